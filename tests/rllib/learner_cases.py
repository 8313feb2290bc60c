"""Learners of every algorithm, built alone and fed with fabricated episodes: no Ray, no environment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tree  # type: ignore[import-untyped]
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.impala import IMPALAConfig
from ray.rllib.algorithms.marwil import MARWILConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME, NUM_ENV_STEPS_TRAINED_LIFETIME

from rl_ckpt.rllib.learner_threads import held

OBS = gym.spaces.Box(-1, 1, (4,), np.float32)
DISCRETE: Any = gym.spaces.Discrete(2)
BOX = gym.spaces.Box(-1, 1, (2,), np.float32)
MODEL = {"fcnet_hiddens": [8], "head_fcnet_hiddens": []}
STEPS = 20  # of one fabricated episode

torch.set_num_threads(1)  # nets are tiny; and a sum by several threads need not be the same twice


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of learner."""

    name: str
    config: Callable[[], Any]
    continuous: bool = False
    policies: tuple[str, ...] = (DEFAULT_MODULE_ID,)
    replay: bool = False
    """Whether it trains on single transitions, as from a replay buffer."""
    update: dict[str, Any] | None = None

    @property
    def actions(self) -> gym.Space:
        return BOX if self.continuous else DISCRETE


def build(case: Case, seed: int = 0, learner_class: Any = None, **changes: Any) -> Any:
    """A learner with weights of its own seed."""
    torch.manual_seed(seed)
    config = case.config().training(**changes)
    if learner_class is not None:
        config = config.learners(learner_class=learner_class)
    return config.build_learner(spaces=dict.fromkeys(case.policies, (OBS, case.actions)))


def train(learner: Any, case: Case, updates: int, start: int = 0) -> None:
    """So many updates, on batches that depend on their number alone."""
    for at in range(start, start + updates):
        steps = {NUM_ENV_STEPS_SAMPLED_LIFETIME: 100 * at, NUM_ENV_STEPS_TRAINED_LIFETIME: 100 * at}
        data = TrainingData(episodes=episodes(learner, case, at))
        learner.update(training_data=data, timesteps=steps, **(case.update or {}))
    finish(learner)


def finish(learner: Any) -> None:
    """Waits until the learner's thread, if it has one, has made all updates."""
    if hasattr(learner, "_learner_thread_in_queue"):
        learner._learner_thread_in_queue.join()
        with held(learner):
            pass


def episodes(learner: Any, case: Case, seed: int) -> list[Any]:
    """Fabricated samples of all policies."""
    rng = np.random.default_rng(seed)
    out = []
    for policy in case.policies:
        whole = _episode(learner, case, policy, rng)
        out += _transitions(whole, rng) if case.replay else [whole]
    return out


def _episode(learner: Any, case: Case, policy: str, rng: np.random.Generator) -> SingleAgentEpisode:
    width = 4 if case.continuous else 2
    if case.continuous:
        acts = list(rng.uniform(-1, 1, (STEPS, 2)).astype(np.float32))
    else:
        acts = list(rng.integers(2, size=STEPS))
    extra = {
        "action_logp": [np.float32(-0.7) for _ in range(STEPS)],
        "action_dist_inputs": list(rng.normal(size=(STEPS, width)).astype(np.float32)),
    }
    if learner.module[policy].is_stateful():
        first = tree.map_structure(lambda v: np.asarray(v, np.float32), learner.module[policy].get_initial_state())
        extra["state_out"] = [first for _ in range(STEPS)]
    several: dict[str, Any] = {"agent_id": policy, "module_id": policy, "multi_agent_episode_id": "e"}
    return SingleAgentEpisode(
        observation_space=OBS,
        action_space=case.actions,
        observations=list(rng.uniform(-1, 1, (STEPS + 1, 4)).astype(np.float32)),
        actions=acts,
        rewards=list(rng.normal(size=STEPS)),
        extra_model_outputs=extra,
        terminated=True,
        len_lookback_buffer=0,
        **(several if len(case.policies) > 1 else {}),
    )


def _transitions(whole: SingleAgentEpisode, rng: np.random.Generator) -> list[SingleAgentEpisode]:
    return [
        SingleAgentEpisode(
            observation_space=OBS,
            action_space=whole.action_space,
            observations=[whole.get_observations(t), whole.get_observations(t + 1)],
            actions=[whole.get_actions(t)],
            rewards=[whole.get_rewards(t)],
            extra_model_outputs={"weights": [np.float32(rng.uniform(0.5, 1))], "n_step": [np.float32(1)]},
            terminated=t == STEPS - 1,
            len_lookback_buffer=0,
        )
        for t in range(STEPS)
    ]


def _small(config: Any, **training: Any) -> Any:
    return config.environment(observation_space=OBS).rl_module(model_config=dict(MODEL)).training(**training)


def _multi(config: Any, *policies: str) -> Any:
    return config.multi_agent(policies=list(policies), policy_mapping_fn=lambda agent, *_args, **_kw: agent)


PPO = Case(
    "ppo",
    lambda: _small(
        PPOConfig(), train_batch_size_per_learner=STEPS, lr=3e-3, entropy_coeff=[[0, 0.1], [1000, 0.0]], kl_target=1e-4
    ),
    update={"num_epochs": 2, "minibatch_size": 10, "shuffle_batch_per_epoch": True},
)
DQN = Case(
    "dqn",
    lambda: _small(DQNConfig(), lr=[[0, 1e-2], [1000, 1e-3]], target_network_update_freq=200, tau=0.5),
    replay=True,
)
SAC = Case(
    "sac",
    lambda: _small(SACConfig(), target_network_update_freq=150, tau=0.3),
    continuous=True,
    replay=True,
)
IMPALA = Case("impala", lambda: _impala(IMPALAConfig()))
APPO = Case("appo", lambda: _impala(APPOConfig()).training(use_kl_loss=True, kl_target=1e-4, use_circular_buffer=False))
MARWIL = Case("marwil", lambda: _small(MARWILConfig(), beta=1.0, lr=1e-2))


def _impala(config: Any) -> Any:
    return (
        _small(config, train_batch_size_per_learner=STEPS, lr=3e-3)
        .env_runners(rollout_fragment_length=STEPS)
        .training(broadcast_interval=10**6)  # else its thread puts weights into Ray's object store
    )


class DtypesModule(TorchRLModule):
    """bfloat16 layers, a float64 head, an int64 buffer beyond int32, a 0-dim parameter, tied weights."""

    def setup(self) -> None:
        self.body = torch.nn.Linear(4, 8).to(torch.bfloat16)
        self.again = torch.nn.Linear(8, 8, bias=False).to(torch.bfloat16)
        self.tied = torch.nn.Linear(8, 8, bias=False).to(torch.bfloat16)
        self.tied.weight = self.again.weight
        self.head = torch.nn.Linear(8, 2).to(torch.float64)
        self.scale = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.register_buffer("seen", torch.tensor([2**40, 1]))
        self.register_buffer("steps", torch.tensor(3, dtype=torch.int64))

    def _forward(self, batch: Any, **_kwargs: Any) -> Any:
        hidden = torch.tanh(self.body(batch["obs"].to(torch.bfloat16)))
        hidden = self.tied(torch.tanh(self.again(hidden)))
        return {"action_dist_inputs": self.scale * self.head(hidden.to(torch.float64))}


class DtypesLearner(TorchLearner):
    """SGD of its own loss, with an optimizer over several parameter groups."""

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        module: Any = self.module[module_id].unwrapped()
        low = [p for p in module.parameters() if p.dtype is torch.bfloat16]
        high = [p for p in module.parameters() if p.dtype is torch.float64]
        groups = [{"params": low, "lr": 0.02}, {"params": high, "weight_decay": 0.01}]
        optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.99))
        self.register_optimizer(module_id=module_id, optimizer=optimizer, params=low + high)

    def compute_loss_for_module(self, *, module_id: str, config: Any, batch: Any, fwd_out: Any) -> Any:
        module: Any = self.module[module_id].unwrapped()
        module.steps += 1
        return fwd_out["action_dist_inputs"].square().mean()


DTYPES = Case(
    "dtypes",
    lambda: (
        PPOConfig()
        .learners(learner_class=DtypesLearner)
        .rl_module(rl_module_spec=RLModuleSpec(module_class=DtypesModule))
    ),
)

CASES = [
    PPO,
    Case(
        "ppo-lstm",
        lambda: PPO.config().rl_module(model_config={**MODEL, "use_lstm": True, "lstm_cell_size": 8, "max_seq_len": 5}),
        update={"num_epochs": 2},
    ),
    Case("ppo-multi", lambda: _multi(PPO.config(), "a--b", "a_b"), policies=("a--b", "a_b"), update={"num_epochs": 2}),
    DQN,
    SAC,
    MARWIL,
    IMPALA,
    APPO,
    DTYPES,
]
