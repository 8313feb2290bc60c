"""Deploy a policy: load one RLModule from a checkpoint of an algorithm, with no algorithm, environment or Ray.

python examples/rllib_policy.py [URL]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

import gymnasium as gym
import ray
import torch
from ray.rllib.algorithms.ppo import PPOConfig

from rl_ckpt.rllib import load_policy, save


def ppo() -> PPOConfig:
    """Small, so that an iteration takes a second."""
    return (
        PPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=0)
        .training(train_batch_size=256, minibatch_size=64, num_epochs=2)
    )


def train(url: str) -> None:
    """A few iterations of PPO, and a checkpoint."""
    ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    algo = ppo().build_algo()
    for _ in range(3):
        algo.train()
    save(algo, url)
    algo.stop()
    ray.shutdown()


def serve(url: str) -> None:
    """Plays an episode with the policy alone."""
    policy = load_policy(url)
    assert not ray.is_initialized()
    env = gym.make("CartPole-v1")
    observation, _ = env.reset(seed=0)
    steps, done = 0, False
    while not done:
        logits = policy.forward_inference({"obs": torch.from_numpy(observation)[None]})["action_dist_inputs"]
        observation, _, terminated, truncated, _ = env.step(int(logits.argmax()))
        steps, done = steps + 1, terminated or truncated
    print(f"{type(policy).__name__} held the pole for {steps} steps")


def main(url: str) -> None:
    """Trains here; serves in a process that knows nothing but the url."""
    train(url)
    subprocess.run([sys.executable, __file__, "--serve", url], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    elif len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(folder)
