"""Checkpoints that earlier releases wrote load for ever, and equal the values they were made of."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from rl_ckpt import Checkpointer, CorruptionError
from rl_ckpt.format.records import FORMAT_VERSION
from tests.data.make_golden import golden_state, packed_state
from tests.unit.trees import assert_same

DATA = Path(__file__).resolve().parents[2] / "data"
VERSIONS = sorted(folder.name for folder in DATA.glob("v*"))


def test_there_is_a_golden_run_of_every_version() -> None:
    assert [f"v{version}" for version in range(1, FORMAT_VERSION + 1)] == VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("step", [1, 2])
def test_golden_checkpoints_load(version: str, step: int) -> None:
    assert_same(Checkpointer(str(DATA / version / "run")).load_state(step), golden_state(step))


def test_golden_packed_files_load() -> None:
    run = DATA / "v1/packed"
    assert_same(Checkpointer(str(run)).load_state(), packed_state())
    with pa.memory_map(str(next(run.rglob("*.arrow")))) as source:
        rows = pa.ipc.open_file(source).read_all()
    assert rows.filter(pc.field("path") == "bytes").num_rows >= 256  # equal ones are stored once


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_runs_tell_what_they_hold(version: str) -> None:
    first, second = Checkpointer(str(DATA / version / "run")).checkpoints()
    assert (first.step, first.tag, dict(first.metrics)) == (1, None, {"return": 12.5, "best": np.float32(2)})
    assert (second.step, second.tag, second.lineage[0]) == (2, "gold", first.id)
    assert second.bytes == first.bytes
    whole = first if version == "v1" else Checkpointer(str(DATA / version / "source")).checkpoints()[0]
    assert second.bytes_written < whole.bytes_written  # it leans on the first one's files


def test_a_golden_fork_reads_its_sources_files_wherever_both_are(tmp_path: Path) -> None:
    shutil.copytree(DATA / "v2", tmp_path / "moved")
    run, source = (Checkpointer(str(tmp_path / "moved" / name)) for name in ("run", "source"))
    assert run.checkpoints()[0].lineage == (source.checkpoints()[0].id,)
    assert run.verify().ok
    shutil.rmtree(tmp_path / "moved/source")
    with pytest.raises(CorruptionError, match="forked from the run at .*moved/source"):
        run.load_state()


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_runs_are_small(version: str) -> None:
    for run in (DATA / version).iterdir():
        assert sum(f.stat().st_size for f in run.rglob("*") if f.is_file()) < 100_000


def test_a_part_without_torch_arrays_loads_without_torch() -> None:
    script = (
        "import sys; sys.modules['torch'] = sys.modules['jax'] = None; from rl_ckpt import Checkpointer; "
        "c = Checkpointer(sys.argv[1]); print(c.load_state(select='changed')['changed'].sum(), "
        "c.load_state(as_numpy=True)['torch'].dtype)"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, str(DATA / VERSIONS[-1] / "run")],
        capture_output=True, text=True, timeout=60, cwd=DATA.parents[1],
    )  # fmt: skip
    assert (out.stdout.split(), out.stderr) == (["10", "bfloat16"], "")
