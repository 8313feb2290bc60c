"""Many small arrays: a state of very many leaves beside one array of the same bytes, local disk, one worker."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import ray

import rl_ckpt
from benchmarks import harness
from benchmarks.results import LIMIT, Goal, Row, Series
from benchmarks.settings import Settings

_ROUNDS = 3
_ROOT = 100  # leaves stand in this many dicts, as layers do


@ray.remote(num_cpus=1)
class Leaves:
    """A worker with `count` arrays, `size_bytes` together."""

    def __init__(self, count: int, size_bytes: int) -> None:
        self._values = np.random.default_rng(0).standard_normal(size_bytes // 4, np.float32)
        groups = max(1, count // _ROOT)
        self._tree: dict[str, dict[str, Any]] = {}
        for i, part in enumerate(np.array_split(self._values, count)):
            self._tree.setdefault(f"group{i % groups}", {})[f"leaf{i}"] = part

    def get_state(self) -> Any:
        """The tree."""
        return self._tree

    def set_state(self, tree: Any) -> None:
        """Arrays were filled in place."""
        self._tree = tree

    def train(self, number: int) -> None:
        """Changes every value."""
        self._values += np.float32(number + 1)

    def checksum(self) -> float:
        """Of all leaves."""
        return float(sum(leaf.sum(dtype=np.float64) for group in self._tree.values() for leaf in group.values()))


def measure(settings: Settings) -> list[Row]:
    """Save (until durable) and restore."""
    kind: Any = Leaves
    size_bytes = settings.small_mib << 20
    with harness.cluster(8), harness.folder() as folder:
        teams = {"ours": [kind.remote(settings.leaves, size_bytes)], LIMIT: [kind.remote(1, size_bytes)]}
        runs = {name: rl_ckpt.Checkpointer(str(folder / name), keep=[rl_ckpt.LatestN(1)], grace_s=0) for name in teams}

        def save(name: str, _round: int) -> dict[str, float]:
            harness.call_all(teams[name], "train", harness.next_step())
            return harness.save(runs[name], harness.next_step(), teams[name])

        def restore(name: str, _round: int) -> dict[str, float]:
            saved = harness.call_all(teams[name], "checksum")
            harness.call_all(teams[name], "train", 0)
            took = harness.timed(lambda: runs[name].restore(teams[name]))
            harness.expect(teams[name], saved, "the restore")
            return {"restore": took}

        found = {
            "save": harness.rounds(_ROUNDS, {name: partial(save, name) for name in teams}),
            "restore": harness.rounds(_ROUNDS, {name: partial(restore, name) for name in teams}),
        }
        for run in runs.values():
            run.close()
    rows = []
    for direction, key in (("save", "durable"), ("restore", "restore")):
        ours, limit = (Series(name, tuple(found[direction][name][key])) for name in ("ours", LIMIT))
        case = f"{direction}, {settings.leaves:,} leaves, {settings.small_mib} MiB"
        rows.append(Row("small", case, "s", ours, limit, goals=(Goal("at most", 3, plus=2.0),)))
    return rows
