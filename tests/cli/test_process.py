"""`rl-ckpt` as a process: what it imports, how it ends, what a signal leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Cli, save
from tests.s3_servers import S3Server

ROOT = Path(__file__).parents[2]


def start(code: str, *words: object, **more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    command = [sys.executable, *(["-c", code] if code else ["-m", "rl_ckpt.cli"]), *map(str, words)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def call(*words: object, code: str = "", **more: str) -> tuple[int, str, str]:
    with start(code, *words, **more) as process:
        out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_commands_of_the_store_import_no_ray(run: Path, tmp_path: Path) -> None:
    code = """
import sys
from rl_ckpt.cli.main import main
run, copy = sys.argv[1:]
for words in (["ls", run], ["show", run], ["verify", run], ["diff", run], ["tag", run, "100", "x"], ["doctor", run],
              ["sweep", run, "-n"], ["rm", run, "100", "-f"], ["fork", run, copy], ["top", run]):
    assert main(words) == 0, words
    assert "ray" not in sys.modules, words
"""
    ended, _, err = call(run, tmp_path / "fork", code=code)
    assert (ended, err) == (0, "")


def test_the_version_and_the_help() -> None:
    assert call("--version") == (0, "rl-ckpt 0.1.0\n", "")
    code, out, _ = call("--help")
    assert code == 0
    names = "ls show verify doctor tag untag note rm sweep diff fork pull push watch prefetch export import top demo"
    assert [name for name in names.split() if f"│ {name} " not in out] == []
    assert call()[0] == 2


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_extra_it_says_what_to_install(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None\nfrom rl_ckpt.cli.main import main\nsys.exit(main(['ls']))"
    assert call(code=code) == (
        2, "", f"error: rl-ckpt needs {package}, which is not installed: pip install 'rl-ckpt[cli]'\n"
    )  # fmt: skip


def test_exit_codes(run: Path) -> None:
    assert [call(*words)[0] for words in (["ls", run], ["ls", f"{run}-2"], ["ls", run, "-n", "x"])] == [0, 3, 2]


def test_whoever_stops_reading_hears_no_complaint(run: Path) -> None:
    with start("", "show", run) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


HELD = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
import sys
import rl_ckpt.store.verify as room
from rl_ckpt.cli.main import main

def held(*_):
    print("reading", flush=True)
    sys.stdin.read()

room.bad_spots = held
sys.exit(main(["verify", sys.argv[1], "200"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_verify_leaves_nothing(number: signal.Signals, run: Path) -> None:
    before = sorted(run.rglob("*"))
    with start(HELD, run) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        assert len(list((run / "pins").iterdir())) == 1
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.startswith("interrupted; ")
    assert sorted(run.rglob("*")) == before


SLOW = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
import sys
from rl_ckpt.cli import progress
from rl_ckpt.cli.main import main
progress.EVERY_S = 0
sys.exit(main(["pull", sys.argv[1], sys.argv[2], "--limit", "200kB"]))
"""


def test_an_interrupted_pull_keeps_what_arrived_and_goes_on(tmp_path: Path, cli: Cli) -> None:
    import numpy as np

    from rl_ckpt import Checkpointer

    run, copy = tmp_path / "run", tmp_path / "copy"
    with Checkpointer(str(run), chunk_bytes=32 << 10) as ckpt:
        ckpt.save_state(1, {"w": np.random.default_rng(1).random(1 << 17)}).result()  # 1 MiB: five seconds
    with start(SLOW, run, copy) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("pull: ") and not line.startswith("pull: 0 bytes"):
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("interrupted; what arrived is kept")
    assert not list(copy.glob("commits/*"))
    assert not list(run.glob("pins/*"))
    report = json.loads(cli("pull", run, copy, "--json").stdout)["report"]
    assert report["bytes_kept"] > 0
    assert report["bytes_moved"] + report["bytes_kept"] == sum(f.stat().st_size for f in run.glob("shards/*/*"))
    cli("verify", copy)


def test_completion_for_each_shell() -> None:
    # Else typer looks which shell it was started from: below a test runner, there may be none.
    named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    for shell, sign in (("bash", "complete -o"), ("zsh", "#compdef"), ("fish", "complete --command")):
        code, out, _ = call("--show-completion", shell, **named)
        assert code == 0
        assert "_RL_CKPT_COMPLETE" in out
        assert sign in out
    completing = {"_RL_CKPT_COMPLETE": "complete_bash", "COMP_WORDS": "rl-ckpt swe", "COMP_CWORD": "1"}
    assert call(**completing)[1].split() == ["sweep"]


def test_the_script_is_declared() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"rl-ckpt": "rl_ckpt.cli.main:main"}
    assert [name.partition(">")[0] for name in project["optional-dependencies"]["cli"]] == ["rich", "typer"]


def test_what_a_new_user_hears(cli: Cli, tmp_path: Path, moto_server: S3Server) -> None:
    bucket, there = moto_server.new_bucket(), ["--endpoint-url", moto_server.endpoint_url]
    env = {name: value for name, value in moto_server.environment().items() if name != "AWS_ENDPOINT_URL"}
    assert "no credentials found. Set AWS_ACCESS_KEY_ID" in cli("ls", f"s3://{bucket}/run", *there, code=2).stderr
    assert "-o key=… -o secret=…" in cli("ls", f"s3://{bucket}/run", *there, code=2).stderr
    assert "names no place" in cli("ls", "s3://", code=2).stderr
    assert "unknown scheme 'ftq'" in cli("ls", "ftq://host/run", code=2).stderr
    assert "nothing is there yet" in cli("ls", f"s3://{bucket}/run", *there, env=env, code=3).stderr
    assert "the bucket does not exist" in cli("ls", "s3://nobody-s/run", *there, env=env, code=2).stderr
    away = cli(
        "ls", f"s3://{bucket}/r", "--endpoint-url", "http://127.0.0.1:1", "-o", "retry_deadline_s=0.1", env=env, code=1
    )
    assert "Check AWS_ENDPOINT_URL or --endpoint-url, the network and that the server runs" in away.stderr
    assert "NAME=VALUE" in cli("ls", f"s3://{bucket}/run", "-o", "anon", code=2).stderr
    assert "profile" in cli("ls", f"s3://{bucket}/run", "--profile", "nobody", code=2).stderr.lower()
    save(tmp_path / "run", 1)
    assert "takes no storage_options" in cli("ls", tmp_path / "run", "--profile", "x", code=2).stderr
