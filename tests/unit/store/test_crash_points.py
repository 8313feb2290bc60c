"""Stop at every change a save makes on the store and reopen: commits are bit-identical, the step whole or absent."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_ckpt import Checkpointer, CheckpointError, LatestN, StorageError
from rl_ckpt.format import records
from rl_ckpt.store.run import Run
from rl_ckpt.store.urls import open_store
from tests.unit.store.faulty import CHANGES, FaultyStore, Stopped, faulty
from tests.unit.trees import assert_same

RULES: dict[str, Any] = {"keep": [LatestN(2)], "grace_s": 0, "chunk_bytes": 1 << 19, "write_streams": 2}
FROZEN = np.random.default_rng(99).random(2000)


def state(step: int) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    return {"w": rng.random(1 << 18), "frozen": FROZEN, "step": step}  # 2 MiB: two shard files


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("prepared") / "run"
    with Checkpointer(str(folder), **RULES) as ckpt:
        for step in (1, 2):
            ckpt.save_state(step, state(step)).result(60)
    return folder


def save_3(folder: Path, patch: pytest.MonkeyPatch, arm: Callable[[FaultyStore], None]) -> BaseException | None:
    """A new process saves step 3 on a store that `arm` has prepared; the error it ends with."""
    with faulty(patch, str(folder)) as store:
        arm(store)
        ckpt = Checkpointer(str(folder), **RULES)
        try:
            pending = ckpt.save_state(3, state(3))
        except (CheckpointError, Stopped) as error:
            return error
        outcome = pending._future.exception(60)
        with contextlib.suppress(Stopped):  # a dead process deletes no lease either
            ckpt.close() if pending.take_failure() is None else ckpt._saver.close()  # type: ignore[union-attr]
        return outcome


def changes_of_a_save(folder: Path, patch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    seen: list[tuple[str, str]] = []

    def arm(store: FaultyStore) -> None:
        store.before = lambda operation, name: seen.append((operation, name)) if operation in CHANGES else None

    assert save_3(folder, patch, arm) is None
    return seen


def assert_whole(folder: Path) -> list[int]:
    """All that is committed is bit-identical; which steps those are."""
    ckpt = Checkpointer(str(folder))
    steps = [info.step for info in ckpt.checkpoints()]
    for step in steps:
        assert_same(ckpt.load_state(step), state(step))
    assert_same(ckpt.load_state(), state(steps[-1]))
    return steps


def assert_next_save_works(folder: Path) -> None:
    with Checkpointer(str(folder), **RULES) as ckpt:
        for step in (4, 5):
            ckpt.save_state(step, state(step)).result(60)
    assert assert_whole(folder) == [4, 5]
    run, store = Run.open(str(folder)), open_store(str(folder))
    named = {f.name for commit in run.log.read().commits for f in run.manifest(commit).files}
    assert {item.name for item in store.list(records.SHARDS)} == named  # nothing is left of what was interrupted
    assert len(store.list(records.MANIFESTS)) == 2


def test_a_crash_at_any_change_leaves_whole_checkpoints(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(prepared, tmp_path / "count")
    total = len(changes_of_a_save(tmp_path / "count", monkeypatch))
    assert total >= 8  # epoch, two shard files, manifest, commit record; record, manifest and file of step 1
    outcomes = set()
    for k in range(total):
        for when in ("before", "after"):
            folder = tmp_path / f"{k}-{when}"
            shutil.copytree(prepared, folder)
            error = save_3(folder, monkeypatch, lambda store, k=k, when=when: _stop_at(store, k, when))  # type: ignore[misc]
            steps = assert_whole(folder)
            assert steps in ([1, 2], [1, 2, 3], [2, 3]), (k, when)
            assert error is not None or 3 in steps
            outcomes.add(tuple(steps))
            if k % 3 == 0:
                assert_next_save_works(folder)
    assert outcomes == {(1, 2), (1, 2, 3), (2, 3)}


def _stop_at(store: FaultyStore, k: int, when: str) -> None:
    """From the k-th change on nothing happens any more: the process is dead."""
    count = [0]

    def stop(operation: str, name: str) -> None:
        if operation in CHANGES:
            count[0] += 1
            if count[0] > k:
                store.before = store.after = _dead
                raise Stopped
        elif count[0] > k:
            raise Stopped

    setattr(store, when, stop)


def _dead(operation: str, name: str) -> None:
    raise Stopped


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_operation_that_fails_costs_at_most_its_save(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The store refuses one change, or does it and loses the reply; the same process goes on."""
    shutil.copytree(prepared, tmp_path / "count")
    changes = changes_of_a_save(tmp_path / "count", monkeypatch)
    for k, (operation, _) in enumerate(changes):
        folder = tmp_path / str(k)
        shutil.copytree(prepared, folder)
        failed = _save_3_and_4(folder, monkeypatch, k, when)
        steps = assert_whole(folder)
        assert steps[-1] == 4
        assert (3 in steps) == (not failed), (k, changes[k])
        if operation == "create" and when == "after":
            assert not failed  # epoch and commit records are read back: a landed one is known for what it is
        if k % 4 == 0:
            shutil.rmtree(folder / "pins", ignore_errors=True)
            with Checkpointer(str(folder), **RULES) as ckpt:
                ckpt.save_state(5, state(5)).result(60)
            assert assert_whole(folder) == [4, 5]


def _save_3_and_4(folder: Path, patch: pytest.MonkeyPatch, k: int, when: str) -> bool:
    with faulty(patch, str(folder)) as store:
        count = [0]

        def fail(operation: str, name: str) -> None:
            if operation in CHANGES:
                count[0] += 1
                if count[0] == k + 1:
                    raise StorageError(f"{operation} of {name}: connection lost")

        setattr(store, when, fail)
        ckpt = Checkpointer(str(folder), **RULES)
        failed = False
        try:
            ckpt.save_state(3, state(3)).result(60)
        except StorageError:
            failed = True
        if ckpt._saver is not None:
            ckpt._saver._writer.submit(int).result(60)  # the sweep behind the save is done, well or badly
        store.before = store.after = lambda operation, name: None
        with pytest.MonkeyPatch.context() as quiet:
            quiet.setattr("warnings.warn", lambda *_, **__: None)  # a sweep that failed is told; tested elsewhere
            ckpt.save_state(4, state(4)).result(60)
        ckpt.close()
        return failed
