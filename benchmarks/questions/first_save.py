"""The first save of a run after `Checkpointer.prepare`, which starts the service and faults its memory in."""

from __future__ import annotations

import rl_ckpt
from benchmarks import harness
from benchmarks.results import LIMIT, Goal, Row, Series
from benchmarks.settings import Settings


def measure(settings: Settings) -> list[Row]:
    """A fresh run each round."""
    rows = []
    for kind in ("sharded", "replicated"):
        ours, limit = [], []
        with (
            harness.cluster(4 * settings.workers),
            harness.folder() as folder,
            harness.team(settings.workers, settings.mib << 20, kind) as actors,
        ):
            for number in range(1 + settings.starts):  # the first is warm-up of the workers themselves
                harness.call_all(actors, "train", number)
                with rl_ckpt.Checkpointer(str(folder / f"run-{number}")) as ckpt:
                    harness.prepare(ckpt, actors)
                    limit.append(max(harness.call_all(actors, "memcpy")))
                    ours.append(harness.save(ckpt, number, actors)["stall"])
        case = f"{settings.workers} workers × {settings.mib} MiB, {kind}"
        rows.append(
            Row(
                "first",
                case,
                "s",
                Series("ours", tuple(ours[1:])),
                Series(LIMIT, tuple(limit[1:])),
                goals=(Goal("at most", 2),),
            )
        )
    return rows
