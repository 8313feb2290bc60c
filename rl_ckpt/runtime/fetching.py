"""Fetching: brings one restore's chunks to one node, from the store and from peers at the same time.

Promises: a chunk is passed on only once its digest was found right here, and as soon as that is so. What a peer that
reads from the store sends damaged, or not at all, is read from the store once more. The ways from a peer, in order: a
socket, Ray's object store. What can't be had is told, and all else is brought in. When a fetch is over, failed or not,
nothing of it uses the memory any more; one whose memory was withdrawn ends early. Decides nothing else: who fetches
what is in the order.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Protocol, TypeVar

from rl_ckpt.errors import CheckpointError, CorruptionError, StorageError, from_code
from rl_ckpt.format.digest import digest
from rl_ckpt.format.shard_file import ALIGNMENT
from rl_ckpt.runtime.messages import (
    AT_PEER,
    IN_PART,
    IN_STORE,
    FetchItem,
    FetchOrder,
    Flaw,
    NotFetched,
    PartItems,
    PassItem,
)
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
_PART_S = 30.0  # for a range of a part through Ray: it is there, or the part is not

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
        self._failed: dict[int, NotFetched] = {}
        self._store_failed: CheckpointError | None = None
        self._stopped = False

    def run(self) -> tuple[dict[str, int], tuple[NotFetched, ...]]:
        """Brings everything in that can be had.

        Returns:
            Bytes by source: "store", "peers_memory" (out of parts that peers hold), "peers" (by socket), "peers_ray"
            (through Ray's object store), "store_again" (what peers could not give, or gave damaged); those that are not
            zero. And what can't be had, with the reason.

        Raises:
            CheckpointError: The memory was withdrawn.
        """
        own: list[Future[None]] = []
        passed: list[Future[None]] = []
        done: Future[None] | None = None
        try:
            own += [
                self._reads.submit(self._read, name, batch, "store")
                for name, items in self._order.files.items()
                for batch in _batches(items, _READ_BYTES)
            ]
            # Parts first: what is passed on waits for other servers, whose peers may wait for these.
            own += [self._pulls.submit(self._take, part) for part in self._order.parts]
            passed += [self._pulls.submit(self._pass, peer, items) for peer, items in self._order.peers.items()]
            for done in as_completed(own):
                done.result()
            if self._failed:  # peers get all else first
                self._shelf.fail(self._name, self._worst())
            for done in as_completed(passed):
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
            own.clear()
            passed.clear()
            done = None
        return dict(self._bytes), tuple(self._failed[offset] for offset in sorted(self._failed))

    def bytes_so_far(self) -> int:
        """That have come and are good."""
        with self._lock:
            return sum(self._bytes.values())

    def _worst(self) -> CheckpointError:
        """Why chunks that this server was to bring for others will not come."""
        flaw = self._failed[min(self._failed)].flaw
        return from_code(flaw.code, flaw.why)

    def _fail(self, items: Iterable[FetchItem | PassItem], last: str, error: Exception) -> None:
        """These can't be had."""
        code = error.code if isinstance(error, CheckpointError) else StorageError.code
        flaw = Flaw(code, str(error))
        with self._lock:
            self._failed.update({item.offset: NotFetched(item.offset, last, flaw) for item in items})

    def _go_on(self) -> None:
        """Raises StorageError where what is still to be done is for nothing."""
        if self._stopped or self._shelf.is_withdrawn(self._name):
            raise StorageError(f"{self._name} was given up")

    def _read(self, name: str, items: Sequence[FetchItem], source: str) -> None:
        """Chunks of one file of the store, verified and put up for peers."""
        self._go_on()
        try:
            if self._store_failed is not None:  # it was tried for long: not for each file again
                raise self._store_failed
            views = [(i.source_offset, self._view(i.offset, i.size_bytes)) for i in items]
            self._store.read_into(name, views)
        except ObjectMissingError:
            text = f"{self._store.missing(name)}, though the checkpoint names it"
            self._fail(items, IN_STORE, CorruptionError(text))
            return
        except CorruptionError as error:
            if len(items) == 1:
                self._fail(items, IN_STORE, error)
            else:  # the file ends too early: what lies before its end is good
                for item in items:
                    self._read(name, [item], source)
            return
        except StorageError as error:
            self._store_failed = error.with_traceback(None)
            self._fail(items, IN_STORE, error)
            return
        good = []
        for item in items:
            found = digest(self._view(item.offset, item.size_bytes))
            if found == item.digest:
                good.append(item)
                continue
            url = self._store.object_url(name)
            text = f"{item.digest.hex()} was committed, {found.hex()} was read"
            self._fail([item], IN_STORE, CorruptionError(f"chunk at {item.source_offset} of {url} is damaged: {text}"))
        self._put_up(good, source)

    def _put_up(self, items: Sequence[FetchItem | PassItem], source: str) -> None:
        """Chunks are here and good: peers may have them."""
        self._count(source, sum(item.size_bytes for item in items))
        # With the padding between them: chunks that lie together can be pulled as one.
        self._shelf.fill(self._name, [(i.offset, -(-i.size_bytes // ALIGNMENT) * ALIGNMENT) for i in items])

    def _take(self, part: PartItems) -> None:
        """Chunks of a part that a peer holds."""
        self._go_on()
        missing, checks, why = {item.offset: item for item in part.items}, list[Future[list[PassItem]]](), None
        for take in (self._by_socket, self._by_ray):
            try:
                for taken in take(part.server, part.part, list(missing.values()), _PART_S):
                    self._go_on()
                    for item in taken:
                        del missing[item.offset]
                    checks.append(self._checks.submit(self._check_part, taken))
            except (TransportError, OSError, CheckpointError) as error:
                self._go_on()
                why = why or error.with_traceback(None)
            if not missing:
                break
        damaged = [item for check in checks for item in check.result()]
        checks.clear()
        self._fail(damaged, IN_PART, CorruptionError(f"{part.part} came damaged from {part.server}"))
        if missing:
            text = f"{part.part} can't be had from {part.server}: {type(why).__name__}: {why}"
            _log.warning("%d chunks: %s", len(missing), text)
            self._fail(missing.values(), IN_PART, StorageError(text))

    def _check_part(self, items: Sequence[PassItem]) -> list[PassItem]:
        """Which of them have not come as they were committed; the others are put up."""
        out = self._damaged(items)
        self._put_up([item for item in items if item not in out] if out else items, "peers_memory")
        return out

    def _pass(self, peer: str, items: Sequence[PassItem]) -> None:
        """Chunks that a peer brings in and passes on."""
        self._go_on()
        missing, checks, why = {item.offset: item for item in items}, list[Future[list[PassItem]]](), ""
        told: CheckpointError | None = None
        for way, take in (("peers", self._by_socket), ("peers", self._by_socket_singly), ("peers_ray", self._by_ray)):
            if take == self._by_socket_singly and told is None:
                continue
            try:
                for taken in take(peer, self._name, list(missing.values()), self._by - time.monotonic()):
                    self._go_on()
                    for item in taken:
                        del missing[item.offset]
                    checks.append(self._checks.submit(self._check_passed, way, taken))
            except (TransportError, OSError) as error:
                self._go_on()
                why = why or f"{type(error).__name__}: {error}"
                if way == "peers":
                    _log.warning("chunks of %s come through Ray's object store, not over a socket: %s", peer, why)
            except CheckpointError as error:
                self._go_on()
                if told is not None:  # and what it has of them is here by now
                    break
                told = error.with_traceback(None)
            if not missing:
                break
        damaged = [item for check in checks for item in check.result()]
        checks.clear()
        if told is not None and missing:
            self._fail(missing.values(), AT_PEER, told)
            missing.clear()
        again = [*missing.values(), *damaged]
        if again:
            self._go_on()
            _log.warning(
                "%d chunks of %s are read from the store: %d came damaged; %s", len(again), peer, len(damaged), why
            )
            self._again(again, peer)

    def _by_socket(self, peer: str, name: str, items: list[PassItem], _wait_s: float) -> Iterable[list[PassItem]]:
        yield from self._pull(peer, name, _together(items))

    def _by_socket_singly(
        self, peer: str, name: str, items: list[PassItem], _wait_s: float
    ) -> Iterable[list[PassItem]]:
        """For a peer that lacks some: what lies together with one of those comes by itself."""
        yield from self._pull(peer, name, [[item] for item in items])

    def _pull(self, peer: str, name: str, groups: list[list[PassItem]]) -> Iterable[list[PassItem]]:
        door = self._find(peer).door()
        if door is None:
            raise TransportError("it has no listener")
        pieces = [
            (
                group[0].source_offset,
                self._view(group[0].offset, group[-1].offset + group[-1].size_bytes - group[0].offset),
            )
            for group in groups
        ]
        for number in pull(door, name, pieces, by=self._by, go_on=self._go_on):
            yield groups[number]

    def _by_ray(self, peer: str, name: str, items: list[PassItem], wait_s: float) -> Iterable[list[PassItem]]:
        server = self._find(peer)
        for batch in _batches(items, _PASS_BYTES):
            self._go_on()
            ranges = [(item.source_offset, item.size_bytes) for item in batch]
            parts = server.serve(name, ranges, min(wait_s, self._by - time.monotonic()))
            for item, part in zip(batch, parts, strict=True):
                self._view(item.offset, item.size_bytes)[:] = part
            yield list(batch)

    def _check_passed(self, way: str, items: Sequence[PassItem]) -> list[PassItem]:
        """Which of them have not come as they were committed; the others are counted."""
        out = self._damaged(items)
        self._count(way, sum(item.size_bytes for item in items) - sum(item.size_bytes for item in out))
        return out

    def _damaged(self, items: Sequence[PassItem]) -> list[PassItem]:
        return [item for item in items if digest(self._view(item.offset, item.size_bytes)) != item.digest]

    def _again(self, items: Sequence[PassItem], peer: str) -> None:
        files: dict[int, list[FetchItem]] = {}
        nowhere: list[PassItem] = []
        for item in items:
            if item.file < 0:
                nowhere.append(item)
                continue
            files.setdefault(item.file, []).append(
                FetchItem(item.file_offset, item.offset, item.size_bytes, item.digest)
            )
        self._fail(nowhere, AT_PEER, StorageError(f"{peer} did not pass it on"))
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
