"""Shards from node to node: 2 to 4 raylets, each with a part of the bytes that all of them need, as a restore has it.

Every node has read its part and takes the rest from all others at once. Ours is the transport of the shard servers
(authenticated sockets, digests compared as the bytes come in); the limit is the same pattern over plain loopback TCP
with sendfile into warm memory; beside them Ray's object store. All raylets share this machine: it shows what the
software costs, not what a network gives.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from benchmarks import harness
from benchmarks.results import LIMIT, Goal, Row, Series
from benchmarks.settings import Settings
from rl_ckpt.format.digest import digest
from rl_ckpt.runtime.transport.client import pull
from rl_ckpt.runtime.transport.listener import Listener
from rl_ckpt.runtime.transport.shelf import Shelf
from rl_ckpt.runtime.transport.wire import Door

_HOST = "127.0.0.1"
_PIECE_BYTES = 8 << 20
_LIMIT_S = 120.0
_NAME = "part"


@ray.remote(num_cpus=1)
class Node:
    """What one node has of the bytes, and room for the rest of them."""

    def __init__(self, index: int, part_bytes: int, nodes: int) -> None:
        self._index, self._nodes = index, nodes
        part = np.random.default_rng(index).integers(0, 256, part_bytes, np.uint8)
        with tempfile.NamedTemporaryFile(dir=_memory_folder(), prefix="rl_ckpt-bench-", delete=False) as file:
            file.write(part.data)
        self._path = file.name
        self._target = np.full(part_bytes * nodes, 1, np.uint8)
        self._pieces = range(0, part_bytes, _PIECE_BYTES)
        self._part_bytes = part_bytes
        self._digests = [digest(part.data[at : at + _PIECE_BYTES]) for at in self._pieces]
        self._part = part
        shelf = Shelf()
        shelf.publish(_NAME, self._path, part_bytes, filled=True)
        self._listener = Listener(_HOST, f"node-{index}", shelf)
        self._raw = socket.create_server((_HOST, 0))
        threading.Thread(target=self._serve_raw, daemon=True).start()
        self._pool = ThreadPoolExecutor(nodes)

    def ends(self) -> tuple[Door, int, list[bytes]]:
        """Where it listens: ours and raw; and its part's digests."""
        return self._listener.door, self._raw.getsockname()[1], self._digests

    def take(self, ends: Sequence[tuple[Door, int, list[bytes]]]) -> None:
        """All other parts by our transport, compared with their digests."""

        def one(peer: int) -> None:
            view = self._room(peer)
            pieces = [(at, view[at : at + _PIECE_BYTES]) for at in self._pieces]
            for number in pull(ends[peer][0], _NAME, pieces, by=time.monotonic() + _LIMIT_S):
                if digest(pieces[number][1]) != ends[peer][2][number]:
                    raise RuntimeError(f"piece {number} of node {peer} came damaged")

        list(self._pool.map(one, self._others()))

    def take_raw(self, ends: Sequence[tuple[Door, int, list[bytes]]]) -> None:
        """All other parts by plain TCP."""

        def one(peer: int) -> None:
            view = self._room(peer)
            with socket.create_connection((_HOST, ends[peer][1])) as sock:
                sock.sendall(len(view).to_bytes(8, "big"))
                filled = 0
                while filled < len(view):
                    filled += sock.recv_into(view[filled:]) or _broken()

        list(self._pool.map(one, self._others()))

    def put(self) -> list[Any]:
        """This part, as an object of Ray's store (in a list, so that nobody fetches it yet)."""
        return [ray.put(self._part)]

    def take_objects(self, parts: Sequence[list[Any]]) -> None:
        """All other parts by Ray's object store, copied out of it as a restore must."""
        for peer in self._others():
            np.copyto(np.frombuffer(self._room(peer), np.uint8), ray.get(parts[peer][0], timeout=_LIMIT_S))

    def close(self) -> None:
        """Gives the memory back."""
        self._listener.close()
        self._raw.close()
        os.unlink(self._path)

    def _others(self) -> list[int]:
        """In rotated order, so that not all ask the same one first."""
        return [(self._index + 1 + i) % self._nodes for i in range(self._nodes - 1)]

    def _room(self, peer: int) -> memoryview:
        return self._target.data[peer * self._part_bytes : (peer + 1) * self._part_bytes]

    def _serve_raw(self) -> None:
        while True:
            try:
                sock, _ = self._raw.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._send_raw, args=(sock,), daemon=True).start()

    def _send_raw(self, sock: socket.socket) -> None:
        with sock, open(self._path, "rb") as file:
            size, sent = int.from_bytes(sock.recv(8, socket.MSG_WAITALL), "big"), 0
            while sent < size:
                sent += os.sendfile(sock.fileno(), file.fileno(), sent, size - sent)


def _broken() -> int:
    raise RuntimeError("the connection broke")


def _memory_folder() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def measure(settings: Settings) -> list[Row]:
    """2, 3 and 4 raylets; as many bytes for all of them as `workers` have."""
    counts = (2, 3, 4) if settings.rounds > 2 else (2,)
    return [_case(settings, count) for count in counts]


def _case(settings: Settings, nodes: int) -> Row:
    part_bytes = (settings.mib << 20) * 2 // nodes // _PIECE_BYTES * _PIECE_BYTES or settings.mib << 20
    with harness.raylets(nodes, 3 * part_bytes * nodes) as ids:
        kind: Any = Node
        actors = [
            kind.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                index, part_bytes, nodes
            )
            for index, node in enumerate(ids)
        ]
        try:
            found = harness.rounds(settings.rounds, _ways(actors))
        finally:
            harness.call_all(actors, "close")  # else their files stay in /dev/shm
    ours, limit, store = (Series(name, tuple(each["took"])) for name, each in found.items())
    moved = part_bytes * nodes * (nodes - 1) / 1e6
    case = f"{nodes} raylets, {moved:.0f} MB in all"
    return Row("nodes", case, "s", ours, limit, (store,), (Goal("at least", 0.7),))


def _ways(actors: list[Any]) -> harness.Ways:
    """Ours, plain TCP, Ray's object store."""
    ends = harness.call_all(actors, "ends")

    def by_ray(_round: int) -> dict[str, float]:
        begun = time.perf_counter()
        parts = harness.call_all(actors, "put")
        harness.call_all(actors, "take_objects", parts)
        return {"took": time.perf_counter() - begun}

    return {
        "ours": lambda _: {"took": harness.timed(lambda: harness.call_all(actors, "take", ends))},
        LIMIT: lambda _: {"took": harness.timed(lambda: harness.call_all(actors, "take_raw", ends))},
        "Ray object store": by_ray,
    }
