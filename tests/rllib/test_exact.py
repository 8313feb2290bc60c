"""Continues exactly: with seeds fixed, k more iterations after a load or a rollback give the uninterrupted run's bits.

Where RLlib itself is not deterministic, nobody can be: IMPALA and APPO (samples and updates run side by side), and
iterations that end by the clock (`min_time_s_per_iteration`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rl_ckpt.rllib import AlgorithmCheckpointer
from tests.rllib.small import (
    built,
    dqn_config,
    full_digest,
    lstm_config,
    multi_config,
    own_config,
    ppo_config,
    sac_config,
)

MORE = 3

CASES: dict[str, Callable[[], Any]] = {
    "ppo": ppo_config,
    "ppo, several environments": lambda: ppo_config().env_runners(num_envs_per_env_runner=3),
    "ppo, remote runners": lambda: ppo_config().env_runners(num_env_runners=2),
    "ppo, remote learner and runners": lambda: ppo_config().env_runners(num_env_runners=2).learners(num_learners=1),
    "ppo, filter": lambda: ppo_config().env_runners(env_to_module_connector=mean_std),
    "dqn": dqn_config,
    "dqn, remote runner": lambda: dqn_config().env_runners(num_env_runners=1),
    "sac": sac_config,
    "lstm": lstm_config,
    "multi": multi_config,
    "own": own_config,
}
SLOW = {"ppo, several environments", "ppo, remote learner and runners", "dqn, remote runner"}


def mean_std(*_args: Any) -> Any:
    from ray.rllib.connectors.env_to_module import MeanStdFilter

    return MeanStdFilter()


def trained(algo: Any, iterations: int) -> dict[str, str]:
    for _ in range(iterations):
        algo.train()
    return full_digest(algo)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.soak] if name in SLOW else [], id=name) for name in CASES]
)
def test_goes_on_as_if_never_interrupted(name: str, ray_small: None, tmp_path: Path) -> None:
    with AlgorithmCheckpointer(str(tmp_path)) as ckpt:
        with built(CASES[name]()) as algo:
            trained(algo, 2)
            ckpt.save(algo).result()
            there = full_digest(algo)
            uninterrupted = trained(algo, MORE)
            assert uninterrupted != there

            report = ckpt.restore(algo)  # a rollback in place
            assert full_digest(algo) == there
            assert report.notices == ()
            assert trained(algo, MORE) == uninterrupted
        loaded = ckpt.load()
        try:
            assert full_digest(loaded) == there
            assert trained(loaded, MORE) == uninterrupted
        finally:
            loaded.stop()
