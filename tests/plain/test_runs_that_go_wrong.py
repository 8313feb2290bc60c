"""Runs that are rolled back, cut short or removed while somebody uses them."""

from __future__ import annotations

import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import NoReturn

import numpy as np
import pytest

from rl_ckpt import Checkpointer, InvalidInputError, StorageError
from rl_ckpt.store import plain_save
from rl_ckpt.store.run import Run


def test_a_branch_may_reach_the_old_branchs_steps_while_its_first_save_is_being_written(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path)) as ckpt:
        for step in (5, 6, 7):
            ckpt.save_state(step, {"w": np.full(3, step)}).result(60)
        ckpt.load_state(5)
        pending = [ckpt.save_state(step, {"w": np.full(3, 10 * step)}) for step in (6, 7)]
        first, second = [save.result(60) for save in pending]
        assert second.lineage[0] == first.id
        assert ckpt.load_state(7)["w"].tolist() == [70, 70, 70]


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_job_that_went_back_stays_there_though_its_first_save_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlaps: bool
) -> None:
    """Else the next one would continue what the job went back from, where its step may be taken."""
    real, asked = plain_save.write_files, Event()

    def fails(*_: object) -> NoReturn:
        monkeypatch.setattr(plain_save, "write_files", real)
        assert asked.wait(60)
        raise StorageError("the disk is full")

    with Checkpointer(str(tmp_path)) as ckpt:
        old = [ckpt.save_state(step, {"w": np.full(3, step)}).result(60) for step in (5, 6, 7)]
        ckpt.load_state(5)
        monkeypatch.setattr(plain_save, "write_files", fails)
        failing = ckpt.save_state(6, {"w": np.full(3, 60)})
        if overlaps:  # the outcome of the first is not known yet when the second begins
            second = ckpt.save_state(7, {"w": np.full(3, 70)})
        asked.set()
        with pytest.raises(StorageError, match="disk is full"):
            failing.result(60)
        if not overlaps:
            second = ckpt.save_state(7, {"w": np.full(3, 70)})
        assert second.result(60).lineage == (old[0].id,)
        third = ckpt.save_state(8, {"w": np.full(3, 80)}).result(60)
        assert third.lineage == (second.result().id, old[0].id)
        with pytest.raises(InvalidInputError, match="committed already"):
            ckpt.save_state(7, {"w": np.full(3, 70)})


def test_a_file_cut_short_that_a_newer_checkpoint_reuses_is_passed_over(tmp_path: Path) -> None:
    frozen = np.arange(100_000.0)
    with Checkpointer(str(tmp_path), write_streams=1) as ckpt:
        ckpt.save_state(1, {"n": 1}).result(60)
        reused = ckpt.save_state(2, {"frozen": frozen, "n": 2}).result(60)
        ckpt.save_state(3, {"frozen": frozen, "n": 3}).result(60)
        (file,) = (tmp_path / "shards" / reused.id).iterdir()
        file.write_bytes(file.read_bytes()[:4096])
        with pytest.warns(UserWarning, match="fell back to checkpoint 1-"):
            assert ckpt.load_state() == {"n": 1}


def test_a_run_that_is_removed_under_its_writer_is_said_and_not_saved_to(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        ckpt.save_state(1, {"n": 1}).result(60)
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(StorageError, match="was removed under this process"):
            ckpt.save_state(2, {"n": 2})
    assert not (tmp_path / "run" / "commits").exists()


def test_many_threads_read_one_log(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path)) as ckpt:
        for step in range(8):
            ckpt.save_state(step, {"n": step}).result(60)
    with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
        run = Run.open(str(tmp_path))
        found = list(pool.map(lambda _: [c.step for c in run.log.read().commits], range(200)))
    assert found == [list(range(8))] * 200
