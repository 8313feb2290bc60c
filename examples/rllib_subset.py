"""Out of a checkpoint with many policies, build an algorithm with two of them; play against a frozen older self.

python examples/rllib_subset.py [URL]
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import ray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.examples.envs.classes.multi_agent import MultiAgentCartPole

from rl_ckpt.rllib import AlgorithmCheckpointer, load, restore


def player(agent_id: Any, *_: Any, **__: Any) -> str:
    """Agent k plays policy k."""
    return f"p{agent_id}"


def two(agent_id: Any, *_: Any, **__: Any) -> str:
    """All agents play one of two policies."""
    return "p0" if int(agent_id) % 2 else "p3"


def config(policies: int) -> PPOConfig:
    """Multi-agent PPO, small."""
    return (
        PPOConfig()
        .environment(MultiAgentCartPole, env_config={"num_agents": policies})
        .env_runners(num_env_runners=0)
        .rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[16]))
        .training(train_batch_size=200, minibatch_size=50, num_epochs=1)
        .multi_agent(policies={f"p{k}" for k in range(policies)}, policy_mapping_fn=player)
    )


def main(url: str) -> None:
    """Save four policies, load two, put one of them into another algorithm as its frozen opponent."""
    league = config(4).build_algo()
    league.train()
    with AlgorithmCheckpointer(url) as ckpt:
        info = ckpt.save(league).result()
    league.stop()
    print(f"saved 4 policies: {info.bytes:,} bytes")

    pair = load(url, policies=["p0", "p3"], policy_mapping_fn=two, policies_to_train=["p0"])
    print(f"an algorithm with {sorted(pair.get_module(id_) is not None and id_ for id_ in ('p0', 'p3'))}")
    pair.train()
    pair.stop()

    match = config(2).multi_agent(policies_to_train=["p0"]).build_algo()
    report = restore(match, url, policies={"p3": "p1"})  # the league's p3 is the opponent p1 here
    print(f"took over {report.policies}")
    match.stop()


if __name__ == "__main__":
    ray.init("local", num_cpus=8, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(folder)
