"""Training steps while a save is written: step times of trainers that compute, with a save under way and without.

A step is a matrix product and an update of about 6 ms on one core. Steps count as "while written" only if they began
after `save` had returned and before the commit was known: all processes read the same monotonic clock.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import ray

import rl_ckpt
from benchmarks import harness
from benchmarks.results import LIMIT, Goal, Row, Series
from benchmarks.settings import WARM_UP, Settings

_SIZE = 512
_STEP_S = 0.006
_MIN_STEPS = 5


@ray.remote(num_cpus=1)
class Trainer:
    """Weights, and a training step of a known length."""

    def __init__(self, rank: int, world_size: int, size_bytes: int) -> None:
        self._rank, self._world_size = rank, world_size
        random = np.random.default_rng(rank)
        self._weights = random.standard_normal(size_bytes // 4, np.float32).reshape(-1, 1024)
        self._a, self._b = (random.standard_normal((_SIZE, _SIZE), np.float32) for _ in range(2))
        self._products = 1
        begun = time.perf_counter()
        for _ in range(20):
            np.matmul(self._a, self._b)
        self._products = max(1, round(_STEP_S / ((time.perf_counter() - begun) / 20)))
        self._row = 0

    def get_state(self) -> Any:
        """A shard of the global weights."""
        rows, columns = self._weights.shape
        return {
            "w": rl_ckpt.Sharded(self._weights, (rows * self._world_size, columns), (rows * self._rank, 0)),
        }

    def set_state(self, tree: Any) -> None:
        """Takes the weights."""
        self._weights = tree["w"]

    def change(self, number: int) -> None:
        """Changes all weights, so that nothing is stored already."""
        self._weights += np.float32(number + 1)

    def steps(self, seconds: float) -> list[tuple[float, float]]:
        """(begin, seconds) of as many steps as fit."""
        found, end = [], time.monotonic() + seconds
        while (begun := time.monotonic()) < end:
            for _ in range(self._products):
                product = np.matmul(self._a, self._b)
            self._row = (self._row + 64) % (len(self._weights) - 64)
            self._weights[self._row : self._row + 64] += product[0, 0]
            found.append((begun, time.monotonic() - begun))
        return found


def measure(settings: Settings) -> list[Row]:
    """Trainers on all cores but one, and on all cores."""
    cores = os.cpu_count() or 1
    rows = []
    for trainers, what in ((max(1, cores - 1), "all cores but one"), (cores, "all cores")):
        found = _run(settings, trainers, settings.mib << 20)
        case = f"{trainers} trainers × {settings.mib} MiB on {what}"
        for name, percent, goal in (("median", 50, 1.05), ("p99", 99, 1.5)):
            ours, limit = (
                [float(np.percentile(steps, percent)) for steps in found[way]] for way in ("with", "without")
            )
            goals = (Goal("at most", goal),)
            rows.append(
                Row(
                    "training",
                    f"{case}, {name}",
                    "s",
                    Series("ours", tuple(ours)),
                    Series(LIMIT, tuple(limit)),
                    (),
                    goals,
                )
            )
    return rows


def _run(settings: Settings, trainers: int, size_bytes: int) -> dict[str, list[list[float]]]:
    """Step times by round, of all trainers together."""
    kind: Any = Trainer
    found: dict[str, list[list[float]]] = {"with": [], "without": []}
    with harness.cluster(4 * trainers), harness.folder() as folder:
        actors = [kind.remote(rank, trainers, size_bytes) for rank in range(trainers)]
        with rl_ckpt.Checkpointer(str(folder / "run"), keep=[rl_ckpt.LatestN(1)], grace_s=0) as ckpt:
            took = 1.0
            for number in range(WARM_UP + settings.rounds):
                harness.call_all(actors, "change", number)
                quiet = [s for steps in harness.call_all(actors, "steps", took) for _, s in steps]
                pending = ckpt.save(number, actors)
                staged = time.monotonic()
                running = [actor.steps.remote(1.5 * took) for actor in actors]
                pending.result()
                committed = time.monotonic()
                took = min(1.0, max(0.1, committed - staged))
                busy = [s for steps in ray.get(running) for begun, s in steps if staged <= begun < committed]
                if number >= WARM_UP and len(busy) >= _MIN_STEPS:
                    found["with"].append(busy)
                    found["without"].append(quiet)
    if not found["with"]:
        raise RuntimeError(f"saves are over before {_MIN_STEPS} steps are done: give the state more MiB")
    return found
