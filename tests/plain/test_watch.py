"""Following a run: every new checkpoint is pulled as it comes."""

from __future__ import annotations

import math
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import rl_ckpt
from rl_ckpt import (
    Catalog,
    Checkpointer,
    CheckpointError,
    InvalidInputError,
    KeepRule,
    LatestN,
    PullReport,
    RunOwnedError,
    StorageError,
    SweepReport,
    watch,
)
from rl_ckpt.store.committer import Committer
from rl_ckpt.store.run import Run
from tests.plain.pulls import assert_mirror, saved, state
from tests.unit.trees import assert_same


@pytest.fixture
def src(tmp_path: Path) -> str:
    return saved(str(tmp_path / "src"))


@pytest.fixture(params=["local", "memory"])
def dst(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "dst") if request.param == "local" else f"memory://pulled_{uuid.uuid4().hex}"


def test_watch_brings_every_new_one(src: str, dst: str) -> None:
    following = watch(src, dst, poll_s=0)
    assert next(following).checkpoints == (Catalog(src).find().id,)
    saved(src, range(4, 7))
    assert [next(following).checkpoints for _ in range(3)] == [(Catalog(src).find(step).id,) for step in (4, 5, 6)]
    assert [info.step for info in Catalog(dst).checkpoints()] == [3, 4, 5, 6]
    assert_mirror(src, dst, 6)


def test_watch_waits_for_the_run_and_ends_when_told(tmp_path: Path, dst: str) -> None:
    src, until = str(tmp_path / "src"), threading.Event()
    reports: list[PullReport] = []
    arrived = threading.Event()

    def follow() -> None:
        for report in watch(src, dst, poll_s=0.01, until=until):
            reports.append(report)
            arrived.set()

    thread = threading.Thread(target=follow)
    thread.start()
    saved(src, range(1, 2))
    assert arrived.wait(30)
    until.set()
    thread.join(30)
    assert not thread.is_alive()
    assert [report.checkpoints for report in reports] == [(Catalog(src).find().id,)]


def test_watch_outlasts_a_store_that_fails_for_a_while(src: str, dst: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find, failures = rl_ckpt.transfer.survey, [StorageError("503"), StorageError("503")]

    def fail(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return find(*args)

    monkeypatch.setattr("rl_ckpt.transfer.survey", fail)
    assert next(watch(src, dst, poll_s=0)).checkpoints
    failures.append(StorageError("503"))
    saved(src, range(4, 5))
    with pytest.raises(StorageError, match="503"):
        next(watch(src, dst, poll_s=0, patience_s=0))


def test_watch_keeps_what_it_is_told_to(src: str, dst: str) -> None:
    following = watch(src, dst, poll_s=0, keep=[LatestN(2)])
    next(following)
    for step in range(4, 9):
        saved(src, range(step, step + 1))
        next(following)
    assert [info.step for info in Catalog(dst).checkpoints()] == [7, 8]
    assert_mirror_but_for_sweeps(src, dst, 8)


def assert_mirror_but_for_sweeps(src: str, dst: str, step: int) -> None:
    """A sweep leaves an epoch record behind, at most one after the last pull, and what its grace still keeps."""
    assert_same(Checkpointer(dst).load_state(step), state(step))
    assert Checkpointer(dst).verify().ok
    mine, theirs = Run.open(src).log.read(), Run.open(dst).log.read()
    assert len([epoch for epoch in theirs.epochs if epoch not in mine.epochs]) <= 1


@pytest.mark.parametrize("error", [StorageError("503"), RunOwnedError("another sweep")], ids=lambda e: e.code)
def test_a_sweep_that_fails_is_said_and_made_up_for(
    src: str, dst: str, monkeypatch: pytest.MonkeyPatch, error: CheckpointError
) -> None:
    sweep, errors = Catalog.sweep, [error]

    def fail(self: Catalog, keep: Sequence[KeepRule]) -> SweepReport:
        if errors:
            raise errors.pop()
        return sweep(self, keep)

    monkeypatch.setattr(Catalog, "sweep", fail)
    following = watch(src, dst, poll_s=0, keep=[LatestN(1)])
    first = next(following)
    assert (len(first.checkpoints), len(first.notices)) == (1, 1)
    assert str(error) in first.notices[0]
    saved(src, range(4, 5))
    assert next(following).notices == ()
    assert [info.step for info in Catalog(dst).checkpoints()] == [4]


def test_watch_outlasts_a_sweep_of_the_mirror_by_somebody_else(src: str, dst: str) -> None:
    following = watch(src, dst, poll_s=0)
    next(following)
    saved(src, range(4, 5))
    sweeper = Committer(Run.open(dst), [], 0.0)
    threading.Timer(0.2, sweeper.close).start()
    assert next(following).checkpoints == (Catalog(src).find(4).id,)


@pytest.mark.parametrize(
    "options",
    [{"poll_s": -1}, {"poll_s": math.inf}, {"patience_s": "long"}, {"streams": 0}, {"keep": [LatestN]}],
    ids=str,
)
def test_watch_says_at_once_what_it_can_not_take(src: str, dst: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        watch(src, dst, **options)
