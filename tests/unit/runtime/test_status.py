"""What a run says of itself: from its store alone, and what its coordinator makes of its machines."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from rl_ckpt import Checkpointer
from rl_ckpt.errors import CheckpointNotFoundError, StorageError
from rl_ckpt.options import Options
from rl_ckpt.runtime.status import PrefetchStatus, ServiceStatus, run_status
from rl_ckpt.runtime.status_work import StatusWork
from rl_ckpt.runtime.tier import Tier
from tests.unit.runtime import restore_bench, save_bench

ALONE = """
import dataclasses, json, sys
from rl_ckpt.runtime.status import run_status
status = run_status(sys.argv[1])
print(json.dumps([dataclasses.asdict(status), sorted({"ray", "torch"} & set(sys.modules))]))
"""


def test_without_a_cluster_the_store_says_what_it_knows_and_ray_is_not_imported(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        ckpt.save_state(3, {"w": np.arange(4)}).result()
        info = ckpt.save_state(5, {"w": np.arange(5)}).result()
        done = subprocess.run([sys.executable, "-c", ALONE, ckpt.url], capture_output=True, text=True, check=True)
        status, imported = json.loads(done.stdout)
        assert imported == []
        assert (status["url"], status["checkpoints"], status["service"]) == (ckpt.url, 2, None)
        assert (status["last"]["step"], status["last"]["id"], status["last"]["bytes"]) == (5, info.id, 40)
        assert status["last"]["age_s"] == pytest.approx(status["time"] - info.time)
        assert "process" in status["owner"]["by"]
        assert status["notice"] == ""
    assert run_status(str(tmp_path / "run")).owner is None, "it was let go"


def test_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no run at"):
        run_status(str(tmp_path / "nothing"))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Servers:
    """Two shard servers, of which one is gone."""

    def names(self) -> list[str]:
        return ["server-0", "server-1"]

    def get(self, name: str) -> Any:
        if name == "server-1":
            raise StorageError("it is gone")
        names = ("parts_held", "bytes_held", "store_bytes_read", "store_bytes_written", "store_retries")
        stats = dict(zip((*names, "bytes_from_peers", "bytes_coming"), (1, 2, 3, 4, 5, 6, 3), strict=True))

        async def answer() -> dict[str, int]:
            return stats

        return SimpleNamespace(stats=SimpleNamespace(remote=answer))


def look(work: StatusWork) -> ServiceStatus:
    return msgspec.msgpack.decode(asyncio.run(work.now()), type=ServiceStatus)


def test_saves_and_restores_under_way_are_told_with_their_states_and_since_when() -> None:
    saves, restores, clock = save_bench.Bench(), restore_bench.Bench(), Clock()
    prefetch = PrefetchStatus(1, "1-a", 8, 4, True)
    machines = saves.machine, restores.machine, Tier(Options()), Servers()
    work = StatusWork(*machines, lambda: prefetch, clock)  # type: ignore[arg-type]
    assert look(work) == ServiceStatus((), (), look(work).prefetch, look(work).servers)

    saves.join(0, 7)
    work.note()
    clock.now += 2
    work.note()
    (one,) = look(work).saves
    assert (one.step, one.state, one.ranks, one.joined, one.bytes) == (7, "joining", 2, 1, 0)
    assert (one.state_s, one.seconds) == (2.0, 2.0)

    saves.join(1, 7)
    saves.name()
    saves.reserve()
    work.note()
    clock.now += 3
    saves.stage(7, 0)
    (one,) = look(work).saves
    assert (one.state, one.joined, one.staged) == ("staging", 2, 1)
    assert one.checkpoint
    assert one.bytes == 4096 + 2 * 80
    assert 0 < one.bytes_staged < one.bytes
    assert (one.state_s, one.seconds) == (3.0, 5.0)

    restores.open(0)
    restores.open(1)
    restores.load()
    restores.match(0)
    (back,) = look(work).restores
    assert (back.step, back.checkpoint, back.phase, back.ranks, back.ready) == (0, "2-new", "matching", 2, 1)

    status = look(work)
    assert [(s.name, s.answers, s.parts, s.bytes, s.bytes_from_peers) for s in status.servers] == [
        ("server-0", True, 1, 2, 6),
        ("server-1", False, 0, 0, 0),
    ]
    assert status.prefetch == PrefetchStatus(1, "1-a", 8, 7, True), "with what is coming on the one that answers"
    assert json.loads(json.dumps(dataclasses.asdict(status)))["saves"][0]["step"] == 7


def test_what_is_over_is_not_told() -> None:
    restores = restore_bench.Bench()
    machines = save_bench.Bench().machine, restores.machine, Tier(Options()), Servers()
    work = StatusWork(*machines, lambda: None)  # type: ignore[arg-type]
    restores.to_over()
    assert [one.phase for one in look(work).restores] == ["over"]
    restores.applied(0)
    assert [one.ready for one in look(work).restores] == [1]
    restores.applied(1)
    assert look(work).restores == ()
