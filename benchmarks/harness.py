"""What every question is measured with: a cluster of its own, workers, and rounds that run all ways in turn."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

import rl_ckpt
from benchmarks.settings import WARM_UP
from benchmarks.workers import BenchWorker

_WORKER: Any = BenchWorker  # an actor class, which Ray's decorator types as the plain one
ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def cluster(cpus: int, store_bytes: int = 200 << 20) -> Iterator[None]:
    """A Ray cluster of this process only.

    Args:
        cpus: More than the machine has, so that all actors are placed.
        store_bytes: Of Ray's object store.
    """
    reach_actors()
    ray.init(
        address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=store_bytes, log_to_driver=False
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def raylets(count: int, store_bytes: int) -> Iterator[list[str]]:
    """A cluster of several raylets on this machine; their ids."""
    reach_actors()
    node = {"num_cpus": 2, "object_store_memory": max(store_bytes, 100 << 20)}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    try:
        for _ in range(count - 1):
            cluster.add_node(**node, wait=False)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        yield [each["NodeID"] for each in ray.nodes()]
    finally:
        ray.shutdown()
        cluster.shutdown()


def reach_actors() -> None:
    """The benchmark's own modules are not installed: PYTHONPATH brings them to the actors."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


@contextmanager
def folder() -> Iterator[Path]:
    """An empty folder on the disk to be measured (TMPDIR, or the system's)."""
    with tempfile.TemporaryDirectory(prefix="rl_ckpt-bench-") as name:
        yield Path(name)


@contextmanager
def team(workers: int, size_bytes: int, kind: str) -> Iterator[list[Any]]:
    """Workers with their state made.

    Args:
        workers: How many.
        size_bytes: Of each one's state.
        kind: See `BenchWorker`.
    """
    actors = [_WORKER.remote(rank, workers, size_bytes, kind) for rank in range(workers)]
    try:
        call_all(actors, "ready")
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)


def call_all(actors: Sequence[Any], method: str, *args: Any) -> list[Any]:
    """The same call in all actors at once; their answers by rank."""
    found: list[Any] = ray.get([getattr(actor, method).remote(*args) for actor in actors])
    return found


def timed(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


Way = Callable[[int], Mapping[str, float]]
"""Runs something once, in a given round; returns its measures by name."""
Ways = Mapping[str, Way]


def rounds(count: int, ways: Ways, before: Callable[[int], Any] | None = None) -> dict[str, dict[str, list[float]]]:
    """Runs all ways in each round, every other round in reverse, so that none always inherits the same cache.

    Args:
        count: Rounds that count; `WARM_UP` more come first and are left out of what is returned.
        ways: To be run in each round.
        before: Called with the round before each of them.

    Returns:
        Way → measure → values by round.
    """
    found: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
    for number in range(WARM_UP + count):
        for name in ways if number % 2 == 0 else reversed(list(ways)):
            if before is not None:
                before(number)
            for measure, value in ways[name](number).items():
                found[name].setdefault(measure, []).append(value)
    return {name: {m: values[WARM_UP:] for m, values in by.items()} for name, by in found.items()}


def prepare(ckpt: rl_ckpt.Checkpointer, actors: Sequence[Any]) -> None:
    """Starts the service and makes its memory ready, before the first save."""
    face: Any = ckpt
    face.prepare(actors)


def save(ckpt: rl_ckpt.Checkpointer, step: int, actors: Sequence[Any]) -> dict[str, float]:
    """One save of ours: `stall` of the slowest worker, `call` of the driver, and `durable`, in seconds."""
    begun = time.perf_counter()
    pending = ckpt.save(step, actors)
    called = time.perf_counter()
    info = pending.result()
    durable = time.perf_counter()
    if info.stall_s is None:
        raise RuntimeError("the save does not say how long it stalled the workers")
    return {"stall": info.stall_s, "call": called - begun, "durable": durable - begun}


def expect(actors: Sequence[Any], checksums: Sequence[float], what: str) -> None:
    """Compares all workers' values with those that were saved.

    Raises:
        RuntimeError: They differ.
    """
    if call_all(actors, "checksum") != list(checksums):
        raise RuntimeError(f"{what} did not bring back the values that were saved")


def empty(path: Path) -> Path:
    """A new folder in place of whatever is there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


_steps = itertools.count()


def next_step() -> int:
    """Steps never repeat in a process."""
    return next(_steps)
