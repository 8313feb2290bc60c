"""A rank's chunks in local files: what is verified, in which order, what is copied, and what stays open."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from rl_ckpt import Checkpointer
from rl_ckpt.errors import StorageError
from rl_ckpt.format.manifest import Chunk, Manifest
from rl_ckpt.runtime import memory, restore_chunks
from rl_ckpt.runtime.messages import FETCHED, HELD, STORED, Source, Sources, TryNext
from rl_ckpt.runtime.restore_chunks import ChunkSource
from rl_ckpt.state.boxes import Box
from rl_ckpt.store.base import Store
from rl_ckpt.store.run import Run

CHUNK = 512 << 10
COUNT = 16
VALUES = np.random.default_rng(0).random((COUNT * 8, CHUNK // 8 // 8))

World = tuple[Store, Manifest, list[tuple[int, int]]]


@pytest.fixture
def saved(tmp_path: Path) -> World:
    url = str(tmp_path / "run")
    with Checkpointer(url, chunk_bytes=CHUNK, write_streams=1) as ckpt:
        ckpt.save_state(0, {"w": VALUES}).result(60)
    run = Run.open(url)
    manifest = run.manifest(run.find(run.log.read(), 0))
    return run.store, manifest, [(0, c) for c in range(len(manifest.arrays[0].chunks))]


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Offsets in the file of what was verified, in order."""
    seen: list[int] = []
    compare = restore_chunks.compare_chunk

    def spy(store: Store, manifest: Manifest, chunk: Chunk, found: bytes) -> None:
        seen.append(chunk.offset)
        compare(store, manifest, chunk, found)

    monkeypatch.setattr(restore_chunks, "compare_chunk", spy)
    return seen


def nothing() -> None:
    return None


def offsets(world: World) -> list[int]:
    _, manifest, needs = world
    return sorted(manifest.arrays[a].chunks[c].offset for a, c in needs)


def damage(world: World, chunk: int) -> None:
    store, manifest, _ = world
    saved = manifest.arrays[0].chunks[chunk]
    with open(str(store.local_path(manifest.files[saved.file].name)), "r+b") as file:
        file.seek(saved.offset + saved.bytes // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("threads", [1, 3])
def test_without_an_answer_all_chunks_are_verified(saved: World, checked: list[int], threads: int) -> None:
    assert ChunkSource(*saved, threads).verify(nothing, 0.0) == {}
    assert sorted(checked) == offsets(saved)
    assert len(checked) == COUNT


@pytest.mark.parametrize("chunk", range(COUNT))
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_damage_of_any_chunk_is_found(saved: World, chunk: int, start: float) -> None:
    damage(saved, chunk)
    said = ChunkSource(*saved, 2).verify(nothing, start)
    assert list(said) == [chunk]
    assert said[chunk].code == "corruption"
    assert f"chunk at {saved[1].arrays[0].chunks[chunk].offset} " in said[chunk].why
    assert "is damaged" in said[chunk].why


def test_neighbours_begin_apart(saved: World, checked: list[int]) -> None:
    expected = offsets(saved)
    for neighbour in range(4):
        checked.clear()
        ChunkSource(*saved, 1).verify(nothing, neighbour / 4)
        begin = COUNT * neighbour // 4
        assert checked == expected[begin:] + expected[:begin]


def test_what_others_verify_is_left_out_once_that_is_known(
    saved: World, checked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore_chunks, "_LOOK_BYTES", 4 * CHUNK)
    asked = 0

    def answer() -> Sources:
        nonlocal asked
        asked += 1
        return Sources(others=tuple(i for i in range(COUNT) if i % 2))

    assert ChunkSource(*saved, 1).verify(answer, 0.0) == {}
    assert asked == 1
    expected = [saved[1].arrays[0].chunks[i].offset for i in range(COUNT) if i < 4 or not i % 2]
    assert sorted(checked) == sorted(expected)


def test_a_candidate_that_was_given_up_is_verified_no_further(
    saved: World, checked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore_chunks, "_LOOK_BYTES", 2 * CHUNK)
    ChunkSource(*saved, 1).verify(TryNext, 0.0)
    assert len(checked) == 2


def test_a_folder_that_is_not_on_this_node_is_named(saved: World) -> None:
    Path(str(saved[0].local_path("run.json"))).unlink()
    with pytest.raises(StorageError, match="not there on this worker's node"):
        ChunkSource(*saved, 1).verify(nothing, 0.0)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("box", [Box.whole(VALUES.shape), Box((5, 100), (77, 301))])
def test_a_box_is_copied(saved: World, threads: int, box: Box) -> None:
    target = np.full(box.shape, -1.0)
    (a, b), (n, m) = box.offset, box.shape
    chunks = ChunkSource(*saved, threads)
    assert chunks.verify(nothing, 0.0) == {}
    assert chunks.copy([(0, target, box)]) == target.nbytes
    assert target.tobytes() == VALUES[a : a + n, b : b + m].tobytes()


def everything_is_others() -> Sources:
    return Sources(others=tuple(range(COUNT)))


def test_files_that_go_after_the_word_of_all_ranks_fail_no_rank(
    saved: World, checked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank verified them: this one has them open all the same."""
    monkeypatch.setattr(restore_chunks, "_LOOK_BYTES", 0)
    chunks, target = ChunkSource(*saved, 1), np.empty_like(VALUES)
    assert chunks.verify(everything_is_others, 0.0) == {}
    assert checked == []
    for path in Path(str(saved[0].local_path("run.json"))).parent.rglob("*.arrow"):
        path.unlink()
    chunks.copy([(0, target, Box.whole(target.shape))])
    assert target.tobytes() == VALUES.tobytes()
    chunks.close()


@pytest.mark.parametrize("left", [0, 1000])
def test_a_short_file_is_found_before_the_word_whoever_verifies_it(
    saved: World, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore_chunks, "_LOOK_BYTES", 0)
    for path in Path(str(saved[0].local_path("run.json"))).parent.rglob("*.arrow"):
        path.write_bytes(path.read_bytes()[:left])
    said = ChunkSource(*saved, 1).verify(everything_is_others, 0.0)
    assert list(said) == list(range(COUNT))
    assert all(f"has {left} bytes; checkpoint {saved[1].id} names" in flaw.why for flaw in said.values())


def test_closing_gives_the_files_back(saved: World) -> None:
    path = os.path.realpath(str(saved[0].local_path(saved[1].files[0].name)))

    def held() -> int:
        there = (os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd"))
        return sum(os.path.realpath(link) == path for link in there)

    chunks = ChunkSource(*saved, 2)
    assert chunks.verify(nothing, 0.0) == {}
    assert held() == 1
    chunks.close()
    assert held() == 0


def in_memory(world: World, tmp_path: Path, *, bad: int = -1) -> tuple[str, tuple[int, ...]]:
    """All chunks as a file of memory in reverse order, and their offsets there."""
    store, manifest, needs = world
    data, places = bytearray(64), list[int]()
    for n, (a, c) in reversed(list(enumerate(needs))):
        saved = manifest.arrays[a].chunks[c]
        whole = Path(str(store.local_path(manifest.files[saved.file].name))).read_bytes()
        places.insert(0, len(data))
        data += whole[saved.offset : saved.offset + saved.bytes]
        data[-1] ^= n == bad
    path = tmp_path / "held"
    path.write_bytes(data)
    return str(path), tuple(places)


def copied(chunks: ChunkSource) -> bytes:
    target = np.empty_like(VALUES)
    chunks.copy([(0, target, Box.whole(target.shape))])
    return target.tobytes()


def remove_shards(world: World) -> None:
    for path in Path(str(world[0].local_path("run.json"))).parent.rglob("*.arrow"):
        path.unlink()


@pytest.mark.parametrize("threads", [1, 3])
def test_held_memory_is_verified_and_copied_without_a_look_at_the_store(
    saved: World, tmp_path: Path, threads: int
) -> None:
    path, offsets = in_memory(saved, tmp_path)
    remove_shards(saved)
    Path(str(saved[0].local_path("run.json"))).unlink()
    chunks = ChunkSource(*saved, threads)
    chunks.take(Sources((Source(HELD, path),), offsets=offsets))
    assert chunks.verify() == {}
    assert copied(chunks) == VALUES.tobytes()
    chunks.close()
    assert not memory.is_mapped(path)


def test_memory_that_was_mapped_before_stays_mapped(saved: World, tmp_path: Path) -> None:
    path, offsets = in_memory(saved, tmp_path)
    memory.mapped(path)
    chunks = ChunkSource(*saved, 1)
    chunks.take(Sources((Source(HELD, path),), offsets=offsets))
    chunks.close()
    assert memory.is_mapped(path), "the next save stages there"
    memory.forget(path)


def test_a_bad_chunk_of_held_memory_is_named_and_taken_from_elsewhere(saved: World, tmp_path: Path) -> None:
    path, offsets = in_memory(saved, tmp_path, bad=5)
    store, manifest, _ = saved
    chunks = ChunkSource(*saved, 2)
    chunks.take(Sources((Source(HELD, path),), offsets=offsets))
    found = chunks.verify()
    assert {n: flaw.code for n, flaw in found.items()} == {5: "corruption"}
    fifth = manifest.arrays[0].chunks[5]
    whole = Path(str(store.local_path(manifest.files[fifth.file].name)))
    other = whole.with_name("other.arrow")
    other.write_bytes(bytes(100) + whole.read_bytes()[fifth.offset : fifth.offset + fifth.bytes])
    name = manifest.files[fifth.file].name.replace(whole.name, other.name)
    chunks.take(Sources((Source(STORED, name),), (0,), (100,), (), (5,)))
    assert chunks.verify() == {}
    assert copied(chunks) == VALUES.tobytes()
    chunks.take(Sources((Source(STORED, name),), (0,), (101,), (), (5,)))
    assert list(chunks.verify()) == [5], "one byte further on"
    chunks.take(Sources((Source(STORED, name),), (-1,), (fifth.offset,), (), (5,)))
    assert chunks.verify() == {}, "back at the manifest's own place"
    assert copied(chunks) == VALUES.tobytes()
    chunks.close()


def test_what_others_verify_and_what_a_server_has_verified_is_left_out(saved: World, tmp_path: Path) -> None:
    path, offsets = in_memory(saved, tmp_path, bad=5)
    for kind, others in ((HELD, (5,)), (FETCHED, ())):
        chunks = ChunkSource(*saved, 1)
        chunks.take(Sources((Source(kind, path),), offsets=offsets, others=others))
        assert chunks.verify() == {}
        chunks.close()


@pytest.mark.parametrize("gone", [True, False])
def test_memory_that_is_gone_or_too_short_is_told_chunk_by_chunk(saved: World, tmp_path: Path, gone: bool) -> None:
    path, offsets = in_memory(saved, tmp_path)
    if gone:
        os.unlink(path)
    else:
        os.truncate(path, offsets[4] + CHUNK)
    chunks = ChunkSource(*saved, 1)
    chunks.take(Sources((Source(FETCHED, path),), offsets=offsets))
    found = chunks.verify()
    assert sorted(found) == (list(range(COUNT)) if gone else [0, 1, 2, 3])
    assert {flaw.code for flaw in found.values()} == {"storage"}
    chunks.close()
