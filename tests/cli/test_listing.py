"""`ls` and `show`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rl_ckpt import Catalog, Checkpointer
from rl_ckpt.cli.output import Node
from rl_ckpt.cli.state_tree import Leaf, tree_of
from tests.cli.conftest import Cli, save


def test_ls_is_a_line_per_checkpoint(cli: Cli, run: Path, ids: dict[int, str]) -> None:
    head, *rows = cli("ls", run).stdout.splitlines()
    assert head.split() == ["STEP", "TIME", "SIZE", "NEW", "RANKS", "METRICS", "TAGS", "ID"]
    assert [row.split()[0] for row in rows] == ["100", "200", "300"]
    assert [row.split()[-1] for row in rows] == [ids[100], ids[200], ids[300]]
    assert ["best" in row for row in rows] == [False, True, False]
    assert "return=2" in rows[1]


def test_ls_of_some(cli: Cli, run: Path) -> None:
    assert [row.split()[0] for row in cli("ls", run, "-n", 2).stdout.splitlines()[1:]] == ["200", "300"]
    assert [row.split()[0] for row in cli("ls", run, "--tag", "best").stdout.splitlines()[1:]] == ["200"]
    assert cli("ls", run, "--tag", "x").stdout == f"{run}: none of its 3 checkpoints has tag 'x'\n"


def test_a_run_that_went_back_shows_where_it_went_on_from(cli: Cli, run: Path, ids: dict[int, str]) -> None:
    with Checkpointer(str(run)) as ckpt:
        ckpt.load_state(100)
        ckpt.save_state(150, {"a": 1}).result()
    head, *rows = cli("ls", run).stdout.splitlines()
    assert head.split()[-1] == "PARENT"
    assert rows[-1].endswith(ids[100])
    assert ids[100] not in rows[1]


def test_ls_in_json(cli: Cli, run: Path, ids: dict[int, str]) -> None:
    Catalog(str(run)).note(300, "a note")
    found = json.loads(cli("ls", run, "--json").stdout)
    assert found["url"] == str(run)
    last = found["checkpoints"][-1]
    assert last.pop("time") > 1e9
    assert last.pop("bytes_written") > 0
    assert last == {
        "step": 300, "id": ids[300], "url": f"file://{run}/manifests/{ids[300]}.json", "bytes": 544, "world_size": 1,
        "parent": ids[200], "tags": [], "note": "a note", "metrics": {"return": 3.0},
    }  # fmt: skip


def test_ls_where_there_is_nothing(cli: Cli, tmp_path: Path) -> None:
    result = cli("ls", tmp_path / "none", code=3)
    assert (result.stdout, result.stderr.startswith("error: no run at")) == ("", True)
    as_json = cli("ls", tmp_path / "none", "--json", code=3)
    assert json.loads(as_json.stdout)["error"]["code"] == "not_found"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file.txt").write_text("x")
    assert "it holds ['file.txt'] but no run.json" in cli("ls", tmp_path / "other", code=3).stderr


def test_ls_of_a_run_without_checkpoints(cli: Cli, run: Path) -> None:
    for record in sorted((run / "commits").iterdir())[1:]:
        record.unlink()
    empty = run.parent / "empty"
    save(empty)
    with Checkpointer(str(empty)) as ckpt:
        ckpt.save_state(1, {}).result()
    for record in (empty / "commits").iterdir():
        if b'"commit"' in record.read_bytes():
            record.unlink()
    assert cli("ls", empty).stdout == f"{empty}: no checkpoint yet\n"


def test_the_run_may_come_from_the_environment(cli: Cli, run: Path) -> None:
    env = {"RL_CKPT_URL": str(run)}
    assert "best" in cli("ls", env=env).stdout
    assert cli("show", "best", env=env).stdout == cli("show", run, 200).stdout
    assert "'other' is no url" in cli("ls", "other", env=env, code=2).stderr
    assert "which run?" in cli("ls", code=2).stderr


def test_show(cli: Cli, run: Path, ids: dict[int, str]) -> None:
    text = cli("show", run, "best").stdout
    assert f"checkpoint:    {ids[200]}\n" in text
    assert f"parent:        {ids[100]} (1 ancestor in all)\n" in text
    assert "tags:          best\n" in text
    assert text.partition("\n\n")[2] == (
        "state  2 arrays, 544 bytes\n"
        "├── policy  2 arrays, 544 bytes\n"
        "│   ├── body  float64 [8, 8]  512 bytes\n"
        "│   └── head  float32 [4, 2]  32 bytes\n"
        "└── rng\n"
        "    ├── seed  200\n"
        "    └── name  '\\x1b[31mred'\n"
    )


def test_show_a_part(cli: Cli, run: Path) -> None:
    assert cli("show", run, "--select", "*/head").stdout.partition("\n\n")[2] == (
        "state  1 array, 32 bytes\n└── policy  1 array, 32 bytes\n    └── head  float32 [4, 2]  32 bytes\n"
    )
    assert cli("show", run, "--depth", 1).stdout.partition("\n\n")[2] == (
        "state  2 arrays, 544 bytes\n├── policy  2 arrays, 544 bytes\n└── rng\n"
    )
    assert "has no such path" in cli("show", run, "-s", "nobody", code=2).stderr
    assert "has no checkpoint" in cli("show", run, "nobody", code=3).stderr
    assert "unexpected extra argument" in cli("show", run, 100, 9, code=2).stderr


def test_show_in_json(cli: Cli, run: Path, ids: dict[int, str]) -> None:
    found = json.loads(cli("show", run, "--json", "-s", "policy").stdout)
    assert found["checkpoint"]["lineage"] == [ids[200], ids[100]]
    assert [set(file) for file in found["files"]] == [{"name", "bytes"}] * 2
    assert found["leaves"][1] == {
        "path": "policy/head", "kind": "numpy", "ranks": None, "dtype": "float32", "shape": [4, 2], "bytes": 32,
        "chunks": 1, "value": None,
    }  # fmt: skip


def test_a_state_of_several_ranks_as_a_tree() -> None:
    leaves = [
        Leaf("w", "numpy", None, "float32", (2, 2), 16, 1),
        Leaf("rng", "plain", (0, 1, 3), value="1"),
        Leaf("rng", "plain", (2,), value="2"),
        Leaf("a/b/c", "tie", None, value="w"),
        Leaf("long", "str", None, "uint8", (5000,), 5000, 1),
    ]
    root = tree_of(leaves, "state", None)
    assert (root.about, [child.name for child in root.children]) == ("2 arrays, 4.90 KiB", ["w", "rng", "a", "long"])
    ranks = root.children[1]
    assert ranks.children == [Node("(ranks 0–1, 3)", "1"), Node("(rank 2)", "2")]
    assert root.children[2].children[0].children[0] == Node("c", "→ w")
    assert root.children[3].about == "str, 4.88 KiB"


def test_a_state_that_is_one_array(cli: Cli, tmp_path: Path) -> None:
    import numpy as np

    with Checkpointer(str(tmp_path / "run")) as ckpt:
        ckpt.save_state(1, np.zeros(3)).result()
    assert cli("show", tmp_path / "run").stdout.endswith("\nstate  float64 [3]  24 bytes\n")


def test_on_a_terminal_there_are_colours_and_whole_ids(cli: Cli, run: Path, ids: dict[int, str]) -> None:
    Catalog(str(run)).note(100, "a long note " * 20)
    env = {"FORCE_COLOR": "1", "COLUMNS": "90", "TERM": "xterm"}
    shown = cli("ls", run, env=env).stdout
    assert "\x1b[" in shown
    assert all(checkpoint in shown for checkpoint in ids.values())
    assert "3 checkpoints," in shown
    tree = cli("show", run, env=env).stdout
    assert "\x1b[31mred" not in tree
    assert "\\x1b[31mred" in tree


@pytest.mark.parametrize("words", [["ls", "--nope"], ["nope"], ["ls", "a", "b"]])
def test_wrong_words(cli: Cli, words: list[str]) -> None:
    assert "Usage: rl-ckpt" in cli(*words, code=2).stderr
