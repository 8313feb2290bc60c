"""RLlib: `Algorithm.save_to_path` and `restore_from_path` of PPO on CartPole with one large network.

As documented: https://docs.ray.io/en/latest/rllib/checkpoints.html. The learner is local and there are no remote
EnvRunners: the case in which RLlib writes and restores least and nothing travels. One process holds all the weights, as
RLlib has no sharded ones; with a state that is sharded over N workers it holds as much as all of them together. Before
its first update the optimizer is empty, so that what is saved is the network.
"""

from __future__ import annotations

import importlib
import logging
import time
from typing import Any

import ray

from benchmarks.alternatives import sync

_LAYERS = 8


def _width(size_bytes: int) -> int:
    """Of the hidden layers, so that their float32 weights take `size_bytes`."""
    return max(16, int((size_bytes / 4 / (_LAYERS - 1)) ** 0.5))


@ray.remote(num_cpus=1)
class RLlibActor:
    """An Algorithm, in a process of its own."""

    def __init__(self, size_bytes: int) -> None:
        logging.getLogger("ray.rllib").setLevel(logging.ERROR)
        ppo: Any = importlib.import_module("ray.rllib.algorithms.ppo")
        module: Any = importlib.import_module("ray.rllib.core.rl_module.default_model_config")
        model = module.DefaultModelConfig(fcnet_hiddens=[_width(size_bytes)] * _LAYERS, vf_share_layers=True)
        config = (
            ppo.PPOConfig()
            .environment("CartPole-v1")
            .env_runners(num_env_runners=0)
            .learners(num_learners=0)
            .rl_module(model_config=model)
        )
        self._algorithm: Any = config.build_algo()
        self._folder = ""

    def ready(self) -> int:
        """Bytes of the learner's weights, once they are there."""
        state = self._algorithm.learner_group.get_weights()["default_policy"]
        return int(sum(value.nbytes for value in state.values()))

    def save(self, folder: str) -> float:
        """Seconds for which training stands still."""
        begun = time.perf_counter()
        self._folder = folder
        self._algorithm.save_to_path(folder)
        return time.perf_counter() - begun

    def wait(self) -> None:
        """fsync, which RLlib does not do."""
        sync(self._folder)

    def restore(self, folder: str) -> None:
        self._algorithm.restore_from_path(folder)
