"""Saves in the background: when they return, what they hold on to, what happens when the store is slow."""

from __future__ import annotations

import threading
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_ckpt import (
    Checkpointer,
    CheckpointError,
    InvalidInputError,
    SaveSkippedError,
    SaveTimeoutError,
    StorageError,
)
from rl_ckpt.plan.deal import SavePlan
from rl_ckpt.store import pending as pending_saves
from rl_ckpt.store import plain_save
from tests.plain.slow import gated
from tests.unit.store.faulty import faulty, once
from tests.unit.trees import assert_same


def lose(operation: str, name: str) -> None:
    raise StorageError(f"no answer to {operation}")


def test_save_returns_before_the_store_has_it_and_result_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "run")
    with gated(monkeypatch, url) as gate, Checkpointer(url) as ckpt:
        pending = ckpt.save_state(3, {"w": np.ones(5)})
        gate.wait_until_writing()
        assert (pending.done(), pending.step) == (False, 3)
        assert "being written" in repr(pending)
        assert ckpt.latest() is None
        with pytest.raises(SaveTimeoutError, match=r"step 3 is not committed after 0\.01 s and is still being written"):
            pending.result(timeout=0.01)
        gate.open()
        info = pending.result(60)
        assert (pending.done(), info.step, pending.result(0)) == (True, 3, info)
        assert ckpt.latest() is not None
        assert info.stall_s is not None
        assert info.durable_s is not None
        assert 0 <= info.stall_s <= info.durable_s


def test_arrays_may_change_as_soon_as_save_has_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "run")
    tree = {"w": np.arange(100.0), "list": [1, 2], "long": b"x" * 3000}
    with gated(monkeypatch, url) as gate, Checkpointer(url) as ckpt:
        pending = ckpt.save_state(0, tree)
        gate.wait_until_writing()
        tree["w"][:] = -1  # type: ignore[call-overload, index]
        tree["list"].append(3)  # type: ignore[attr-defined]
        del tree["long"]
        gate.open()
        pending.result(60)
        assert_same(ckpt.load_state(), {"w": np.arange(100.0), "list": [1, 2], "long": b"x" * 3000})


def test_skip_skips_the_third_save_while_two_are_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "run")
    with gated(monkeypatch, url) as gate, Checkpointer(url, when_busy="skip") as ckpt:
        first, second = (ckpt.save_state(step, {"w": np.full(9, step)}) for step in (1, 2))
        gate.wait_until_writing()
        for _ in range(3):
            with pytest.raises(SaveSkippedError, match="2 saves are still being written"):
                ckpt.save_state(3, {"w": np.full(9, 3)})
        gate.open()
        assert [p.result(60).step for p in (first, second)] == [1, 2]
        ckpt.save_state(4, {"w": np.full(9, 4)}).result(60)  # at once: who has a result finds memory free
        assert [info.step for info in ckpt.checkpoints()] == [1, 2, 4]


def test_wait_waits_for_memory_and_keeps_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "run")
    asked = threading.Event()
    with gated(monkeypatch, url) as gate, Checkpointer(url) as ckpt:
        for step in (1, 2):
            ckpt.save_state(step, {"w": np.full(9, step)})
        gate.wait_until_writing()
        buffer = ckpt._saver._buffer  # type: ignore[union-attr]
        monkeypatch.setattr(ckpt._saver, "_buffer", lambda: (asked.set(), buffer())[1])  # type: ignore[func-returns-value]
        pending: list[object] = []
        third = threading.Thread(target=lambda: pending.append(ckpt.save_state(3, {"w": np.full(9, 3)})))
        third.start()
        assert asked.wait(60)
        assert ckpt._saver._buffers.empty()  # type: ignore[union-attr]
        assert pending == []  # it waits for a generation of memory, both are in use
        gate.open()
        third.join(60)
        assert len(pending) == 1
        ckpt.close()
        assert [info.step for info in ckpt.checkpoints()] == [1, 2, 3]


def test_memory_is_bounded_at_two_generations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    empty = np.empty

    def count(shape: int, dtype: type) -> np.ndarray:  # type: ignore[type-arg]
        if shape:
            made.append(shape)
        return empty(shape, dtype)

    with Checkpointer(str(tmp_path)) as ckpt, monkeypatch.context() as patch:
        patch.setattr(plain_save.np, "empty", count)
        for step in range(8):
            ckpt.save_state(step, {"w": np.full(5000, step, np.int64), "v": np.full(300, step, np.int16)})
    big = [size for size in made if size >= 40_000]
    assert 1 <= len(big) <= 2
    assert max(big) <= 41_000 + 4096  # and room to start at a page


def test_a_failure_in_the_background_reaches_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "run")
    with faulty(monkeypatch, url) as store, Checkpointer(url) as ckpt:
        ckpt.save_state(0, {"w": np.ones(3)}).result(60)
        store.before = once(lose, "put", prefix="shards/")
        pending = ckpt.save_state(1, {"w": np.zeros(3)})
        pending._future.exception(60)
        with pytest.raises(StorageError, match="no answer to put"):
            ckpt.save_state(2, {"w": np.zeros(3)})
        ckpt.save_state(2, {"w": np.zeros(3)}).result(60)  # told once, and the save after it works
        assert [info.step for info in ckpt.checkpoints()] == [0, 2]


def test_a_failure_in_the_background_reaches_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "run")
    with faulty(monkeypatch, url) as store:
        ckpt = Checkpointer(url)
        store.before = once(lose, "put", prefix="manifests/")
        ckpt.save_state(0, {"w": np.zeros(3)})
        with pytest.raises(StorageError, match="no answer to put"):
            ckpt.close()
        ckpt.close()


def test_a_failure_that_was_seen_is_not_told_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "run")
    with faulty(monkeypatch, url) as store, Checkpointer(url) as ckpt:
        store.before = once(lose, "put", prefix="shards/")
        with pytest.raises(StorageError):
            ckpt.save_state(0, {"w": np.zeros(3)}).result(60)
        ckpt.save_state(1, {"w": np.zeros(3)}).result(60)


def test_a_failure_during_the_next_saves_staging_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "run")
    with faulty(monkeypatch, url) as store:
        ckpt = Checkpointer(url)
        ckpt.save_state(0, {"w": np.ones(3)}).result(60)
        failing = threading.Event()

        def lose_later(operation: str, name: str) -> None:
            assert failing.wait(60)
            lose(operation, name)

        store.before = once(lose_later, "put", prefix="shards/")
        first = ckpt.save_state(1, {"w": np.zeros(3)})
        stage = plain_save.stage

        def stage_while_it_fails(*args: object) -> object:
            failing.set()
            first._future.exception(60)
            return stage(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(plain_save, "stage", stage_while_it_fails)
        ckpt.save_state(2, {"w": np.full(3, 7)})
        with pytest.raises(StorageError):
            ckpt.close()


def test_two_failures_are_both_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "run")
    with gated(monkeypatch, url) as gate:
        ckpt = Checkpointer(url)
        pending = [ckpt.save_state(step, {"w": np.full(9, step)}) for step in (1, 2)]
        gate.wait_until_writing()
        gate.store.after = lambda operation, name: lose(operation, name) if operation == "put" else None
        gate.open()
        for p in pending:
            p._future.exception(60)
        told = 0
        for _ in range(2):
            try:
                ckpt.close()
            except CheckpointError as error:
                told += 1 + len(getattr(error, "__notes__", []))
        assert told == 2


def test_a_step_that_is_being_saved_is_waited_for_by_who_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "run")
    with gated(monkeypatch, url) as gate, Checkpointer(url, join_timeout_s=50) as ckpt:
        ckpt.save_state(1, {"w": np.ones(3)})

        def wait_and_open(saves: list[Any], seconds: float) -> None:
            assert (len(saves), seconds) == (1, 50)
            gate.open()
            wait(saves, seconds)

        monkeypatch.setattr(pending_saves, "wait", wait_and_open)
        assert_same(ckpt.load_state(np.int64(1)), {"w": np.ones(3)})  # type: ignore[arg-type]  # an int all the same


def test_a_step_that_is_being_saved_is_not_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "run")
    with gated(monkeypatch, url) as gate, Checkpointer(url) as ckpt:
        ckpt.save_state(1, {"w": np.ones(3)})
        with pytest.raises(InvalidInputError, match="step 1 is being saved already"):
            ckpt.save_state(1, {"w": np.zeros(3)})
        gate.open()
        ckpt.close()
        assert [info.step for info in ckpt.checkpoints()] == [1]


def test_the_step_of_a_save_that_failed_may_be_saved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "run")
    with faulty(monkeypatch, url) as store, Checkpointer(url) as ckpt:
        store.before = once(lose, "put", prefix="shards/")
        with pytest.raises(StorageError):
            ckpt.save_state(1, {"w": np.ones(3)}).result(60)
        ckpt.save_state(1, {"w": np.ones(3)}).result(60)
        assert_same(ckpt.load_state(1), {"w": np.ones(3)})


def test_close_waits_and_the_checkpointer_may_be_used_again(tmp_path: Path) -> None:
    ckpt = Checkpointer(str(tmp_path))
    pending = ckpt.save_state(0, {"w": np.ones(3)})
    ckpt.close()
    assert pending.done()
    ckpt.close()
    ckpt.save_state(1, {"w": np.ones(3)})
    ckpt.close()
    assert [info.step for info in ckpt.checkpoints()] == [0, 1]


def test_an_unchanged_state_costs_next_to_nothing(tmp_path: Path) -> None:
    tree = {"w": np.random.default_rng(0).random(1 << 17)}
    with Checkpointer(str(tmp_path)) as ckpt:
        first = ckpt.save_state(0, tree).result(60)
        second = ckpt.save_state(1, tree).result(60)
    assert first.bytes == second.bytes == 1 << 20
    assert first.bytes_written > 1 << 20
    assert second.bytes_written < 0.02 * second.bytes


def test_saves_of_one_shape_use_one_plan_with_the_plain_leaves_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[int] = []
    deal = plain_save.deal

    def spy(*args: Any) -> SavePlan:
        planned.append(len(planned))
        return deal(*args)

    monkeypatch.setattr(plain_save, "deal", spy)
    w, moments = np.zeros(4), [np.ones(3), np.ones((2, 2))]
    states: list[Any] = [
        {"w": w, "step": 1, "moments": moments, "name": "a"},
        {"w": w + 1, "step": 2.0, "moments": moments, "name": None},
        {"w": w + 2, "step": "x" * 20, "moments": [m * 2 for m in moments], "name": "b"},  # the third of the same shape
        {"step": 3, "w": w, "moments": moments, "name": "a"},  # other order
        {"step": 3, "w": w.astype(np.float32), "moments": moments, "name": "a"},
        {"step": 3, "w": w.astype(np.float32), "moments": tuple(moments), "name": "a"},
        {"step": 3, "w": w.astype(np.float32), "moments": (moments[1], moments[1]), "name": "a"},
        {"step": 3, "w": 5, "moments": (moments[1], moments[1]), "name": "a"},
    ]
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        pending = [ckpt.save_state(step, state) for step, state in enumerate(states)]
        for save in pending:
            save.result(60)
        for step, state in enumerate(states):
            assert_same(ckpt.load_state(step), state)
    assert len(planned) == len(states) - 2
