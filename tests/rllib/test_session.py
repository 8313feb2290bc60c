"""Saves, loads in a fresh process, restores in place: every copy of the weights is the saved one, before any sample."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rl_ckpt.rllib import save
from tests.rllib.small import (
    built,
    dqn_config,
    full_digest,
    impala_config,
    lstm_config,
    multi_config,
    own_config,
    ppo_config,
    sac_config,
)

pytestmark = pytest.mark.timeout(900)  # both processes' work is in the first test's setup
FRESH_S = 400
ROOT = Path(__file__).resolve().parents[2]

CASES: dict[str, Callable[[], Any]] = {
    "ppo": lambda: (
        ppo_config()
        .env_runners(num_env_runners=1)
        .evaluation(evaluation_interval=1, evaluation_num_env_runners=1, evaluation_duration=1)
    ),
    "dqn": dqn_config,
    "sac": sac_config,
    "impala": impala_config,
    "multi": multi_config,
    "own": own_config,
    "lstm": lstm_config,
    "bf16": lambda: own_config("bfloat16"),
    "f64": lambda: own_config("float64"),
    "two learners": lambda: ppo_config().learners(num_learners=2),
}

FRESH = """
import json, sys, warnings
import ray
from rl_ckpt.rllib import AlgorithmCheckpointer
from tests.rllib.small import digests_of, full_digest

for name, url in json.loads(sys.argv[1]).items():
    with AlgorithmCheckpointer(url) as ckpt:
        algo = ckpt.load()
    report = ckpt.last_restore
    found = {
        "copies": digests_of(algo), "full": full_digest(algo), "iteration": algo.iteration,
        "said": dict(report.digests), "again": algo.train()["training_iteration"],
    }
    print("FOUND", json.dumps([name, found]), flush=True)
    algo.stop()
"""


@pytest.fixture(scope="module")
def saved(ray_small: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One trained and saved Algorithm of each kind."""
    out = {}
    for name, config in CASES.items():
        url = str(tmp_path_factory.mktemp("run"))
        with built(config()) as algo:
            algo.train()
            algo.train()
            info = save(algo, url)
            out[name] = {"url": url, "full": full_digest(algo), "iteration": algo.iteration, "info": info}
    return out


@pytest.fixture(scope="module")
def loaded(saved: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a fresh process found, that had nothing but the urls."""
    urls = json.dumps({name: case["url"] for name, case in saved.items()})
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}
    fresh = [sys.executable, "-c", FRESH, urls]
    result = subprocess.run(fresh, cwd=ROOT, capture_output=True, text=True, timeout=FRESH_S, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    lines = [line.removeprefix("FOUND") for line in result.stdout.splitlines() if line.startswith("FOUND")]
    return dict(json.loads(line) for line in lines)


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_process_loads_from_the_url_alone(name: str, saved: dict[str, Any], loaded: dict[str, Any]) -> None:
    before, after = saved[name], loaded[name]
    assert after["full"] == before["full"]
    assert after["iteration"] == before["iteration"] == 2
    assert after["again"] == 3
    (expected,) = {json.dumps(parts, sort_keys=True) for parts in after["copies"].values()}
    assert list(json.loads(expected)) == sorted(after["said"])
    assert before["info"].step == 2


def test_every_copy_is_looked_at(loaded: dict[str, Any]) -> None:
    assert set(loaded["ppo"]["copies"]) == {"learner 0", "runner 0", "runner 1", "eval runner 0", "eval runner 1"}
    assert {"learner 0", "runner 1", "server"} <= set(loaded["impala"]["copies"])
    assert {"learner 0", "learner 1", "runner 0"} == set(loaded["two learners"]["copies"])
