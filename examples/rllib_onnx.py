"""Export a policy to ONNX, and run it with onnxruntime alone.

    python examples/rllib_onnx.py

The export compares the file with the policy on random inputs before it says that it succeeded.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import ray
from ray.rllib.algorithms.ppo import PPOConfig

from rl_ckpt.export import export_model
from rl_ckpt.rllib import save


def ppo() -> PPOConfig:
    """Small, so that an iteration takes a second."""
    return (
        PPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=0)
        .training(train_batch_size=256, minibatch_size=64, num_epochs=2)
    )


def main(folder: Path) -> None:
    """Trains, saves, exports, runs."""
    algo = ppo().build_algo()
    algo.train()
    save(algo, str(folder / "run"))
    algo.stop()

    report = export_model(str(folder / "run"), "default_policy", format="onnx", path=folder / "policy.onnx")
    print(f"{report.path}: differs from the policy by at most {report.max_difference}")

    session = onnxruntime.InferenceSession(str(folder / "policy.onnx"), providers=["CPUExecutionProvider"])
    observations = np.random.default_rng(0).standard_normal((5, 4), dtype=np.float32)
    (logits,) = session.run(["action_dist_inputs"], {session.get_inputs()[0].name: observations})
    print(f"actions: {logits.argmax(axis=1).tolist()}")


if __name__ == "__main__":
    ray.init("local", num_cpus=8, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    with tempfile.TemporaryDirectory() as made:
        main(Path(made))
