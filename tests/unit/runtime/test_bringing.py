"""A part comes from the store into a shard server's memory: verified, without what is damaged, and once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from rl_ckpt import Checkpointer
from rl_ckpt.errors import CorruptionError, StorageError
from rl_ckpt.format.digest import digest
from rl_ckpt.format.manifest import Manifest
from rl_ckpt.plan.parts import Part
from rl_ckpt.plan.prefetch import deal_parts, places
from rl_ckpt.runtime import fetching, memory
from rl_ckpt.runtime.bringing import Bringing
from rl_ckpt.runtime.held import HeldParts
from rl_ckpt.runtime.messages import FetchItem, decode, encode
from rl_ckpt.runtime.prefetch_messages import BringDone, BringOrder
from rl_ckpt.runtime.transport.shelf import Shelf
from rl_ckpt.store.base import Store
from rl_ckpt.store.run import Run

CHUNK = 1 << 14


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "_root", lambda: tmp_path / "shm")
    return tmp_path / "shm"


class Server:
    """A shard server's memory, without its actor."""

    def __init__(self) -> None:
        self.memory = memory.ServerMemory("server")
        self.shelf = Shelf()
        self.held = HeldParts(self.memory, self.shelf, 3)
        self.bringing = Bringing(self.held, self.shelf)

    def names(self, pattern: str = "*") -> list[str]:
        return sorted(path.name for path in Path(self.memory.path("")).glob(pattern))


@pytest.fixture
def server(root: Path) -> Server:
    return Server()


class Saved:
    """A checkpoint on a local disk, and the order to bring all of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with Checkpointer(str(folder), chunk_bytes=CHUNK) as ckpt:
            ckpt.save_state(1, {"w": np.arange(20_000), "none": np.zeros(0)}).result()
        run = Run.open(f"file://{folder}")
        self.store: Store = run.store
        self.manifest: Manifest = run.manifest(run.log.read().commits[-1])
        (self.part,) = deal_parts(self.manifest, {"server": 1 << 30}).parts
        files: dict[str, list[FetchItem]] = {}
        where = places(self.manifest)
        for chunk in self.part.chunks:
            if chunk.size_bytes:
                place = where[chunk.digest, chunk.size_bytes]
                item = FetchItem(place.offset, chunk.offset, chunk.size_bytes, chunk.digest)
                files.setdefault(place.file, []).append(item)
        order = BringOrder(self.part, {name: tuple(items) for name, items in files.items()})
        self.order: BringOrder = decode(encode(order), BringOrder)

    def flip(self, number: int) -> None:
        """Damages a chunk in the store."""
        chunk = self.part.chunks[number]
        place = places(self.manifest)[chunk.digest, chunk.size_bytes]
        path = self.folder / place.file
        data = bytearray(path.read_bytes())
        data[place.offset + 5] ^= 1
        path.write_bytes(data)


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return Saved(tmp_path / "run")


def good(done: BringDone) -> bool:
    data = Path(done.path).read_bytes()
    return all(digest(data[c.offset : c.offset + c.size_bytes]) == c.digest for c in done.part.chunks)


def test_all_of_a_part_is_brought_in_and_found_again(server: Server, saved: Saved) -> None:
    done = server.bringing.bring(saved.order, saved.store, 30)
    assert (done.part, done.flaws) == (saved.part, {})
    assert len(done.part.chunks) > 5
    assert good(done)
    assert server.shelf.ready(saved.part.name, {0: (0, saved.part.bytes)}, 0) == (done.path, [0])
    read = saved.store.stats.snapshot().bytes_read
    assert server.bringing.bring(saved.order, saved.store, 30) == done, "asked twice"
    assert saved.store.stats.snapshot().bytes_read == read
    assert (server.bringing.bytes_so_far(), server.held.counts()["bytes_copied"]) == (0, 0)
    again = Server()  # its process was killed
    assert [one.part for one in again.held.found(True).parts] == [saved.part]


def test_what_is_damaged_is_left_out_and_stays_left_out(server: Server, saved: Saved) -> None:
    saved.flip(1)
    done = server.bringing.bring(saved.order, saved.store, 30)
    bad = saved.part.chunks[1]
    assert done.part.chunks == tuple(chunk for chunk in saved.part.chunks if chunk != bad)
    assert good(done)
    ((offset, flaw),) = done.flaws.items()
    assert (offset, flaw.code) == (bad.offset, CorruptionError.code)
    assert "damaged" in flaw.why
    assert server.bringing.bring(saved.order, saved.store, 30).part == done.part
    assert [one.part for one in Server().held.found(True).parts] == [done.part]


def test_of_what_is_not_there_at_all_nothing_is_kept(server: Server, saved: Saved) -> None:
    for path in (saved.folder / "shards").rglob("*.arrow"):
        path.unlink()
    done = server.bringing.bring(_with_values(saved), saved.store, 30)
    assert (done.path, done.part.chunks) == ("", ())
    assert {flaw.code for flaw in done.flaws.values()} == {CorruptionError.code}
    assert server.names() == ["owner.json"]


def _with_values(saved: Saved) -> BringOrder:
    """Without the chunk that has no bytes: that one is good wherever it is."""
    chunks = tuple(chunk for chunk in saved.part.chunks if chunk.size_bytes)
    part = Part(saved.part.checkpoint, saved.part.origin, saved.part.bytes, chunks)
    return BringOrder(part, saved.order.files)


def test_without_room_nothing_is_read(server: Server, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = saved.part.bytes - 1

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    assert server.held.room() == saved.part.bytes - 1
    before = saved.store.stats.snapshot().reads
    with pytest.raises(StorageError, match="no room"):
        server.bringing.bring(saved.order, saved.store, 30)
    assert saved.store.stats.snapshot().reads == before
    assert server.names() == ["owner.json"]


def test_one_that_was_given_up_is_not_brought_in_by_a_late_call(
    server: Server, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.bringing.bring(saved.order, saved.store, 30)
    server.held.release(saved.part.name)
    with pytest.raises(StorageError, match="given up"):
        server.bringing.bring(saved.order, saved.store, 30)
    assert server.memory.spares() == 1

    class Usage:
        free = 10

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    assert server.held.room() == 10 + saved.part.bytes, "a spare is room"


def test_another_prefetch_brings_in_what_was_given_up(server: Server, saved: Saved) -> None:
    first = server.bringing.bring(saved.order, saved.store, 30)
    server.held.release(first.part.name)
    part = msgspec.structs.replace(saved.part, attempt="again")
    done = server.bringing.bring(BringOrder(part, saved.order.files), saved.store, 30)
    assert done.part == part
    assert good(done)
    assert part.name != saved.part.name
    assert [one.part for one in Server().held.found(True).parts] == [part]


@pytest.mark.parametrize("how", ["released", "its coordinator is gone"])
def test_one_that_is_given_up_meanwhile_ends_early(
    server: Server, saved: Saved, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    read_into, reads = saved.store.read_into, []
    monkeypatch.setattr(fetching, "_READ_BYTES", CHUNK)
    monkeypatch.setattr(fetching, "_READS_AT_ONCE", 1)

    def read(*order: Any) -> Any:
        reads.append(order)
        if how == "released":
            server.held.release(saved.part.name)
        else:
            server.bringing.give_up()
        return read_into(*order)

    monkeypatch.setattr(saved.store, "read_into", read)
    with pytest.raises(StorageError, match="given up"):
        server.bringing.bring(saved.order, saved.store, 30)
    assert len(reads) == 1
    assert server.names("part-*") == []
    assert server.held.counts()["parts_held"] == 0
