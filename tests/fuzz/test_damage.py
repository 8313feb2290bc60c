"""Damage of every kind at every place: what is read is what was saved, or an error of ours. Never anything else.

Each mutation is made from a seed and a number, which a failure names: `-k "seed-number"`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
import pytest

from rl_ckpt import Checkpointer, CheckpointError
from tests.fuzz.damage import Change, damage
from tests.fuzz.runs import SavedRun
from tests.unit.trees import assert_same

MUTATIONS = 250
"""Of one seed; a third of it for the run of packed files, which takes long to read."""


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


def read(disk: Disk, step: int | None, forgot: bool, count: Counter[str]) -> None:
    """Reads a state, and compares it with what was saved at the step that it claims to be of.

    An older one than the newest must be told, unless the run `forgot`: a checkpoint without its record is none.
    """
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            tree = Checkpointer(disk.url).load_state(step)
        except CheckpointError:
            count["refused"] += 1
            return
    assert step in (None, tree["step"])
    assert_same(tree, disk.run.saved[tree["step"]])
    if not forgot and step is None and tree["step"] != max(disk.run.saved):
        assert any("fell back" in str(warning.message) for warning in told)
    for warning in told:
        (what,) = [what for what in ("fell back", "was read whole") if what in str(warning.message)]
        count[what] += 1
    count["same"] += not told


def listed(disk: Disk) -> None:
    """Lists the checkpoints, and compares what is said of them."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "records that can't be read", UserWarning)
            found = Checkpointer(disk.url).checkpoints()
    except CheckpointError:
        return
    for info in found:
        assert info.step in disk.run.saved
        assert info.metrics == {"loss": 0.5 * info.step}
        assert info.tag == ("best" if info.step == 2 else None)


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[pytest.mark.soak] if n >= 4 else []) for n in range(13)])
def test_what_is_read_is_what_was_saved_or_an_error(
    seed: int, runs: tuple[SavedRun, SavedRun, SavedRun], tmp_path: Path
) -> None:
    run = runs[seed % 6 == 5]
    disk = Disk(f"memory://fuzz-{seed}" if seed % 2 else f"file://{tmp_path}", run)
    mutations = MUTATIONS // 3 if run is runs[1] else MUTATIONS
    count: Counter[str] = Counter()
    for number in range(mutations):
        rng = np.random.default_rng([seed, number])
        said, change = damage(rng, run, runs[2])
        with disk.damaged(change):
            try:
                forgot = any(name.startswith("commits/") and data is None for name, data in change.items())
                read(disk, None, forgot, count)
                read(disk, int(rng.choice(sorted(run.saved))), forgot, count)
                listed(disk)
            except Exception as error:
                raise AssertionError(f"seed {seed}, mutation {number}: {said}: {error!r}") from error
    assert count["same"] > mutations // 2, count
    assert count["refused"] > mutations // 10, count
    assert count["fell back"] > mutations // 10, count
    assert run is runs[1] or count["was read whole"] > mutations // 50, count
