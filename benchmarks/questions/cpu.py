"""CPU seconds per GB of all processes of a run, beside the raw path: memcpy + write + fsync, and a cached read.

The sum is over the driver, Ray's daemons, the workers, the coordinator and the shard servers. Ray's daemons also tick
while the raw path runs, so both sides pay for them. Each round moves everything several times, as the kernel counts CPU
time in hundredths of a second.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import rl_ckpt
from benchmarks import harness
from benchmarks.processes import cpu_seconds
from benchmarks.results import LIMIT, Goal, Row, Series
from benchmarks.settings import Settings

_TIMES = 3


def measure(settings: Settings) -> list[Row]:
    """Save and restore, sharded and found replicas."""
    return [row for kind in ("sharded", "replicated") for row in _case(settings, kind)]


def _case(settings: Settings, kind: str) -> list[Row]:
    workers, size_bytes = settings.workers, settings.mib << 20
    with (
        harness.cluster(4 * workers),
        harness.folder() as folder,
        harness.team(workers, size_bytes, kind) as actors,
        rl_ckpt.Checkpointer(str(folder / "run"), keep=[rl_ckpt.LatestN(1)], grace_s=0) as ckpt,
    ):
        harness.call_all(actors, "fill_file", str(folder))
        written = workers * size_bytes if kind == "sharded" else size_bytes
        read = workers * size_bytes

        def train() -> None:
            harness.call_all(actors, "train", 0)

        saving: harness.Ways = {
            "ours": lambda _: _per_gb(written, lambda: harness.save(ckpt, harness.next_step(), actors), train),
            LIMIT: lambda _: _per_gb(written, lambda: _raw_save(actors, folder), train),
        }
        restoring: harness.Ways = {
            "ours": lambda _: _per_gb(read, lambda: ckpt.restore(actors), train),
            LIMIT: lambda _: _per_gb(read, lambda: harness.call_all(actors, "raw_read", str(folder)), train),
        }
        rows = []
        for direction, ways in (("save", saving), ("restore", restoring)):
            found = harness.rounds(settings.rounds, ways)
            ours, limit = (Series(name, tuple(found[name]["cpu"])) for name in ("ours", LIMIT))
            case = f"{direction}, per GB, {workers} workers × {settings.mib} MiB, {kind}"
            rows.append(Row("cpu", case, "s", ours, limit, goals=(Goal("at most", 1.5),)))
        return rows


def _per_gb(size_bytes: int, call: Callable[[], Any], between: Callable[[], None]) -> dict[str, float]:
    """CPU seconds per GB of a call that moves that much; what happens between is not counted."""
    used = 0.0
    for _ in range(_TIMES):
        between()
        before = cpu_seconds()
        call()
        used += cpu_seconds() - before
    return {"cpu": used / (_TIMES * size_bytes / 1e9)}


def _raw_save(actors: list[Any], folder: Path) -> None:
    harness.call_all(actors, "memcpy")
    place = harness.empty(folder / "raw")
    harness.call_all(actors, "raw_write", str(place))
