"""`tag`, `untag`, `note`, `rm`, `sweep`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rl_ckpt import Catalog
from tests.cli.conftest import Cli

ROOT = Path(__file__).parents[2]
OWNER = """
import sys, rl_ckpt
with rl_ckpt.Checkpointer(sys.argv[1]) as ckpt:
    ckpt.save_state(400, {}).result()
    print("saved", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def owned(run: Path) -> Iterator[Path]:
    """A run that a job in another process owns, which has saved step 400."""
    command = [sys.executable, "-c", OWNER, str(run)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "saved\n"
        yield run
        job.communicate()
    assert job.returncode == 0


def steps(run: Path) -> list[int]:
    return [info.step for info in Catalog(str(run)).checkpoints()]


def test_tags_and_notes(cli: Cli, run: Path, ids: dict[int, str]) -> None:
    assert cli("tag", run, "latest", "shipped").stdout == f"checkpoint {ids[300]} of step 300: tags shipped\n"
    cli("tag", "shipped", "twice", env={"RL_CKPT_URL": str(run)})
    cli("note", run, "twice", "works\x1b[31m")
    assert Catalog(str(run)).find("shipped").tags == ("shipped", "twice")
    assert cli("untag", run, 300, "shipped").stdout == (
        f"checkpoint {ids[300]} of step 300: tags twice; note: works\\x1b[31m\n"
    )
    found = json.loads(cli("note", run, 300, "", "--json").stdout)
    assert (found["checkpoint"]["tags"], found["checkpoint"]["note"]) == (["twice"], "")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["tag", "RUN", "latest"], 2, "the tag's NAME is missing"),
        (["tag", "RUN", "latest", "5"], 2, "tag"),
        (["tag", "RUN", "9", "x"], 3, "no checkpoint of step 9"),
        (["untag", "RUN", "300", "x"], 2, "has no tag 'x'"),
        (["note", "RUN", "300"], 2, "the TEXT is missing"),
        (["rm", "RUN"], 2, "which checkpoints of"),
        (["rm", "RUN", "latest"], 2, "is the newest, and is never removed"),
        (["rm", "RUN", "100", "best"], 2, "`rl-ckpt untag`), or give --force"),
        (["rm", "RUN", "100", "9"], 3, "no checkpoint of step 9"),
        (["sweep", "RUN", "--every", "7"], 2, "add --latest 1 if that is meant"),
        (["sweep", "RUN", "--latest", "0"], 2, "at least 1"),
        (["sweep", "RUN", "--newer", "soon"], 2, "--newer 'soon' must be a length of time"),
        (["sweep", "RUN", "--best", ""], 2, "--best '' must be METRIC"),
    ],
)
def test_what_is_refused_changes_nothing(words: list[str], code: int, said: str, cli: Cli, run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert said in cli(*(str(run) if word == "RUN" else word for word in words), code=code).stderr
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_rm(cli: Cli, run: Path, ids: dict[int, str]) -> None:
    text = cli("rm", run, 100, "best", "--force").stdout
    assert "2 checkpoints removed\n" in text
    assert steps(run) == [300]
    assert "deleted by a later sweep" in cli("sweep", run).stdout
    assert len(list((run / "manifests").iterdir())) == 3
    cli("sweep", run, "--grace", "0s")
    assert [path.stem for path in (run / "manifests").iterdir()] == [ids[300]]
    cli("verify", run)


def test_sweep_says_what_it_would_do_and_then_does_it(cli: Cli, run: Path, ids: dict[int, str]) -> None:
    text = cli("sweep", run, "--latest", 1, "--dry-run").stdout
    head, *rows = text.partition("\n\n")[0].splitlines()
    assert head.split() == ["STEP", "ID", "VERDICT", "WHY"]
    assert [row.split(None, 3)[2:] for row in rows] == [
        ["go", "no rule keeps it"], ["keep", "tagged best"], ["keep", "the newest always stays"],
    ]  # fmt: skip
    assert "1 checkpoint would be removed\n" in text
    assert steps(run) == [100, 200, 300]
    done = json.loads(cli("sweep", run, "--latest", 1, "--json").stdout)["report"]
    assert (done["deleted"], done["dry_run"]) == ([ids[100]], False)
    assert steps(run) == [200, 300]
    assert "0 checkpoints removed\n" in cli("sweep", run).stdout


def test_rules_combine(cli: Cli, run: Path) -> None:
    rules = ["--every", 100, "--best", "return:min", "--newer", "7d", "--hourly", 24, "--daily", 7]
    verdicts = json.loads(cli("sweep", run, *rules, "-n", "--json").stdout)["report"]["verdicts"]
    assert all(one["keep"] for one in verdicts)
    why = verdicts[0]["why"]
    assert "EveryNSteps(n=100)" in why
    assert "BestN(metric='return', mode='min', n=1)" in why
    assert "NewerThan(seconds=604800.0)" in why
    kept = json.loads(cli("sweep", run, "--daily", 7, "-n", "--json").stdout)["report"]["verdicts"]
    assert [one["keep"] for one in kept] == [False, True, True]  # the last of its day, and the tagged one


def test_a_run_that_a_job_owns(cli: Cli, owned: Path, ids: dict[int, str]) -> None:
    refused = cli("sweep", owned, "--latest", 1, code=4).stderr
    assert "Only the job that owns a run deletes of it" in refused
    assert steps(owned) == [100, 200, 300, 400]
    asked = cli("rm", owned, 100).stdout
    assert "0 checkpoints removed\n" in asked
    assert f"{ids[100]}: " in asked
    assert Catalog(str(owned)).sweep(dry_run=True).verdicts[0].why.endswith("asked to remove it")
