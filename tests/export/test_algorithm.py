"""Policies of an Algorithm's checkpoint: each is exported by its id, and gives what the trained one gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import ray
import torch

from rl_ckpt.export import export_model
from rl_ckpt.rllib import save
from tests.rllib.small import built, multi_config


@pytest.fixture
def ray_small() -> Iterator[None]:
    ray.init("local", num_cpus=16, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_policy_of_an_algorithm(ray_small: None, tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    with built(multi_config(3)) as algo:
        algo.train()
        save(algo, url)
        module: Any = algo.get_module("p1")
        obs = np.random.default_rng(0).uniform(-1, 1, (9, 3)).astype(np.float32)
        with torch.no_grad():
            expected = module.forward_inference({"obs": torch.from_numpy(obs)})["action_dist_inputs"].numpy()
        report = export_model(url, "p1", path=tmp_path / "p1.onnx")
        session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(["action_dist_inputs"], {"obs": obs})[0], expected, atol=1e-5)
        tensors = torch.load(export_model(url, "p1", "state_dict", tmp_path / "p1.pt").path, weights_only=True)
        assert all(torch.equal(tensors[name], value) for name, value in module.state_dict().items())
        assert {name.partition(".")[0] for name in tensors} >= {"vf", "pi", "encoder"}
