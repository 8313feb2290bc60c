"""Bring a checkpoint that RLlib wrote itself into a run of rl_ckpt, go on training, and write one for RLlib again.

    python examples/rllib_import.py

RLlib's own checkpoints are made of pickles. The import reads them through an unpickler that runs no code of theirs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import ray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.ppo import PPOConfig

from rl_ckpt.rllib import load, save
from rl_ckpt.rllib.native import export_native, import_native


def ppo() -> PPOConfig:
    """Small, so that an iteration takes a second."""
    return (
        PPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=0)
        .training(train_batch_size=256, minibatch_size=64, num_epochs=2)
    )


def main(folder: Path) -> None:
    """RLlib → rl_ckpt → RLlib."""
    algo = ppo().build_algo()
    algo.train()
    algo.save_to_path(str(folder / "native"))
    algo.stop()

    imported = import_native(str(folder / "native"), str(folder / "run"), allow_pickle=True)
    print(f"imported: {imported.checkpoint.id}, {imported.checkpoint.bytes:,} bytes")

    algo = load(str(folder / "run"))
    print(f"goes on after iteration {algo.iteration}")
    algo.train()
    save(algo, str(folder / "run"))
    algo.stop()

    export_native(str(folder / "run"), str(folder / "for-rllib"))
    again = Algorithm.from_checkpoint(str(folder / "for-rllib"))
    print(f"RLlib loads it: iteration {again.iteration}")
    again.stop()


if __name__ == "__main__":
    ray.init("local", num_cpus=8, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    with tempfile.TemporaryDirectory() as made:
        main(Path(made))
