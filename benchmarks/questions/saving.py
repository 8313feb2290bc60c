"""Stall and time to durable, local disk: ours, the raw ways and every alternative in turn.

A worker's stall is what the slowest rank says; the driver's is the wall time of the call that starts the save in all
workers. With 8 workers, and with declared replicas, only the raw ways are run beside ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rl_ckpt
from benchmarks import harness
from benchmarks.alternatives import ON_DISK, RLLIB
from benchmarks.others import Others, others
from benchmarks.results import LIMIT, Goal, Row, Series
from benchmarks.settings import Settings

_WITH_OTHERS = ("sharded", "replicated")
_AGAINST_OTHERS = (Goal("at least", 20, "RLlib"), Goal("at least", 3, "DCP async"))


def measure(settings: Settings) -> list[Row]:
    """Rows of both questions."""
    rows = []
    for workers, mib in {settings.workers: settings.mib, settings.many_workers: settings.many_mib}.items():
        for kind in ("sharded", "declared", "replicated"):
            compared = workers == settings.workers and kind in _WITH_OTHERS
            rows += _case(settings, workers, mib, kind, compared)
    return sorted(rows, key=lambda row: row.question != "stall")


def _case(settings: Settings, workers: int, mib: int, kind: str, compared: bool) -> list[Row]:
    size_bytes = mib << 20
    names = (*ON_DISK, RLLIB) if compared else ()
    unique_bytes = size_bytes * workers if kind == "sharded" else size_bytes
    with (
        harness.cluster(4 * workers),
        harness.folder() as folder,
        harness.team(workers, size_bytes, kind) as actors,
        others(actors, str(folder), names, unique_bytes=unique_bytes) as rest,
        rl_ckpt.Checkpointer(str(folder / "run"), keep=[rl_ckpt.LatestN(1)], grace_s=0) as ckpt,
    ):
        ways: harness.Ways = {
            "memcpy": lambda _: {"stall": max(harness.call_all(actors, "memcpy"))},
            "ours": lambda _: harness.save(ckpt, harness.next_step(), actors),
            "write": lambda _: {"durable": _write(actors, folder)},
            **rest.saves(),
        }
        found = harness.rounds(settings.rounds, ways, lambda number: harness.call_all(actors, "train", number))
        return _rows(found, rest, f"{workers} workers × {mib} MiB, {kind}", compared)


def _write(actors: list[Any], folder: Path) -> float:
    place = harness.empty(folder / "raw")
    return harness.timed(lambda: harness.call_all(actors, "raw_write", str(place)))


def _rows(found: Mapping[str, Mapping[str, list[float]]], rest: Others, case: str, compared: bool) -> list[Row]:
    def ours(name: str) -> Series:
        return Series("ours", tuple(found["ours"][name]))

    memcpy = Series(LIMIT, tuple(found["memcpy"]["stall"]))
    write = Series(LIMIT, tuple(found["write"]["durable"]))
    against = _AGAINST_OTHERS if compared else ()
    worker = (Goal("at most", 1.2), *against)
    skipped = rest.skipped
    return [
        Row("stall", f"{case}, worker", "s", ours("stall"), memcpy, rest.series(found, "stall"), worker, skipped),
        Row("stall", f"{case}, driver", "s", ours("call"), memcpy, rest.series(found, "call"), against, skipped),
        Row(
            "durable",
            case,
            "s",
            ours("durable"),
            write,
            rest.series(found, "durable"),
            (Goal("at least", 0.9),),
            skipped,
        ),
    ]
