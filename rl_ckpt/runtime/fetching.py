"""Fetching: brings one restore's chunks to one node, from the store and from peers at the same time.

Promises: a chunk is passed on only once its digest was found right here, and as soon as that is so; what a peer sends
damaged, or not at all, is read from the store once more before the checkpoint is given up. The ways from a peer, in
order: a socket, Ray's object store, and the store itself. When a fetch is over, failed or not, nothing of it uses the
memory any more; one whose memory was withdrawn ends early. Decides nothing else: who fetches what is in the order.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Protocol, TypeVar

from rl_ckpt.errors import CheckpointError, CorruptionError, StorageError
from rl_ckpt.format.digest import digest
from rl_ckpt.format.shard_file import ALIGNMENT
from rl_ckpt.runtime.messages import FetchItem, FetchOrder, PassItem
from rl_ckpt.runtime.transport.client import pull
from rl_ckpt.runtime.transport.shelf import Range, Shelf
from rl_ckpt.runtime.transport.wire import Door, TransportError
from rl_ckpt.store.base import ObjectMissingError, Store

_READ_BYTES = 16 << 20  # of a file at a time: peers get it when it is in
_READS_AT_ONCE = 16
_CHECKS_AT_ONCE = 2  # beside the streams: a stream that hashes lets its peer wait
_PEERS_AT_ONCE = 4  # asked by one server; the order in which it asks them is rotated by the plan
_PIECE_BYTES = 8 << 20  # of small chunks that lie together, and travel as one
_PASS_BYTES = 64 << 20  # what one call through Ray brings: pays the call, and stays in the object store

_log = logging.getLogger("rl_ckpt")

Item = TypeVar("Item", FetchItem, PassItem)


class Peer(Protocol):
    """Another node's shard server, by Ray calls. Each raises TransportError where it can't be had."""

    def door(self) -> Door | None:
        """Where its listener is; None where it has none."""

    def serve(self, name: str, ranges: list[Range], wait_s: float) -> Sequence[memoryview]:
        """Ranges of its memory, through Ray's object store, when they are there."""


class Fetch:
    """One order, carried out. Threads of its own; made for one `run`."""

    def __init__(
        self,
        order: FetchOrder,
        name: str,
        target: memoryview,
        store: Store,
        shelf: Shelf,
        find: Callable[[str], Peer],
        limit_s: float,
    ) -> None:
        """Takes an order.

        Args:
            order: What to bring in.
            name: Of the restore's memory on everybody's shelf; it is on this server's already.
            target: That memory.
            store: The run's.
            shelf: This server's.
            find: Gives the peer of a name; raises TransportError.
            limit_s: For everything, in seconds.
        """
        self._order = order
        self._name = name
        self._target = target
        self._store = store
        self._shelf = shelf
        self._find = find
        self._by = time.monotonic() + limit_s
        self._reads = ThreadPoolExecutor(_READS_AT_ONCE, "rl_ckpt-read")
        self._pulls = ThreadPoolExecutor(_PEERS_AT_ONCE, "rl_ckpt-pull")
        self._checks = ThreadPoolExecutor(_CHECKS_AT_ONCE, "rl_ckpt-check")
        self._lock = threading.Lock()
        self._bytes: dict[str, int] = {}
        self._stopped = False

    def run(self) -> dict[str, int]:
        """Brings everything in.

        Returns:
            Bytes by source: "store", "peers" (by socket), "peers_ray" (through Ray's object store), "store_again"
            (what peers could not give, or gave damaged); those that are not zero.

        Raises:
            CorruptionError: A chunk is damaged or missing at its last source.
            CheckpointError: The store failed, or a peer that read from it, or the memory was withdrawn.
        """
        work: list[Future[None]] = []
        done: Future[None] | None = None
        try:
            work += [
                self._reads.submit(self._read, name, batch, "store")
                for name, items in self._order.files.items()
                for batch in _batches(items, _READ_BYTES)
            ]
            work += [self._pulls.submit(self._pass, peer, items) for peer, items in self._order.peers.items()]
            for done in as_completed(work):
                done.result()
        except CheckpointError as error:
            self._shelf.fail(self._name, error)
            raise
        finally:
            # Waited for: the memory must be free when the next candidate needs some. What is queued still runs, and
            # ends at once: who waits for a future that a pool cancels is not told. Pulls first: they use the others.
            self._stopped = True
            for pool in (self._pulls, self._checks, self._reads):
                pool.shutdown()
            # A future's error has this frame in its traceback: a cycle, which would keep the memory mapped.
            work.clear()
            done = None
        return dict(self._bytes)

    def _go_on(self) -> None:
        """Raises StorageError where what is still to be done is for nothing."""
        if self._stopped or self._shelf.is_withdrawn(self._name):
            raise StorageError(f"{self._name} was given up")

    def _read(self, name: str, items: Sequence[FetchItem], source: str) -> None:
        """Chunks of one file of the store, verified and put up for peers."""
        self._go_on()
        url = self._store.object_url(name)
        try:
            self._store.read_into(name, [(i.source_offset, self._view(i.offset, i.size_bytes)) for i in items])
        except ObjectMissingError as error:
            raise CorruptionError(f"{url} is missing, though the checkpoint names it") from error
        for item in items:
            found = digest(self._view(item.offset, item.size_bytes))
            if found != item.digest:
                raise CorruptionError(
                    f"chunk at {item.source_offset} of {url} is damaged: {item.digest.hex()} was committed, "
                    f"{found.hex()} was read"
                )
        self._count(source, sum(item.size_bytes for item in items))
        # With the padding between them: chunks that lie together can be pulled as one.
        self._shelf.fill(self._name, [(i.offset, -(-i.size_bytes // ALIGNMENT) * ALIGNMENT) for i in items])

    def _pass(self, peer: str, items: Sequence[PassItem]) -> None:
        """Chunks that a peer reads from the store and passes on."""
        self._go_on()
        missing, checks, why = {item.offset: item for item in items}, list[Future[list[PassItem]]](), ""
        for way, take in (("peers", self._by_socket), ("peers_ray", self._by_ray)):
            try:
                for taken in take(peer, list(missing.values())):
                    self._go_on()
                    for item in taken:
                        del missing[item.offset]
                    checks.append(self._checks.submit(self._damaged, way, taken))
            except (TransportError, OSError) as error:
                self._go_on()
                why = why or f"{type(error).__name__}: {error}"
                if way == "peers":
                    _log.warning("chunks of %s come through Ray's object store, not over a socket: %s", peer, why)
            if not missing:
                break
        damaged = [item for check in checks for item in check.result()]
        again = [*missing.values(), *damaged]
        if again:
            self._go_on()
            _log.warning(
                "%d chunks of %s are read from the store: %d came damaged; %s", len(again), peer, len(damaged), why
            )
            self._again(again)

    def _by_socket(self, peer: str, items: list[PassItem]) -> Iterable[list[PassItem]]:
        door = self._find(peer).door()
        if door is None:
            raise TransportError("it has no listener")
        groups = _together(items)
        pieces = [
            (
                group[0].source_offset,
                self._view(group[0].offset, group[-1].offset + group[-1].size_bytes - group[0].offset),
            )
            for group in groups
        ]
        for number in pull(door, self._name, pieces, by=self._by, go_on=self._go_on):
            yield groups[number]

    def _by_ray(self, peer: str, items: list[PassItem]) -> Iterable[list[PassItem]]:
        server = self._find(peer)
        for batch in _batches(items, _PASS_BYTES):
            self._go_on()
            ranges = [(item.source_offset, item.size_bytes) for item in batch]
            parts = server.serve(self._name, ranges, self._by - time.monotonic())
            for item, part in zip(batch, parts, strict=True):
                self._view(item.offset, item.size_bytes)[:] = part
            yield list(batch)

    def _damaged(self, way: str, items: Sequence[PassItem]) -> list[PassItem]:
        """Which of them have not come as they were committed; the others are counted."""
        out = [item for item in items if digest(self._view(item.offset, item.size_bytes)) != item.digest]
        self._count(way, sum(item.size_bytes for item in items) - sum(item.size_bytes for item in out))
        return out

    def _again(self, items: Sequence[PassItem]) -> None:
        files: dict[int, list[FetchItem]] = {}
        for item in items:
            files.setdefault(item.file, []).append(
                FetchItem(item.file_offset, item.offset, item.size_bytes, item.digest)
            )
        work = [
            self._reads.submit(self._read, self._order.names[file], batch, "store_again")
            for file, some in files.items()
            for batch in _batches(some, _READ_BYTES)
        ]
        done: Future[None] | None = None
        try:
            for done in as_completed(work):
                done.result()
        finally:  # as in `run`
            work.clear()
            done = None

    def _view(self, offset: int, size: int) -> memoryview:
        return self._target[offset : offset + size]

    def _count(self, source: str, size: int) -> None:
        with self._lock:
            if size:
                self._bytes[source] = self._bytes.get(source, 0) + size


def _batches(items: Sequence[Item], limit_bytes: int) -> list[list[Item]]:
    """Items in the order of their sources, cut where a batch would pass the limit."""
    out: list[list[Item]] = []
    filled = limit_bytes
    for item in sorted(items, key=lambda i: i.source_offset):
        if filled + item.size_bytes > limit_bytes:
            out.append([])
            filled = 0
        out[-1].append(item)
        filled += item.size_bytes
    return out


def _together(items: Iterable[PassItem]) -> list[list[PassItem]]:
    """Groups of items that lie together at their source and here alike, but for the padding between chunks."""
    out: list[list[PassItem]] = []
    for item in sorted(items, key=lambda i: i.source_offset):
        if out:
            first, last = out[-1][0], out[-1][-1]
            gap = item.source_offset - last.source_offset - last.size_bytes
            same = item.offset - first.offset == item.source_offset - first.source_offset
            size = item.source_offset + item.size_bytes - first.source_offset
            if 0 <= gap < ALIGNMENT and same and size <= _PIECE_BYTES:
                out[-1].append(item)
                continue
        out.append([item])
    return out
