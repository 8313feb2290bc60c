"""What a shard server keeps: parts on its shelf, copies that are verified, files that outlive it and go in the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from rl_ckpt.errors import CorruptionError, StorageError
from rl_ckpt.format.digest import digest
from rl_ckpt.plan.parts import ChunkAt, Part, Remembered
from rl_ckpt.runtime import copying, memory
from rl_ckpt.runtime.copying import copy_part, pieces
from rl_ckpt.runtime.held import HeldParts
from rl_ckpt.runtime.messages import FoundParts, RememberOrder
from rl_ckpt.runtime.transport.listener import Listener
from rl_ckpt.runtime.transport.shelf import Range, Shelf
from rl_ckpt.runtime.transport.wire import Door, TransportError

SIZES = (100, 64, 4096, 1 << 20, 0, 7)
TOTAL = 2 << 20


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "_root", lambda: tmp_path / "shm")
    return tmp_path / "shm"


class Server:
    """A shard server's memory, without its actor."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.memory = memory.ServerMemory(name)
        self.shelf = Shelf()
        self.held = HeldParts(self.memory, self.shelf, 3)

    def names(self, pattern: str = "*") -> list[str]:
        return sorted(path.name for path in Path(self.memory.path("")).glob(pattern))

    def stage(self, checkpoint: str, generation: int = 0) -> tuple[Part, str]:
        """A generation with some chunks in it."""
        path = self.memory.renew(f"generation-{generation}-", f"generation-{generation}-{checkpoint}", TOTAL)
        view, offset, chunks = memory.mapped(path), 0, []
        for i, size in enumerate(SIZES):
            values = np.random.default_rng(i).integers(0, 256, size, np.uint8).tobytes()
            view[offset : offset + size] = values
            chunks.append(ChunkAt(digest(values), offset, size))
            offset += -(-size // 64) * 64
        return Part(checkpoint, self.name, offset, tuple(chunks)), path


@pytest.fixture
def origin() -> Server:
    return Server("origin")


@pytest.fixture
def buddy() -> Server:
    return Server("buddy")


def good(values: bytes, part: Part) -> bool:
    return all(digest(values[c.offset : c.offset + c.size_bytes]) == c.digest for c in part.chunks)


def from_file(path: str) -> Callable[[memoryview], None]:
    def fill(target: memoryview) -> None:
        target[:] = Path(path).read_bytes()[: len(target)]

    return fill


def test_what_is_held_is_on_the_shelf_until_it_is_released(origin: Server) -> None:
    part, path = origin.stage("1-a")
    assert origin.held.hold(part, path) == path
    assert origin.shelf.ready(part.name, {0: (0, part.bytes)}, 0) == (path, [0])
    assert origin.held.counts() == {"parts_held": 1, "bytes_held": part.bytes, "bytes_copied": 0}
    origin.held.hold(part, path)  # asked twice
    origin.held.release(part.name)
    with pytest.raises(TransportError):
        origin.shelf.ready(part.name, {0: (0, 1)}, 0)
    assert origin.names() == ["generation-0-1-a", "owner.json"], "the generation is for the next save"
    with pytest.raises(StorageError, match="came late"):
        origin.held.hold(part, path)
    assert origin.names("held-*") == []


def test_a_generation_that_is_held_stays_when_another_takes_its_place(origin: Server) -> None:
    part, path = origin.stage("1-a")
    origin.held.hold(part, path)
    origin.stage("2-b")
    assert good(Path(path).read_bytes(), part)
    origin.held.release(part.name)
    assert origin.names("generation-*") == ["generation-0-2-b"]


def test_a_copy_is_made_again_in_the_memory_of_one_that_went(origin: Server, buddy: Server) -> None:
    inodes = []
    for step in range(4):
        part, path = origin.stage(f"{step}-a", step % 2)
        copy = buddy.held.copy(part, from_file(path))
        assert good(Path(copy).read_bytes(), part)
        assert buddy.held.copy(part, from_file("/nowhere")) == copy, "asked twice"
        inodes.append(os.stat(copy).st_ino)
        if step:
            buddy.held.release(f"part-{step - 1}-a-origin")
    assert len(set(inodes)) == 2
    assert len(buddy.names("*part-*")) == 3, "a copy, what is written down of it, and a spare"
    buddy.memory.drop_spares()
    assert good(Path(copy).read_bytes(), part)
    buddy.held.release(part.name)
    assert [name for name in buddy.names() if not name.startswith("spare-")] == ["owner.json"]


def test_spares_go_where_staging_has_no_memory(buddy: Server, origin: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    part, path = origin.stage("1-a")
    buddy.held.copy(part, from_file(path))
    buddy.held.release(part.name)
    assert buddy.memory.spares() == 1

    class Usage:
        free = 1000

    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(StorageError, match="don't fit"):
        buddy.memory.make("generation-0-x", 2000)
    assert buddy.memory.spares() == 0


def test_a_copy_leaves_room_for_staging(buddy: Server, origin: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    part, path = origin.stage("1-a")
    buddy.stage("1-a")

    class Usage:
        free = 2 * TOTAL + part.bytes - 1

    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(StorageError, match="no room for a copy of"):
        buddy.held.copy(part, from_file(path))
    Usage.free += 1
    buddy.held.copy(part, from_file(path))


def test_a_copy_that_fails_leaves_nothing(buddy: Server, origin: Server) -> None:
    part, _ = origin.stage("1-a")

    def fail(_: memoryview) -> None:
        raise CorruptionError("damaged")

    with pytest.raises(CorruptionError):
        buddy.held.copy(part, fail)
    assert buddy.names() == ["owner.json"]
    buddy.held.release(part.name)
    with pytest.raises(StorageError, match="came late"):
        buddy.held.copy(part, fail)


def test_an_error_that_is_not_ours_leaves_nothing_either(buddy: Server, origin: Server) -> None:
    part, path = origin.stage("1-a")

    def fail(_: memoryview) -> None:
        raise OSError("a socket")

    with pytest.raises(OSError, match="a socket"):
        buddy.held.copy(part, fail)
    assert buddy.names() == ["owner.json"]
    buddy.held.copy(part, from_file(path))
    buddy.held.copy(part, from_file(path))
    assert len(buddy.held._copying) == 0, "nobody makes it, nobody waits"


@pytest.mark.parametrize("adopt", [False, True])
def test_what_is_released_while_it_is_told_is_not_told(
    origin: Server, monkeypatch: pytest.MonkeyPatch, adopt: bool
) -> None:
    part, path = origin.stage("1-a")
    origin.held.hold(part, path)
    origin.held.remember(memo(part))
    names, read = origin.memory.names, origin.memory.read

    def overtaken(name: str) -> bytes:
        origin.held.release(part.name)
        return read(name)

    monkeypatch.setattr(origin.memory, "read", overtaken)
    monkeypatch.setattr(
        origin.memory, "names", lambda prefix: ["remembered-1-a"] if prefix == "remembered-" else names(prefix)
    )
    assert origin.held.found(adopt) == FoundParts((), ())


def memo(part: Part) -> RememberOrder:
    return RememberOrder(Remembered(part.checkpoint, 1, b"{}", None, 0, True), (part.name,))


def test_a_server_that_was_killed_finds_what_it_held(origin: Server, buddy: Server) -> None:
    part, path = origin.stage("1-a")
    origin.held.hold(part, path)
    buddy.held.copy(part, from_file(path))
    buddy.held.remember(memo(part))
    half = buddy.memory.make("part-2-b-origin", 100)
    again = Server("buddy")
    assert not os.path.exists(half), "a copy that was being made"
    assert again.held.found(adopt=False) == buddy.held.found(adopt=False)
    assert [one.part for one in again.held.found(adopt=False).parts] == [part]
    assert again.shelf.ready(part.name, {0: (0, part.bytes)}, 0)[1] == [0]
    once_more = Server("origin")
    once_more.stage("2-b")
    assert good(Path(path).read_bytes(), part), "a generation is still held"


def test_another_coordinator_finds_files_that_are_no_generations(origin: Server) -> None:
    part, path = origin.stage("1-a")
    origin.held.hold(part, path)
    origin.held.remember(memo(part))
    found = origin.held.found(adopt=True)
    assert [(one.part, os.path.basename(one.path)) for one in found.parts] == [(part, part.name)]
    assert found.remembered == (memo(part),)
    assert origin.names("generation-*") == []
    assert origin.shelf.ready(part.name, {0: (0, 1)}, 0)[0] == found.parts[0].path
    assert good(Path(found.parts[0].path).read_bytes(), part)
    assert Server("origin").held.found(adopt=False) == found
    origin.held.release(part.name)
    assert origin.names("remembered-*") == []


def test_chunks_that_lie_together_travel_together() -> None:
    table = [ChunkAt(b"", 0, 60), ChunkAt(b"", 64, 64), ChunkAt(b"", 128, 0), ChunkAt(b"", 4096, 10)]
    assert pieces(table) == [table[:2], [table[3]]]
    large = [ChunkAt(b"", 0, 6 << 20), ChunkAt(b"", 6 << 20, 6 << 20)]
    assert pieces(large) == [large[:1], large[1:]]


class Peer:
    """Another server, by calls."""

    def __init__(self, door: Door | None, path: str, damaged: bool = False) -> None:
        self._door, self._path, self._damaged = door, path, damaged

    def door(self) -> Door | None:
        return self._door

    def serve(self, name: str, ranges: list[Range], wait_s: float) -> Sequence[memoryview]:
        values = bytearray(Path(self._path).read_bytes())
        if self._damaged:
            values[200] ^= 1
        return [memoryview(values)[offset : offset + size] for offset, size in ranges]


@pytest.fixture
def listener(origin: Server) -> Iterator[Listener]:
    made = Listener("127.0.0.1", origin.name, origin.shelf)
    yield made
    made.close()


def test_a_copy_comes_by_socket_and_else_by_ray(origin: Server, listener: Listener) -> None:
    part, path = origin.stage("1-a")
    origin.held.hold(part, path)
    for door, way in ((listener.door, "socket"), (None, "ray")):
        target = memoryview(bytearray(part.bytes))
        peer = Peer(door, path)
        assert copy_part(part, "origin", target, {"origin": peer}.__getitem__, 10.0) == way
        assert good(bytes(target), part)


def test_damage_on_the_way_is_found_and_asked_for_again(
    origin: Server, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, path = origin.stage("1-a")
    origin.held.hold(part, path)
    by_socket = copying._by_socket

    def damaging(*args: object) -> Iterator[int]:
        target = args[3]
        assert isinstance(target, memoryview)
        for number in by_socket(*args):  # type: ignore[arg-type]
            target[64] ^= 1
            yield number

    monkeypatch.setattr(copying, "_by_socket", damaging)
    target = memoryview(bytearray(part.bytes))
    assert copy_part(part, "origin", target, lambda _: Peer(listener.door, path), 10.0) == "ray"
    assert good(bytes(target), part)


def test_damage_at_the_holder_is_said_and_nothing_is_taken_for_a_copy(origin: Server, listener: Listener) -> None:
    part, path = origin.stage("1-a")
    origin.held.hold(part, path)
    memory.mapped(path)[70] ^= 1
    with pytest.raises(CorruptionError, match="what origin has of part-1-a-origin in its memory is damaged"):
        copy_part(part, "origin", memoryview(bytearray(part.bytes)), lambda _: Peer(listener.door, path), 10.0)


def test_a_holder_that_is_gone_is_a_storage_error(origin: Server) -> None:
    part, _ = origin.stage("1-a")

    def gone(_: str) -> Peer:
        raise TransportError("it is gone")

    with pytest.raises(StorageError, match="can't be copied from origin: TransportError: it is gone"):
        copy_part(part, "origin", memoryview(bytearray(part.bytes)), gone, 10.0)


def test_close_leaves_nothing(origin: Server, buddy: Server, root: Path) -> None:
    part, path = origin.stage("1-a")
    origin.held.hold(part, path)
    buddy.held.copy(part, from_file(path))
    origin.memory.close()
    buddy.memory.close()
    assert not root.exists()
