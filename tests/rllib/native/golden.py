"""What the golden checkpoints in `tests/data/rllib` are checkpoints of; the pickles in them name what is here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.env_to_module import MeanStdFilter

from tests.rllib.small import Pairs

FOLDER = Path(__file__).resolve().parents[2] / "data" / "rllib"
_TINY = {"fcnet_hiddens": [4], "head_fcnet_hiddens": [], "vf_share_layers": False}
_TRAINING: dict[str, Any] = {"train_batch_size_per_learner": 32, "minibatch_size": 16, "num_epochs": 1}


def filtered(env: Any = None, spaces: Any = None, device: Any = None) -> MeanStdFilter:
    """The connectors between environment and module."""
    return MeanStdFilter()


def small_ppo() -> PPOConfig:
    """Of `native-2.1`, `native-2.0` and `ours-1`."""
    config = PPOConfig().environment("CartPole-v1").training(**_TRAINING).rl_module(model_config=_TINY)
    return config.env_runners(num_env_runners=0, env_to_module_connector=filtered)


def two_policies() -> PPOConfig:
    """Of `native-2.1-two`."""
    config = PPOConfig().environment(Pairs).training(**_TRAINING).rl_module(model_config=_TINY)
    script: dict[str, Any] = {"__name__": "__main__"}  # a lambda of which the pickle has the code, and no path of ours
    exec(compile("mapping = lambda agent, *_args, **_more: 'p' + agent[1:]", "train.py", "exec"), script)
    policies = {"p0", "p1"}
    return config.env_runners(num_env_runners=0).multi_agent(policies=policies, policy_mapping_fn=script["mapping"])


def old_ppo() -> PPOConfig:
    """Of `native-1.1` and `native-1.0`."""
    config = PPOConfig().api_stack(enable_rl_module_and_learner=False, enable_env_runner_and_connector_v2=False)
    config.environment("CartPole-v1").env_runners(num_env_runners=0, observation_filter="MeanStdFilter")
    return config.training(train_batch_size=32, minibatch_size=16, num_epochs=1, model={"fcnet_hiddens": [4]})
