"""One server's part of a restore: out of parts that peers hold, and what is brought in while something can't be had."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rl_ckpt.errors import CorruptionError
from rl_ckpt.runtime.messages import AT_PEER, IN_PART, IN_STORE, FetchItem, FetchOrder, PartItems, PassItem
from rl_ckpt.runtime.transport.listener import Limits
from rl_ckpt.runtime.transport.shelf import Shelf
from rl_ckpt.store.base import Store
from tests.unit.runtime.test_fetching import (
    ALL,
    CHUNK,
    CHUNKS,
    DATA,
    FILE,
    NAME,
    SIZE,
    STEP,
    WAIT_S,
    Reading,
    Server,
    _digest,
    _fetch,
    _order_of,
)
from tests.unit.runtime.test_fetching import source as source
from tests.unit.runtime.test_fetching import store as store
from tests.unit.runtime.test_fetching import taker as taker

PART = "part-1-a-source"


@pytest.fixture
def third(tmp_path: Path, store: Store) -> Iterator[Server]:
    made = Server(tmp_path, "third", store, [])
    yield made
    made.listener.close()


def hold(server: Server, damaged: tuple[int, ...] = ()) -> None:
    """The server has all chunks as a part."""
    part = bytearray(CHUNKS * STEP)
    for chunk in ALL:
        part[chunk * STEP : chunk * STEP + CHUNK] = DATA[chunk * CHUNK : (chunk + 1) * CHUNK]
        if chunk in damaged:
            part[chunk * STEP + CHUNK // 2] ^= 1
    path = server.path.with_name(f"{server.name}-part")
    path.write_bytes(part)
    server.shelf.publish(PART, str(path), len(part), filled=True)


def of_part(chunks: list[int]) -> FetchOrder:
    items = tuple(PassItem(c * STEP, c * STEP, CHUNK, _digest(c)) for c in chunks)
    return FetchOrder("r", CHUNKS * STEP, parts=(PartItems("source", PART, items),))


def failed(server: Server) -> dict[int, tuple[str, str]]:
    """By chunk: where it was looked for last, and the kind of error."""
    return {item.offset // STEP: (item.last, item.flaw.code) for item in server.failed}


def test_chunks_of_a_part_come_by_socket_together_and_no_store_is_asked(taker: Server, source: Server) -> None:
    hold(source)
    assert taker.fetch([source], of_part(ALL)) == {"peers_memory": SIZE}
    assert taker.has() == ALL
    assert taker.store.stats.snapshot().reads == 0
    assert source.listener.counts()["bytes_served"] == CHUNKS * STEP - (STEP - CHUNK), "one range, the padding with it"


def test_without_a_listener_a_part_comes_through_ray(taker: Server, source: Server) -> None:
    hold(source)
    source.has_listener = False
    assert taker.fetch([source], of_part(ALL)) == {"peers_memory": SIZE}
    assert source.served.is_set()
    assert taker.has() == ALL


def test_damaged_chunks_of_a_part_are_told_and_all_else_is_brought(taker: Server, source: Server) -> None:
    hold(source, damaged=(3, 7))
    taker.goes_on = True
    assert taker.fetch([source], of_part(ALL)) == {"peers_memory": SIZE - 2 * CHUNK}
    assert failed(taker) == dict.fromkeys((3, 7), (IN_PART, "corruption"))
    assert set(taker.has()) == set(ALL) - {3, 7}


@pytest.mark.parametrize("how", ["never there", "withdrawn", "dead"])
def test_a_part_that_is_gone_is_told_at_once(
    taker: Server, source: Server, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    hold(source)
    taker.goes_on = True
    if how == "withdrawn":
        source.shelf.withdraw(PART)
    elif how == "never there":
        source.shelf = Shelf()
        source.listener._shelf = source.shelf
        source.listener._limits = Limits(beat_s=0.05, absent_s=1000.0)  # which is for what is yet to come
        source.ray_works = False  # which waits
    else:
        source.listener.close()
        source.ray_works = False
    with caplog.at_level(logging.WARNING, "rl_ckpt"):
        assert taker.fetch([source], of_part(ALL)) == {}
    assert failed(taker) == dict.fromkeys(ALL, (IN_PART, "storage"))
    assert "can't be had from source" in caplog.text
    assert how != "never there" or "nothing is known here" in caplog.text


def test_what_is_pulled_out_of_a_part_is_passed_on_but_for_what_is_damaged(
    taker: Server, source: Server, third: Server
) -> None:
    hold(source, damaged=(5,))
    taker.goes_on = third.goes_on = True
    items = tuple(PassItem(c * STEP, c * STEP, CHUNK, _digest(c)) for c in ALL)
    thread = threading.Thread(target=third.fetch, args=([taker], FetchOrder("r", CHUNKS * STEP, {}, {"taker": items})))
    taker.memory = _shared(taker)
    thread.start()
    taker.fetch([source], of_part(ALL))
    thread.join(WAIT_S)
    assert failed(third) == {5: (AT_PEER, "corruption")}
    assert set(third.has()) == set(ALL) - {5}
    assert third.store.stats.snapshot().reads == 0


def _shared(server: Server) -> memoryview:
    """Its memory is the file that peers read; kept by who fetches."""
    import mmap

    server.path.write_bytes(bytes(CHUNKS * STEP))
    with open(server.path, "r+b") as file:
        view = memoryview(mmap.mmap(file.fileno(), CHUNKS * STEP))
    server.path = _Kept(server.path)  # type: ignore[assignment]
    return view


class _Kept:
    """A path of which `fetch` does not make a new file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def write_bytes(self, _: object) -> None:
        pass


def test_damaged_chunks_of_the_store_are_told_and_all_else_is_brought(taker: Server, store: Store) -> None:
    damaged = bytearray(DATA)
    damaged[7 * CHUNK + 1] ^= 1
    store.put(FILE, [bytes(damaged)])
    taker.takes, taker.goes_on = ALL, True
    assert taker.fetch([]) == {"store": SIZE - CHUNK}
    assert failed(taker) == {7: (IN_STORE, "corruption")}


def test_of_a_file_that_is_cut_off_what_is_left_is_brought(taker: Server, store: Store) -> None:
    store.put(FILE, [DATA[: 10 * CHUNK + 100]])
    taker.takes, taker.goes_on = ALL, True
    assert taker.fetch([]) == {"store": 10 * CHUNK}
    assert failed(taker) == dict.fromkeys(ALL[10:], (IN_STORE, "corruption"))
    assert taker.has() == ALL[:10]


def test_of_two_files_the_one_that_is_missing_is_told(taker: Server, store: Store) -> None:
    own = tuple(FetchItem(c * CHUNK, c * STEP, CHUNK, _digest(c)) for c in ALL)
    taker.goes_on = True
    order = FetchOrder("r", CHUNKS * STEP, {FILE: own[:20], "shards/1/gone": own[20:]})
    assert taker.fetch([], order) == {"store": 20 * CHUNK}
    assert failed(taker) == dict.fromkeys(ALL[20:], (IN_STORE, "corruption"))


def test_a_store_that_fails_is_not_tried_for_every_file() -> None:
    store = Reading("file-1")
    store.go_on.set()
    order = _order_of([f"file-{i}" for i in range(100)])
    found, left = _fetch(store, order, Shelf(), memoryview(bytearray(order.memory_bytes))).run()
    assert {item.flaw.why for item in left} == {"the store said 503"}
    assert found.get("store", 0) + CHUNK * len(left) == 100 * CHUNK
    assert len(store.begun) < 100


def test_a_peer_that_lacks_one_chunk_gives_all_others_and_the_store_is_not_asked_again(
    taker: Server, source: Server
) -> None:
    source.publish()
    source.shelf = Shelf()
    source.listener._shelf = source.shelf
    source.shelf.publish(NAME, str(source.path), CHUNKS * STEP)
    source.shelf.fill(NAME, [(c * STEP, STEP) for c in ALL if c != 9])
    source.shelf.fail(NAME, CorruptionError("a flipped bit"))
    taker.goes_on = True
    assert taker.fetch([source]) == {"peers": SIZE - CHUNK}
    assert failed(taker) == {9: (AT_PEER, "corruption")}
    assert taker.store.stats.snapshot().reads == 0
