"""The learner: turns the rollout workers' experience into a better policy by PPO.

Owns the weights of policy and value networks, Adam's moments, the observation filter, the step counters and the
generator that shuffles minibatches; `get_state` and `set_state` hold all of it. A plain class without Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rl_ckpt.demo.observe import ObservationFilter, tree_digest
from rl_ckpt.demo.policy import (
    Floats,
    Network,
    PolicyBatch,
    adam_step,
    advantages,
    forward,
    init_network,
    policy_loss,
    value_loss,
)
from rl_ckpt.demo.rollout import Batch

State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Settings:
    """PPO's numbers, chosen so that CartPole is learned within half a minute on two cores."""

    hidden: int = 128
    """Width of both hidden layers of both networks."""
    rate: float = 1.5e-4
    """Adam's learning rate."""
    gamma: float = 0.99
    lam: float = 0.95
    clip: float = 0.1
    entropy_coef: float = 0.005
    epochs: int = 6
    """Passes over each iteration's experience."""
    minibatch: int = 256
    """Samples per gradient step."""


@dataclass(frozen=True, slots=True)
class Update:
    """What one iteration of the learner tells."""

    step: int
    """Iterations done, over all lives of the job."""
    env_steps: int
    """Environment steps taken in, over all lives of the job."""
    returns: tuple[float, ...]
    """Of the episodes that ended in this iteration."""


class Learner:
    """Learns from batches and hands out the policy.

    Args:
        seed: Seed of the weights and of the minibatches.
        settings: PPO's numbers.
    """

    def __init__(self, seed: int, settings: Settings) -> None:
        self._settings = settings
        self._rng = np.random.default_rng(seed)
        hidden = (settings.hidden, settings.hidden)
        self._policy = init_network(self._rng, (4, *hidden, 2), output_scale=0.01)
        self._value = init_network(self._rng, (4, *hidden, 1), output_scale=1.0)
        self._moments = {
            name: {kind: {key: np.zeros_like(a) for key, a in net.items()} for kind in ("m", "v")}
            for name, net in (("policy", self._policy), ("value", self._value))
        }
        self._filter = ObservationFilter(4)
        self._adam_steps = 0
        self._step = 0
        self._env_steps = 0

    def policy(self) -> tuple[Network, State]:
        """Policy weights and filter state, for `RolloutWorker.set_policy`."""
        return self._policy, self._filter.get_state()

    def update(self, *batches: Batch) -> Update:
        """Learn from what all rollout workers saw with the current policy.

        Args:
            *batches: One per rollout worker.

        Returns:
            Counters and the returns of the episodes that ended.
        """
        self._learn(*self._prepare(batches))
        # The filter moves only now: the batch was scaled, and its actions drawn, by the one before.
        self._filter.update(np.concatenate([b.observations.reshape(-1, 4) for b in batches]))
        self._step += 1
        self._env_steps += sum(b.rewards.size for b in batches)
        return Update(self._step, self._env_steps, tuple(r for b in batches for r in b.returns))

    def _prepare(self, batches: tuple[Batch, ...]) -> tuple[PolicyBatch, Floats]:
        """Experience as flat samples with normalised advantages, and the value network's targets."""
        s = self._settings
        observations = np.concatenate([self._filter.apply(b.observations) for b in batches], axis=1)
        followed = np.concatenate([self._filter.apply(b.next_observations) for b in batches], axis=1)
        values, next_values = (
            forward(self._value, x.reshape(-1, 4))[-1].reshape(x.shape[:2]) for x in (observations, followed)
        )
        estimates = advantages(
            np.concatenate([b.rewards for b in batches], axis=1),
            values,
            next_values,
            np.concatenate([b.terminated for b in batches], axis=1),
            np.concatenate([b.ended for b in batches], axis=1),
            s.gamma,
            s.lam,
        )
        normalised = (estimates - estimates.mean()) / (estimates.std() + 1e-8)
        samples = PolicyBatch(
            observations=observations.reshape(-1, 4),
            actions=np.concatenate([b.actions for b in batches], axis=1).reshape(-1),
            log_probs=np.concatenate([b.log_probs for b in batches], axis=1).reshape(-1),
            advantages=normalised.reshape(-1),
        )
        return samples, (estimates + values).reshape(-1)

    def _learn(self, samples: PolicyBatch, targets: Floats) -> None:
        """Several passes of minibatch steps of both networks."""
        s = self._settings
        for _ in range(s.epochs):
            order = self._rng.permutation(len(targets))
            for start in range(0, len(order), s.minibatch):
                pick = order[start : start + s.minibatch]
                part = PolicyBatch(
                    samples.observations[pick], samples.actions[pick], samples.log_probs[pick], samples.advantages[pick]
                )
                _, policy_grads = policy_loss(self._policy, part, s.clip, s.entropy_coef)
                _, value_grads = value_loss(self._value, part.observations, targets[pick])
                self._adam_steps += 1
                for name, net, grads in (
                    ("policy", self._policy, policy_grads),
                    ("value", self._value, value_grads),
                ):
                    moments = self._moments[name]
                    adam_step(net, grads, moments["m"], moments["v"], self._adam_steps, s.rate)

    def get_state(self) -> State:
        """Everything this learner would need to go on as if nothing had happened."""
        return {
            "policy": dict(self._policy),
            "filter": self._filter.get_state(),
            "value": dict(self._value),
            "adam": {"moments": self._moments, "steps": self._adam_steps},
            "counters": {"step": self._step, "env_steps": self._env_steps},
            "rng": self._rng.bit_generator.state,
        }

    def set_state(self, state: State) -> None:
        """Go on from what `get_state` gave; the arrays are copied, as later steps change them in place."""
        self._policy = {name: np.array(a) for name, a in state["policy"].items()}
        self._value = {name: np.array(a) for name, a in state["value"].items()}
        self._moments = {
            name: {kind: {key: np.array(a) for key, a in arrays.items()} for kind, arrays in kinds.items()}
            for name, kinds in state["adam"]["moments"].items()
        }
        self._filter.set_state(state["filter"])
        self._adam_steps = state["adam"]["steps"]
        self._step = state["counters"]["step"]
        self._env_steps = state["counters"]["env_steps"]
        self._rng.bit_generator.state = state["rng"]

    def digests(self) -> dict[str, str]:
        """Digest of each part of the state, to prove that a restore gave back what was saved."""
        return {name: tree_digest(part) for name, part in self.get_state().items()}
