"""Node to node: what shard servers pass on, against plain TCP streams of the same number on the same raylets.

Each of N nodes holds 1/N of the bytes and takes the rest from its peers, all at the same time: a restore's passing on,
without the store. Ours is the whole of it: a Ray call for the door, handshake, requests, sendfile, recv_into, a digest
of every chunk. The limit is a thread for each of the same connections that does nothing but sendfile, or recv_into.
Both write into shared memory that is mapped and has been written before (`warm`), or that was just made (`fresh`: as in
a restore, where its pages are made and mapped on the way).

    python -m benchmarks.node_transfer [nodes] [MiB] [rounds]
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rl_ckpt.format.digest import digest
from rl_ckpt.options import Options
from rl_ckpt.runtime.links import ensure_server
from rl_ckpt.runtime.messages import FetchOrder, PassItem
from rl_ckpt.runtime.spec import NAMESPACE, RunSpec

CHUNK_BYTES = 16 << 20
_TIMEOUT_S = 120.0


def transfer(actors: dict[str, Any], size_bytes: int, *, warm: bool) -> Callable[[], float]:
    """Prepares passing `size_bytes` on between shard servers.

    Args:
        actors: Shard servers' handles by name.
        size_bytes: Of the state that every node has in the end; a multiple of the chunk's size times their number.
        warm: Whether it goes into memory that has been written before.

    Returns:
        A function that has it done once, and gives the seconds.
    """
    names = sorted(actors)
    digests = ray.get(
        [actors[name].__ray_call__.remote(_prepare, i, len(names), size_bytes) for i, name in enumerate(names)]
    )
    orders = [_order(names, i, size_bytes, [d for part in digests for d in part]) for i in range(len(names))]

    def once() -> float:
        ray.get([actors[name].__ray_call__.remote(_make_target, size_bytes, warm) for name in names])
        begun = time.perf_counter()
        done = [actors[name].__ray_call__.remote(_fetch, order) for name, order in zip(names, orders, strict=True)]
        moved = ray.get(done, timeout=_TIMEOUT_S)
        seconds = time.perf_counter() - begun
        assert all(m == {"peers": size_bytes - size_bytes // len(names)} for m in moved), moved
        return seconds

    return once


def _chunks(index: int, count: int, size_bytes: int) -> range:
    part = size_bytes // count
    return range(index * part, (index + 1) * part, CHUNK_BYTES)


def _prepare(server: Any, index: int, count: int, size_bytes: int) -> list[bytes]:
    """In a shard server: puts its part of the state on its shelf; gives the digests of its chunks."""
    path = server._memory.make("bench-source", size_bytes)
    rng = np.random.default_rng(index)
    with open(path, "r+b") as file:
        view = memoryview(mmap.mmap(file.fileno(), size_bytes))
    digests = []
    for offset in _chunks(index, count, size_bytes):
        view[offset : offset + CHUNK_BYTES] = rng.bytes(CHUNK_BYTES)
        digests.append(digest(view[offset : offset + CHUNK_BYTES]))
    server._shelf.publish("bench", path, size_bytes, filled=True)
    return digests


def _order(names: list[str], index: int, size_bytes: int, digests: list[bytes]) -> FetchOrder:
    peers = {}
    for step in range(1, len(names)):
        peer = (index + step) % len(names)
        peers[names[peer]] = tuple(
            PassItem(offset, offset, CHUNK_BYTES, digests[offset // CHUNK_BYTES], 0, 0)
            for offset in _chunks(peer, len(names), size_bytes)
        )
    return FetchOrder("bench", size_bytes, peers=peers, names=("none",))


def _make_target(server: Any, size_bytes: int, warm: bool) -> None:
    """In a shard server or a plain actor: memory for what comes in."""
    if not warm or getattr(server, "bench_target", None) is None:
        server.bench_target = None
    if warm and server.bench_target is None:
        server.bench_target = _shared(size_bytes)
        np.frombuffer(server.bench_target, np.uint8)[:] = 1


def _shared(size_bytes: int) -> memoryview:
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size_bytes)
        return memoryview(mmap.mmap(file.fileno(), size_bytes))


def _fetch(server: Any, order: FetchOrder) -> dict[str, int]:
    """In a shard server: what its `fetch` does, into the memory at hand."""
    from rl_ckpt.runtime.fetching import Fetch
    from rl_ckpt.runtime.shard_server import _RayPeer

    target = server.bench_target if server.bench_target is not None else _shared(order.memory_bytes)
    return Fetch(order, "bench", target, server._store, server._shelf, _RayPeer, _TIMEOUT_S).run()


class Plain:
    """An actor with plain sockets: the limit."""

    bench_target: memoryview | None = None

    def listen(self, index: int, count: int, size_bytes: int) -> tuple[str, int]:
        """Serves this node's part to whoever connects."""
        self._file = tempfile.TemporaryFile(dir="/dev/shm")  # noqa: SIM115 - without a name: goes with the actor
        self._file.write(np.random.default_rng(index).bytes(size_bytes // count))
        self._file.flush()
        self._part = size_bytes // count
        self._socket = socket.create_server((ray.util.get_node_ip_address(), 0))
        threading.Thread(target=self._accept, daemon=True).start()
        host, port = self._socket.getsockname()
        return host, port

    def _accept(self) -> None:
        while True:
            sock, _ = self._socket.accept()
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            sent = 0
            while sent < self._part:
                sent += os.sendfile(sock.fileno(), self._file.fileno(), sent, self._part - sent)

    def receive(self, addresses: list[tuple[str, int]], size_bytes: int) -> None:
        """Reads every peer's part, a thread for each."""
        target = self.bench_target if self.bench_target is not None else _shared(size_bytes)
        threads = [
            threading.Thread(target=_receive, args=(address, target[i * self._part : (i + 1) * self._part]))
            for i, address in enumerate(addresses)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _receive(address: tuple[str, int], view: memoryview) -> None:
    with socket.create_connection(address) as sock:
        got = 0
        while got < len(view):
            got += sock.recv_into(view[got:])


def plain(actors: list[Any], size_bytes: int, *, warm: bool) -> Callable[[], float]:
    """The same over plain sockets; see `transfer`."""
    count = len(actors)
    doors = ray.get([actor.listen.remote(i, count, size_bytes) for i, actor in enumerate(actors)])

    def once() -> float:
        ray.get([actor.__ray_call__.remote(_make_target, size_bytes, warm) for actor in actors])
        begun = time.perf_counter()
        others = [[doors[(i + step) % count] for step in range(1, count)] for i in range(count)]
        ray.get(
            [actor.receive.remote(peers, size_bytes) for actor, peers in zip(actors, others, strict=True)],
            timeout=_TIMEOUT_S,
        )
        return time.perf_counter() - begun

    return once


def measure(nodes: int, size_bytes: int, rounds: int) -> dict[str, Any]:
    """Starts a cluster of so many raylets and measures both, in turn.

    Returns:
        For `warm` and `fresh`: GB/s that all nodes together take in, ours and plain, as medians, and the ratio of the
        two as the median over the rounds.
    """
    size_bytes -= size_bytes % (nodes * CHUNK_BYTES)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False},
    )
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=2, object_store_memory=100 << 20, wait=False)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        out = _measure(size_bytes, rounds)
    finally:
        ray.shutdown()
        cluster.shutdown()
    return out


def _measure(size_bytes: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        spec = RunSpec(f"file://{folder}", {}, (), Options(), "get_state", "set_state", service="bench")
        places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes()]
        start: Any = ray.remote(num_cpus=0)(ensure_server)
        names = ray.get([start.options(scheduling_strategy=place).remote(spec) for place in places])
        servers = {name: ray.get_actor(name, namespace=NAMESPACE) for name in names}
        kind: Any = ray.remote(num_cpus=0)(Plain)
        others = [kind.options(scheduling_strategy=place).remote() for place in places]
        out: dict[str, Any] = {"nodes": len(names), "bytes": size_bytes}
        try:
            for warm in (True, False):
                ours, limit = transfer(servers, size_bytes, warm=warm), plain(others, size_bytes, warm=warm)
                ours(), limit()
                pairs = [(ours(), limit()) for _ in range(rounds)]
                gigabytes = (len(names) - 1) * size_bytes / 1e9
                out["warm" if warm else "fresh"] = {
                    "ours_gb_s": round(gigabytes / statistics.median(a for a, _ in pairs), 2),
                    "plain_gb_s": round(gigabytes / statistics.median(b for _, b in pairs), 2),
                    "ratio": round(statistics.median(b / a for a, b in pairs), 3),
                }
        finally:
            for server in servers.values():
                ray.get(server.close.remote())
                server.__ray_terminate__.remote()
        return out


if __name__ == "__main__":
    given = [int(arg) for arg in sys.argv[1:]]
    nodes, size_mib, rounds = given + [3, 256, 9][len(given) :]
    print(json.dumps(measure(nodes, size_mib << 20, rounds)))
