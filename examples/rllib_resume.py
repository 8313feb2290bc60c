"""Train an RLlib algorithm, kill the job without warning, start it again: it goes on from its last checkpoint.

    python examples/rllib_resume.py [URL]

URL is a folder or any fsspec URL; a temporary folder is used where it is left out. The job's only line about
checkpoints is `.callbacks(checkpointing(url, ...))`: it saves beside training, and resumes by itself.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile

import ray
from ray.rllib.algorithms.ppo import PPOConfig

from rl_ckpt import LatestN
from rl_ckpt.rllib import AlgorithmCheckpointer, checkpointing


def train(url: str, iterations: int, kill_after: int | None) -> None:
    """The job: PPO on CartPole until `iterations`, with a checkpoint of each."""
    ray.init("local", num_cpus=8, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    config = (
        PPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=2)
        .training(train_batch_size=256, minibatch_size=64, num_epochs=2)
        .callbacks(checkpointing(url, every_iterations=1, keep=[LatestN(3)]))
    )
    algo = config.build_algo()
    print(f"starts after iteration {algo.iteration}", flush=True)
    while algo.iteration < iterations:
        result = algo.train()
        print(f"iteration {algo.iteration}: return {result['env_runners']['episode_return_mean']:.1f}", flush=True)
        if algo.iteration == kill_after:
            with AlgorithmCheckpointer(url) as reader:
                while (newest := reader.latest()) is None:  # the first save is still being written
                    pass
            print(f"killed; the newest checkpoint is of iteration {newest.step}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    algo.stop()


def main(url: str) -> None:
    """The same job twice: killed in the middle, then to its end."""
    job = [sys.executable, __file__, "--job", url]
    killed = subprocess.run([*job, "--kill-after", "3"], check=False)
    print(f"the first job ended with {killed.returncode}")
    subprocess.run(job, check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", nargs="?")
    parser.add_argument("--job", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--kill-after", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.job:
        train(asked.job, 5, asked.kill_after)
    elif asked.url:
        main(asked.url)
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(folder)
