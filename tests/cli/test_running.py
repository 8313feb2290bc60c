"""`top`, `prefetch` and `demo`: with a cluster and without."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from rl_ckpt import Checkpointer
from rl_ckpt.cli.status_lines import status_lines
from rl_ckpt.runtime.status import (
    LastCommit,
    OwnerStatus,
    PrefetchStatus,
    RestoreStatus,
    RunStatus,
    SaveStatus,
    ServerStatus,
    ServiceStatus,
)
from tests.cli.conftest import Cli
from tests.ray.holders import Holder, one_node
from tests.s3_servers import free_port


def test_a_status_in_lines() -> None:
    service = ServiceStatus(
        saves=(SaveStatus(9, "9-a", "staging", 4, 4, 3, 4 << 20, 3 << 20, 2 << 20, 1 << 20, 1.0, 2.5),),
        restores=(
            RestoreStatus(None, "", "opening", 4, 1, {}, 0.5, 0.5),
            RestoreStatus(8, "8-a", "fetching", 4, 4, {"store": 1024}, 1, 2),
        ),
        prefetch=PrefetchStatus(8, "8-a", 4096, 1024, True),
        servers=(ServerStatus("a", True, 2, 2048, 10, 20, 3, 0), ServerStatus("b", False)),
        memory_bytes=4096, memory_parts=2, copies_missing=1, in_memory=("8-a", "7-a"),
    )  # fmt: skip
    status = RunStatus(
        "s3://b/run", 1000.0, LastCommit(8, "8-a", 940.0, 60.0, 2048), OwnerStatus("me", "job 1", 400.0, 900.0, 30.0),
        service, 3, "the store is slow",
    )  # fmt: skip
    assert status_lines(status) == [
        "run       s3://b/run",
        "last      step 8, 1 min ago, 2.00 KiB (8-a); 3 checkpoints in the store",
        "owner     me for job 1, since 10 min ago, seen 1 min 40 s ago: dead, or its clock is wrong",
        "memory    4.00 KiB in 2 parts, 1 copy missing: 8-a, 7-a",
        "save      step 9  staging for 1.0 s  4 of 4 ranks joined, 3 staged  [###############.....] staged 3.00 MiB of "
        "4.00 MiB, written 1.00 MiB of 2.00 MiB  2.5 s in all",
        "restore   step ?  opening for 0.5 s  1 of 4 ranks ready  0.5 s in all",
        "restore   step 8  fetching for 1.0 s  4 of 4 ranks ready  1.00 KiB from store  2.0 s in all",
        "prefetch  step 8  under way  [#####...............] 1.00 KiB of 4.00 KiB in memory",
        "server    a: 2 parts, 2.00 KiB; store read 10 bytes, written 20 bytes, 3 retries; from peers 0 bytes",
        "server    b: does not answer",
        "notice    the store is slow",
    ]
    idle = RunStatus("u", 0.0, None, None, ServiceStatus())
    assert status_lines(idle)[1:] == [
        "last      no checkpoint yet", "owner     nobody", "memory    0 bytes in 0 parts", "now       nothing under way"
    ]  # fmt: skip


def test_top_without_a_cluster(cli: Cli, run: Path) -> None:
    lines = cli("top", run).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "last", "owner"]
    found = json.loads(cli("top", run, "--json").stdout)
    assert (found["last"]["step"], found["service"], found["checkpoints"]) == (300, None, 3)
    assert "no run at" in cli("top", f"{run}-2", code=3).stderr


@pytest.mark.parametrize("words", [["top"], ["prefetch"], ["pull", "copy"]])
def test_a_cluster_that_is_not_there(words: list[str], cli: Cli, run: Path, tmp_path: Path) -> None:
    places = [str(tmp_path / word) for word in words[1:]]
    said = cli(words[0], run, *places, "--address", f"127.0.0.1:{free_port()}", code=2).stderr
    assert "no Ray cluster at '127.0.0.1:" in said
    assert "ray start --head" in said


def test_demo_takes_its_own_words(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--workers-after" in cli("demo", "--help").stdout
    assert "at least 1 worker" in cli("demo", "--workers", "0", code=2).stderr


def test_prefetch_and_top_on_a_cluster(cli: Cli, tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    with one_node():
        workers = [Holder.remote({"w": np.arange(50_000.0), "rank": rank}) for rank in range(2)]
        with Checkpointer(url) as ckpt:
            ckpt.save(1, workers).result(60)
            found = json.loads(cli("top", url, "--address", "auto", "--json").stdout)
            assert (found["last"]["step"], len(found["service"]["servers"])) == (1, 1)
        said = cli("prefetch", url, "1").stdout
        assert re.match(r"step 1 \(1-\w+\): .* in the memory of 1 node, .* read in ", said)
        assert "prefetch  step 1  done" in cli("top", url, "--address", "auto").stdout
        assert "no checkpoint" in cli("prefetch", url, "nobody", code=3).stderr
        with Checkpointer(url) as ckpt:
            assert ckpt.restore(workers).bytes_from.get("store", 0) == 0
