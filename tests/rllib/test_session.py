"""Saves, loads in a fresh process, restores in place: every copy of the weights is the saved one, before any sample."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.rllib.algorithms.algorithm import Algorithm

import rl_ckpt
from rl_ckpt.rllib import AlgorithmCheckpointer, load, restore, save
from tests.rllib.small import (
    assert_all_hold,
    built,
    digests_of,
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
SLOW = {"dqn", "sac", "multi", "own", "lstm", "f64"}  # but for f64, each loads and goes on in test_exact.py too

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
def saved(
    ray_small: None, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, dict[str, Any]]:
    """One trained and saved Algorithm of each kind that is asked for in this session."""
    slow_too = any(item.path == request.path and item.get_closest_marker("soak") for item in request.session.items)
    out = {}
    for name, config in CASES.items():
        if name in SLOW and not slow_too:
            continue
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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.soak] if name in SLOW else [], id=name) for name in CASES]
)
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


def test_a_rollback_in_place_replaces_what_the_state_server_hands_out(ray_small: None, tmp_path: Path) -> None:
    with built(impala_config()) as algo, AlgorithmCheckpointer(str(tmp_path)) as ckpt:
        algo.train()
        ckpt.save(algo).result()
        number = rl_ckpt.Checkpointer(str(tmp_path)).load_state(select="learner")["learner"]["weights_seq_no"]
        for _ in range(2):
            algo.train()
        before = ray.get(algo._env_runner_state_server.get_version.remote())  # type: ignore[attr-defined]
        later = full_digest(algo)
        report = ckpt.restore(algo)
        assert full_digest(algo) != later
        assert set(digests_of(algo)) >= {"learner 0", "runner 1", "server"}
        assert_all_hold(algo, digests_of(algo)["learner 0"])
        assert ray.get(algo._env_runner_state_server.get_version.remote()) == number < before  # type: ignore[attr-defined]
        assert report.iteration == algo.iteration == 1
        # What was sampled with the later weights trains nobody.
        assert algo.env_runner_group.num_in_flight_async_reqs() == 0  # type: ignore[union-attr]
        assert algo.learner_group._worker_manager.num_outstanding_async_reqs() == 0  # type: ignore[union-attr]
        assert algo._episode_packs_being_built == []  # type: ignore[attr-defined]
        algo.train()
        assert full_digest(algo) != later


def test_one_call_each(ray_small: None, tmp_path: Path) -> None:
    url = str(tmp_path)
    with built(ppo_config()) as algo:
        algo.train()
        info = save(algo, url, metrics={"return": 20.0}, tag="first")
        assert (info.step, info.metrics, info.tag) == (1, {"return": 20.0}, "first")
        there, generators = full_digest(algo), np.random.get_state()[1].tolist()
        algo.train()
        np.random.rand(3)
        report = restore(algo, url, step=1)
        assert np.random.get_state()[1].tolist() == generators
        assert (report.step, report.id, report.iteration) == (1, info.id, 1)
        assert full_digest(algo) == there
        assert list(report.digests) == ["default_policy"]
    loaded = load(url)
    assert full_digest(loaded) == there
    loaded.stop()


def test_a_save_goes_on_while_it_trains_and_steps_branch(ray_small: None, tmp_path: Path) -> None:
    with built(ppo_config()) as algo, AlgorithmCheckpointer(str(tmp_path), keep=[rl_ckpt.LatestN(2)]) as ckpt:
        digests = {}
        for _ in range(3):
            algo.train()
            ckpt.save(algo)  # not waited for
            digests[algo.iteration] = full_digest(algo)
        ckpt.restore(algo, step=2)
        assert full_digest(algo) == digests[2]
        algo.train()
        info = ckpt.save(algo).result()  # step 3 once more, on another branch
        assert info.step == 3
        assert info.lineage[0].startswith("2-")
        assert ckpt.latest() is not None
        assert isinstance(algo, Algorithm)
