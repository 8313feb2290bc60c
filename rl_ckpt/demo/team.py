"""One set of actors that trains: a learner and its rollout workers, placed on given nodes.

Owns the actor handles and one iteration of training. Rank 0 of a save is the learner, ranks 1, 2, … are the rollout
workers: `workers` has that order. Experience and weights travel between the actors, never through the driver. A team
does not recover: when one of its actors is lost, `iterate` raises, and `supervise` has another team made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rl_ckpt.demo.learner import Learner, Settings, Update
from rl_ckpt.demo.records import JobConfig
from rl_ckpt.demo.rollout import RolloutWorker

Actor = Any
"""Handle of a Ray actor; Ray types its methods as Any."""


class Team:
    """A learner and rollout workers.

    Args:
        config: Seed, number of environments, steps per iteration.
        rollout_workers: How many.
        nodes: Node ids to deal the actors over; the learner is on the first.
        life: 0 for the first team of the job, 1 for the next: their fresh generators differ.
    """

    def __init__(self, config: JobConfig, rollout_workers: int, nodes: list[str], life: int) -> None:
        self._horizon = config.horizon
        self.learner: Actor = _place(Learner, nodes[0]).remote(config.seed, Settings())
        self.rollouts: list[Actor] = [
            _place(RolloutWorker, nodes[i % len(nodes)]).remote((config.seed, life, i), config.envs)
            for i in range(rollout_workers)
        ]
        ray.get(self._share_policy())

    @property
    def workers(self) -> list[Actor]:
        """All actors, by rank."""
        return [self.learner, *self.rollouts]

    def iterate(self, while_playing: Callable[[], None] | None = None) -> Update:
        """Play, learn, and hand the new policy to everybody.

        Args:
            while_playing: Called once the rollout workers have begun.

        Returns:
            What the learner tells.

        Raises:
            RayActorError: An actor is lost.
            ObjectLostError: Experience is lost with the node that held it.
        """
        batches = [worker.sample.remote(self._horizon) for worker in self.rollouts]
        if while_playing is not None:
            while_playing()
        result: Update = ray.get(self.learner.update.remote(*batches))
        ray.get(self._share_policy())
        return result

    def digests(self) -> list[dict[str, str]]:
        """By rank: digests of the parts of every actor's state."""
        result: list[dict[str, str]] = ray.get([worker.digests.remote() for worker in self.workers])
        return result

    def _share_policy(self) -> list[ray.ObjectRef[Any]]:
        # Actors take their calls in order, so whoever comes after this call meets workers with equal weights.
        weights, filter_state = self.learner.policy.options(num_returns=2).remote()
        return [worker.set_policy.remote(weights, filter_state) for worker in self.rollouts]


def _place(kind: type, node_id: str) -> Any:
    pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(kind).options(num_cpus=1, max_restarts=0, scheduling_strategy=pinned)
