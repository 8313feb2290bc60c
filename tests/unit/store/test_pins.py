"""Pins: renewed for as long as their reader lives, whatever a clock says, and gone with it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rl_ckpt import Catalog, Checkpointer, CheckpointNotFoundError, LatestN
from rl_ckpt.format import records
from rl_ckpt.format.records import PinRecord
from rl_ckpt.store import pins as pins_module
from rl_ckpt.store import sweep as sweep_module
from rl_ckpt.store.base import Store
from rl_ckpt.store.pins import Hold, holders, pin, read_pins
from rl_ckpt.store.run import Run
from rl_ckpt.store.sweep import SteadyClock, Sweeper
from rl_ckpt.store.urls import open_store

_names = itertools.count()


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"memory://pins_{next(_names)}"


@pytest.fixture
def store(url: str) -> Store:
    return open_store(url)


def save(url: str, *steps: int, keep: int = 99) -> None:
    with Checkpointer(url, keep=[LatestN(keep)], grace_s=0) as ckpt:
        for step in steps:
            ckpt.save_state(step, {"w": np.full(50, step)}).result(60)


def steps(url: str) -> list[int]:
    return [info.step for info in Catalog(url).checkpoints()]


def until(true: Callable[[], bool]) -> None:
    """Waits for another thread to have done something; the test's time limit ends it."""
    while not true():
        time.sleep(0.005)


def test_a_read_that_lasts_longer_than_its_pin_survives_sweeps(url: str) -> None:
    save(url, 1, 2)
    run = Run.open(url)
    with pin(run, Catalog(url).find(1).id, 0.3) as hold:
        begun = time.monotonic()
        for step in range(3, 6):
            renewals = hold.renewals
            until(lambda renewals=renewals: hold.renewals >= renewals + 5)  # type: ignore[misc]  # longer than it lasts
            save(url, step, keep=1)
            assert steps(url) == [1, step]
        assert time.monotonic() - begun > 0.9
        hold.check()
    save(url, 6, keep=1)
    assert steps(url) == [6]


def test_a_hold_that_was_lost_says_so(url: str, store: Store) -> None:
    save(url, 1, 2)
    hold = Hold(Run.open(url), Catalog(url).find(1).id, 3600)
    hold.check()
    store.delete([hold.name])  # a sweep did, long after it was over
    hold._beat()
    hold.check()  # the checkpoint is still there, and held again
    assert hold.name in {item.name for item in store.list(records.PINS)}
    store.delete([hold.name])
    Catalog(url).remove(1, grace_s=0)
    hold._beat()
    with pytest.raises(CheckpointNotFoundError, match="dropped while it was being read"):
        hold.check()
    hold.close()
    assert not store.list(records.PINS)


def test_a_store_that_fails_a_renewal_is_asked_again(url: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    save(url, 1)
    run, failed = Run.open(url), list[str]()
    real = run.store.put

    def put(name: str, segments: list[bytes]) -> None:
        if len(failed) < 3:
            failed.append(name)
            raise pins_module.CheckpointError("no")
        real(name, segments)

    monkeypatch.setattr(run.store, "put", put)
    with pin(run, Catalog(url).find(1).id, 0.05) as hold:
        until(lambda: hold.renewals >= 2)
        hold.check()
    assert len(failed) == 3
    assert not store.list(records.PINS)


def test_a_pin_is_over_when_both_clocks_say_so(url: str, store: Store) -> None:
    save(url, 1)
    now = time.time()

    def write(**fields: float) -> None:
        store.put(records.pin_name("a"), [records.encode(PinRecord(checkpoint="1-a", by="me", **fields))])

    def held(now: float, store_now: float | None) -> bool:
        pins, over = read_pins(store, now, lambda: store_now)
        assert len(pins) + len(over) == 1
        return holders(pins) == {"1-a": "me"}

    write(expires=now + 100, seconds=100)
    times = [
        (now + 99, now + 99),
        (now + 101, now + 99),
        (now + 99, now + 1e6),
        (now + 101, None),
        (now + 101, now + 102),
    ]
    assert [held(*both) for both in times] == [True, True, True, False, False]
    write(expires=now + 100)  # of an earlier release
    assert [held(*both) for both in times] == [True, False, True, False, False]


def test_a_clock_that_jumps_ends_no_pin(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save(url, 1)
    jumped = [0.0]
    fake = SimpleNamespace(time=lambda: time.time() + jumped[0], monotonic=time.monotonic)
    monkeypatch.setattr(sweep_module, "time", fake)
    monkeypatch.setattr(Sweeper, "store_now", lambda _: None)
    with Catalog(url).pin(1, seconds=600), Checkpointer(url, keep=[LatestN(1)], grace_s=0) as ckpt:
        ckpt.save_state(2, {"w": 1}).result(60)
        jumped[0] = 1e6
        ckpt.save_state(3, {"w": 1}).result(60)
    assert steps(url) == [1, 3]


def test_the_steady_clock_follows_one_that_goes_back_and_none_that_runs_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    wall, own = [1000.0], [50.0]
    monkeypatch.setattr(sweep_module, "time", SimpleNamespace(time=lambda: wall[0], monotonic=lambda: own[0]))
    clock = SteadyClock()
    own[0] += 10
    wall[0] += 10
    assert clock.now() == 1010
    wall[0] += 1e6
    assert clock.now() == 1010
    wall[0] = 7
    assert clock.now() == 7
