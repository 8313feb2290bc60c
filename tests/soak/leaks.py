"""Many saves, one after the other: memory, file descriptors and shared memory of every process must stay flat."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import ray

from rl_ckpt import Checkpointer, LatestN
from tests.ray.holders import MEMORY, link, on_nodes, servers

RESTORE_EVERY = 10


@dataclass(frozen=True)
class Sample:
    """What one process, or the machine's shared memory, holds after some saves."""

    saves: int
    private_bytes: dict[str, int]
    """Memory of each process that nothing else maps, by its part in the run."""
    files: dict[str, int]
    """Open file descriptors."""
    threads: dict[str, int]
    shared_bytes: int
    """Of the run's files in shared memory."""


def many_saves(
    ckpt: Checkpointer, count: int, every: int, say: Callable[[str], None], size: int = 1 << 20
) -> list[Sample]:
    """Saves `count` times on every node, restores now and then, and looks every so often.

    Args:
        ckpt: Of a run on this cluster.
        count: Of saves.
        every: So many saves between two looks.
        say: Takes a line a look.
        size: Of each worker's own array, in elements of 4 bytes.
    """
    workers, out = on_nodes(4), list[Sample]()
    for step in range(1, count + 1):
        ray.get([worker.put.remote(_state(rank, step, size)) for rank, worker in enumerate(workers)])
        ckpt.save(step, workers).result(60)
        if step % RESTORE_EVERY == 0:
            ckpt.restore(workers)
        if step % every == 0:
            out.append(_look(ckpt, workers, step))
            say(line(out[-1]))
    return out


def checkpointer(url: str, **options: Any) -> Checkpointer:
    """With a run that does not grow."""
    return Checkpointer(url, keep=[LatestN(2)], grace_s=0, **options)


def _state(rank: int, step: int, size: int) -> dict[str, Any]:
    return {"shared": np.full(size, step, np.float32), "own": np.full(size, rank + step / 7, np.float32), "step": step}


def _look(ckpt: Checkpointer, workers: Sequence[Any], saves: int) -> Sample:
    actors = {"coordinator": link(ckpt)}
    actors |= {f"shard server {i}": actor for i, actor in enumerate(servers(ckpt).values())}
    actors |= {f"worker {i}": actor for i, actor in enumerate(workers)}
    pids = {name: int(ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))) for name, actor in actors.items()}
    found = {name: psutil.Process(pid) for name, pid in {**pids, "driver": os.getpid()}.items()}
    return Sample(
        saves,
        {name: process.memory_full_info().uss for name, process in found.items()},
        {name: process.num_fds() for name, process in found.items()},
        {name: process.num_threads() for name, process in found.items()},
        sum(path.stat().st_blocks * 512 for name in servers(ckpt) for path in (MEMORY / name).rglob("*")),
    )


def line(sample: Sample) -> str:
    """One row of the table."""
    return (
        f"{sample.saves:5d} saves: private {sum(sample.private_bytes.values()) >> 20:5d} MiB in all, "
        f"{sum(sample.files.values()):4d} file descriptors, {sum(sample.threads.values()):4d} threads, "
        f"shared memory {sample.shared_bytes >> 20:4d} MiB"
    )


def grown(first: Sample, last: Sample) -> list[str]:
    """What is more at the end than noise explains; both looks are past the warm-up."""
    out: list[str] = []
    for name, before in first.private_bytes.items():
        now = last.private_bytes[name]
        if now > before * 1.10 + (8 << 20):
            out.append(f"{name}: {before >> 20} MiB private became {now >> 20}")
    for what, a, b in (("file descriptors", first.files, last.files), ("threads", first.threads, last.threads)):
        out += [f"{name}: {n} {what} became {b[name]}" for name, n in a.items() if b[name] > n + 4]
    if last.shared_bytes > first.shared_bytes:
        out.append(f"shared memory: {first.shared_bytes} bytes became {last.shared_bytes}")
    return out
