"""Compaction in a fork: what lies in another run takes no space in this one."""

from __future__ import annotations

import pytest

from rl_ckpt.format.manifest import ArrayEntry, Chunk, Manifest, ShardFileEntry
from rl_ckpt.plan.chunk_index import ChunkIndex
from rl_ckpt.state.arrays import ArraySpec
from rl_ckpt.state.boxes import Box

KIB = 1 << 10


def manifest(*chunks: tuple[str, int, int, str]) -> Manifest:
    """Of chunks: file, offset and size, and a digit that is the digest."""
    names = list(dict.fromkeys(name for name, *_ in chunks))
    spec = ArraySpec(dtype="uint8", shape=(1,), kind="numpy")
    arrays = [
        ArrayEntry(spec, (Chunk(Box((0,), (size,)), names.index(name), offset, size, digit * 32),))
        for name, offset, size, digit in chunks
    ]
    files = tuple(ShardFileEntry(name, 2000 * KIB if "0-z" in name else 102 * KIB) for name in names)
    return Manifest(
        run="r", id="1-a", step=1, world_size=1, time=0.0, writer="", parent=None, metrics={}, tag=None,
        files=files, arrays=tuple(arrays), nodes={},
    )  # fmt: skip


@pytest.mark.parametrize("large", ["base/0/shards/0-z/s-0.arrow", "shards/0-z/s-0.arrow"])
def test_a_bases_large_file_makes_no_save_move_what_is_its_own(large: str) -> None:
    index = ChunkIndex()
    mine = "shards/1-a/s-0.arrow"
    index.add(manifest((large, 0, 10 * KIB, "1"), (mine, 0, 85 * KIB, "2"), (mine, 85 * KIB, 15 * KIB, "3")), 1)
    wanted = [(bytes.fromhex("1" * 32), 10 * KIB), (bytes.fromhex("2" * 32), 85 * KIB)]
    found = index.view(["1-a"], [], False).find(wanted)
    stays = {file.name for file, _ in found.values()}
    assert stays == ({mine, large} if large.startswith("base/") else {mine})
