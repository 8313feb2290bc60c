"""The job of the storm: a team whose state at a step is known to everybody, so that any restore can be checked.

A state is a function of seed, rank and step: whoever reads a checkpoint of step n, in any process, can tell each bit
that it must hold.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rl_ckpt import Sharded

WORKERS = 4
_WEIGHTS, _ROWS, _COLUMNS = 1 << 18, 64, 1 << 10


def expected(seed: int, rank: int, step: int) -> dict[str, Any]:
    """What a rank holds after `step` steps, with its part of the sharded array as a plain array."""

    def made(name: str, *size: int, of: int | None = None, at: int = step) -> Any:
        own = (seed, at, zlib.crc32(name.encode()), *(() if of is None else (of,)))
        return np.random.default_rng(own).random(size, np.float32)

    rows = _ROWS // WORKERS
    return {
        "policy": {"weights": made("weights", _WEIGHTS), "frozen": made("frozen", _WEIGHTS, at=0), "version": step},
        "optimizer": made("optimizer", _ROWS, _COLUMNS)[rank * rows : (rank + 1) * rows],
        "rng": made("rng", 1000, of=rank),
        "rank": rank,
        "step": step,
    }


def wrong(found: Any, seed: int, rank: int, step: int, whole: bool = False) -> list[str]:
    """Paths of a state that are not what they must be.

    Args:
        found: The state.
        seed: Of the storm.
        rank: Whose.
        step: Of the checkpoint.
        whole: Whether the sharded array is there as a whole (`load_state`).
    """
    want = expected(seed, rank, step)
    if whole:
        rows = _ROWS // WORKERS
        found = {**found, "optimizer": found["optimizer"][rank * rows : (rank + 1) * rows]}
    out = [name for name in ("optimizer", "rng") if not _same(found[name], want[name])]
    out += [name for name in ("weights", "frozen") if not _same(found["policy"][name], want["policy"][name])]
    out += [name for name in ("rank", "step") if found[name] != want[name]]
    return out + (["version"] if found["policy"]["version"] != step else [])


def _same(a: Any, b: Any) -> bool:
    a = getattr(a, "array", a)
    return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())


class Worker:
    """One rank of the team; changes its arrays in place, as an optimizer does."""

    def __init__(self, seed: int, rank: int) -> None:
        self._seed, self._rank = seed, rank
        self._state = expected(seed, rank, 0)

    def get_state(self) -> dict[str, Any]:
        rows = _ROWS // WORKERS
        box = Sharded(self._state["optimizer"], (_ROWS, _COLUMNS), (self._rank * rows, 0))
        return {**self._state, "optimizer": box}

    def set_state(self, tree: dict[str, Any]) -> None:
        self._state = {**tree, "optimizer": getattr(tree["optimizer"], "array", tree["optimizer"])}

    def train(self, step: int) -> int:
        """One step, on whatever the state was."""
        new = expected(self._seed, self._rank, step)
        for name in ("optimizer", "rng"):
            np.copyto(self._state[name], new[name])
        np.copyto(self._state["policy"]["weights"], new["policy"]["weights"])
        self._state["step"] = self._state["policy"]["version"] = step
        return step

    def wrong(self, step: int) -> list[str]:
        """What is not as it must be at `step`."""
        return wrong(self._state, self._seed, self._rank, step)


def team(seed: int, nodes: list[str]) -> list[Any]:
    """Workers by rank, dealt over nodes."""
    kind: Any = ray.remote(num_cpus=0)(Worker)
    places = [NodeAffinitySchedulingStrategy(nodes[rank % len(nodes)], soft=False) for rank in range(WORKERS)]
    return [kind.options(scheduling_strategy=place).remote(seed, rank) for rank, place in enumerate(places)]
