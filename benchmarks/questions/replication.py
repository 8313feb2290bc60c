"""Training steps while a save is written and copied to other nodes' memory: 3 raylets, a trainer on each.

The memory tier copies each node's part to another node beside the writing. Steps are counted in a window of fixed
length that begins once `save` has returned, long enough for writing and copying; the same window without the memory
tier, and with no save at all. The three take turns in every round, and every save has new values. All raylets share
this machine, so that a copy costs the sender's and the receiver's share of the same cores.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import rl_ckpt
from benchmarks import harness
from benchmarks.questions.training import Trainer
from benchmarks.results import LIMIT, Goal, Row, Series
from benchmarks.settings import WARM_UP, Settings

_NODES = 3
_WINDOW_S = 1.0
_WITHOUT = "without the memory tier"


def measure(settings: Settings) -> list[Row]:
    """Median and 99th percentile of a step."""
    found = _run(settings, settings.mib << 20)
    rows = []
    for name, percent, goal in (("median", 50, 1.05), ("p99", 99, 1.5)):
        ours, without, limit = (
            Series(way, tuple(float(np.percentile(steps, percent)) for steps in found[way]))
            for way in ("ours", _WITHOUT, LIMIT)
        )
        case = f"{_NODES} nodes, a trainer × {settings.mib} MiB on each, {name}"
        rows.append(Row("replication", case, "s", ours, limit, (without,), (Goal("at most", goal),)))
    return rows


def _run(settings: Settings, size_bytes: int) -> dict[str, list[list[float]]]:
    """Step times by round, of all trainers together."""
    kind: Any = Trainer
    with harness.raylets(_NODES, 100 << 20) as ids, harness.folder() as folder:
        actors = [
            kind.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                rank, _NODES, size_bytes
            )
            for rank, node in enumerate(ids)
        ]
        options: Any = {"keep": [rl_ckpt.LatestN(1)], "grace_s": 0}
        with (
            rl_ckpt.Checkpointer(str(folder / "tier"), **options) as tier,
            rl_ckpt.Checkpointer(str(folder / "base"), memory_tier=False, **options) as base,
        ):
            found: dict[str, list[list[float]]] = {"ours": [], _WITHOUT: [], LIMIT: []}
            ways = list({"ours": tier, _WITHOUT: base, LIMIT: None}.items())
            for number in range(WARM_UP + settings.rounds):
                for way, ckpt in ways if number % 2 else reversed(ways):
                    steps = _steps_beside(ckpt, actors)
                    if number >= WARM_UP:
                        found[way].append(steps)
    return found


def _steps_beside(ckpt: rl_ckpt.Checkpointer | None, actors: list[Any]) -> list[float]:
    """Seconds of each step of all trainers in the window after a save was staged, or with no save."""
    step = harness.next_step()
    harness.call_all(actors, "change", step)
    pending = None if ckpt is None else ckpt.save(step, actors)
    running = [actor.steps.remote(_WINDOW_S) for actor in actors]
    steps = [seconds for found in ray.get(running) for _, seconds in found]
    if pending is not None:
        pending.result()
    return steps
