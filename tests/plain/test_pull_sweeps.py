"""Pulls beside sweeps: those of the source, and the destination's own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_ckpt import Catalog, Checkpointer, CommitConflictError, LatestN, Progress, RunOwnedError, pull
from rl_ckpt.format import records
from rl_ckpt.store.run import Run
from rl_ckpt.store.urls import open_store
from tests.plain.pulls import killed, saved, state
from tests.unit.trees import assert_same


@pytest.fixture
def src(tmp_path: Path) -> str:
    return saved(str(tmp_path / "src"))


@pytest.fixture
def dst(tmp_path: Path) -> str:
    return str(tmp_path / "dst")


def at(phase: str, do: Callable[[], object]) -> Callable[[Progress], None]:
    """Does something once, when a pull comes to a phase."""
    left = [do]

    def tell(progress: Progress) -> None:
        if progress.phase == phase and left:
            left.pop()()

    return tell


def assert_good(url: str, *steps: int) -> None:
    ckpt = Checkpointer(url)
    assert [info.step for info in ckpt.checkpoints()] == list(steps)
    for step in steps:
        assert_same(ckpt.load_state(step), state(step))
    assert ckpt.verify().ok


@pytest.mark.parametrize("phase", ["checking", "copying", "committing"])
def test_the_source_is_swept_meanwhile(src: str, dst: str, phase: str) -> None:
    """The rules would drop what is being pulled; it goes with the first sweep after the pull."""
    swept = at(phase, lambda: Catalog(src).sweep([LatestN(1)], grace_s=0))
    if phase == "checking":  # it is not held yet
        with pytest.raises(Exception, match=r"dropped.*Nothing was written"):
            pull(src, dst, at=1, progress=swept)
        assert open_store(dst).list() == []
        return
    pull(src, dst, at=1, progress=swept)
    assert_good(dst, 1)
    assert [info.step for info in Catalog(src).checkpoints()] == [1, 3]
    Catalog(src).sweep([LatestN(1)], grace_s=0)
    assert [info.step for info in Catalog(src).checkpoints()] == [3]
    assert_good(dst, 1)


@pytest.mark.parametrize("phase", ["copying", "committing", "done"])
def test_the_destination_is_swept_meanwhile(src: str, dst: str, phase: str) -> None:
    pull(src, dst, at=1)
    pull(src, dst, at=3, progress=at(phase, lambda: Catalog(dst).sweep([LatestN(5)], grace_s=0)))
    assert_good(dst, 1, 3)
    pull(src, dst, at="all")
    assert_good(dst, 1, 2, 3)


def test_what_a_killed_pull_left_is_held_for_the_next_one(src: str, dst: str) -> None:
    pull(src, dst, at=1)
    before = {item.name for item in open_store(dst).list()}
    killed(src, dst, phase="committing")
    brought = {item.name for item in open_store(dst).list(records.SHARDS)} - before
    assert brought
    Catalog(dst).sweep(grace_s=0)
    assert brought <= {item.name for item in open_store(dst).list(records.SHARDS)}
    report = pull(src, dst)
    assert (report.files, report.bytes_moved) == (0, 0)
    assert_good(dst, 1, 3)


def test_what_a_killed_pull_left_is_swept_in_the_end(src: str, dst: str) -> None:
    pull(src, dst, at=1)
    store = open_store(dst)
    before = {item.name for item in store.list()}
    killed(src, dst, phase="committing")
    (pin,) = store.list(records.PINS)
    record = records.decode(pin.name, store.get(pin.name), records.PinRecord)
    past = records.PinRecord(checkpoint=record.checkpoint, by=record.by, expires=time.time() - 1, seconds=1e-9)
    store.put(pin.name, [records.encode(past)])
    old = time.time() - 3600
    os.utime(store.local_path(pin.name) or "", (old, old))
    Catalog(dst).sweep(grace_s=0)
    left = {item.name for item in store.list()}
    assert {name for name in left if not name.startswith(records.COMMITS)} == {
        name for name in before if not name.startswith(records.COMMITS)
    }
    pull(src, dst)
    assert_good(dst, 1, 3)


def test_leftovers_that_another_pull_takes_up_are_no_orphans_any_more(src: str, dst: str) -> None:
    """A file of an older checkpoint, left by a pull that was killed, is waited for by the pull of a newer one."""
    shared = {"frozen": np.arange(50_000)}
    with Checkpointer(src) as ckpt:
        ckpt.load_state()
        for step in (4, 5):
            ckpt.save_state(step, shared | {"step": step}).result(60)
    manifest = Run.open(src).manifest(Run.open(src).log.read().commits[-1])
    (older,) = {file.name for file in manifest.files if manifest.id not in file.name}
    store = open_store(dst)
    pull(src, dst, at=1)
    store.put(older, [open_store(src).get(older)])  # an orphan, and nobody's pin tells of the one that wrote it
    # As a sweep found it an hour ago: its grace is over, that of the manifest which names it has only begun.
    waiting = records.WaitingRecord(waiting={older: time.time() - 3600})
    store.put(records.WAITING_FILE, [records.encode(waiting)])

    def sweep() -> None:
        Catalog(dst).sweep(grace_s=600)
        assert store.exists(older)

    report = pull(src, dst, progress=at("committing", sweep))
    assert report.bytes_kept > 0
    loaded = Checkpointer(dst).load_state()
    assert_same(loaded, shared | {"step": 5})


def test_a_sweep_that_began_before_the_commit_deletes_nothing_of_it(
    src: str, dst: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows nothing of the checkpoint, and the pin is gone when it looks for pins the last time."""
    from rl_ckpt.store.sweep import Sweeper

    pull(src, dst, at=1)
    find, pulled = Sweeper._find_orphans, list[object]()

    def late(self: Sweeper, live: Any) -> list[str]:
        if not pulled:
            pulled.append(1)
            store = open_store(dst)
            for item in open_store(src).list(records.SHARDS):
                if Catalog(src).find(2).id in item.name:  # what a killed pull had left
                    store.put(item.name, [open_store(src).get(item.name)])
            found = find(self, live)
            with monkeypatch.context() as patch:  # that the sweep owns the run is seen first, mostly; not so in a race
                patch.setattr("rl_ckpt.store.mirror.Mirror._alive", lambda *_: None)
                pulled.append(pull(src, dst, at=2))
            return found
        return find(self, live)

    monkeypatch.setattr(Sweeper, "_find_orphans", late)
    open_store(dst).put("shards/1-dead/x-0.arrow", [b"an orphan"])
    report = Catalog(dst).sweep(grace_s=0)
    assert (len(pulled), report.files) == (2, 1)
    assert_good(dst, 1, 2)


def test_a_job_that_begins_to_save_there_ends_the_pull(src: str, dst: str) -> None:
    pull(src, dst, at=1)
    jobs: list[Checkpointer] = []

    def begin() -> None:
        job = Checkpointer(dst)
        jobs.append(job)
        job.load_state()
        job.save_state(2, state(2)).result(60)

    with pytest.raises((RunOwnedError, CommitConflictError)):
        pull(src, dst, progress=at("copying", begin))
    jobs[0].save_state(3, state(3)).result(60)
    jobs[0].close()
    assert_good(dst, 1, 2, 3)


def test_a_destination_that_a_job_owns_is_refused_until_it_ends(src: str, dst: str) -> None:
    pull(src, dst, at=1)
    job = Checkpointer(dst)
    run = Run.open(dst)
    from rl_ckpt.store.committer import Committer

    owner = Committer(run, (), 300.0)
    before = {item.name for item in open_store(dst).list()}
    with pytest.raises(RunOwnedError, match=r"job that is alive owns it, rl-ckpt .*Stop that job"):
        pull(src, dst)
    assert {item.name for item in open_store(dst).list()} == before
    owner.close()
    pull(src, dst)
    job.close()
    assert_good(dst, 1, 3)
