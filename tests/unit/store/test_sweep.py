"""Retention and sweep: only what no checkpoint needs goes, after its grace, and only by the run's owner."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import rl_ckpt
from rl_ckpt import Checkpointer, EveryNSteps, FencedError, LatestN, StorageError
from rl_ckpt.format import records
from rl_ckpt.format.records import EpochRecord, PinRecord
from rl_ckpt.store import sweep as sweep_module
from rl_ckpt.store.base import Store
from rl_ckpt.store.committer import Committer
from rl_ckpt.store.run import Run
from rl_ckpt.store.urls import open_store
from tests.unit.store.faulty import faulty, once
from tests.unit.trees import assert_same

_names = itertools.count()


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"memory://sweep_{next(_names)}"


@pytest.fixture
def store(url: str) -> Store:
    return open_store(url)


def state(step: int) -> dict[str, Any]:
    return {"w": np.random.default_rng(step).random(50), "step": step}


def names(store: Store, prefix: str) -> set[str]:
    return {item.name for item in store.list(prefix)}


def save_all(url: str, steps: range, **options: Any) -> None:
    with Checkpointer(url, **options) as ckpt:
        for step in steps:
            ckpt.save_state(step, state(step)).result(60)


def steps_of(url: str) -> list[int]:
    return [info.step for info in Checkpointer(url).checkpoints()]


def assert_no_orphans(url: str, store: Store) -> None:
    run = Run.open(url)
    live = [run.manifest(commit) for commit in run.log.read().commits]
    assert names(store, records.SHARDS) == {f.name for m in live for f in m.files}
    assert names(store, records.MANIFESTS) == {records.manifest_name(m.id) for m in live}


def test_rules_say_what_stays_and_all_of_it_loads(url: str, store: Store) -> None:
    save_all(url, range(8), keep=[LatestN(2), EveryNSteps(4)], grace_s=0)
    assert steps_of(url) == [0, 4, 6, 7]
    for step in steps_of(url):
        assert_same(Checkpointer(url).load_state(step), state(step))
    assert_no_orphans(url, store)


def test_tagged_checkpoints_stay(url: str) -> None:
    with Checkpointer(url, keep=[LatestN(1)], grace_s=0) as ckpt:
        for step in range(4):
            ckpt.save_state(step, state(step), tag="best" if step == 1 else None).result(60)
    assert steps_of(url) == [1, 3]
    assert_same(Checkpointer(url).load_state(1), state(1))


def test_a_pinned_checkpoint_stays_until_it_is_let_go(url: str, store: Store) -> None:
    save_all(url, range(2), grace_s=0)
    with Checkpointer(url).pin(0) as info:
        assert info.step == 0
        save_all(url, range(2, 4), keep=[LatestN(1)], grace_s=0)
        assert steps_of(url) == [0, 3]
        assert_same(Checkpointer(url).load_state(0), state(0))
    assert names(store, records.PINS) == set()
    save_all(url, range(4, 5), keep=[LatestN(1)], grace_s=0)
    assert steps_of(url) == [4]
    assert_no_orphans(url, store)


def test_a_pin_holds_the_files_of_what_a_writer_before_had_dropped(
    url: str, store: Store, clock: Callable[[float], None]
) -> None:
    frozen = {"frozen": np.random.default_rng(0).random(1000)}
    with Checkpointer(url, grace_s=100) as ckpt:
        for step in range(2):
            ckpt.save_state(step, state(step) | frozen).result(60)
    run = Run.open(url)
    first, second = run.log.read().commits
    files = {name for c in (first, second) for name in (f.name for f in run.manifest(c).files)}
    held = {*(f.name for f in run.manifest(second).files), records.manifest_name(second.id)}
    pin = PinRecord(checkpoint=second.id, by="x", expires=time.time() + 1000)
    store.create(records.pin_name("one"), records.encode(pin))
    # A committer that is gone by now was deleting both as the pin came.
    store.delete([records.commit_name(first.number), records.commit_name(second.number)])
    with Checkpointer(url, grace_s=100) as ckpt:
        ckpt.save_state(5, state(5)).result(60)
        ckpt._saver._writer.submit(int).result(60)  # type: ignore[union-attr]
        clock(200)
        ckpt.save_state(6, state(6)).result(60)
    left = names(store, records.SHARDS) | names(store, records.MANIFESTS)
    assert held <= left
    assert records.manifest_name(first.id) not in left
    assert not (files - held) & left


def test_pins_that_expired_or_are_damaged_hold_nothing(url: str, store: Store) -> None:
    save_all(url, range(1), grace_s=0)
    held = Checkpointer(url).latest()
    assert held is not None
    expired = PinRecord(checkpoint=held.id, by="x", expires=time.time() - 1)
    store.create(records.pin_name("expired"), records.encode(expired))
    store.create(records.pin_name("damaged"), b"garbage")
    save_all(url, range(1, 2), keep=[LatestN(1)], grace_s=0)
    assert steps_of(url) == [1]
    assert names(store, records.PINS) == set()


def test_files_that_a_later_checkpoint_shares_survive(url: str, store: Store) -> None:
    frozen = np.random.default_rng(0).random(1000)
    with Checkpointer(url, keep=[LatestN(1)], grace_s=0) as ckpt:
        for step in range(4):
            last = ckpt.save_state(step, {"frozen": frozen, "step": np.full(3, step)}).result(60)
    assert steps_of(url) == [3]
    assert last.bytes_written < frozen.nbytes  # it leans on the first one's file,
    files = names(store, records.SHARDS)
    assert any(name.startswith("shards/0-") for name in files)  # which is still there
    assert not any(name.startswith(("shards/1-", "shards/2-")) for name in files)
    assert_same(Checkpointer(url).load_state(), {"frozen": frozen, "step": np.full(3, 3)})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [1000.0]

    def forward(seconds: float) -> None:
        now[0] += seconds

    fake = SimpleNamespace(monotonic=lambda: now[0], time=time.time)
    monkeypatch.setattr(sweep_module, "time", fake)
    return forward


def test_files_stay_for_the_grace_time(url: str, store: Store, clock: Callable[[float], None]) -> None:
    with Checkpointer(url, keep=[LatestN(1)], grace_s=100) as ckpt:

        def saved(step: int) -> set[str]:
            ckpt.save_state(step, state(step)).result(60)
            ckpt._saver._writer.submit(int).result(60)  # type: ignore[union-attr]  # the sweep behind the save is done
            return {name.split("/")[1].split("-")[0] for name in names(store, records.SHARDS)}

        saved(0)
        assert saved(1) == {"0", "1"}
        clock(60)
        assert saved(2) == {"0", "1", "2"}
        clock(60)
        assert saved(3) == {"1", "2", "3"}  # 120 s after its commit record went; those of 1 went 60 s ago
        clock(1000)
        assert saved(4) == {"3", "4"}
    assert steps_of(url) == [4]


def test_what_a_killed_writer_left_is_swept(url: str, store: Store) -> None:
    save_all(url, range(1), grace_s=0)
    store.put("shards/1-killed/local-0.arrow", [b"half"])
    store.put("manifests/1-killed.json", [b"{}"])
    save_all(url, range(2, 3), grace_s=0)
    assert_no_orphans(url, store)
    assert steps_of(url) == [0, 2]


def test_epoch_records_are_never_deleted(url: str, store: Store) -> None:
    for step in range(5):
        save_all(url, range(step, step + 1), keep=[LatestN(1)], grace_s=0)
    run = Run.open(url)
    numbers = [n for name in sorted(names(store, records.COMMITS)) if (n := records.commit_number(name))]
    kept = [run.log._read_one(records.commit_name(n)) for n in numbers]
    assert [r.epoch for r in kept if isinstance(r, EpochRecord)] == [1, 2, 3, 4, 5]
    assert len(kept) == 6


def test_a_zombie_that_wakes_up_after_many_sweeps_is_fenced_and_harms_nothing(url: str, store: Store) -> None:
    zombie = Checkpointer(url, keep=[LatestN(1)], grace_s=0)
    zombie.save_state(0, state(0)).result(60)
    for step in range(1, 6):
        save_all(url, range(step, step + 1), keep=[LatestN(2)], grace_s=0)
    before = names(store, "")
    for step in (6, 7):
        with pytest.raises(FencedError, match=r"taken over by rl-ckpt .* process \d+ \(epoch 2, "):
            zombie.save_state(step, state(step)).result(60)
    zombie.close()
    assert names(store, records.COMMITS) == {name for name in before if name.startswith(records.COMMITS)}
    assert before <= names(store, "")  # nothing was swept; what it wrote itself are orphans
    assert steps_of(url) == [4, 5]
    for step in (4, 5):
        assert_same(Checkpointer(url).load_state(step), state(step))
    save_all(url, range(8, 9), keep=[LatestN(2)], grace_s=0)
    assert_no_orphans(url, store)


def test_a_sweep_that_is_overtaken_leaves_the_new_owners_files(url: str, store: Store, monkeypatch: Any) -> None:
    """A new coordinator claims the run and writes while the old one, its commit done, lists the files to sweep."""
    save_all(url, range(1), grace_s=0)

    def new_owner(*_: str) -> None:
        Run(store, Run.open(url).record).log.claim("new owner")
        store.put("shards/9-new/local-0.arrow", [b"being written"])

    with faulty(monkeypatch, url) as watched, Checkpointer(url, keep=[LatestN(1)], grace_s=0) as ckpt:
        watched.before = once(new_owner, "list", prefix=records.MANIFESTS)
        ckpt.save_state(1, state(1)).result(60)
    assert "shards/9-new/local-0.arrow" in names(store, records.SHARDS)
    assert steps_of(url) == [0, 1]


def test_a_sweep_that_was_stopped_half_way_leaves_the_files_to_the_new_owner(
    url: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it was stopped: the new owner's saves may name files of what both took for live."""
    save_all(url, range(3), grace_s=0)
    before = Committer(Run.open(url), (LatestN(1),), 0.0)
    files, after = names(store, records.SHARDS), list[Committer]()
    held = before.sweeper._held

    def meanwhile(due: set[str]) -> set[str]:
        after.append(Committer(Run.open(url), (), 0.0, take_over=True))
        return held(due)

    monkeypatch.setattr(before.sweeper, "_held", meanwhile)
    before.tidy()
    assert names(store, records.SHARDS) == files
    for committer in (before, *after):
        committer.close()
    save_all(url, range(3, 4), grace_s=0)
    assert_no_orphans(url, store)


def test_files_of_a_commit_whose_outcome_is_unknown_are_not_swept(url: str, store: Store, monkeypatch: Any) -> None:
    def lose(operation: str, name: str) -> None:
        raise StorageError("connection lost")

    with faulty(monkeypatch, url) as watched, Checkpointer(url, grace_s=0) as ckpt:
        ckpt.save_state(0, state(0)).result(60)
        watched.after = once(lose, "create", prefix=records.COMMITS)
        watched.before = once(lose, "get", prefix=records.COMMITS)
        with pytest.raises(rl_ckpt.CommitUnknownError):
            ckpt.save_state(1, state(1)).result(60)
        assert_same(ckpt.load_state(), state(1))  # it had landed
        for step in (2, 3):
            ckpt.save_state(step, state(step)).result(60)
    assert steps_of(url) == [0, 1, 2, 3]
    for step in range(4):
        assert_same(Checkpointer(url).load_state(step), state(step))
    assert_no_orphans(url, store)


def test_files_of_a_commit_that_may_yet_arrive_are_not_swept(url: str, store: Store, monkeypatch: Any) -> None:
    """The request timed out on its way; it lands after the save has failed and the sweep behind it has run."""
    on_its_way: list[tuple[str, bytes]] = []

    def delay(name: str, data: bytes) -> None:
        on_its_way.append((name, data))
        raise StorageError("timed out")

    with faulty(monkeypatch, url) as watched, Checkpointer(url, grace_s=0) as ckpt:
        ckpt.save_state(0, state(0)).result(60)
        with monkeypatch.context() as slow:
            slow.setattr(watched.inner, "create", delay)
            with pytest.raises(StorageError, match="timed out"):
                ckpt.save_state(1, state(1)).result(60)
            for step in (2, 3):  # these fail too, and sweep
                with pytest.raises(StorageError, match="timed out"):
                    ckpt.save_state(step, state(step)).result(60)
            ckpt._saver._writer.submit(int).result(60)  # type: ignore[union-attr]
        store.create(*on_its_way[0])
        assert_same(ckpt.load_state(), state(1))
        ckpt.save_state(4, state(4)).result(60)
    assert steps_of(url) == [0, 1, 4]
    assert_same(Checkpointer(url).load_state(1), state(1))
    assert_no_orphans(url, store)


def test_a_sweep_that_fails_is_told_at_the_next_save_and_made_up_for(url: str, store: Store, monkeypatch: Any) -> None:
    def lose(operation: str, name: str) -> None:
        raise StorageError("no answer")

    with faulty(monkeypatch, url) as watched, Checkpointer(url, keep=[LatestN(1)], grace_s=0) as ckpt:
        ckpt.save_state(0, state(0)).result(60)
        watched.before = once(lose, "delete")
        ckpt.save_state(1, state(1)).result(60)
        ckpt._saver._writer.submit(int).result(60)  # type: ignore[union-attr]  # the sweep behind the save is done
        with pytest.warns(UserWarning, match="could not be swept: no answer"):
            ckpt.save_state(2, state(2)).result(60)
    assert steps_of(url) == [2]
    assert_no_orphans(url, store)
