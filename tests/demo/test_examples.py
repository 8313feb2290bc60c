"""The examples run as their docstrings say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

RUNS = {
    "periodic_saves.py": [],
    "plain_state.py": [],
    "ray_job_local.py": [],
    "rllib_import.py": [],
    "rllib_onnx.py": [],
    "rllib_policy.py": [],
    "rllib_resume.py": [],
    "rllib_subset.py": [],
    "ray_job_s3.py": [
        "--start-server",
        "--iterations",
        "12",
        "--save-every",
        "4",
        "--workers",
        "2",
        "--workers-after",
        "3",
    ],
}
# Pages of docs/ say and run the same, block by block (tests/project/test_docs.py).
SLOW = {"rllib_import.py", "rllib_onnx.py", "rllib_policy.py", "rllib_subset.py"}


def test_every_example_is_run_here() -> None:
    assert sorted(RUNS) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.soak] if n in SLOW else []) for n in RUNS])
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *RUNS[name]], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
