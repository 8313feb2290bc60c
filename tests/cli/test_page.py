"""docs/cli.md: its commands run, in their order, and it names every command and only those that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rl_ckpt.cli.app import app
from tests.cli.conftest import Cli
from tests.project.doc_blocks import python_blocks
from tests.s3_servers import S3Server

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()


def test_the_commands_of_the_page(
    cli: Cli, moto_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in python_blocks(PAGE):
        exec(compile(block.code, "docs/cli.md", "exec"), {})
    bucket = moto_server.new_bucket()
    commands = [
        line.removeprefix("$ rl-ckpt ").replace("s3://bucket/", f"s3://{bucket}/")
        for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(commands) >= 12
    for words in commands:
        cli(*shlex.split(words), env=moto_server.environment())


def test_the_page_names_every_command() -> None:
    table = PAGE.partition("## Commands")[2].partition("## Output")[0]
    named = {word for row in re.findall(r"^\| (`.*?) \| ", table, re.MULTILINE) for word in re.findall(r"`(\w+)", row)}
    assert named == {command.name for command in app.registered_commands}


def test_every_command_with_json_has_its_document_named() -> None:
    table = PAGE.partition("| Command | Document |")[2].partition("## Exit codes")[0]
    named = {word for row in re.findall(r"^\| (`.*?) \| ", table, re.MULTILINE) for word in re.findall(r"`(\w+)`", row)}
    assert named == {command.name for command in app.registered_commands} - {"demo"}
