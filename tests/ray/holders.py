"""What the tests in this folder share: actors that hold a state, clusters, and ways to look behind the runtime."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rl_ckpt import Checkpointer
from rl_ckpt.runtime.links import coordinator
from rl_ckpt.runtime.spec import NAMESPACE
from rl_ckpt.state.tree import LocalArray, flatten

ROOT = Path(__file__).parents[2]
STORE_BYTES = 150 << 20
WAIT_S = 60.0
# A dead node is known within seconds instead of 15, and a busy two-core machine still answers in time.
HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}


class HolderBase:
    """A user's actor: it has a state, and inherits nothing."""

    def __init__(self, state: Any = None) -> None:
        self.state = state
        self.sets = 0

    def get_state(self) -> Any:
        return self.state() if callable(self.state) else self.state

    def set_state(self, tree: Any) -> None:
        self.state = tree
        self.sets += 1

    def put(self, state: Any) -> None:
        """Takes a state of its own: what arrives through Ray is read-only."""
        self.state, self.sets = copied(state), 0

    def take(self) -> Any:
        return self.state

    def look(self, what: Callable[..., Any], *args: Any) -> Any:
        """Runs a function on this actor."""
        return what(self, *args)


class AsyncHolder(HolderBase):
    """The same as an async actor, whose methods share one event loop."""

    async def save_async(self, handle: Any, step: int) -> Any:
        pending = handle.save(step, self.state)
        return await asyncio.to_thread(pending.result, WAIT_S)

    async def restore_async(self, handle: Any) -> Any:
        self.state = handle.restore(self.state)
        return self.state

    async def ping(self) -> bool:
        return True


class WithoutState:
    """An actor that is no worker."""

    def ping(self) -> bool:
        return True


class Coroutines:
    """An actor whose get_state is a coroutine."""

    async def get_state(self) -> dict[str, int]:
        return {"a": 1}


Holder = ray.remote(num_cpus=0)(HolderBase)


def copied(tree: Any) -> Any:
    """A tree with arrays of its own; declarations and other leaves stay."""
    if isinstance(tree, np.ndarray):
        return tree.copy(order="K")
    if type(tree) in (list, tuple):
        return type(tree)(copied(item) for item in tree)
    if isinstance(tree, dict):
        return type(tree)((key, copied(value)) for key, value in tree.items())
    return tree


def on_nodes(count: int, kind: Any = HolderBase) -> list[Any]:
    """Actors, dealt over the live nodes in turn."""
    nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
    actor = ray.remote(num_cpus=0)(kind)
    pinned = [NodeAffinitySchedulingStrategy(nodes[i % len(nodes)], soft=False) for i in range(count)]
    return [actor.options(scheduling_strategy=place).remote() for place in pinned]


def give(workers: Sequence[Any], states: Sequence[Any]) -> None:
    """Also shows that no worker is blocked."""
    ray.get([worker.put.remote(state) for worker, state in zip(workers, states, strict=True)], timeout=WAIT_S)


def states_of(workers: Sequence[Any]) -> list[Any]:
    return list(ray.get([worker.take.remote() for worker in workers]))


def number_of_sets(workers: Sequence[Any]) -> list[int]:
    return list(ray.get([worker.look.remote(lambda holder: holder.sets) for worker in workers]))


def fingerprint(tree: Any) -> dict[str, Any]:
    """Everything about a tree that must come back, by path: containers, kinds, dtypes, shapes, bytes, plain values."""
    flat = flatten(tree)
    out: dict[str, Any] = {}
    for path, node in flat.nodes.items():
        if isinstance(node, LocalArray):
            values = flat.arrays[path]
            host = values.detach().numpy() if hasattr(values, "detach") else values
            host = np.asarray(host) if not isinstance(host, str | bytes) else host
            raw = host.tobytes() if isinstance(host, np.ndarray) else host
            out[path] = (node.spec.kind, node.spec.dtype, np.shape(host), raw)
        else:
            out[path] = node
    return out


def same(found: Any, expected: Any) -> None:
    assert fingerprint(found) == fingerprint(expected)


LEAN = {"include_dashboard": False, "no_monitor": True, "include_log_monitor": False}
"""For a cluster's head: services that no test needs are not started, which takes a quarter of a start's time."""


@contextmanager
def several_nodes(count: int, system: dict[str, Any] | None = None, num_cpus: int = 2) -> Iterator[Any]:
    """A cluster of `count` raylets on this machine, connected; ended afterwards.

    Args:
        count: Of raylets.
        system: Ray's own settings.
        num_cpus: Of each raylet, which begins with so many worker processes that wait for actors.
    """
    with importable():
        node = {"num_cpus": num_cpus, "object_store_memory": STORE_BYTES}
        cluster = Cluster(initialize_head=True, head_node_args=node | LEAN | {"_system_config": system or {}})
        try:
            for _ in range(count - 1):
                cluster.add_node(**node, wait=False)
            cluster.wait_for_nodes()
            ray.init(address=cluster.address, log_to_driver=False)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@contextmanager
def one_node() -> Iterator[None]:
    """A cluster of one raylet, connected; ended afterwards."""
    with several_nodes(1, num_cpus=4):
        yield


@contextmanager
def importable() -> Iterator[None]:
    """Workers find this package and these tests, installed or not."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def until(true: Callable[[], Any], what: str) -> Any:
    """Waits for an event that nothing can be told by but looking."""
    deadline = time.monotonic() + WAIT_S
    while not (found := _try(true)):
        assert time.monotonic() < deadline, f"waited {WAIT_S} s for: {what}"
        threading.Event().wait(0.02)
    return found


def _try(true: Callable[[], Any]) -> Any:
    with contextlib.suppress(ray.exceptions.RayError, ValueError):
        return true()
    return None


def spec_of(ckpt: Checkpointer) -> Any:
    """What every process of the run is told; starts the coordinator where none is."""
    return ckpt._running_service().spec


def link(ckpt: Checkpointer) -> Any:
    """Handle of the run's coordinator."""
    return coordinator(spec_of(ckpt))


def server_names(ckpt: Checkpointer) -> list[str]:
    return list(ray.get(link(ckpt).servers.remote()))


def servers(ckpt: Checkpointer) -> dict[str, Any]:
    """Handles of the run's shard servers, by name."""
    return {name: ray.get_actor(name, namespace=NAMESPACE) for name in server_names(ckpt)}


def server_stats(ckpt: Checkpointer) -> dict[str, dict[str, int]]:
    return {name: ray.get(handle.stats.remote()) for name, handle in servers(ckpt).items()}


def total(stats: dict[str, dict[str, int]], name: str) -> int:
    return sum(one[name] for one in stats.values())


def pid_of(actor: Any) -> int:
    return int(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())))


def kill_process(pid: int) -> None:
    """SIGKILL to a process that this test's cluster started; returns once it is gone."""
    process = psutil.Process(pid)
    process.kill()
    until(lambda: not psutil.pid_exists(pid) or process.status() == psutil.STATUS_ZOMBIE, f"process {pid} is gone")


MEMORY = Path("/dev/shm") / f"rl_ckpt-{os.getuid()}"


def shared_memory() -> set[str]:
    """Folders of staging memory on this machine."""
    return {folder.name for folder in MEMORY.iterdir()} if MEMORY.is_dir() else set()


def memory_files(server: str, pattern: str) -> list[str]:
    """Names of a shard server's files of staging memory."""
    return sorted(path.name for path in (MEMORY / server).glob(pattern))


def flip_bit(folder: Path) -> Path:
    """Damages the largest file of a folder in its middle, and keeps its size."""
    path = max(folder.rglob("*.arrow"), key=lambda p: p.stat().st_size)
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    return path
