"""One server's part of a restore: from a store and from peers on real sockets, in one process, with everything that may
go wrong on the way from a peer.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
import uuid
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from rl_ckpt.errors import CheckpointError, CorruptionError, StorageError, from_code
from rl_ckpt.format.digest import digest
from rl_ckpt.runtime.fetching import Fetch, Peer
from rl_ckpt.runtime.messages import FetchItem, FetchOrder, NotFetched, PassItem
from rl_ckpt.runtime.transport.listener import Limits, Listener
from rl_ckpt.runtime.transport.shelf import Range, Shelf
from rl_ckpt.runtime.transport.wire import Door, TransportError
from rl_ckpt.store.base import Store
from rl_ckpt.store.urls import open_store

NAME = "restore-r"
FILE = "shards/1/a.arrow"
WAIT_S = 30.0
CHUNKS = 40
CHUNK = 5000
STEP = 5056
"""From chunk to chunk in memory: a multiple of 64."""


class Server:
    """A shard server as its peers see it; `takes` are the chunks that it reads from the store itself."""

    def __init__(self, folder: Path, name: str, store: Store, takes: Sequence[int]) -> None:
        self.name = name
        self.store = store
        self.path = folder / name
        self.memory = memoryview(bytearray(CHUNKS * STEP))
        self.takes = takes
        self.shelf = Shelf()
        self.listener = Listener("127.0.0.1", name, self.shelf, Limits(beat_s=0.05, absent_s=1.0))
        self.ray_works = True
        self.has_listener = True
        self.served = threading.Event()
        self.goes_on = False
        """Without what can't be had, which is an error else."""
        self.failed: tuple[NotFetched, ...] = ()

    def publish(self, *, good: bool = True) -> None:
        """Has everything at once, without a store; `good`: or with a byte in the middle of each chunk changed."""
        for chunk in range(CHUNKS):
            self.memory[chunk * STEP : chunk * STEP + CHUNK] = DATA[chunk * CHUNK : (chunk + 1) * CHUNK]
            if not good:
                self.memory[chunk * STEP + CHUNK // 2] ^= 1
        self.path.write_bytes(self.memory)
        self.shelf.publish(NAME, str(self.path), len(self.memory), filled=True)

    def door(self) -> Door | None:
        return self.listener.door if self.has_listener else None

    def serve(self, name: str, ranges: list[Range], wait_s: float) -> Sequence[memoryview]:
        self.served.set()
        if not self.ray_works:
            raise TransportError("the actor is dead")
        data = Path(self.shelf.await_all(name, ranges, wait_s)).read_bytes()
        return [memoryview(data)[offset : offset + size] for offset, size in ranges]

    def fetch(self, peers: Sequence[Server], order: FetchOrder | None = None) -> dict[str, int]:
        """Carries out an order: by default, what it reads itself and all else from its peers."""

        def find(name: str) -> Peer:
            return next(peer for peer in peers if peer.name == name)

        self.path.write_bytes(self.memory)
        self.shelf.publish(NAME, str(self.path), len(self.memory))
        order = order or self.order(peers)
        found, self.failed = Fetch(order, NAME, self.memory, self.store, self.shelf, find, WAIT_S).run()
        if self.failed and not self.goes_on:
            raise from_code(self.failed[0].flaw.code, self.failed[0].flaw.why)
        return found

    def order(self, peers: Sequence[Server]) -> FetchOrder:
        own = tuple(FetchItem(c * CHUNK, c * STEP, CHUNK, _digest(c)) for c in self.takes)
        passed = {
            peer.name: tuple(PassItem(c * STEP, c * STEP, CHUNK, _digest(c), 0, c * CHUNK) for c in peer.takes)
            for peer in peers
        }
        return FetchOrder("r", len(self.memory), {FILE: own} if own else {}, passed, (FILE,))

    def has(self) -> list[int]:
        """Chunks that are there, as they were committed."""
        return [c for c in range(CHUNKS) if digest(self.memory[c * STEP : c * STEP + CHUNK]) == _digest(c)]


DATA = os.urandom(CHUNKS * CHUNK)
ALL = list(range(CHUNKS))
SIZE = CHUNKS * CHUNK


def _digest(chunk: int) -> bytes:
    return digest(memoryview(DATA)[chunk * CHUNK : (chunk + 1) * CHUNK])


@pytest.fixture
def store() -> Store:
    made = open_store(f"memory://{uuid.uuid4().hex}", {})
    made.put(FILE, [DATA])
    return made


@pytest.fixture
def source(tmp_path: Path, store: Store) -> Iterator[Server]:
    made = Server(tmp_path, "source", store, ALL)
    yield made
    made.listener.close()


@pytest.fixture
def taker(tmp_path: Path, store: Store) -> Iterator[Server]:
    made = Server(tmp_path, "taker", store, [])
    yield made
    made.listener.close()


def test_from_the_store(taker: Server) -> None:
    taker.takes = ALL
    assert taker.fetch([]) == {"store": SIZE}
    assert taker.has() == ALL


def test_from_a_peer_by_socket_and_small_chunks_travel_together(taker: Server, source: Server) -> None:
    source.publish()
    assert taker.fetch([source]) == {"peers": SIZE}
    assert taker.has() == ALL
    assert taker.store.stats.snapshot().reads == 0
    assert source.listener.counts()["bytes_served"] == CHUNKS * STEP - (STEP - CHUNK), "one range, the padding with it"
    assert not source.served.is_set()


def test_chunks_are_passed_on_while_the_peer_is_still_reading(taker: Server, source: Server) -> None:
    source.path.write_bytes(bytes(CHUNKS * STEP))
    source.shelf.publish(NAME, str(source.path), CHUNKS * STEP)
    first = CHUNKS // 2
    source.publish()  # the bytes, but of the shelf only the first half
    source.shelf = Shelf()
    source.listener._shelf = source.shelf
    source.shelf.publish(NAME, str(source.path), CHUNKS * STEP)
    order = taker.order([source])
    halves = {"source": order.peers["source"][:first]}, {"source": order.peers["source"][first:]}
    source.shelf.fill(NAME, [(c * STEP, STEP) for c in range(first)])
    assert taker.fetch([source], FetchOrder("r", SIZE, {}, halves[0], (FILE,))) == {"peers": SIZE // 2}
    assert taker.has() == ALL[:first]
    timer = threading.Timer(0.1, source.shelf.fill, (NAME, [(c * STEP, STEP) for c in range(first, CHUNKS)]))
    timer.start()
    assert taker.fetch([source], FetchOrder("r", SIZE, {}, halves[1], (FILE,))) == {"peers": SIZE // 2}
    assert taker.has() == ALL


def test_a_damaged_chunk_of_the_store_is_never_passed_on(taker: Server, source: Server, store: Store) -> None:
    damaged = bytearray(DATA)
    damaged[7 * CHUNK + 1] ^= 1
    store.put(FILE, [bytes(damaged)])
    source.takes = [7]
    with pytest.raises(CorruptionError, match=r"a\.arrow is damaged"):
        source.fetch([])
    read = store.stats.snapshot().reads
    with pytest.raises(CorruptionError, match=r"a\.arrow is damaged"):
        taker.fetch([source])
    assert store.stats.snapshot().reads == read, "the peer has told why: nothing is read once more"
    assert taker.has() == []
    assert source.listener.counts()["bytes_served"] == 0


def test_a_missing_file_is_named(taker: Server, store: Store) -> None:
    store.delete([FILE])
    taker.takes = ALL
    with pytest.raises(CorruptionError, match="is missing, though the checkpoint names it"):
        taker.fetch([])


def test_what_the_peer_could_not_read_is_told_and_not_read_again(taker: Server, source: Server) -> None:
    source.shelf.publish(NAME, str(source.path), CHUNKS * STEP)
    source.shelf.fail(NAME, StorageError("the store said 503, 8 times"))
    with pytest.raises(StorageError, match="503"):
        taker.fetch([source])
    assert taker.store.stats.snapshot().reads == 0


def close_listener(source: Server) -> None:
    source.listener.close()


def no_listener(source: Server) -> None:
    source.has_listener = False


def another_secret(source: Server) -> None:
    source.listener.door = Door(source.listener.door.host, source.listener.door.port, source.name, b"else" * 8)
    real = source.listener.door
    source.door = lambda: Door(real.host, real.port, real.name, b"guess" * 8)  # type: ignore[method-assign]


UNREACHABLE = pytest.mark.parametrize("close", [close_listener, no_listener, another_secret], ids=lambda f: f.__name__)


@UNREACHABLE
def test_without_a_socket_chunks_come_through_ray_and_it_is_said(
    taker: Server, source: Server, caplog: pytest.LogCaptureFixture, close: object
) -> None:
    source.publish()
    assert callable(close)
    close(source)
    with caplog.at_level(logging.WARNING, "rl_ckpt"):
        assert taker.fetch([source]) == {"peers_ray": SIZE}
    assert taker.has() == ALL
    assert [record.message for record in caplog.records if "come through Ray's object store" in record.message]
    assert len(caplog.records) == 1
    assert source.listener.door.secret.hex() not in caplog.text
    assert str(source.listener.door.secret) not in caplog.text


def test_without_socket_and_ray_chunks_come_from_the_store(taker: Server, source: Server) -> None:
    close_listener(source)
    source.ray_works = False
    assert taker.fetch([source]) == {"store_again": SIZE}
    assert taker.has() == ALL


def test_a_peer_that_was_told_to_forget_is_gone_round(taker: Server, source: Server) -> None:
    source.publish()
    source.shelf.withdraw(NAME)
    assert taker.fetch([source]) == {"store_again": SIZE}
    assert taker.has() == ALL


def test_a_connection_that_breaks_in_the_middle_loses_and_repeats_nothing(taker: Server, source: Server) -> None:
    source.publish()
    source.shelf = Shelf()
    source.listener._shelf = source.shelf
    source.shelf.publish(NAME, str(source.path), CHUNKS * STEP)
    even = [c for c in ALL if c % 2 == 0]
    source.shelf.fill(NAME, [(c * STEP, CHUNK) for c in even])

    def break_it() -> None:
        deadline = time.monotonic() + WAIT_S
        while source.listener.counts()["bytes_served"] < len(even) * CHUNK:
            assert time.monotonic() < deadline
            threading.Event().wait(0.005)
        source.listener.close()
        source.shelf.fill(NAME, [(c * STEP, CHUNK) for c in ALL])

    thread = threading.Thread(target=break_it)
    thread.start()
    order = taker.order([source])
    scattered = tuple(  # so that no two travel together
        PassItem(i.source_offset, (CHUNKS - 1) * STEP - i.offset, i.size_bytes, i.digest, i.file, i.file_offset)
        for i in order.peers["source"]
    )
    found = taker.fetch([source], FetchOrder("r", SIZE, {}, {"source": scattered}, (FILE,)))
    thread.join()
    assert found == {"peers": len(even) * CHUNK, "peers_ray": SIZE - len(even) * CHUNK}
    there = [digest(taker.memory[c * STEP : c * STEP + CHUNK]) for c in ALL]
    assert there == [_digest(CHUNKS - 1 - c) for c in ALL]


@pytest.mark.parametrize("by_ray", [False, True])
def test_chunks_that_come_damaged_are_read_from_the_store(taker: Server, source: Server, by_ray: bool) -> None:
    source.publish(good=False)
    source.has_listener = not by_ray
    assert taker.fetch([source]) == {"store_again": SIZE}
    assert taker.has() == ALL


def test_chunks_damaged_at_the_peer_and_in_the_store_are_an_error(taker: Server, source: Server, store: Store) -> None:
    source.publish(good=False)
    store.put(FILE, [bytes(SIZE)])
    with pytest.raises(CorruptionError, match="damaged"):
        taker.fetch([source])


def test_three_servers_each_read_a_third_and_pass_it_on(tmp_path: Path, store: Store) -> None:
    class Shared(Server):
        """Its memory is the file that peers read."""

        def __init__(self, name: str, takes: Sequence[int]) -> None:
            super().__init__(tmp_path, name, store, takes)
            import mmap

            self.path.write_bytes(bytes(CHUNKS * STEP))
            with open(self.path, "r+b") as file:
                self.memory = memoryview(mmap.mmap(file.fileno(), CHUNKS * STEP))

    servers = [Shared(name, ALL[i::3]) for i, name in enumerate("abc")]
    found: dict[str, dict[str, int]] = {}
    errors: list[CheckpointError] = []

    def work(server: Server) -> None:
        others = [other for other in servers if other is not server]
        server.shelf.publish(NAME, str(server.path), CHUNKS * STEP)
        order = server.order(others)

        def find(name: str) -> Peer:
            return next(other for other in servers if other.name == name)

        try:
            found[server.name], _ = Fetch(order, NAME, server.memory, store, server.shelf, find, WAIT_S).run()
        except CheckpointError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(server,)) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert errors == []
    for server in servers:
        own = len(server.takes) * CHUNK
        assert found[server.name] == {"store": own, "peers": SIZE - own}
        assert server.has() == ALL
        server.listener.close()


class Reading(Store):
    """A store whose reads a test steers: one of `fails` fails once another is under way, all others wait."""

    def __init__(self, fails: str = "") -> None:
        super().__init__("memory://reading", {})
        self.fails = fails
        self.begun: list[str] = []
        self.under_way = threading.Event()
        self.go_on = threading.Event()
        self.writes: list[memoryview] = []

    def read_into(self, name: str, reads: Sequence[tuple[int, memoryview]]) -> None:
        self.begun.append(name)
        if name == self.fails:
            assert self.under_way.wait(WAIT_S)
            raise StorageError("the store said 503")
        self.under_way.set()
        assert self.go_on.wait(WAIT_S)
        for _, view in reads:
            view[:] = bytes(view.nbytes)

    def _unused(self, *_: object, **__: object) -> NoReturn:
        raise AssertionError("a fetch only reads")

    put = create = get = list = delete = exists = clean_partial = _unused  # type: ignore[assignment]


def _order_of(names: Sequence[str]) -> FetchOrder:
    zeros = digest(memoryview(bytes(CHUNK)))
    files: dict[str, tuple[FetchItem, ...]] = {
        name: (FetchItem(0, i * STEP, CHUNK, zeros),) for i, name in enumerate(names)
    }
    return FetchOrder("r", len(names) * STEP, files, {}, ())


def _fetch(store: Store, order: FetchOrder, shelf: Shelf, target: memoryview) -> Fetch:
    def find(name: str) -> Peer:
        raise AssertionError(name)

    shelf.publish(NAME, "/nowhere", order.memory_bytes)
    return Fetch(order, NAME, target, store, shelf, find, WAIT_S)


def test_a_failed_fetch_is_over_only_when_nothing_of_it_reads_any_more() -> None:
    store, ended = Reading("bad"), list[str]()
    order = _order_of(["slow", "bad"])
    fetch = _fetch(store, order, Shelf(), memoryview(bytearray(order.memory_bytes)))

    def run() -> None:
        _, failed = fetch.run()
        assert [item.flaw.why for item in failed] == ["the store said 503"]
        ended.extend(t.name for t in threading.enumerate() if t.name.startswith("rl_ckpt-read"))
        ended.append("over")

    # One read fails, the other is still under way: the fetch waits for it.
    thread = threading.Thread(target=run)
    thread.start()
    assert store.under_way.wait(WAIT_S)
    thread.join(0.2)
    assert ended == []
    store.go_on.set()
    thread.join(WAIT_S)
    assert ended == ["over"]


def test_a_fetch_whose_memory_is_withdrawn_begins_no_other_read() -> None:
    store, shelf = Reading(), Shelf()
    order = _order_of([f"file-{i}" for i in range(100)])
    fetch = _fetch(store, order, shelf, memoryview(bytearray(order.memory_bytes)))
    errors: list[CheckpointError] = []

    def run() -> None:
        try:
            fetch.run()
        except CheckpointError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert store.under_way.wait(WAIT_S)
    shelf.withdraw(NAME)
    store.go_on.set()
    thread.join(WAIT_S)
    assert "was given up" in str(errors[0])
    assert len(store.begun) <= 17, "those that were under way"


def test_what_a_withdrawn_fetch_lacks_is_not_read_again(taker: Server, source: Server) -> None:
    source.publish()
    source.has_listener = False

    def forgotten(name: str, ranges: list[Range], wait_s: float) -> Sequence[memoryview]:
        taker.shelf.withdraw(NAME)
        raise TransportError("it is not here any more")

    source.serve = forgotten  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="was given up"):
        taker.fetch([source])
    assert taker.store.stats.snapshot().reads == 0


def test_a_transfer_ends_when_the_fetch_is_withdrawn_though_the_peer_has_nothing_yet(
    taker: Server, source: Server
) -> None:
    source.shelf.publish(NAME, str(source.path), CHUNKS * STEP)  # and nothing is filled
    errors: list[CheckpointError] = []

    def run() -> None:
        try:
            taker.fetch([source])
        except CheckpointError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while not source.listener.counts()["connections"]:
        assert thread.is_alive()
        threading.Event().wait(0.005)
    taker.shelf.withdraw(NAME)
    thread.join(WAIT_S / 2)
    assert not thread.is_alive()
    assert "was given up" in str(errors[0])


@pytest.mark.parametrize("from_peer", [False, True])
def test_a_failed_fetch_keeps_no_memory(taker: Server, source: Server, store: Store, from_peer: bool) -> None:
    """No cycle of an error and a frame: the memory would stay mapped until the collector comes."""
    source.publish(good=False)
    store.put(FILE, [bytes(SIZE)])
    taker.takes, source.takes = ([], ALL) if from_peer else (ALL, [])
    taker.path.write_bytes(taker.memory)
    taker.shelf.publish(NAME, str(taker.path), len(taker.memory))
    fetch = Fetch(taker.order([source]), NAME, taker.memory, store, taker.shelf, lambda _: source, WAIT_S)
    kept = weakref.ref(fetch)
    gc.disable()
    try:
        assert len(fetch.run()[1]) == CHUNKS
        del fetch
        assert kept() is None
    finally:
        gc.enable()
