"""`verify(repair=True)` after damage of every kind: what it calls good or repaired loads, and it harms nothing."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from rl_ckpt import Checkpointer, CheckpointError, VerifyReport
from tests.fuzz.damage import damage
from tests.fuzz.runs import SavedRun
from tests.unit.trees import assert_same

MUTATIONS = 40
"""Of one seed; a fifth of it for the run of packed files, which takes long to read."""


def loads(url: str, run: SavedRun) -> dict[int, bool]:
    """Which steps load whole and from their own files; what loads is compared."""
    out = {}
    for step, saved in run.saved.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                tree = Checkpointer(url).load_state(step)
        except (CheckpointError, UserWarning):
            out[step] = False
            continue
        assert_same(tree, saved)
        out[step] = True
    return out


def check(report: VerifyReport, before: dict[int, bool], after: dict[int, bool], repair: bool) -> None:
    said = {int(name.partition("-")[0]): state for name, state in report.checkpoints.items()}
    for step, state in said.items():
        if state == "good" or (state == "repaired" and repair):
            assert after[step], f"step {step} is said to be {state} and does not load"
    for step, good in before.items():
        assert after[step] or not good, f"step {step} loaded before"
        assert good or said.get(step) != "good", f"step {step} did not load, and is said to be good"


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[pytest.mark.soak] if n >= 2 else []) for n in range(6)])
def test_what_is_called_good_or_repaired_loads(
    seed: int, runs: tuple[SavedRun, SavedRun, SavedRun], tmp_path: Path
) -> None:
    run = runs[seed % 3 == 2]
    mutations = MUTATIONS if run is runs[0] else MUTATIONS // 5
    repaired = 0
    for number in range(mutations):
        said, change = damage(np.random.default_rng([1000 + seed, number]), run, runs[2])
        for name in run.files:
            data = change.get(name, run.files[name])
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            if data is not None:
                (tmp_path / name).write_bytes(data)
        untouched = {name for name in run.files if change.get(name, run.files[name]) == run.files[name]}
        try:
            before = loads(str(tmp_path), run)
            try:
                seen = Checkpointer(str(tmp_path)).verify()
                check(seen, before, before, False)
                report = Checkpointer(str(tmp_path)).verify(repair=True)
            except CheckpointError:
                assert not any(before.values())
                continue
            finally:
                for name in untouched:
                    assert (tmp_path / name).read_bytes() == run.files[name], f"{name} was good and was changed"
            assert seen.ok == (not seen.damage)
            check(report, before, loads(str(tmp_path), run), True)
            repaired += any(item.repaired_from for item in report.damage)
            again = Checkpointer(str(tmp_path)).verify()
            assert len(again.damage) == sum(item.repaired_from is None for item in report.damage), again.damage
        except Exception as error:
            raise AssertionError(f"seed {seed}, mutation {number}: {said}: {error!r}") from error
        finally:
            shutil.rmtree(tmp_path)
    assert repaired > mutations // 5
