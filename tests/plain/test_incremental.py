"""What saves cost when little has changed, and what a run takes on a real disk over many of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_ckpt import Checkpointer, EveryNSteps, LatestN
from rl_ckpt.plan.retention import KeepRule
from rl_ckpt.store.run import Run

PARTS, SIZE = 100, 64 << 10
Change = Callable[[int, np.random.Generator], Sequence[int]]

FROZEN: Change = lambda step, rng: range(90, PARTS)  # noqa: E731 - a table of patterns
CHURN: Change = lambda step, rng: np.flatnonzero(rng.random(PARTS) < 0.1).tolist()  # noqa: E731


def shares(url: str, saves: int, change: Change, keep: Sequence[KeepRule]) -> tuple[list[float], list[float]]:
    """Of each save, what was written to what the state has; of some, what is stored to what live checkpoints hold."""
    rng = np.random.default_rng(0)
    state: dict[str, Any] = {f"p{part:02}": rng.integers(0, 255, SIZE, np.uint8) for part in range(PARTS)}
    written, stored = [], []
    with Checkpointer(url, keep=keep, grace_s=0) as ckpt:
        for step in range(1, saves + 1):
            for part in change(step, rng):
                state[f"p{part:02}"] = rng.integers(0, 255, SIZE, np.uint8)
            info = ckpt.save_state(step, state).result(60)
            written.append(info.bytes_written / info.bytes)
            if step % 10 == 0 or step == saves:
                assert ckpt._saver is not None
                ckpt._saver._writer.submit(int).result(60)  # the sweep behind the save is done
                stored.append(on_disk(url) / held(url))
        for info in ckpt.checkpoints():
            assert ckpt.load_state(info.step).keys() == state.keys(), "nothing of it is gone"
        final = ckpt.load_state()
    assert all((final[name] == array).all() for name, array in state.items())
    return written[1:], stored


def on_disk(url: str) -> int:
    return sum(path.stat().st_size for path in Path(url, "shards").rglob("*") if path.is_file())


def held(url: str) -> int:
    """Bytes of the chunks that live checkpoints hold, each once."""
    run = Run.open(url)
    manifests = [run.manifest(commit) for commit in run.log.read().commits]
    chunks = {(c.digest, c.bytes) for manifest in manifests for array in manifest.arrays for c in array.chunks}
    return sum(size for _, size in chunks)


def test_an_unchanged_state_costs_next_to_nothing(tmp_path: Path) -> None:
    written, stored = shares(str(tmp_path), 5, lambda step, rng: (), [LatestN(2)])
    assert max(written) <= 0.02
    assert max(stored) <= 1.02


def test_of_a_state_that_is_frozen_but_for_a_tenth_that_tenth_is_written(tmp_path: Path) -> None:
    written, stored = shares(str(tmp_path), 12, FROZEN, [LatestN(2)])
    assert max(written) <= 0.12
    assert max(stored) <= 1.1


def test_a_ring_buffer_costs_what_was_added(tmp_path: Path) -> None:
    """A buffer in chunks: each save has filled five more of a hundred, and come round once at the end."""
    buffer = np.random.default_rng(0).integers(0, 255, (PARTS, SIZE), np.uint8)
    with Checkpointer(str(tmp_path), keep=[LatestN(2)], grace_s=0, chunk_bytes=SIZE) as ckpt:
        ckpt.save_state(0, {"buffer": buffer}).result(60)
        for step in range(1, 22):
            rows = [(5 * step + k) % PARTS for k in range(5)]
            buffer[rows] = np.random.default_rng(step).integers(0, 255, (5, SIZE), np.uint8)
            info = ckpt.save_state(step, {"buffer": buffer, "position": rows[-1]}).result(60)
            # What was added; once round, what is left in files of the first save that are nearly overwritten.
            assert info.bytes_written <= (5 + 4) * SIZE, step
        assert (ckpt.load_state()["buffer"] == buffer).all()


def test_what_goes_back_to_an_older_state_is_not_written_again(tmp_path: Path) -> None:
    states = [{"w": np.random.default_rng(seed).random(100_000)} for seed in range(3)]
    with Checkpointer(str(tmp_path), grace_s=0) as ckpt:
        sizes = [ckpt.save_state(step, states[step % 3]).result(60).bytes_written for step in range(6)]
    assert all(size > 800_000 for size in sizes[:3])
    assert all(size < 8_000 for size in sizes[3:]), "any live checkpoint will do, not only the one before"


@pytest.mark.parametrize("keep", [[LatestN(3)], [LatestN(2), EveryNSteps(10)]], ids=["latest", "every"])
def test_storage_stays_near_what_is_held_while_a_state_churns(tmp_path: Path, keep: list[KeepRule]) -> None:
    written, stored = shares(str(tmp_path), 30, CHURN, keep)
    assert max(stored) <= 1.3
    assert np.mean(written) <= 0.14, "what changes, and a little for what is moved"


@pytest.mark.soak
@pytest.mark.parametrize("change", [FROZEN, CHURN], ids=["frozen", "churn"])
@pytest.mark.parametrize("keep", [[LatestN(3)], [LatestN(2), EveryNSteps(50)]], ids=["latest", "every"])
def test_a_thousand_saves(tmp_path: Path, change: Change, keep: list[KeepRule]) -> None:
    written, stored = shares(str(tmp_path), 1000, change, keep)
    assert max(stored) <= 1.3
    assert np.mean(written) <= 0.12
    assert len(os.listdir(tmp_path / "manifests")) <= 23
