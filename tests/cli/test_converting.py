"""`export` and `import`: what the command adds to the functions, which have tests of their own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rl_ckpt import Checkpointer
from tests.cli.conftest import Cli


def test_arrays_of_a_checkpoint(cli: Cli, run: Path, tmp_path: Path, ids: dict[int, str]) -> None:
    out = tmp_path / "out.npz"
    words = ["-s", "policy", "--format", "numpy", "--out", out]
    text = cli("export", run, "best", *words).stdout
    assert text.startswith(f"{out}: 2 arrays of step 200 ({ids[200]}) as numpy, ")
    with np.load(out) as found:
        assert found["policy/head"].tolist() == [[200, 200]] * 4
    assert cli("export", run, "best", *words, code=2).stderr.startswith(f"error: {out} exists")
    out.unlink()
    report = json.loads(cli("export", run, ids[100], *words, "--json").stdout)["report"]
    assert (report["step"], report["tensors"]) == (100, 2)


def test_a_checkpoint_that_is_not_the_newest_of_its_step(
    cli: Cli, run: Path, tmp_path: Path, ids: dict[int, str]
) -> None:
    with Checkpointer(str(run)) as ckpt:
        ckpt.load_state(100)
        ckpt.save_state(200, {"w": np.ones(3)}).result()
    words = ["-s", "**", "--format", "numpy", "--out", tmp_path / "out.npz"]
    said = cli("export", run, "best", *words, code=2).stderr
    assert f"'best' is checkpoint {ids[200]}" in said
    assert not (tmp_path / "out.npz").exists()
    assert "3 arrays" not in cli("export", run, 200, *words).stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["200", "--step", "100"], "REF and --step: give one of them"),
        (["-s", "policy", "--policy", "p"], "--policy and --select: give one of them"),
        (["-s", "policy", "--out", "out.npz"], "is named as numpy, and safetensors is made without --format"),
        (["--module-class", "os:path"], "write package.module:Class"),
        (["-f", "gif"], "Usage: rl-ckpt export"),
    ],
)
def test_wrong_exports(words: list[str], said: str, cli: Cli, run: Path) -> None:
    assert said in cli("export", run, *words, code=2).stderr


def test_imports_that_cannot_be(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "algorithm_state.pkl").write_bytes(b"x")
    refused = cli("import", tmp_path / "native", tmp_path / "run", code=2).stderr
    assert "Give --allow-pickle to import it" in refused
    assert "no such directory" in cli("import", tmp_path / "none", tmp_path / "run", code=3).stderr
    assert not (tmp_path / "run").exists()
