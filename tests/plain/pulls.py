"""What the tests of pulls share: runs to pull, how a mirror must be, and a pull in a process that is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from rl_ckpt import Checkpointer
from rl_ckpt.store.base import Store
from rl_ckpt.store.run import Run
from rl_ckpt.store.urls import open_store
from tests.unit.trees import assert_same

ROOT = Path(__file__).resolve().parents[2]


def state(step: int) -> dict[str, Any]:
    """Weights that change, a table that does not, and many small leaves."""
    return {
        "w": np.random.default_rng(step).random(30_000),
        "frozen": np.arange(20_000, dtype="float32"),
        "small": {str(i): np.full(3, i + step) for i in range(20)},
        "step": step,
    }


def saved(url: str, steps: range = range(1, 4), **options: Any) -> str:
    with Checkpointer(url, **options) as ckpt:
        for step in steps:
            ckpt.save_state(step, state(step), metrics={"return": float(step)}).result(60)
    return url


def objects(store: Store) -> dict[str, bytes]:
    return {item.name: store.get(item.name) for item in store.list()}


def assert_mirror(source: str | Store, target: str | Store, step: int) -> None:
    """The checkpoint loads, and all that is at the destination is the source's, byte by byte."""
    mine, theirs = (s if isinstance(s, Store) else open_store(s) for s in (source, target))
    here, there = objects(mine), objects(theirs)
    assert {name: data for name, data in there.items() if here.get(name) != data} == {}
    run = Run.open(theirs.url, theirs.storage_options)
    ckpt = Checkpointer(theirs.url, storage_options=theirs.storage_options)
    assert_same(ckpt.load_state(step), state(step))
    assert ckpt.verify().ok
    assert run.log.read().commits[-1] in Run.open(mine.url, mine.storage_options).log.read().commits


_PULLER = """
import select, signal, sys, rl_ckpt
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
src, dst, limit, moved, phase = sys.argv[1:]
def tell(progress):
    if progress.bytes_moved >= int(moved) and phase in ("", progress.phase):
        print("there", flush=True)
        while not select.select([sys.stdin], [], [], 0.1)[0]:  # a signal just before a read would wait with it
            pass
rl_ckpt.pull(src, dst, progress=tell, max_bytes_per_s=float(limit), streams=2, nodes=False)
"""


def killed(
    src: str, dst: str, *, limit: float = 1e9, moved: int = 0, phase: str = "", sign: int = signal.SIGKILL
) -> int:
    """Runs a pull in a process of its own, which waits when so much has moved, or at a phase, and is killed there."""
    command = [sys.executable, "-c", _PULLER, src, dst, str(limit), str(moved), phase]
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "there\n", process.stderr.read()
        process.send_signal(sign)
        process.wait(60)
    return process.returncode
