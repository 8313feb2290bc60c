"""Saves of a state of which little has changed since the one before, local disk, one process without Ray.

Alternatives write everything; each keeps its newest save alone, as ours does. Bytes are what a save has put on the
disk.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import rl_ckpt
from benchmarks import alternatives, harness
from benchmarks.alternatives import ON_DISK, Rank, State
from benchmarks.results import LIMIT, Goal, Row, Series
from benchmarks.settings import Settings

_ARRAYS = 20
_CASES: dict[str, tuple[Callable[[int], Sequence[int]], float]] = {
    "unchanged": (lambda number: (), 0.02),
    "90 % frozen": (lambda number: range(_ARRAYS - 2, _ARRAYS), 0.12),
    "ring buffer, 5 % added": (lambda number: (number % _ARRAYS,), 0.06),
}
"""Which arrays a round changes, and the share of the state that may be written."""


def measure(settings: Settings) -> list[Row]:
    """Time to durable and bytes, for each case."""
    rows = []
    for case, (changes, share) in _CASES.items():
        rows += _case(settings, case, changes, share)
    return rows


def _case(settings: Settings, case: str, changes: Callable[[int], Sequence[int]], share: float) -> list[Row]:
    columns = max(1, (settings.mib << 20) // (_ARRAYS * 64 * 4))
    arrays = {f"a{k}": np.random.default_rng(k).random((64, columns), np.float32) for k in range(_ARRAYS)}
    size_bytes = sum(array.nbytes for array in arrays.values())
    skipped = {name: why for name in ON_DISK if (why := alternatives.missing(name))}
    with (
        harness.folder() as folder,
        rl_ckpt.Checkpointer(str(folder / "ours"), keep=[rl_ckpt.LatestN(1)], grace_s=0) as ckpt,
    ):
        state = State(arrays, "replicated", 0, 1, f"127.0.0.1:{_free_port()}")
        ranks = {name: alternatives.make(name, state) for name in ON_DISK if name not in skipped}

        def change(number: int) -> None:
            for k in changes(number):
                arrays[f"a{k}"] += 1.0

        ways: harness.Ways = {
            "ours": lambda number: _ours(ckpt, arrays, change, number),
            LIMIT: lambda number: _raw(folder / "raw", [arrays[f"a{k}"] for k in changes(number)]),
            **{name: partial(_other, rank, folder / name) for name, rank in ranks.items()},
        }
        found = harness.rounds(settings.rounds, ways)
        for rank in ranks.values():
            rank.close()
    series = {name: {what: Series(name, tuple(values)) for what, values in by.items()} for name, by in found.items()}
    rows = []
    for unit, what, goals in (
        ("s", "seconds", ()),
        ("bytes", "bytes", (Goal("at most", 0, "", plus=share * size_bytes),)),
    ):
        row: Any = unit
        others = tuple(series[name][what] for name in ranks)
        limit = series[LIMIT][what]
        rows.append(
            Row(
                "incremental",
                f"{case}, {settings.mib} MiB, {what}",
                row,
                series["ours"][what],
                limit,
                others,
                goals,
                skipped,
            )
        )
    return rows


def _ours(
    ckpt: rl_ckpt.Checkpointer, arrays: dict[str, Any], change: Callable[[int], None], number: int
) -> dict[str, float]:
    change(number)
    found: list[rl_ckpt.CheckpointInfo] = []
    seconds = harness.timed(lambda: found.append(ckpt.save_state(harness.next_step(), arrays).result()))
    return {"seconds": seconds, "bytes": float(found[0].bytes_written)}


def _raw(place: Path, changed: Sequence[np.ndarray[Any, Any]]) -> dict[str, float]:
    """What changed, written and fsynced."""
    harness.empty(place)

    def write() -> None:
        with open(place / "raw", "wb", buffering=0) as file:
            for array in changed:
                file.write(array.data.cast("B"))
        alternatives.sync(str(place))

    return {"seconds": harness.timed(write), "bytes": float(sum(array.nbytes for array in changed))}


def _other(rank: Rank, place: Path, number: int) -> dict[str, float]:
    here = harness.empty(place / str(number))

    def save() -> None:
        rank.save(str(here))
        rank.wait()

    seconds = harness.timed(save)
    shutil.rmtree(place / str(number - 1), ignore_errors=True)
    size = sum(path.stat().st_size for path in here.rglob("*") if path.is_file())
    return {"seconds": seconds, "bytes": float(size)}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
