"""What a save may lean on: which checkpoints, which files, and how much is read to know it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rl_ckpt import Checkpointer, LatestN
from rl_ckpt.errors import StorageError
from rl_ckpt.format import records
from rl_ckpt.format.records import CommitRecord
from rl_ckpt.plan.deal import SavePlan, deal
from rl_ckpt.plan.inventory import take_inventory
from rl_ckpt.plan.merge import merge
from rl_ckpt.state.tree import flatten
from rl_ckpt.store import reuse as reuse_module
from rl_ckpt.store.commit_log import LATEST_S
from rl_ckpt.store.committer import Committer, SaveRequest, WrittenSave
from rl_ckpt.store.reuse import line
from rl_ckpt.store.run import Run

SIZE = 1 << 18


def part(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 255, SIZE, np.uint8)


def state(*seeds: int) -> dict[str, Any]:
    return {f"p{seed}": part(seed) for seed in seeds}


def save(ckpt: Checkpointer, step: int, *seeds: int, deadline_s: float | None = None) -> int:
    """How many of the parts were written."""
    info = ckpt.save_state(step, state(*seeds)).result(60)
    return round(info.bytes_written / SIZE)


def known(committer: Committer, deadline_s: float | None = None, parent: str | None = None) -> set[int]:
    """Steps of the checkpoints whose files a save may name."""
    attempt = committer.attempt(SaveRequest(10**6, parent=parent, deadline_s=deadline_s))
    try:
        return {int(name.split("/")[1].split("-")[0]) for name in committer.stored(attempt).names}
    finally:
        committer.abandon(attempt)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A run of four checkpoints: each holds a part of its own, and the first one's."""
    with Checkpointer(str(tmp_path), grace_s=0) as ckpt:
        for step in range(4):
            assert save(ckpt, step, 0, step) == 1
    return str(tmp_path)


@pytest.fixture
def committer(url: str) -> Iterator[Committer]:
    found = Committer(Run.open(url), (), 0.0)
    yield found
    found.close()


def test_what_any_live_checkpoint_of_the_line_holds_is_not_written(url: str) -> None:
    with Checkpointer(url, keep=[LatestN(3)], grace_s=0) as ckpt:
        assert save(ckpt, 10, 0, 1, 2, 3) == 0
        assert save(ckpt, 11, 4) == 1
        assert save(ckpt, 12, 5) == 1
        assert save(ckpt, 13, 0, 1, 2, 3, 4, 5, 6) == 1
        for seed in range(6):
            assert (ckpt.load_state(13)[f"p{seed}"] == part(seed)).all()


def test_what_only_a_dropped_checkpoint_held_is_written(url: str) -> None:
    with Checkpointer(url, keep=[LatestN(1)], grace_s=3600) as ckpt:
        assert save(ckpt, 10, 9) == 1
        assert ckpt._saver is not None
        ckpt._saver._writer.submit(int).result(60)  # the others went, and their files are there for readers still
        assert len(list(Path(url, "shards").iterdir())) == 5
        assert {name[:10] for name in ckpt._saver._committer._reuse._index.names()} == {"shards/10-"}
        assert save(ckpt, 11, 0, 1, 9) == 2


def test_a_job_that_went_back_does_not_lean_on_what_may_be_damaged(committer: Committer) -> None:
    assert known(committer) == {0, 1, 2, 3}
    assert known(committer, parent=committer.commits[1].id) == {0, 1}


def test_a_branch_does_not_lean_on_what_it_left_behind(url: str) -> None:
    with Checkpointer(url, grace_s=0) as ckpt:
        ckpt.load_state(1)
        assert save(ckpt, 20, 0, 1, 3) == 1
        assert save(ckpt, 21, 0, 3) == 0
        assert save(ckpt, 22, 2) == 1
    with Checkpointer(url, grace_s=0) as ckpt:
        assert save(ckpt, 23, 2, 3, 0) == 0, "of its own line"


def commit(number: int, parent: str | None) -> CommitRecord:
    return CommitRecord(
        number=number, run="r", write_id="", epoch=1, id=f"c{number}", step=number, manifest_bytes=0,
        manifest_digest="", bytes=0, bytes_written=0, time=0.0, parent=parent,
    )  # fmt: skip


def test_a_line_goes_back_as_far_as_there_are_records_and_to_all_before_those() -> None:
    commits = [commit(1, None), commit(2, "c1"), commit(3, "c2"), commit(4, "c2"), commit(5, "c4"), commit(7, "c6")]
    lines = {one.id: line(one, commits) for one in commits}
    assert lines["c5"] == {"c5", "c4", "c2", "c1"}
    assert lines["c3"] == {"c3", "c2", "c1"}
    assert lines["c7"] == {one.id for one in commits}, "c6 was dropped: nobody knows what it continued"
    assert lines["c1"] == {"c1"}


@pytest.mark.parametrize("how", ["gone", "cut short"])
def test_nothing_leans_on_a_file_that_is_damaged(url: str, how: str) -> None:
    (path,) = Path(url).rglob("shards/2-*/*.arrow")
    path.unlink() if how == "gone" else path.write_bytes(path.read_bytes()[:-1])
    with Checkpointer(url, grace_s=0) as ckpt:
        assert save(ckpt, 10, 1, 2, 3) == 1
        assert (ckpt.load_state(10)["p2"] == part(2)).all()


def test_a_damaged_manifest_costs_what_it_alone_names(url: str) -> None:
    (path,) = Path(url).glob("manifests/2-*.json")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with Checkpointer(url, grace_s=0) as ckpt:
        assert save(ckpt, 10, 0, 1, 2, 3) == 1


@pytest.mark.parametrize("lost", ["its record", "its file"])
def test_what_an_earlier_writer_may_be_deleting_is_not_leant_on(
    url: str, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """One that was taken over from, and lives: it may have dropped all but the newest before it learnt that."""
    before = Committer(Run.open(url), (LatestN(1),), 0.0)
    assert before._lease.ended, "the one that has made the run"
    after = Committer(Run.open(url), (), 0.0)
    assert not after._lease.ended
    assert known(after) == {0, 3}, "the newest, and the file of the first that it names"
    store = before.run.store
    names = [records.commit_name(before.commits[2].number)]
    store.delete(names if lost == "its record" else [i.name for i in store.list("shards/") if "/2-" in i.name])
    later = time.monotonic() + LATEST_S
    monkeypatch.setattr(reuse_module, "time", SimpleNamespace(monotonic=lambda: later))
    assert known(after) == {0, 1, 3}, "nothing is on its way any more; 2 is gone"
    before.close()
    after.close()


def test_on_an_object_store_nobody_knows_what_a_writer_that_ended_has_sent(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.open(url)
    monkeypatch.setattr(type(run.store), "local_path", lambda self, name: None)
    committer = Committer(run, (), 0.0)
    assert known(committer) == {0, 3}
    committer.close()


def test_a_hurried_save_reads_one_manifest(committer: Committer) -> None:
    assert known(committer, deadline_s=5.0) == {0, 3}
    assert known(committer) == {0, 1, 2, 3}


def test_few_manifests_are_read_before_the_first_save_and_the_others_after_it(
    committer: Committer, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = sum(commit.manifest_bytes for commit in committer.commits[2:])
    monkeypatch.setattr(reuse_module, "FIRST_BYTES", two)
    reads = committer.run.store.stats.snapshot().reads
    assert known(committer) == {0, 2, 3}
    assert committer.run.store.stats.snapshot().reads == reads + 2
    committer.tidy()
    assert known(committer) == {0, 1, 2, 3}
    assert committer.run.store.stats.snapshot().reads == reads + 4, "and the sweep has read none of them once more"


def test_the_newest_are_known_where_there_are_too_many_chunks(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse_module, "MOST_CHUNKS", 3)
    monkeypatch.setattr(reuse_module, "_READERS", 1)
    with Checkpointer(url, grace_s=0) as ckpt:
        assert save(ckpt, 10, 1, 3) == 1, "of the oldest nothing was read"
        assert save(ckpt, 11, 1, 3, 5) == 1
        assert save(ckpt, 12, 1, 3, 5) == 0
        assert ckpt._saver is not None
        assert ckpt._saver._committer._reuse._index.chunks <= 3


def test_files_that_an_attempt_might_have_named_are_swept_after_it(url: str) -> None:
    committer = Committer(Run.open(url), (), 0.0)
    attempt = committer.attempt(SaveRequest(10))
    committer.stored(attempt)
    committer.configure([LatestN(1)], 0.0)
    committer.tidy()
    assert [record.step for record in committer.commits] == [3]
    assert len(list(Path(url).glob("shards/*"))) == 4, "held for the attempt"
    committer.abandon(attempt)
    committer.tidy()
    assert {path.name.split("-")[0] for path in Path(url).glob("shards/*")} == {"0", "3"}
    committer.close()


def test_what_only_an_attempt_held_goes_after_its_commit(url: str) -> None:
    committer = Committer(Run.open(url), (LatestN(1),), 0.0)
    attempt = committer.attempt(SaveRequest(10))
    committer.stored(attempt)
    committer.tidy()
    assert len(list(Path(url).glob("shards/*"))) == 4
    committer.configure([LatestN(9)], 0.0)  # nothing is dropped any more, which would make the sweep look,
    committer.sweeper._clean_at = math.inf  # nor is it time to do so anyway
    committer.commit(WrittenSave(attempt, SaveRequest(10), _nothing(), {}, {}))
    committer.tidy()
    assert {path.name.split("-")[0] for path in Path(url).glob("shards/*")} == {"0", "3"}
    committer.close()


def _nothing() -> SavePlan:
    return deal(merge([take_inventory(flatten({"n": 1}), 1 << 20, 1)], 1 << 20), ["s"], 1, 1 << 20)


def test_a_store_that_fails_while_it_is_asked_fails_that_save_only(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpointer(url, grace_s=0) as ckpt:

        def fail(run: Run, commit: CommitRecord) -> None:
            raise StorageError("gone for a while")

        with monkeypatch.context() as patch:
            patch.setattr(Run, "manifest", fail)
            with pytest.raises(StorageError, match="for a while"):
                save(ckpt, 10, 0)
            assert ckpt._saver is not None
            ckpt._saver._writer.submit(int).result(60)  # the sweep behind it has failed too
        with pytest.warns(UserWarning, match="for a while"):
            assert save(ckpt, 11, 0, 1, 2, 3) == 0
