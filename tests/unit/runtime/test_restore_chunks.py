"""A rank's chunks in mapped files: what is verified, in which order, what is copied, and what stays in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rl_ckpt import Checkpointer
from rl_ckpt.errors import StorageError
from rl_ckpt.format.manifest import Chunk, Manifest
from rl_ckpt.runtime import restore_chunks
from rl_ckpt.runtime.messages import Sources, TryNext
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
    assert ChunkSource(*saved, threads).verify(nothing, 0.0) == ""
    assert sorted(checked) == offsets(saved)
    assert len(checked) == COUNT


@pytest.mark.parametrize("chunk", range(COUNT))
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_damage_of_any_chunk_is_found(saved: World, chunk: int, start: float) -> None:
    damage(saved, chunk)
    said = ChunkSource(*saved, 2).verify(nothing, start)
    assert f"chunk at {saved[1].arrays[0].chunks[chunk].offset} " in said
    assert "is damaged" in said


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

    assert ChunkSource(*saved, 1).verify(answer, 0.0) == ""
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
    assert ChunkSource(*saved, threads).copy([(0, target, box)]) == target.nbytes
    assert target.tobytes() == VALUES[a : a + n, b : b + m].tobytes()


def resident(path: str) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    size, mine = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            mine = line.endswith(path)
        elif mine and line.startswith("Rss:"):
            size += int(line.split()[1]) << 10
    return size


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what is resident")
@pytest.mark.parametrize(
    "use", [lambda c, t: c.verify(nothing, 0.0), lambda c, t: c.copy([(0, t, Box.whole(t.shape))])]
)
def test_mapped_pages_are_let_go_behind_their_use(saved: World, use: Callable[..., object]) -> None:
    store, manifest, _ = saved
    path = str(store.local_path(manifest.files[0].name))
    chunks = ChunkSource(*saved, 1)
    chunks._mapped.view(path, 0, 1)
    assert bytes(chunks._mapped.view(path, 0, 64 << 10)), "touched"
    assert resident(path) > 0, "this test can see it"
    use(chunks, np.empty_like(VALUES))
    assert resident(path) < CHUNK
