"""`pull`, `push`, `watch`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rl_ckpt import Catalog
from rl_ckpt.cli import progress
from tests.cli.conftest import Cli
from tests.s3_servers import S3Server


@pytest.mark.parametrize("word", ["pull", "push"])
def test_pull_and_push(word: str, cli: Cli, run: Path, tmp_path: Path, ids: dict[int, str]) -> None:
    copy = tmp_path / "copy"
    first, second, *_ = cli(word, run, copy).stdout.splitlines()
    assert first == f"file://{copy}: {ids[300]}"
    assert second.startswith("2 files travelled, ")
    report = json.loads(cli(word, run, copy, "--at", "all", "--json").stdout)["report"]
    assert (report["checkpoints"], report["already"]) == ([ids[100], ids[200]], [ids[300]])
    assert [info.id for info in Catalog(str(copy)).checkpoints()] == list(ids.values())
    assert f"nothing new; there already: {ids[200]}" in cli(word, run, copy, "--at", "best").stdout
    cli("verify", copy)


def test_progress_of_a_pull(cli: Cli, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0)
    lines = cli("pull", run, tmp_path / "copy").stderr.splitlines()
    assert lines[0].startswith("pull: 0 bytes of ")
    assert "(100 %)" in lines[-1]


def test_between_a_folder_and_a_bucket(cli: Cli, run: Path, tmp_path: Path, moto_server: S3Server) -> None:
    env = {name: value for name, value in moto_server.environment().items() if name != "AWS_ENDPOINT_URL"}
    bucket, there = f"s3://{moto_server.new_bucket()}/run", ["--endpoint-url", moto_server.endpoint_url]
    cli("push", run, bucket, "--at", "all", *there, env=env)
    assert cli("ls", bucket, *there, env=env).stdout == cli("ls", run).stdout
    cli("pull", bucket, tmp_path / "back", *there, env=env)
    cli("verify", tmp_path / "back")
    cli("pull", bucket, f"{bucket}-2", *there, env=env)
    assert "cannot reach" in cli(
        "pull", run, bucket, "--endpoint-url", moto_server.endpoint_url, "--to-endpoint-url", "http://127.0.0.1:1",
        "--to-storage-option", "retry_deadline_s=0.1", env=env, code=1,
    ).stderr  # fmt: skip


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["pull", "RUN", "RUN"], 2, "is the source itself"),
        (["pull", "NONE", "COPY"], 3, "no run at"),
        (["pull", "RUN", "COPY", "--at", "9"], 3, "no checkpoint of step 9"),
        (["pull", "RUN", "COPY", "--limit", "fast"], 2, "--limit 'fast' must be a number of bytes"),
        (["watch", "RUN", "COPY", "--latest", "0"], 2, "at least 1"),
    ],
)
def test_what_is_refused_writes_nothing(
    words: list[str], code: int, said: str, cli: Cli, run: Path, tmp_path: Path
) -> None:
    places = {"RUN": run, "NONE": tmp_path / "none", "COPY": tmp_path / "copy"}
    assert said in cli(*(places.get(word, word) for word in words), code=code).stderr
    assert not (tmp_path / "copy").exists()


def test_watch(cli: Cli, run: Path, tmp_path: Path, ids: dict[int, str]) -> None:
    result = cli("watch", run, tmp_path / "copy", "--times", 1, "--latest", 1)
    assert result.stdout.startswith(f"file://{tmp_path}/copy: {ids[300]}  2 files travelled")
    assert result.stderr == f"watching {run}, every 10 s; Ctrl-C ends it\n"
    (line,) = cli("watch", run, tmp_path / "other", "--times", 1, "--json").stdout.splitlines()
    assert json.loads(line)["report"]["checkpoints"] == [ids[300]]
