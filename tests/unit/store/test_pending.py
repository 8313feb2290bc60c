"""What the next save of a job continues, as its face remembers it."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from rl_ckpt.errors import StorageError
from rl_ckpt.info import CheckpointInfo
from rl_ckpt.store.pending import Branch, PendingSave


def info(checkpoint: str, in_store: bool) -> CheckpointInfo:
    return CheckpointInfo(
        id=checkpoint, step=2, time=0.0, metrics={}, tag=None, url="", bytes=0, bytes_written=0, world_size=1,
        lineage=(), stall_s=0.0, durable_s=0.0, in_store=in_store,
    )  # fmt: skip


@pytest.fixture
def branch() -> Branch:
    made = Branch()
    made.restored("old")
    return made


def under_way(branch: Branch, checkpoint: str) -> Future[CheckpointInfo]:
    future: Future[CheckpointInfo] = Future()
    branch.saved(PendingSave(2, checkpoint, future))
    return future


def test_nothing_is_named_before_a_restore() -> None:
    branch = Branch()
    under_way(branch, "a")
    assert branch.parent() == (None, ())


def test_a_restored_checkpoint_is_named_until_a_save_of_it_is_in_the_store(branch: Branch) -> None:
    assert branch.parent() == ("old", ())
    failing, in_memory, stored = (under_way(branch, name) for name in "abc")
    failing.set_exception(StorageError("full"))
    in_memory.set_result(info("b", in_store=False))
    assert branch.parent() == ("old", ("a", "b", "c"))
    stored.set_result(info("c", in_store=True))
    assert branch.parent() == (None, ())


def test_going_back_again_begins_anew(branch: Branch) -> None:
    under_way(branch, "a")
    branch.restored("older")
    assert branch.parent() == ("older", ())


def test_a_look_at_what_came_of_a_save_does_not_count_as_being_told() -> None:
    future: Future[CheckpointInfo] = Future()
    pending = PendingSave(3, "3-a", future)
    assert pending.peek() is None
    error = StorageError("gone")
    future.set_exception(error)
    assert pending.peek() is error
    assert pending.take_failure() is error, "nobody was told yet"
