"""Damage of every kind at every place: what is read is what was saved, or an error of ours. Never anything else.

Each mutation is made from a seed and a number, which a failure names: `-k "seed-number"`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
import pytest

from rl_ckpt import Checkpointer, CheckpointError
from tests.fuzz.damage import Change, damage
from tests.fuzz.runs import SavedRun, make_runs
from tests.unit.trees import assert_same

MUTATIONS = 250
"""Of one seed."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[SavedRun, SavedRun, SavedRun]:
    return make_runs(tmp_path_factory.mktemp("runs"))


class Disk:
    """A run's files in a folder, or in fsspec's memory, where values are read by ranges as from S3."""

    def __init__(self, url: str, run: SavedRun) -> None:
        self.url = url
        self.run = run
        self.fs, self.root = fsspec.core.url_to_fs(url)
        for name in run.files:
            self._write(name, run.files[name])

    def _write(self, name: str, data: bytes | None) -> None:
        path = f"{self.root}/{name}"
        if data is not None:
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(path, data)
        elif self.fs.exists(path):
            self.fs.rm_file(path)

    @contextmanager
    def damaged(self, change: Change) -> Iterator[None]:
        for name, data in change.items():
            self._write(name, data)
        try:
            yield
        finally:
            for name in change:
                self._write(name, self.run.files[name])


def read_all(disk: Disk) -> dict[str, int]:
    """Reads what a user may read, and compares it with what was saved.

    Returns:
        How often it was good, passed over, repaired, an error.
    """
    count = {"same": 0, "refused": 0}
    ckpt = Checkpointer(disk.url)
    for step in (None, *disk.run.saved):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", "fell back|checkpoint .* is damaged", UserWarning)
                tree = ckpt.load_state(step)
        except CheckpointError:
            count["refused"] += 1
            continue
        assert step in (None, tree["step"])
        assert_same(tree, disk.run.saved[tree["step"]])
        count["same"] += 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "records that can't be read", UserWarning)
            found = ckpt.checkpoints()
    except CheckpointError:
        return count
    for info in found:
        assert info.step in disk.run.saved
        assert info.metrics == {"loss": 0.5 * info.step}
        assert info.tag == ("best" if info.step == 2 else None)
    return count


@pytest.mark.parametrize("seed", range(12))
def test_what_is_read_is_what_was_saved_or_an_error(
    seed: int, runs: tuple[SavedRun, SavedRun, SavedRun], tmp_path: Path
) -> None:
    run = runs[seed % 3 == 2]
    disk = Disk(f"memory://fuzz-{seed}" if seed % 2 else f"file://{tmp_path}", run)
    total = {"same": 0, "refused": 0}
    for number in range(MUTATIONS):
        said, change = damage(np.random.default_rng([seed, number]), run, runs[2])
        with disk.damaged(change):
            try:
                for key, n in read_all(disk).items():
                    total[key] += n
            except Exception as error:
                raise AssertionError(f"seed {seed}, mutation {number}: {said}: {error!r}") from error
    assert total["same"] > MUTATIONS
    assert total["refused"] > MUTATIONS // 10
