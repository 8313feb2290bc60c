"""Sweeps by hand from several processes at once: nothing that both keep is lost, and nothing is half there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from rl_ckpt import Catalog, Checkpointer
from rl_ckpt.format import records
from rl_ckpt.store.committer import Committer
from rl_ckpt.store.run import Run
from tests.unit.trees import assert_same

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40
SWEEP = """
import sys
from rl_ckpt import Catalog, EveryNSteps, RunOwnedError
url, rules = sys.argv[1], [EveryNSteps(int(sys.argv[2]))]
done = refused = 0
while done < 3:
    try:
        done += bool(Catalog(url).sweep(rules, grace_s=0).verdicts)
    except RunOwnedError:
        refused += 1
        if refused == 1:
            print("refused", flush=True)
print(done, flush=True)
"""


def test_two_sweepers_at_once_lose_nothing(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    frozen = np.arange(500.0)
    with Checkpointer(url) as ckpt:
        for step in range(STEPS):
            ckpt.save_state(step, {"w": np.full(50, step), "frozen": frozen}).result(60)
    Catalog(url).tag(7, "mine")
    owner = Committer(Run.open(url), [], 0.0)  # until all of them have met it
    sweepers = [
        subprocess.Popen(
            [sys.executable, "-c", SWEEP, url, str(every)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for every in (2, 3, 2, 3)
    ]  # fmt: skip
    try:
        for one in sweepers:
            assert one.stdout is not None
            assert one.stdout.readline() == "refused\n"
        owner.close()
        said = [one.communicate(timeout=120)[0].split() for one in sweepers]
    finally:
        for one in sweepers:
            one.kill()
            one.communicate()
    assert [one.returncode for one in sweepers] == [0] * 4
    assert said == [["3"]] * 4

    both = [step for step in range(STEPS) if step % 6 == 0]
    assert [info.step for info in Catalog(url).checkpoints()] == sorted({*both, 7, STEPS - 1})
    report = Catalog(url).verify()
    assert report.ok
    for step in both:
        assert_same(Checkpointer(url).load_state(step), {"w": np.full(50, step), "frozen": frozen})
    run = Run.open(url)
    named = {file.name for commit in run.log.read().commits for file in run.manifest(commit).files}
    assert {item.name for item in run.store.list(records.SHARDS)} == named
    assert not run.store.list(records.LEASES)
