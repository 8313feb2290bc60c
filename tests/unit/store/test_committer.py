"""The committer's own book-keeping: attempts that overlap, and attempts that are given up while the store is asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from rl_ckpt import fork
from rl_ckpt.errors import CheckpointNotFoundError, InvalidInputError, StorageError
from rl_ckpt.format import records
from rl_ckpt.format.manifest import Manifest
from rl_ckpt.plan.chunk_index import KnownChunks
from rl_ckpt.plan.deal import deal, settle
from rl_ckpt.plan.inventory import take_inventory
from rl_ckpt.plan.merge import merge
from rl_ckpt.plan.retention import LatestN
from rl_ckpt.plan.stage import stage
from rl_ckpt.state.tree import flatten
from rl_ckpt.store.committer import Committer, SaveRequest, WrittenSave
from rl_ckpt.store.pins import pin
from rl_ckpt.store.run import Run
from rl_ckpt.store.shard_writer import write_files


@pytest.fixture
def committer(tmp_path: Path) -> Committer:
    return Committer(Run.create(str(tmp_path / "run")), (), 0.0)


def commit(committer: Committer, step: int, checkpoint: str | None = None) -> None:
    checkpoint = checkpoint or committer.attempt(SaveRequest(step))
    flat = flatten({"w": np.full(10, step)})
    plan = deal(merge([take_inventory(flat, 1 << 20, 1)], 1 << 20), ["s"], 1, 1 << 20)
    memory = memoryview(bytearray(plan.staged_bytes["s"]))
    found = stage(flat, plan.stage[0], memory)
    digests = {("s", item.offset): digest for item, digest in zip(plan.stage[0], found, strict=True)}
    plan = settle(plan, checkpoint, digests, committer.stored(checkpoint))
    written = write_files(committer.run.store, plan.files["s"], memory, 1)
    committer.commit(WrittenSave(checkpoint, SaveRequest(step), plan, {"s": written}, digests))


def test_a_step_is_taken_by_an_attempt_that_overlaps_too(committer: Committer) -> None:
    first, second = committer.attempt(SaveRequest(1)), committer.attempt(SaveRequest(2))
    with pytest.raises(InvalidInputError, match="being saved"):
        committer.attempt(SaveRequest(1))
    commit(committer, 1, first)
    with pytest.raises(InvalidInputError, match="committed already"):
        committer.attempt(SaveRequest(1))
    commit(committer, 2, second)
    assert [record.step for record in committer.commits] == [1, 2]


def test_steps_of_a_branch_are_taken_while_its_saves_are_under_way(committer: Committer) -> None:
    commit(committer, 5)
    commit(committer, 6)
    old = committer.commits[0].id
    first = committer.attempt(SaveRequest(6, parent=old))
    with pytest.raises(InvalidInputError, match="committed already"):
        committer.attempt(SaveRequest(5, parent=old, since=(first,)))
    with pytest.raises(InvalidInputError, match="being saved"):
        committer.attempt(SaveRequest(6, parent=old, since=(first,)))
    committer.attempt(SaveRequest(6, parent=old))  # another branch, of a job that went back once more


def test_files_of_an_attempt_that_is_given_up_while_the_store_is_asked_are_swept(
    committer: Committer, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(committer, 1, committer.attempt(SaveRequest(1)))
    given_up, look = committer.attempt(SaveRequest(2)), committer._reuse.find
    orphan = f"shards/{given_up}/s-0.arrow"
    committer.run.store.put(orphan, [b"x"])

    def slowly(*args: Any, **rest: Any) -> KnownChunks:
        found = look(*args, **rest)
        committer.abandon(given_up)  # the save failed meanwhile
        return found

    monkeypatch.setattr(committer._reuse, "find", slowly)
    committer.stored(given_up)
    committer.tidy()
    assert not committer.run.store.exists(orphan)
    assert len(list(committer.run.store.list("shards/"))) == 1


def test_nothing_leans_on_a_checkpoint_whose_deletes_were_sent(
    committer: Committer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep failed in the middle: what it asked for may still be done later."""
    store = committer.run.store
    sent: list[str] = []
    committer.configure([LatestN(1)], 0.0)
    commit(committer, 1)
    old = committer.commits[0]
    committer.tidy()
    commit(committer, 2)
    delete = store.delete

    def fail(names: Sequence[str]) -> None:
        sent.extend(names)
        if any(name.startswith("shards/") for name in names):
            raise StorageError("timed out")
        delete([name for name in names if name.startswith("commits/")])

    with monkeypatch.context() as patch:
        patch.setattr(store, "delete", fail)
        with pytest.raises(StorageError, match="timed out"):
            committer.tidy()
    assert records.commit_name(old.number) in sent
    attempt = committer.attempt(SaveRequest(3, parent=old.id))
    assert old.id not in {name.split("/")[1] for name in committer.stored(attempt).names}
    committer.abandon(attempt)
    committer.tidy()
    assert {item.name.split("/")[1][0] for item in store.list("shards/")} == {"2"}


def test_a_pin_that_comes_while_its_checkpoint_is_dropped_is_told_or_holds_the_files(
    committer: Committer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = committer.run, committer.run.store
    committer.configure([LatestN(1)], 0.0)
    commit(committer, 1)
    old = committer.commits[0]
    commit(committer, 2)
    held, delete = pin(run, old.id, 100.0), store.delete

    def pinned_first(names: Sequence[str]) -> None:
        if records.commit_name(old.number) in names:
            held.__enter__()
        delete(names)

    with monkeypatch.context() as patch:
        patch.setattr(store, "delete", pinned_first)
        committer.tidy()
    assert [record.step for record in committer.commits] == [2]
    assert any(item.name.startswith("shards/1-") for item in store.list("shards/"))
    with pytest.raises(CheckpointNotFoundError, match="was dropped"), pin(run, old.id, 100.0):
        pass
    held.__exit__(None, None, None)
    committer.tidy()
    assert not any(item.name.startswith("shards/1-") for item in store.list("shards/"))
    assert not store.list("pins/")


def land(committer: Committer, checkpoint: str, request: SaveRequest) -> Manifest:
    """A save that stays in memory; its manifest."""
    plan = deal(merge([take_inventory(flatten({"n": 1}), 1 << 20, 1)], 1 << 20), ["s"], 1, 1 << 20)
    _, data = committer.land(WrittenSave(checkpoint, request, plan, {}, {}))
    return msgspec.json.decode(data, type=Manifest)


def test_what_a_save_continues_does_not_change_when_another_branch_begins_meanwhile(committer: Committer) -> None:
    commit(committer, 1)
    commit(committer, 2)
    first, second = (record.id for record in committer.commits)
    request = SaveRequest(3, parent=second)
    in_memory = committer.attempt(request)
    land(committer, in_memory, request)
    commit(committer, 4, committer.attempt(SaveRequest(4, parent=first)))  # which cuts what only memory has
    going_on = SaveRequest(5, parent=in_memory)
    after_it = SaveRequest(7, parent=first, since=(in_memory,))
    third, fourth = committer.attempt(going_on), committer.attempt(after_it)
    committer.attempt(SaveRequest(6, parent=first))
    assert land(committer, third, going_on).parent == second
    assert land(committer, fourth, after_it).parent == second


def test_only_what_it_named_is_open(committer: Committer) -> None:
    request = SaveRequest(1)
    checkpoint = committer.attempt(request)
    assert committer.is_open(checkpoint)
    assert not committer.is_open("1-other")
    land(committer, checkpoint, request)
    assert not committer.is_open(checkpoint)


@pytest.mark.parametrize("ends", ["abandoned", "committed"])
def test_a_save_under_way_that_leans_on_a_base_keeps_the_pin_there(
    committer: Committer, tmp_path: Path, ends: str
) -> None:
    commit(committer, 1)
    committer.close()
    fork(str(tmp_path / "run"), str(tmp_path / "fork"))
    forked = Committer(Run.open(str(tmp_path / "fork")), [LatestN(1)], 0.0)
    slow = forked.attempt(SaveRequest(2))
    assert [name.split("/")[0] for name in forked.stored(slow).names] == ["base"]
    commit(forked, 3)
    forked.tidy()
    assert [record.step for record in forked.commits] == [3]
    assert list((tmp_path / "run/pins").iterdir()) != []
    if ends == "abandoned":
        forked.abandon(slow)
    else:  # without what it might have named; nothing else goes
        forked.configure((), 0.0)
        forked.sweeper._clean_at = math.inf
        commit(forked, 2, slow)
    forked.tidy()
    assert not (tmp_path / "run/pins").exists()
    forked.close()
