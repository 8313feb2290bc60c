"""Environment runners in the middle of episodes, for test_runner.py, and what they sample, as text that compares.

Run as a program it is the fresh process: it makes each runner anew, restores it, samples, and prints what it sampled.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import wrappers
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.env_to_module import FlattenObservations, MeanStdFilter, PrevActionsPrevRewards
from ray.rllib.connectors.env_to_module.frame_stacking import FrameStackingEnvToModule
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.multi_agent_env import MultiAgentEnv
from ray.rllib.env.multi_agent_env_runner import MultiAgentEnvRunner
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.examples.envs.classes.multi_agent import MultiAgentCartPole

from rl_ckpt import Checkpointer, Replicated
from rl_ckpt.rllib.data import to_data
from rl_ckpt.rllib.runner import runner_problems, runner_tree, set_runner
from rl_ckpt.state.tree import flatten

SAMPLES = 4
SEQ_NO = 5


class Counting(gym.Wrapper):  # type: ignore[type-arg]
    """A wrapper that keeps something: every third reward is doubled."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.steps = 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, float(reward) * (2 if self.steps % 3 == 0 else 1), terminated, truncated, info | {"n": self.steps}

    def get_state(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def set_state(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


class Pictures(gym.Env[Any, Any]):
    """Random pictures; an episode ends by chance. Can be saved."""

    observation_space = gym.spaces.Box(0.0, 1.0, (6, 6, 1), np.float32)
    action_space = gym.spaces.Discrete(3)

    def __init__(self, config: Any = None) -> None:
        self.sum = 0.0

    def _look(self) -> Any:
        return self.np_random.random((6, 6, 1), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.sum = 0.0
        return self._look(), {}

    def step(self, action: Any) -> Any:
        self.sum += float(action) + 0.1
        return self._look(), self.sum, bool(self.np_random.random() < 0.1), False, {"sum": self.sum}

    def get_state(self) -> dict[str, Any]:
        return {"sum": self.sum}

    def set_state(self, state: dict[str, Any]) -> None:
        self.sum = state["sum"]


class Unsavable(Pictures):
    """The same without the protocol."""

    get_state = None  # type: ignore[assignment]


class Turns(MultiAgentEnv):
    """Two players in turn, so that actions hang; a third comes later, one goes early. Can be saved.

    Numbers for names: RLlib walks through sets of agents, whose order is another one for strings in each process.
    """

    def __init__(self, config: Any = None) -> None:
        space = gym.spaces.Box(-1.0, 100.0, (2,), np.float32)
        self.possible_agents = [0, 1, 2]
        self.agents = list(self.possible_agents)
        self.observation_spaces = dict.fromkeys(self.possible_agents, space)
        self.action_spaces = {name: gym.spaces.Discrete(2) for name in self.possible_agents}
        super().__init__()
        self.t = 0

    def _obs(self, names: list[int]) -> dict[Any, Any]:
        return {name: np.array([self.t, self.np_random.random()], np.float32) for name in names}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        gym.Env.reset(self, seed=seed)
        self.t = 0
        return self._obs([0]), {}

    def step(self, actions: Any) -> Any:
        self.t += 1
        names = [self.t % 2] if self.t < 13 else [0]
        names += [2] if self.t >= 7 else []
        rewards = {name: 1.0 + self.t + sum(actions.values()) for name in (0, 1)}
        if self.t > 12:
            rewards.pop(1)
        rewards |= {2: 0.5} if self.t > 7 else {}
        ends = {1: True} if self.t == 12 else {}
        names += [1] if self.t == 12 and 1 not in names else []
        done = self.t == 17
        if done:
            names = [0, 2]
        return self._obs(names), rewards, ends | {"__all__": done}, {"__all__": False}, {}

    def get_state(self) -> dict[str, Any]:
        return {"t": self.t}

    def set_state(self, state: dict[str, Any]) -> None:
        self.t = state["t"]


def _base(env: Any, **env_runners: Any) -> PPOConfig:
    settings: dict[str, Any] = {"num_envs_per_env_runner": 2, "rollout_fragment_length": 13, "num_env_runners": 0}
    return (
        PPOConfig()
        .environment(env)
        .env_runners(**(settings | env_runners))
        .rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[8], vf_share_layers=False))
        .debugging(seed=7)
    )


def _wrapped(_config: Any) -> Any:
    env: Any = gym.make("CartPole-v1", max_episode_steps=23)
    around: tuple[Callable[[Any], Any], ...] = (
        lambda inner: wrappers.StickyAction(inner, 0.3),
        wrappers.RecordEpisodeStatistics,
        wrappers.NormalizeObservation,
        wrappers.NormalizeReward,
        wrappers.TimeAwareObservation,
        lambda inner: wrappers.DelayObservation(inner, 2),
        lambda inner: wrappers.FrameStackObservation(inner, 3),
        wrappers.FlattenObservation,
        Counting,
    )
    for wrap in around:
        env = wrap(env)
    return env


def _lstm(config: PPOConfig) -> PPOConfig:
    return config.rl_module(
        model_config=DefaultModelConfig(fcnet_hiddens=[8], use_lstm=True, lstm_cell_size=6, max_seq_len=5)
    )


def _agent_to_module(agent: Any, _episode: Any, **_kwargs: Any) -> str:
    return "even" if agent in (0, 2) else "odd"


def _multi(config: PPOConfig) -> PPOConfig:
    return config.multi_agent(policies={"even", "odd"}, policy_mapping_fn=_agent_to_module).rl_module(
        rl_module_spec=MultiRLModuleSpec(rl_module_specs={"even": RLModuleSpec(), "odd": RLModuleSpec()})
    )


def _filters(env: Any, spaces: Any, device: Any) -> list[Any]:
    return [MeanStdFilter(), MeanStdFilter(clip_by_value=1.0)]  # two of one class: each has its own statistics


CASES: dict[str, Callable[[], PPOConfig]] = {
    "plain": lambda: _base("CartPole-v1"),
    "continuous": lambda: _base("Pendulum-v1"),
    "filters": lambda: _base("CartPole-v1", env_to_module_connector=_filters),
    "stack": lambda: _base(
        Pictures, env_to_module_connector=lambda env, spaces, device: FrameStackingEnvToModule(num_frames=4)
    ).rl_module(model_config=DefaultModelConfig(conv_filters=[(4, 3, 2)])),
    "random": lambda: CASES["stack"]().environment(env_config={"random": True}),
    "lstm": lambda: _lstm(
        _base(
            "CartPole-v1",
            env_to_module_connector=lambda env, spaces, device: [
                PrevActionsPrevRewards(n_prev_actions=3, n_prev_rewards=2), FlattenObservations(),
            ],
            episode_lookback_horizon=4,
        )
    ),
    "wrappers": lambda: _base(_wrapped),
    "agents": lambda: _multi(
        _base(
            MultiAgentCartPole, env_to_module_connector=lambda env, spaces, device: MeanStdFilter(multi_agent=True)
        ).environment(env_config={"num_agents": 3})
    ),
    "turns": lambda: _lstm(_multi(_base(Turns, rollout_fragment_length=5))),
    "unsavable": lambda: _base(Unsavable).rl_module(model_config=DefaultModelConfig(conv_filters=[(4, 3, 2)])),
}  # fmt: skip


def runner_of(config: PPOConfig) -> Any:
    kind = MultiAgentEnvRunner if config.is_multi_agent else SingleAgentEnvRunner
    runner = kind(config=config, worker_index=1)
    runner._weights_seq_no = SEQ_NO  # each step's, in an episode
    return runner


def weights_of(runner: Any) -> dict[str, Any]:
    if runner.config.is_multi_agent:
        return {name: module.state_dict() for name, module in runner.module.items()}
    return {"default_policy": runner.module.state_dict()}


def save(url: str, runner: Any, step: int = 1) -> None:
    with Checkpointer(url) as ckpt:
        policies = {name: {"module": weights} for name, weights in weights_of(runner).items()}
        ckpt.save_state(step, {"env_runners": {1: Replicated(runner_tree(runner))}, "policies": Replicated(policies)})


def restore(url: str, runner: Any, *, own: bool = True) -> list[str]:
    """Restores a runner that has other weights, of a larger number."""
    with Checkpointer(url) as ckpt:
        tree = ckpt.load_state()
    weights = {name: policy["module"] for name, policy in tree["policies"].items()}
    with torch.no_grad():
        for tensors in weights_of(runner).values():
            for tensor in tensors.values():
                tensor.add_(1)
    runner._weights_seq_no = SEQ_NO + 1
    assert runner_problems(runner, tree["env_runners"][1], weights) == []
    return set_runner(runner, tree["env_runners"][1], weights, SEQ_NO, own=own)


def known_ids(runner: Any) -> list[str]:
    """Ids of running episodes and of their agents' episodes."""
    ids = []
    for episode in runner._ongoing_episodes:
        if episode is not None:
            ids += [episode.id_, *(part.id_ for part in getattr(episode, "agent_episodes", {}).values())]
    return ids


def sample(runner: Any) -> Any:
    """One fragment of each environment."""
    steps = runner.config.rollout_fragment_length * runner.num_envs
    return runner.sample(num_timesteps=steps, random_actions=runner.config.env_config.get("random", False))


def sampled(runner: Any, known: list[str], samples: int = SAMPLES) -> list[str]:
    """What the next samples are: a digest for every episode chunk, and one for the metrics after each sample."""
    found = []
    for _ in range(samples):
        chunks = sample(runner)
        found += [_digest(_episode(chunk, known)) for chunk in chunks]
        metrics = runner.get_metrics()
        names = ("episode_len_mean", "episode_return_mean", "num_episodes_lifetime", "num_env_steps_sampled_lifetime")
        found.append(str([str(metrics[name]) if name in metrics else None for name in names]))
    return found


def _episode(episode: Any, known: list[str]) -> Any:
    own = episode.id_ if episode.id_ in known else "new"
    if hasattr(episode, "agent_episodes"):
        names = ("env_t", "env_t_started", "is_terminated", "is_truncated", "_len_lookback_buffers")
        hanging = (episode._hanging_actions_end, episode._hanging_rewards_end, episode._hanging_rewards_begin)
        steps = {agent: (buffer.data, buffer.lookback) for agent, buffer in episode.env_t_to_agent_t.items()}
        agents = [[agent, _episode(part, known)] for agent, part in episode.agent_episodes.items()]
        return [
            own,
            *(getattr(episode, name) for name in names),
            *hanging,
            steps,
            agents,
            dict(episode.agent_t_started),
        ]
    fields = ("t", "t_started", "is_terminated", "is_truncated", "agent_id", "module_id")
    buffers = [episode.observations, episode.actions, episode.rewards, episode.infos]
    outputs = {name: (buffer.data, buffer.lookback) for name, buffer in episode.extra_model_outputs.items()}
    data = [(_without_times(buffer.data), buffer.lookback) for buffer in buffers]
    return [own, *(getattr(episode, name) for name in fields), data, outputs]


def _without_times(data: Any) -> Any:
    """Infos of `RecordEpisodeStatistics` tell how long an episode took."""
    if isinstance(data, list) and data and isinstance(data[0], dict):
        return [{key: {k: v for k, v in item.items() if k != "t"} if key == "episode" else item
                 for key, item in info.items()} for info in data]  # fmt: skip
    return data


def _digest(value: Any) -> str:
    flat = flatten(to_data(value))
    digest = hashlib.sha256(repr(list(flat.nodes.items())).encode())
    for array in flat.arrays.values():
        digest.update(np.ascontiguousarray(array).tobytes() if isinstance(array, np.ndarray) else bytes(array))
    return digest.hexdigest()[:16]


def main() -> None:
    """Restores each case from its url and prints what it samples."""
    found = {}
    for case, (url, known) in json.loads(sys.argv[1]).items():
        runner = runner_of(CASES[case]())
        notices = restore(url, runner)
        found[case] = [notices, sampled(runner, known)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
