"""The benchmark suite runs, on sizes that measure nothing; what is not installed here is said by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.alternatives import ON_DISK, RLLIB, missing

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.timeout(300)
def test_a_quick_run_answers_and_keeps_every_sample(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    done = bench("--quick", "--only", "durable", "--json", str(out))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    kept = results.load(out)
    assert kept.questions() == ["durable"]
    assert kept.failed == ()
    compared = next(row for row in kept.of("durable") if "sharded" in row.case)
    assert len(compared.ours.values) == kept.settings["rounds"]
    every = {*ON_DISK, RLLIB}
    assert {name for name in every if compared.other(name) is not None} == {n for n in every if missing(n) is None}
    assert dict(compared.skipped) == {name: why for name in every if (why := missing(name))}
    assert "All questions" in done.stdout
    assert "Time to durable" in done.stdout


def test_a_question_that_is_none_is_refused() -> None:
    done = bench("--only", "stall,nonsense")
    assert done.returncode == 2
    assert "unknown questions: nonsense" in done.stderr
