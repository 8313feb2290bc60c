"""Environment runners: after a restore they sample what they would have sampled."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray.rllib")

from tests.rllib.runner_cases import CASES, known_ids, restore, runner_of, sampled, save

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:gymnasium")  # RLlib registers its environment anew

ROOT = Path(__file__).resolve().parents[2]
SAVABLE = [case for case in CASES if case != "unsavable"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By case: the url, ids of running episodes, what the runner sampled after the save, and the runner."""
    found = {}
    for case, config in CASES.items():
        runner = runner_of(config())
        sampled(runner, [], 3)
        url = str(tmp_path_factory.mktemp("runs") / case)
        save(url, runner)
        known = known_ids(runner)
        found[case] = (url, known, sampled(runner, known), runner)
    return found


@pytest.fixture(scope="module")
def fresh(saved: dict[str, Any]) -> dict[str, Any]:
    """By case: notices, and what a runner in another process sampled after the restore."""
    cases = json.dumps({case: (url, known) for case, (url, known, _, _) in saved.items()})
    command = [sys.executable, "-m", "tests.rllib.runner_cases", cases]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", SAVABLE)
def test_a_fresh_process_goes_on_bit_for_bit(case: str, saved: dict[str, Any], fresh: dict[str, Any]) -> None:
    notices, samples = fresh[case]
    assert notices == []
    assert samples == saved[case][2]


@pytest.mark.parametrize("case", SAVABLE)
def test_rollback_in_place_goes_on_bit_for_bit(case: str, saved: dict[str, Any]) -> None:
    url, known, samples, runner = saved[case]
    assert restore(url, runner) == []
    assert sampled(runner, known) == samples
