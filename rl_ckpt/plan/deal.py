"""Deal: which rank stages which chunk, where in its node's staging memory, and which shard files come of it.

Owns: balance (by bytes over ranks, then over nodes), de-duplication by digest (within the save and against the newest
checkpoint), the layout of a generation of staging memory, and the split into files. Moves nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from rl_ckpt.format.manifest import ArrayEntry, Chunk, Manifest, ShardFileEntry, shard_file_name
from rl_ckpt.format.shard_file import ALIGNMENT, PAGE_BYTES
from rl_ckpt.plan.merge import Merged, MergedArray, MergedChunk
from rl_ckpt.state.boxes import Box


class StageItem(msgspec.Struct, frozen=True, array_like=True):
    """One chunk that a rank copies to `offset` of its node's generation of staging memory."""

    path: str
    box: Box
    offset: int
    size_bytes: int
    digest: bytes


class ColumnPlan(msgspec.Struct, frozen=True, array_like=True):
    """One chunk that a shard server writes as a column of a shard file."""

    name: str
    path: str
    dtype: str
    box: Box
    offset: int
    """Where it is staged, in bytes from the start of the generation."""
    bytes: int


class FilePlan(msgspec.Struct, frozen=True, array_like=True):
    """One shard file."""

    name: str
    columns: tuple[ColumnPlan, ...]


@dataclass(slots=True)
class SavePlan:
    """Who does what in one save."""

    stage: dict[int, list[StageItem]]
    """By rank."""
    files: dict[str, list[FilePlan]]
    """By shard server."""
    staged_bytes: dict[str, int]
    """By shard server: size of the generation of staging memory that the save needs."""
    merged: Merged
    sources: dict[tuple[int, int], _Source] = field(default_factory=dict)
    """By array and chunk: where its bytes will lie."""

    @property
    def new_bytes(self) -> int:
        """Bytes of values that the save writes."""
        return sum(c.bytes for plans in self.files.values() for f in plans for c in f.columns)


@dataclass(frozen=True, slots=True)
class _Source:
    """Either a chunk that this save writes (server, file, column) or one that an older checkpoint holds."""

    server: str = ""
    file: int = 0
    column: int = 0
    old: tuple[ShardFileEntry, Chunk] | None = None
    """A chunk that is stored already, and its file."""


Stored = Mapping[tuple[bytes, int], tuple[ShardFileEntry, Chunk]]
"""Chunks that the newest checkpoint holds, by digest and bytes."""


def stored_chunks(manifest: Manifest) -> dict[tuple[bytes, int], tuple[ShardFileEntry, Chunk]]:
    """The chunks that a checkpoint holds, for the next save to refer to."""
    return {
        (bytes.fromhex(c.digest), c.bytes): (manifest.files[c.file], c)
        for array in manifest.arrays
        for c in array.chunks
    }


@dataclass(slots=True)
class _Write:
    """A chunk that must be staged: once for all places that have the same bytes."""

    array: MergedArray
    chunk: MergedChunk
    holders: set[int]
    places: list[tuple[int, int]]


def deal(
    merged: Merged,
    servers: Sequence[str],
    checkpoint: str,
    stored: Stored,
    write_streams: int,
    file_bytes: int,
) -> SavePlan:
    """Plans a save.

    Args:
        merged: From `merge`.
        servers: Shard server of each rank's node, by rank.
        checkpoint: Id of the checkpoint, for file names.
        stored: What need not be written again.
        write_streams: Shard files that a server writes at a time.
        file_bytes: Size past which a shard file is split further.

    Returns:
        The plan. Each of N replicas stages about 1/N of the bytes they share.
    """
    plan = SavePlan({rank: [] for rank in range(merged.world_size)}, {}, {}, merged)
    writes = _writes(merged, stored, plan)
    dealt = _balance(writes, servers)
    for server in sorted(set(servers)):
        mine = [(rank, write) for rank, write in dealt if servers[rank] == server]
        if mine:
            _lay_out(plan, server, mine, checkpoint, write_streams, file_bytes)
    return plan


def _writes(merged: Merged, stored: Stored, plan: SavePlan) -> list[_Write]:
    out: list[_Write] = []
    known: dict[tuple[bytes, int], _Write] = {}
    for a, array in enumerate(merged.arrays):
        for c, chunk in enumerate(array.chunks):
            key = (chunk.digest, chunk.size_bytes)
            old = stored.get(key) if chunk.digest else None
            if old is not None:
                plan.sources[a, c] = _Source(old=old)
            elif chunk.digest and key in known:
                known[key].places.append((a, c))
            else:
                out.append(_Write(array, chunk, set(chunk.holders), [(a, c)]))
                if chunk.digest:
                    known[key] = out[-1]
    return out


def _balance(writes: list[_Write], servers: Sequence[str]) -> list[tuple[int, _Write]]:
    """Deals each chunk to its least loaded holder; those with the fewest holders first: they have the least choice."""
    rank_load = dict.fromkeys(range(len(servers)), 0)
    node_load = dict.fromkeys(servers, 0)
    groups: dict[frozenset[int], list[_Write]] = {}
    for write in writes:
        groups.setdefault(frozenset(write.holders), []).append(write)
    dealt: list[tuple[int, _Write]] = []
    for holders in sorted(groups, key=lambda h: (len(h), sorted(h))):
        heap = [(rank_load[r], node_load[servers[r]], r) for r in holders]
        heapq.heapify(heap)
        for write in sorted(groups[holders], key=lambda w: -w.chunk.size_bytes):
            _, seen, rank = heap[0]
            while seen != node_load[servers[rank]]:  # another rank of its node was dealt to meanwhile
                heapq.heapreplace(heap, (rank_load[rank], node_load[servers[rank]], rank))
                _, seen, rank = heap[0]
            rank_load[rank] += write.chunk.size_bytes
            node_load[servers[rank]] += write.chunk.size_bytes
            heapq.heapreplace(heap, (rank_load[rank], node_load[servers[rank]], rank))
            dealt.append((rank, write))
    order = {id(write): i for i, write in enumerate(writes)}
    return sorted(dealt, key=lambda item: (item[0], order[id(item[1])]))  # by rank, then as the tree was walked


def _lay_out(
    plan: SavePlan,
    server: str,
    dealt: list[tuple[int, _Write]],
    checkpoint: str,
    write_streams: int,
    file_bytes: int,
) -> None:
    total = sum(write.chunk.size_bytes for _, write in dealt)
    target = max(min(-(-total // write_streams), file_bytes), 1 << 20)
    columns: list[list[ColumnPlan]] = [[]]
    names: set[str] = set()
    offset = filled = 0
    for rank, write in dealt:
        chunk, array = write.chunk, write.array
        if filled >= target:
            columns.append([])
            filled, names = 0, set()
            offset = -(-offset // PAGE_BYTES) * PAGE_BYTES  # as in the file: written without a copy (see file_writer)
        name = _column_name(array, chunk, names)
        source = _Source(server, len(columns) - 1, len(columns[-1]))
        for place in write.places:
            plan.sources[place] = source
        columns[-1].append(ColumnPlan(name, array.path, array.spec.dtype, chunk.box, offset, chunk.size_bytes))
        plan.stage[rank].append(StageItem(array.path, chunk.box, offset, chunk.size_bytes, chunk.digest))
        filled += chunk.size_bytes
        offset += -(-chunk.size_bytes // ALIGNMENT) * ALIGNMENT
    plan.files[server] = [
        FilePlan(shard_file_name(checkpoint, server, k), tuple(group)) for k, group in enumerate(columns)
    ]
    plan.staged_bytes[server] = offset


def _column_name(array: MergedArray, chunk: MergedChunk, taken: set[str]) -> str:
    """The path; with the box's offset where the array is in several chunks, and the rank where it belongs to one."""
    name = array.path or "~"  # "~" alone is no path: it names the column of a tree that is one array
    if array.rank is not None:
        name += f"#{array.rank}"
    if chunk.box.shape != array.spec.shape:
        name += "@" + ",".join(map(str, chunk.box.offset))
    while name in taken:
        name += "'"
    taken.add(name)
    return name


def settle(plan: SavePlan, digests: Mapping[tuple[str, int], bytes], stored: Stored) -> None:
    """Once everything is staged, drops from the plan what need not be written: bytes stored already, or staged twice.

    What is hashed before it is staged (replicas that must be found) was left out by `deal`; the rest is hashed while it
    is copied, and left out here.

    Args:
        plan: From `deal`; its files and sources are changed.
        digests: Of what was staged, by server and offset.
        stored: What need not be written again.
    """
    moved: dict[_Source, _Source] = {}
    first: dict[tuple[bytes, int], _Source] = {}
    for server, files in plan.files.items():
        kept: list[FilePlan] = []
        for f, file in enumerate(files):
            columns: list[ColumnPlan] = []
            for c, column in enumerate(file.columns):
                key = (digests[server, column.offset], column.bytes)
                here, old = _Source(server, f, c), stored.get(key)
                if old is not None:
                    moved[here] = _Source(old=old)
                elif key in first:
                    moved[here] = first[key]
                else:
                    moved[here] = first[key] = _Source(server, len(kept), len(columns))
                    columns.append(column)
            if columns:
                kept.append(FilePlan(file.name, tuple(columns)))
        plan.files[server] = kept
    plan.files = {server: files for server, files in plan.files.items() if files}
    plan.sources = {place: moved.get(source, source) for place, source in plan.sources.items()}


class Written(msgspec.Struct, frozen=True):
    """What a shard server wrote of one file: its size, and each column's offset in it."""

    bytes: int
    offsets: tuple[int, ...]


def entries(
    plan: SavePlan, written: Mapping[str, Sequence[Written]], digests: Mapping[tuple[str, int], bytes]
) -> tuple[tuple[ShardFileEntry, ...], tuple[ArrayEntry, ...]]:
    """The manifest's files and arrays, once everything is written.

    Args:
        plan: From `deal`.
        written: By server, in the order of the plan's files.
        digests: Of what was staged, by server and offset in its generation.
    """
    files: dict[ShardFileEntry, int] = {}
    arrays = []
    for a, array in enumerate(plan.merged.arrays):
        chunks = []
        for c, chunk in enumerate(array.chunks):
            source = plan.sources[a, c]
            if source.old is not None:
                file, old = source.old
                offset, digest = old.offset, old.digest
            else:
                planned, done = plan.files[source.server][source.file], written[source.server][source.file]
                file = ShardFileEntry(planned.name, done.bytes)
                offset = done.offsets[source.column]
                digest = digests[source.server, planned.columns[source.column].offset].hex()
            index = files.setdefault(file, len(files))
            chunks.append(Chunk(chunk.box, index, offset, chunk.size_bytes, digest))
        arrays.append(ArrayEntry(array.spec, tuple(chunks)))
    return tuple(files), tuple(arrays)
