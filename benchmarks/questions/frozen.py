"""Stall where the state is an object of Ray's store, from a weight broadcast: nothing has to be copied."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray

import rl_ckpt
from benchmarks import harness
from benchmarks.results import Goal, Row, Series
from benchmarks.settings import WARM_UP, Settings


@ray.remote(num_cpus=1)
class Follower:
    """A worker whose weights are the object that was broadcast last."""

    def __init__(self) -> None:
        self._weights: Any = None

    def follow(self, wrapped: list[Any]) -> None:
        """Takes a reference; the list keeps Ray from fetching it at once, as a lazy worker would."""
        self._weights = wrapped[0]
        ray.get(self._weights)

    def get_state(self) -> Any:
        """The reference itself."""
        return {"weights": self._weights}

    def set_state(self, tree: Any) -> None:
        """Takes what was restored."""
        self._weights = ray.put(tree["weights"])


def measure(settings: Settings) -> list[Row]:
    """One row for each size; the driver owns the objects."""
    sizes = sorted({1, min(64, settings.frozen_mib), settings.frozen_mib})
    kind: Any = Follower
    rows = []
    # Two objects are alive at a time: the one that is being written, and the next.
    with harness.cluster(4 * settings.workers, store_bytes=max(200, 3 * settings.frozen_mib) << 20):
        actors = [kind.remote() for _ in range(settings.workers)]
        for mib in sizes:
            with harness.folder() as folder:
                stalls = _stalls(actors, str(folder / "run"), mib << 20, settings.rounds)
            case = f"{settings.workers} workers, broadcast of {mib} MiB"
            rows.append(
                Row("frozen", case, "s", Series("ours", tuple(stalls)), goals=(Goal("at most", 0, "", plus=0.005),))
            )
    return rows


def _stalls(actors: list[Any], url: str, size_bytes: int, count: int) -> list[float]:
    stalls = []
    with rl_ckpt.Checkpointer(url, keep=[rl_ckpt.LatestN(1)], grace_s=0) as ckpt:
        for number in range(WARM_UP + count):
            weights = ray.put(np.full(size_bytes // 4, number, np.float32))
            harness.call_all(actors, "follow", [weights])
            stalls.append(harness.save(ckpt, number, actors)["stall"])
    return stalls[WARM_UP:]
