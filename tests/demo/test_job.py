"""The whole demo job in a process of its own: a cluster, training, saves, a killed node, a restore."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rl_ckpt import Checkpointer

ROOT = Path(__file__).parents[2]


def run_demo(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rl_ckpt.demo", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.parametrize(("before", "after"), [(3, 2), pytest.param(2, 4, marks=pytest.mark.soak)])
def test_the_job_loses_a_node_and_goes_on_with_another_number_of_workers(
    before: int, after: int, tmp_path: Path
) -> None:
    url = str(tmp_path / "run")
    sizes = ["--workers", str(before), "--workers-after", str(after)]
    done = run_demo("--url", url, "--out", str(tmp_path), "--iterations", "12", "--save-every", "4", *sizes)

    assert done.returncode == 0, done.stdout + done.stderr
    out = done.stdout
    assert "SIGKILL" in out
    assert "FAILED" not in out
    # Killed after step 6, so the job went back to step 4 and did 5 and 6 twice.
    steps = [int(step) for step in re.findall(r"^step +(\d+) .* return", out, re.MULTILINE)]
    assert steps == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9, 10, 11, 12]
    assert len(re.findall(r"^│.*committed", out, re.MULTILINE)) == 3
    assert (tmp_path / "return.png").read_bytes().startswith(b"\x89PNG")
    with Checkpointer(url) as ckpt:
        infos = ckpt.checkpoints()
    assert [info.step for info in infos] == [4, 8, 12]
    returns = [info.metrics["return"] for info in infos]
    assert all(isinstance(value, float) and value > 10 for value in returns)
    # The policy is on every actor and stored once; the learner's own part, with Adam's moments, is most of the bytes.
    assert all(info.bytes_written > 400_000 for info in infos)


def test_a_url_in_use_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        ckpt.save_state(1, {"a": 1}).result()
    done = run_demo("--url", str(tmp_path / "run"), "--out", str(tmp_path))
    assert done.returncode == 2
    assert "already holds checkpoints" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("args", [["--workers", "0"], ["--iterations", "4", "--save-every", "4"]])
def test_arguments_that_cannot_work_are_refused(args: list[str]) -> None:
    done = run_demo(*args)
    assert done.returncode == 2
    assert "at least" in done.stderr


def test_nobody_is_asked_to_kill_a_node_of_the_demos_own_cluster() -> None:
    done = run_demo("--kill", "you")
    assert done.returncode == 2
    assert "--address" in done.stderr
