"""RLModules that are exported in tests, or that can't be."""

from __future__ import annotations

import os
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.core.distribution.torch.torch_distribution import TorchDiagGaussian
from ray.rllib.core.rl_module.torch import TorchRLModule

OBS = gym.spaces.Box(-1, 1, (4,), np.float32)
ACTION: Any = gym.spaces.Discrete(3)
NESTED = gym.spaces.Dict(
    {
        "image": gym.spaces.Box(0, 255, (5, 5, 1), np.uint8),
        "pair": gym.spaces.Tuple((gym.spaces.Discrete(4), gym.spaces.MultiDiscrete([2, 3]))),
        "far": gym.spaces.Box(-np.inf, np.inf, (2,), np.float64),
        "mask": gym.spaces.MultiBinary(3),
    }
)


class Linear(TorchRLModule):
    """One layer, in the dtype that `model_config` names."""

    def setup(self) -> None:
        config: Any = self.model_config
        self.dtype = getattr(torch, config.get("dtype", "float32"))
        self.layer = torch.nn.Linear(4, 3).to(self.dtype)

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {"action_dist_inputs": self.layer(batch["obs"].to(self.dtype))}


class Nested(TorchRLModule):
    """Observations of many kinds, with actions drawn from a Gaussian."""

    def setup(self) -> None:
        self.image = torch.nn.Linear(25, 4)
        self.table = torch.nn.Embedding(4, 4)

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        obs = batch["obs"]
        assert isinstance(obs["pair"], tuple)
        image = self.image(obs["image"].float().flatten(1) / 255)
        rest = torch.cat([obs["far"].float(), obs["pair"][1].float()], 1)
        out = image + self.table(obs["pair"][0]) + rest
        return {"action_dist_inputs": out * obs["mask"].sum(1, keepdim=True), "features": {"image": image}}

    def get_inference_action_dist_cls(self) -> type[TorchDiagGaussian]:
        return TorchDiagGaussian


class Counting(Linear):
    """With a state of its own kind: integers, and values that do not begin at zero."""

    def get_initial_state(self) -> dict[str, Any]:
        return {"t": torch.zeros(1, dtype=torch.int64), "mean": torch.full((4,), 0.5)}

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        state, obs = batch["state_in"], batch["obs"]
        mean = 0.9 * state["mean"] + 0.1 * obs[:, 0]
        state = {"t": state["t"] + 1, "mean": mean}
        return {"action_dist_inputs": self.layer(obs - mean[:, None]), "state_out": state}


class Branching(Linear):
    """Computes something else for some values."""

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        out = self.layer(batch["obs"])
        return {"action_dist_inputs": out if out.sum() > 0 else -out}


class Silent(Linear):
    """Does not say what to do."""

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {"embeddings": self.layer(batch["obs"])}


class Noisy(Linear):
    """Draws random numbers."""

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        out = self.layer(batch["obs"])
        return {"action_dist_inputs": out + torch.randn_like(out)}


class Colliding(Linear):
    """Two outputs that would have one name."""

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        out = self.layer(batch["obs"])
        return {"action_dist_inputs": out, "extra": {"x": out + 1}, "extra.x": out + 2}


class Summing(Linear):
    """An output that has no batch."""

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        out = self.layer(batch["obs"])
        return {"action_dist_inputs": out, "total": out.sum()}


class Averaging(Linear):
    """Gives one answer for the whole batch."""

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {"action_dist_inputs": self.layer(batch["obs"]).mean(0, keepdim=True)}


class Broken(Linear):
    """Fails."""

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {"action_dist_inputs": self.layer(batch["observations"])}


class Interrupted(Linear):
    """Gets a signal while it is traced."""

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        config: Any = self.model_config
        if torch.compiler.is_exporting():
            os.kill(os.getpid(), config["signal"])
        return {"action_dist_inputs": self.layer(batch["obs"])}


class TraceDependent(Linear):
    """Computes something else when it is traced: what a check after the export is for."""

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        out = self.layer(batch["obs"])
        return {"action_dist_inputs": out + 1 if torch.compiler.is_exporting() else out}
