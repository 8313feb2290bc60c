"""`fork` and `diff`."""

from __future__ import annotations

import json
from pathlib import Path

from rl_ckpt import Catalog, Checkpointer
from tests.cli.conftest import Cli, save


def test_diff_with_the_parent(cli: Cli, run: Path, ids: dict[int, str]) -> None:
    lines = cli("diff", run).stdout.splitlines()
    assert lines[:2] == [
        "~ rng/seed: 200 → 300",
        "~ policy/head: float32 (4, 2) numpy, 100.00% of 8 elements, norm 282.8, at most 100",
    ]
    assert lines[2].startswith(f"{ids[200]} → {ids[300]}: 2 leaves the same, 64 bytes read in ")
    assert cli("diff", run, 100).stdout.splitlines()[0] == "~ rng/seed: 100 → 300"
    assert cli("diff", run, 100, "best").stdout.splitlines()[0] == "~ rng/seed: 100 → 200"
    assert cli("diff", run, "-s", "policy/body").stdout.count("\n") == 1


def test_diff_of_two_runs_and_what_is_new(cli: Cli, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with Checkpointer(str(other)) as ckpt:
        ckpt.save_state(1, {"policy": {}, "new\n": 1}).result()
    lines = cli("diff", run, "--other", other).stdout.splitlines()
    assert "+ new\\n" in lines
    assert {"- policy/body", "- rng/seed"} <= set(lines)
    found = json.loads(cli("diff", run, "--other", other, "--json").stdout)
    assert (found["same"], found["bytes_read"], found["b"]["step"]) == (False, 0, 1)
    assert found["added"] == {"new\n": None}


def test_the_exit_code_of_diff_where_it_is_asked_for(cli: Cli, run: Path) -> None:
    cli("diff", run, "--exit-code", code=1)
    cli("diff", run, 300, 300, "--exit-code")


def test_fork(cli: Cli, run: Path, tmp_path: Path, ids: dict[int, str]) -> None:
    url = tmp_path / "fork"
    assert cli("fork", run, url, "--at", "best", "--verify").stdout.startswith(f"{url}: begins with 200-")
    assert Catalog(str(url)).find().lineage[0] == ids[200]
    cli("verify", url)
    assert json.loads(cli("ls", url, "--json").stdout)["checkpoints"][0]["step"] == 200
    assert "is held by fork" in cli("rm", run, "best", "--force", code=2).stderr
    assert "is a run already" in cli("fork", run, url, code=2).stderr


def test_forks_that_cannot_be(cli: Cli, run: Path, tmp_path: Path) -> None:
    assert (
        "no checkpoint of step 7; its steps are 100, 200, 300"
        in cli("fork", run, tmp_path / "f", "--at", 7, code=3).stderr
    )
    assert "no run at" in cli("fork", tmp_path / "none", tmp_path / "f", code=3).stderr
    assert not (tmp_path / "f").exists()
    first = tmp_path / "first"
    save(first, 1)
    assert "continues none" in cli("diff", first, code=2).stderr
