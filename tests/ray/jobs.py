"""A supervised job for tests: it trains, saves after each step, and meets with accidents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray

from rl_ckpt import Checkpointer, RestoreReport
from tests.ray.holders import WAIT_S, Holder, kill_process, pid_of, same, states_of

WORKERS, STEPS = 3, 5


def fresh(rank: int) -> dict[str, Any]:
    return {"w": np.zeros(1000), "own": np.full(10, 100.0 * rank), "step": 0}


def trained(rank: int, steps: int) -> dict[str, Any]:
    """What `advance` makes of a fresh state."""
    return {"w": np.full(1000, float(steps)), "own": np.full(10, 100.0 * rank + steps), "step": steps}


def advance(holder: Any) -> int:
    state = holder.state
    state["w"] = state["w"] + 1
    state["own"] = state["own"] + 1
    state["step"] += 1
    return int(state["step"])


def with_state(workers: list[Any]) -> list[Any]:
    ray.get([worker.put.remote(fresh(rank)) for rank, worker in enumerate(workers)], timeout=WAIT_S)
    return workers


class Job:
    """Trains for a number of steps with a save after each, and meets with an accident before some of them."""

    def __init__(self, ckpt: Checkpointer, accidents: dict[int, Callable[[list[Any]], None]] | None = None) -> None:
        self.ckpt = ckpt
        self.accidents = dict(accidents or {})
        self.teams: list[list[Any]] = []
        self.starts: list[int] = []

    def make(self) -> list[Any]:
        self.teams.append([Holder.remote() for _ in range(WORKERS)])
        return with_state(self.teams[-1])

    def train(self, workers: Sequence[Any], restored: RestoreReport | None) -> str:
        team, step = list(workers), 0 if restored is None else restored.step
        self.starts.append(step)
        while step < STEPS:
            self.accidents.pop(step, lambda _: None)(team)
            step = ray.get([worker.look.remote(advance) for worker in team], timeout=WAIT_S)[0]
            self.ckpt.save(step, team).result(WAIT_S)
        return "done"

    def is_whole(self) -> None:
        """The state is that of a job that lost nothing, and so is every checkpoint."""
        for rank, found in enumerate(states_of(self.teams[-1])):
            same(found, trained(rank, STEPS))
        assert [info.step for info in self.ckpt.checkpoints()] == list(range(1, STEPS + 1))


def kill_rank(rank: int) -> Callable[[list[Any]], None]:
    return lambda team: kill_process(pid_of(team[rank]))


def ended(worker: Any) -> bool:
    try:
        ray.get(worker.take.remote(), timeout=WAIT_S)
    except ray.exceptions.RayActorError:
        return True
    return False
