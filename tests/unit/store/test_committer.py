"""The committer's own book-keeping: attempts that overlap, and attempts that are given up while the store is asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.plan.deal import Stored, deal, settle
from rl_ckpt.plan.inventory import take_inventory
from rl_ckpt.plan.merge import merge
from rl_ckpt.plan.stage import stage
from rl_ckpt.state.tree import flatten
from rl_ckpt.store.committer import Committer, SaveRequest, WrittenSave
from rl_ckpt.store.run import Run
from rl_ckpt.store.shard_writer import write_files


@pytest.fixture
def committer(tmp_path: Path) -> Committer:
    return Committer(Run.create(str(tmp_path / "run")), (), 0.0)


def commit(committer: Committer, step: int, checkpoint: str) -> None:
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


def test_files_of_an_attempt_that_is_given_up_while_the_store_is_asked_are_swept(
    committer: Committer, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(committer, 1, committer.attempt(SaveRequest(1)))
    given_up, look = committer.attempt(SaveRequest(2)), committer._stored_for
    orphan = f"shards/{given_up}/s-0.arrow"
    committer.run.store.put(orphan, [b"x"])

    def slowly(parent: str | None) -> Stored:
        found = look(parent)
        committer.abandon(given_up)  # the save failed meanwhile
        return found

    monkeypatch.setattr(committer, "_stored_for", slowly)
    committer.stored(given_up)
    committer.tidy()
    assert not committer.run.store.exists(orphan)
    assert len(list(committer.run.store.list("shards/"))) == 1
