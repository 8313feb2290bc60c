"""Small Algorithms for the tests of this folder, and what they hold, looked at without the code that is tested."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import ray
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.impala import IMPALAConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from ray.rllib.env.multi_agent_env import MultiAgentEnv

TINY = DefaultModelConfig(fcnet_hiddens=[8], head_fcnet_hiddens=[])


def ppo_config(env: Any = "CartPole-v1", seed: int | None = 7, **training: Any) -> PPOConfig:
    """PPO with a tiny net and batches of 64 steps, all of it in the driver."""
    settings = {"train_batch_size_per_learner": 64, "minibatch_size": 32, "num_epochs": 1, "lr": 1e-3} | training
    config = PPOConfig().environment(env).training(**settings).rl_module(model_config=TINY)
    return config.env_runners(num_env_runners=0).debugging(seed=seed)


def dqn_config(seed: int | None = 7, **training: Any) -> DQNConfig:
    """DQN that learns from its first steps on, from a prioritised buffer."""
    settings = {"train_batch_size_per_learner": 16, "num_steps_sampled_before_learning_starts": 32} | training
    config = DQNConfig().environment("CartPole-v1").training(**settings).rl_module(model_config=TINY)
    config.env_runners(num_env_runners=0, rollout_fragment_length=8).debugging(seed=seed)
    return config.reporting(min_sample_timesteps_per_iteration=40, min_time_s_per_iteration=None)


def sac_config(seed: int | None = 7, **training: Any) -> SACConfig:
    """SAC that learns from its first steps on."""
    settings = {"train_batch_size_per_learner": 16, "num_steps_sampled_before_learning_starts": 32} | training
    config = SACConfig().environment("Pendulum-v1").training(**settings).rl_module(model_config=TINY)
    config.env_runners(num_env_runners=0, rollout_fragment_length=8).debugging(seed=seed)
    return config.reporting(min_sample_timesteps_per_iteration=40, min_time_s_per_iteration=0)


def impala_config(seed: int | None = 7, **training: Any) -> IMPALAConfig:
    """IMPALA with a remote learner and a remote runner, which takes its weights from the state server."""
    config = IMPALAConfig().environment("CartPole-v1").training(train_batch_size_per_learner=40, **training)
    config.env_runners(num_env_runners=1, rollout_fragment_length=20).learners(num_learners=1)
    config.rl_module(model_config=TINY).debugging(seed=seed)
    return config.reporting(min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=120)


class Pairs(MultiAgentEnv):
    """`agents` agents that are rewarded for the sign of what they see; episodes of 10 steps."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.agents = self.possible_agents = [f"a{i}" for i in range((config or {}).get("agents", 2))]
        self.observation_spaces = {a: gym.spaces.Box(-1.0, 1.0, (3,), np.float32) for a in self.agents}
        self.action_spaces = {a: gym.spaces.Discrete(2) for a in self.agents}
        self.time = 0

    def _look(self) -> dict[str, Any]:
        self.seen = {a: self.np_random.uniform(-1, 1, 3).astype(np.float32) for a in self.agents}
        return self.seen

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        if seed is not None:
            self.np_random = np.random.default_rng(seed)
        self.time = 0
        return self._look(), {}

    def step(self, actions: dict[str, int]) -> Any:
        rewards = {a: float(actions[a] == (self.seen[a][0] > 0)) for a in self.agents}
        self.time += 1
        over = self.time >= 10
        return self._look(), rewards, {"__all__": over}, {"__all__": False}, {}

    def get_state(self) -> dict[str, Any]:
        return {"time": self.time, "seen": self.seen}

    def set_state(self, state: dict[str, Any]) -> None:
        self.time, self.seen = state["time"], state["seen"]


def agent_is_policy(agent: str, episode: Any = None, **_more: Any) -> str:
    """Agent `a3` acts by policy `p3`."""
    return f"p{agent[1:]}"


def multi_config(agents: int = 2, seed: int | None = 7, **training: Any) -> PPOConfig:
    """PPO with a policy for each agent."""
    config = ppo_config(Pairs, seed, **training).environment(env_config={"agents": agents})
    policies = [f"p{i}" for i in range(agents)]
    return config.multi_agent(policies=policies, policy_mapping_fn=agent_is_policy)


@contextmanager
def built(config: AlgorithmConfig) -> Iterator[Algorithm]:
    """An Algorithm, stopped at the end."""
    algo = config.build_algo()
    try:
        yield algo
    finally:
        algo.stop()


def parameters_of(module: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors by policy and name, of a learner's or runner's module."""
    inner = module.unwrapped()
    if isinstance(inner, MultiRLModule):
        return {id_: dict(inner[id_].unwrapped().state_dict()) for id_ in inner._rl_modules}
    return {"default_policy": dict(inner.state_dict())}


def digest_of(tensors: dict[str, torch.Tensor], names: Any) -> str:
    """Of the named ones, over dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name in sorted(names):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _shown(thing: Any) -> dict[str, Any]:
    """What a learner or runner acts by; runs in its process."""
    return {id_: {n: t.detach().clone() for n, t in part.items()} for id_, part in parameters_of(thing.module).items()}


def _own(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))


def copies_of(algo: Algorithm) -> dict[str, dict[str, Any]]:
    """Weights by who has them: every learner, env runner and evaluation runner, and the state server."""
    out: dict[str, dict[str, Any]] = {}
    if algo.learner_group._learner is not None:
        out["learner 0"] = _shown(algo.learner_group._learner)
    else:
        for i, actor in enumerate(algo.learner_group._worker_manager.actors().values()):
            out[f"learner {i}"] = ray.get(actor.__ray_call__.remote(_shown))
    for name, group in (("runner", algo.env_runner_group), ("eval runner", algo.eval_env_runner_group)):
        if group is None:
            continue
        if group.local_env_runner is not None:
            out[f"{name} 0"] = _shown(group.local_env_runner)
        for i, actor in group._worker_manager.actors().items():
            out[f"{name} {i}"] = ray.get(actor.__ray_call__.remote(_shown))
    server = getattr(algo, "_env_runner_state_server", None)
    state = None if server is None else ray.get(server.pull.remote())
    if state is not None:
        served = state["rl_module"]
        served = ray.get(served) if isinstance(served, ray.ObjectRef) else served
        out["server"] = {id_: {n: _own(t) for n, t in part.items()} for id_, part in served.items()}
    return out


def digests_of(algo: Algorithm) -> dict[str, dict[str, str]]:
    """By who has them: digests by policy, over what all copies of it have."""
    copies = copies_of(algo)
    ids = copies["learner 0"].keys()
    common = {id_: set.intersection(*(set(part[id_]) for part in copies.values() if id_ in part)) for id_ in ids}
    assert all(common.values())
    return {who: {id_: digest_of(part[id_], common[id_]) for id_ in part} for who, part in copies.items()}


def assert_all_hold(algo: Algorithm, expected: dict[str, str]) -> None:
    """Every copy of every policy has these digests."""
    found = digests_of(algo)
    assert {who: parts for who, parts in found.items() if parts != expected} == {}


def full_digest(algo: Algorithm) -> dict[str, str]:
    """Of everything that learner 0's modules have, by policy."""
    local = algo.learner_group._learner
    actors = [] if local is not None else list(algo.learner_group._worker_manager.actors().values())
    shown = _shown(local) if local is not None else ray.get(actors[0].__ray_call__.remote(_shown))
    return {id_: digest_of(part, part) for id_, part in shown.items()}


class OwnModule(TorchRLModule, ValueFunctionAPI):
    """A user's module: two layers with shared features, in the dtype of `model_config["dtype"]`."""

    def setup(self) -> None:
        self.dtype = getattr(torch, self.model_config.get("dtype", "float32"))
        size = self.observation_space.shape[0]
        self.body = torch.nn.Linear(size, 8, dtype=self.dtype)
        self.heads = torch.nn.ModuleDict(
            {
                "pi": torch.nn.Linear(8, self.action_space.n, dtype=self.dtype),
                "vf": torch.nn.Linear(8, 1, dtype=self.dtype),
            }
        )
        self.register_buffer("seen", torch.tensor(2**40, dtype=torch.int64))  # RLlib's own way makes 0 of it

    def _forward(self, batch: Any, **kwargs: Any) -> dict[str, Any]:
        return {"action_dist_inputs": self._forward_train(batch)["action_dist_inputs"]}

    def _forward_train(self, batch: Any, **kwargs: Any) -> dict[str, Any]:
        features = torch.tanh(self.body(batch["obs"].to(self.dtype)))
        return {"action_dist_inputs": self.heads["pi"](features).float(), "embeddings": features}

    def compute_values(self, batch: Any, embeddings: Any = None) -> Any:
        features = torch.tanh(self.body(batch["obs"].to(self.dtype)))
        return self.heads["vf"](features).squeeze(-1).float()

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: value.detach().clone() for name, value in self.state_dict().items()}  # numpy has no bfloat16

    def set_state(self, state: Any) -> None:
        self.load_state_dict(dict(state))


def own_config(dtype: str = "float32", **training: Any) -> PPOConfig:
    """PPO of a user's module."""
    spec = RLModuleSpec(module_class=OwnModule, model_config={"dtype": dtype})
    return ppo_config(**training).rl_module(rl_module_spec=spec, model_config={"dtype": dtype})


def lstm_config() -> PPOConfig:
    """PPO with a recurrent net."""
    model = DefaultModelConfig(fcnet_hiddens=[8], use_lstm=True, lstm_cell_size=8, max_seq_len=4)
    return ppo_config().rl_module(model_config=model)
