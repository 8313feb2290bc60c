"""The rollout worker: plays CartPole with a copy of the policy and gives what it saw to the learner.

Owns the environments of one worker, their running episodes, and the worker's one random generator. `get_state` and
`set_state` hold all of it: after `set_state` the worker plays on exactly where the saved one stood. The policy's
weights and the observation filter are copies of the learner's; as every worker holds the same, a checkpoint stores
them once. A plain class without Ray, so that it runs in a test as well as in an actor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import gymnasium
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from numpy.typing import NDArray

from rl_ckpt import PerRank
from rl_ckpt.demo.observe import ObservationFilter, tree_digest
from rl_ckpt.demo.policy import Floats, Ints, Network, draw_actions, forward, log_softmax

State = dict[str, Any]
TIME_LIMIT = 500
"""Steps after which an episode of CartPole-v1 is cut off."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Experience of one worker over `steps` steps of `envs` environments."""

    observations: Floats
    """(steps, envs, 4) float32, unfiltered."""
    next_observations: Floats
    """(steps, envs, 4) float32, unfiltered, before any reset."""
    actions: Ints
    """(steps, envs)"""
    log_probs: Floats
    """(steps, envs) float32"""
    rewards: Floats
    """(steps, envs) float32"""
    terminated: NDArray[np.bool_]
    """(steps, envs), the pole fell or the cart left."""
    ended: NDArray[np.bool_]
    """(steps, envs), terminated or cut off by the time limit."""
    returns: list[float]
    """Of the episodes that ended in this batch."""


class CartPoles:
    """A row of CartPole environments that share one generator and can be saved in the middle of an episode."""

    def __init__(self, count: int, rng: np.random.Generator) -> None:
        # Without gymnasium's wrappers, whose counters could not be saved; the time limit is kept here.
        self._envs = [cast(CartPoleEnv, gymnasium.make("CartPole-v1").unwrapped) for _ in range(count)]
        for env in self._envs:
            env.np_random = rng
        self._observations = np.stack([env.reset()[0] for env in self._envs])
        self._lengths = np.zeros(count, dtype=np.int64)

    @property
    def observations(self) -> Floats:
        """(envs, 4) float32: what the next actions answer to."""
        return self._observations

    def step(self, actions: Ints) -> tuple[Floats, NDArray[np.bool_], NDArray[np.bool_], list[float]]:
        """Act in every environment and start a new episode where one ended.

        Args:
            actions: (envs,) of 0 or 1.

        Returns:
            Observations that followed (before any reset), terminated, ended, and the returns of ended episodes.
        """
        count = len(self._envs)
        followed = np.empty((count, 4), dtype=np.float32)
        terminated = np.zeros(count, dtype=np.bool_)
        returns: list[float] = []
        self._lengths += 1
        ended = self._lengths >= TIME_LIMIT
        after = np.empty_like(followed)
        for i, env in enumerate(self._envs):
            followed[i], _, terminated[i], _, _ = env.step(int(actions[i]))
            ended[i] |= terminated[i]
            if ended[i]:
                returns.append(float(self._lengths[i]))  # CartPole pays 1 for every step
                self._lengths[i] = 0
            after[i] = env.reset()[0] if ended[i] else followed[i]
        self._observations = after
        return followed, terminated, ended, returns

    def get_state(self) -> State:
        """Physics, (envs, 4) float64, and length so far, (envs,), of every running episode."""
        physics = np.stack([np.asarray(env.state, dtype=np.float64) for env in self._envs])
        return {"physics": physics, "lengths": self._lengths.copy()}

    def set_state(self, state: State) -> None:
        """Go on from the episodes that `get_state` gave."""
        for env, physics in zip(self._envs, state["physics"], strict=True):
            env.state = np.array(physics, dtype=np.float64)
            env.steps_beyond_terminated = None
        self._observations = state["physics"].astype(np.float32)
        self._lengths = np.array(state["lengths"], dtype=np.int64)


class RolloutWorker:
    """Plays with the policy it was last given.

    Args:
        seed: Seed of this worker's generator, e.g. `(run seed, worker number)`.
        envs: Environments played side by side.
    """

    def __init__(self, seed: tuple[int, ...], envs: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._envs = CartPoles(envs, self._rng)
        self._policy: Network = {}
        self._filter = ObservationFilter(4)
        self._episodes = 0

    def set_policy(self, policy: Network, filter_state: State) -> None:
        """Take the learner's weights and observation filter."""
        self._policy = {name: np.array(value) for name, value in policy.items()}
        self._filter.set_state(filter_state)

    def sample(self, steps: int) -> Batch:
        """Play `steps` steps in every environment.

        Args:
            steps: Steps per environment.

        Returns:
            What was seen; the episodes run on into the next call.
        """
        rows: list[tuple[Floats, Floats, Ints, Floats, NDArray[np.bool_], NDArray[np.bool_]]] = []
        returns: list[float] = []
        for _ in range(steps):
            seen = self._envs.observations
            log_probs = log_softmax(forward(self._policy, self._filter.apply(seen))[-1])
            actions = draw_actions(self._rng, log_probs)
            followed, terminated, ended, finished = self._envs.step(actions)
            chosen = log_probs[np.arange(len(actions)), actions]
            rows.append((seen, followed, actions, chosen, terminated, ended))
            returns += finished
        self._episodes += len(returns)
        seen_all, followed_all, actions_all, chosen_all, terminated_all, ended_all = zip(*rows, strict=True)
        return Batch(
            observations=np.stack(seen_all),
            next_observations=np.stack(followed_all),
            actions=np.stack(actions_all),
            log_probs=np.stack(chosen_all),
            rewards=np.ones(np.shape(actions_all), dtype=np.float32),
            terminated=np.stack(terminated_all),
            ended=np.stack(ended_all),
            returns=returns,
        )

    def get_state(self) -> State:
        """Everything this worker would need to go on as if nothing had happened.

        What every worker shares is found by its equal values. The rest is declared to be this worker's own, so that a
        number that happens to be equal on two of them is not taken for something shared.
        """
        own = {"envs": self._envs.get_state(), "episodes": self._episodes, "rng": self._rng.bit_generator.state}
        return {"policy": dict(self._policy), "filter": self._filter.get_state(), "own": PerRank(own)}

    def set_state(self, state: State) -> None:
        """Go on from what a checkpoint kept of `get_state`, here or in another process."""
        self.set_policy(state["policy"], state["filter"])
        own = state["own"]
        self._envs.set_state(own["envs"])
        self._episodes = own["episodes"]
        self._rng.bit_generator.state = own["rng"]

    def digests(self) -> dict[str, str]:
        """Digest of each part of the state, to prove that a restore gave back what was saved."""
        return {name: tree_digest(part) for name, part in self.get_state().items()}
