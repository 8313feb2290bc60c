"""Who brings which chunk of a checkpoint into memory: each once, level, and not more than there is room for."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_ckpt.format.manifest import ArrayEntry, Chunk, Manifest, ShardFileEntry
from rl_ckpt.plan.prefetch import deal_parts, names_of, places
from rl_ckpt.state.arrays import ArraySpec
from rl_ckpt.state.boxes import Box
from tests.unit.plan.model import save

SERVERS = ("s0", "s1", "s2")


def manifest_of(sizes: list[int], equal: bool = False) -> Manifest:
    """One array of such chunks, in files of four."""
    chunks, files, offset = [], [], 0
    for n, size in enumerate(sizes):
        if n % 4 == 0:
            files.append(ShardFileEntry(f"shards/1-a/{n // 4}.arrow", 1 << 30))
            offset = 0
        digest = f"{0 if equal else n:032x}"
        chunks.append(Chunk(Box((0,), (size,)), len(files) - 1, offset, size, digest))
        offset += size
    array = ArrayEntry(ArraySpec("numpy", "<u1", (sum(sizes),)), tuple(chunks))
    return Manifest(
        run="r", id="1-a", step=1, world_size=1, time=0.0, writer="w", parent=None, metrics={}, tag=None,
        files=tuple(files), arrays=(array,), nodes={},
    )  # fmt: skip


@given(
    sizes=st.lists(st.integers(0, 300), max_size=40),
    room=st.dictionaries(st.sampled_from(SERVERS), st.integers(-10, 5000)),
)
@settings(max_examples=200, deadline=None)
def test_each_chunk_is_in_one_part_or_left_and_no_part_is_larger_than_its_room(
    sizes: list[int], room: dict[str, int]
) -> None:
    dealt = deal_parts(manifest_of(sizes), room)
    dealt_keys = [(chunk.digest, chunk.size_bytes) for part in dealt.parts for chunk in part.chunks]
    expected = [(bytes.fromhex(f"{n:032x}"), size) for n, size in enumerate(sizes)]
    assert sorted([*dealt_keys, *dealt.left]) == sorted(expected)
    assert dealt.bytes == sum(sizes)
    assert dealt.left_bytes == sum(size for _, size in dealt.left)
    for part in dealt.parts:
        assert part.bytes <= room[part.origin]
        ends = [chunk.offset + chunk.size_bytes for chunk in part.chunks]
        assert all(chunk.offset % 64 == 0 for chunk in part.chunks)
        assert all(end <= after.offset for end, after in zip(ends, part.chunks[1:], strict=False))
        assert max(ends) <= part.bytes
    if all(size >= 0 for size in room.values()):
        for _, size in dealt.left:  # nobody has room for what is left
            filled = {part.origin: part.bytes for part in dealt.parts}
            assert all(filled.get(server, 0) + -(-size // 64) * 64 > room[server] for server in room)


def test_loads_are_level_and_neighbours_in_a_file_stay_together() -> None:
    manifest = manifest_of([640] * 36)
    dealt = deal_parts(manifest, dict.fromkeys(SERVERS, 1 << 40))
    assert [part.bytes for part in dealt.parts] == [640 * 12] * 3
    where = places(manifest)
    for part in dealt.parts:
        assert len({where[chunk.digest, chunk.size_bytes].file for chunk in part.chunks}) == 3


def test_who_has_little_room_takes_little_and_others_the_rest() -> None:
    dealt = deal_parts(manifest_of([640] * 36), {"s0": 1500, "s1": 1 << 40, "s2": 1 << 40})
    assert {part.origin: part.bytes for part in dealt.parts} == {"s0": 1280, "s1": 640 * 17, "s2": 640 * 17}
    assert dealt.left == ()


def test_equal_bytes_are_one_chunk() -> None:
    dealt = deal_parts(manifest_of([64] * 8, equal=True), dict.fromkeys(SERVERS, 1000))
    assert (len(dealt.parts), dealt.bytes) == (1, 64)


def test_chunks_have_names_for_people() -> None:
    manifest = save([{"a": np.arange(20.0), "b": np.arange(5)}] * 2, ["s0", "s1"]).manifest
    chunk = manifest.arrays[1].chunks[0]
    key = bytes.fromhex(chunk.digest), chunk.bytes
    assert names_of(manifest, [key]) == {key: "chunk 0 of b"}
    assert names_of(manifest, []) == {}
