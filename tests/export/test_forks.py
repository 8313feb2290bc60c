"""Export of forks, whose files lie in other runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from rl_ckpt import Checkpointer, CorruptionError, fork
from rl_ckpt.export import export_arrays

FROZEN = np.random.default_rng(0).random(4000)


def save(url: str, step: int) -> None:
    with Checkpointer(url) as ckpt:
        if ckpt.latest() is not None:
            ckpt.load_state()
        ckpt.save_state(step, {"frozen": FROZEN, "own": np.full(500, step, np.float64)}).result(60)


@pytest.mark.parametrize("depth", [1, 2], ids=["a fork", "a fork of a fork"])
def test_a_fork_is_exported_with_what_lies_in_its_bases(tmp_path: Path, depth: int) -> None:
    source = url = str(tmp_path / "source")
    save(url, 0)
    for k in range(1, depth + 1):
        fork(url, str(tmp_path / f"fork{k}"))
        url = str(tmp_path / f"fork{k}")
        save(url, k)
    for step in range(depth - 1, depth + 1):  # the one it was forked from, and one of its own
        report = export_arrays(url, ["frozen", "own"], "numpy", tmp_path / f"{step}.npz", step=step)
        assert report.notices == ()
        with np.load(tmp_path / f"{step}.npz") as found:
            assert (found["frozen"] == FROZEN).all()
            assert (found["own"] == step).all()
    shutil.move(source, tmp_path / "elsewhere")
    with pytest.raises(CorruptionError, match=r"was forked from the run at .*source, which is not there any more"):
        export_arrays(url, "frozen", "numpy", tmp_path / "lost.npz")
    assert not (tmp_path / "lost.npz").exists()
    export_arrays(url, "own", "numpy", tmp_path / "own.npz")  # which takes nothing of the source
