"""Deal: which rank stages which chunk, where in its node's staging memory, and which shard files come of it.

Owns: balance (by bytes over ranks, then over nodes), the layout of a generation of staging memory, the split into
files (packed ones for many small chunks), and, once all is staged and its digests are known, de-duplication (within the
save, and against what is stored). A plan depends on shapes and on who has what, not on values: the
next save of the same shape can use it again. Moves nothing.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from rl_ckpt.format.manifest import ArrayEntry, Chunk, Manifest, ShardFileEntry, shard_file_name
from rl_ckpt.format.shard_file import ALIGNMENT, PAGE_BYTES
from rl_ckpt.plan.chunk_index import Found, KnownChunks, Wanted
from rl_ckpt.plan.compaction import file_target
from rl_ckpt.plan.merge import Merged, MergedArray, MergedChunk
from rl_ckpt.state.boxes import Box
from rl_ckpt.state.dtypes import dtype_from_name

PACK_BELOW_BYTES = 64 << 10
"""A smaller chunk is a row of a packed file, where there are many of them."""
COLUMNS_BEFORE_PACKING = 1024
"""So many small chunks a server are columns; with more, all of them are rows."""


FILES_AT_LEAST = 16
"""So many files take a save where several are written at a time, whatever the number of servers: those of which little
is wanted later are written anew, one at a time (plan/compaction.py)."""
LEAST_FILE_BYTES = 256 << 10
"""No smaller files are made for that, nor to have several to write at a time."""

Place = tuple[int, int]
"""Which chunk: the number of its array, and its own in it."""


# `gc=False`: 100,000 of these must not make Python's collector walk the user's heap; none of them can be in a cycle.
class StageItem(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One chunk that a rank copies to `offset` of its node's generation of staging memory."""

    path: str
    box: Box
    offset: int
    size_bytes: int
    digest: bytes


class ColumnPlan(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One chunk that a shard server writes as a column of a shard file, or as a row of a packed one."""

    name: str
    """Of the column; empty for a row."""
    path: str
    dtype: str
    box: Box
    offset: int
    """Where it is staged, in bytes from the start of the generation."""
    bytes: int
    rank: int | None = None
    """The rank it belongs to, for a row."""


class FilePlan(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One shard file; it has a name once the plan is settled. `columns` are its rows where it is packed."""

    name: str
    columns: tuple[ColumnPlan, ...]
    packed: bool = False


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
    sources: dict[Place, Source] = field(default_factory=dict)
    """Where the bytes of each chunk will lie."""

    @property
    def new_bytes(self) -> int:
        """Bytes of values that the save writes, once settled."""
        return sum(c.bytes for plans in self.files.values() for f in plans for c in f.columns)


class Source(msgspec.Struct, frozen=True, gc=False, cache_hash=True):
    """Either a chunk that this save writes (server, file, column) or one that an older checkpoint holds."""

    server: str = ""
    file: int = 0
    column: int = 0
    old: tuple[ShardFileEntry, Chunk] | None = None
    """A chunk that is stored already, and its file."""


Stored = Mapping[Wanted, Found] | KnownChunks
"""Chunks that need not be written, by digest and bytes."""


def stored_chunks(manifest: Manifest) -> dict[Wanted, Found]:
    """The chunks that a checkpoint holds, for a save to refer to."""
    return {
        (bytes.fromhex(c.digest), c.bytes): (manifest.files[c.file], c)
        for array in manifest.arrays
        for c in array.chunks
    }


class Write(msgspec.Struct, gc=False):
    """A chunk to be staged, and its place."""

    array: MergedArray
    chunk: MergedChunk
    place: Place


def deal(
    merged: Merged,
    servers: Sequence[str],
    write_streams: int,
    file_bytes: int,
) -> SavePlan:
    """Plans a save.

    Args:
        merged: From `merge`.
        servers: Shard server of each rank's node, by rank.
        write_streams: Shard files that a server writes at a time: as many there are at least.
        file_bytes: Size past which a shard file is split further.

    Returns:
        The plan. Each of N replicas stages about 1/N of the bytes they share.
    """
    plan = SavePlan({rank: [] for rank in range(merged.world_size)}, {}, {}, merged)
    writes = [
        Write(array, chunk, (a, c)) for a, array in enumerate(merged.arrays) for c, chunk in enumerate(array.chunks)
    ]
    by_server: dict[str, list[tuple[int, Write]]] = {}
    for rank, write in balance(writes, servers):
        by_server.setdefault(servers[rank], []).append((rank, write))
    # One stream asks for as few files as can be.
    files_each = max(write_streams, FILES_AT_LEAST // max(len(by_server), 1)) if write_streams > 1 else 1
    for server in sorted(by_server):
        lay_out(plan, server, by_server[server], files_each, file_bytes)
    return plan


def balance(writes: list[Write], servers: Sequence[str]) -> list[tuple[int, Write]]:
    """Deals each chunk to its least loaded holder; those with the fewest holders first: they have the least choice."""
    rank_load = [0] * len(servers)
    node_load = dict.fromkeys(servers, 0)
    mine: list[list[int]] = [[] for _ in servers]  # numbers of the chunks dealt to each rank
    for holders, group in _by_holders(writes):
        if len(holders) == 1:  # nothing to choose
            size = sum(writes[number].chunk.size_bytes for number in group)
            rank_load[holders[0]] += size
            node_load[servers[holders[0]]] += size
            mine[holders[0]] += group
            continue
        heap = [(rank_load[r], node_load[servers[r]], r) for r in holders]
        heapq.heapify(heap)
        for number in sorted(group, key=lambda i: -writes[i].chunk.size_bytes):
            _, seen, rank = heap[0]
            while seen != node_load[servers[rank]]:  # another rank of its node was dealt to meanwhile
                heapq.heapreplace(heap, (rank_load[rank], node_load[servers[rank]], rank))
                _, seen, rank = heap[0]
            rank_load[rank] += writes[number].chunk.size_bytes
            node_load[servers[rank]] += writes[number].chunk.size_bytes
            heapq.heapreplace(heap, (rank_load[rank], node_load[servers[rank]], rank))
            mine[rank].append(number)
    # By rank, then as the tree was walked.
    return [(rank, writes[number]) for rank, numbers in enumerate(mine) for number in sorted(numbers)]


def _by_holders(writes: Sequence[Write]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Numbers of the chunks by who holds them; those with the fewest holders first."""
    lists: dict[int, list[int]] = {}  # by object first: a thousand holders are not hashed for every chunk of theirs
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, write in enumerate(writes):
        holders = write.chunk.holders
        group = lists.get(id(holders))
        if group is None:
            group = lists[id(holders)] = groups.setdefault(holders, [])
        group.append(number)
    return sorted(groups.items(), key=lambda item: (len(item[0]), item[0]))


def lay_out(
    plan: SavePlan,
    server: str,
    dealt: list[tuple[int, Write]],
    files_at_least: int,
    file_bytes: int,
) -> None:
    """Gives each chunk of one shard server its place in staging memory and in a file; goes into the plan.

    Args:
        plan: Gets the server's part.
        server: Its name.
        dealt: Its chunks, and the ranks that stage them.
        files_at_least: Into how many files they go, where they are not few bytes.
        file_bytes: As for `deal`.
    """
    files: list[FilePlan] = []
    offset = 0
    for group, packed in into_files(dealt, files_at_least, file_bytes):
        names: set[str] = set()
        planned: list[ColumnPlan] = []
        for rank, write in group:
            chunk, array, size = write.chunk, write.array, write.chunk.size_bytes
            plan.sources[write.place] = Source(server, len(files), len(planned))
            planned.append(column(write, offset, packed, names))
            plan.stage[rank].append(StageItem(array.path, chunk.box, offset, size, chunk.digest))
            offset += size if packed else _aligned(size)
        # The next file begins at a page, as its values do in it: they are written without a copy (file_writer.py).
        offset = -(-offset // PAGE_BYTES) * PAGE_BYTES
        files.append(FilePlan("", tuple(planned), packed))
    plan.files[server] = files
    plan.staged_bytes[server] = offset


def into_files(
    dealt: list[tuple[int, Write]], files_at_least: int, file_bytes: int
) -> list[tuple[list[tuple[int, Write]], bool]]:
    """Which chunks of one shard server go into one file each, and whether it is packed; packed ones last."""
    total = sum(write.chunk.size_bytes for _, write in dealt)
    target = max(min(-(-total // files_at_least), file_bytes), LEAST_FILE_BYTES)
    rows, columns = _small(dealt)
    return [(group, False) for group in _groups(columns, target)] + [(group, True) for group in _groups(rows, target)]


def column(write: Write, offset: int, packed: bool, names: set[str]) -> ColumnPlan:
    """A chunk as a column of a file, or a row; `names` are those of the columns before it, and take its own up."""
    array, chunk = write.array, write.chunk
    name, owner = ("", array.rank) if packed else (_column_name(array, chunk, names), None)
    return ColumnPlan(name, array.path, array.spec.dtype, chunk.box, offset, chunk.size_bytes, owner)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _small(dealt: list[tuple[int, Write]]) -> tuple[list[tuple[int, Write]], list[tuple[int, Write]]]:
    """Chunks for packed files, and the others. A few small chunks are columns: those are easier to look at.

    Packed chunks lie one after the other without padding, those of the widest alignment first. As a chunk is a multiple
    of its dtype's alignment, each begins at a multiple of its own.
    """
    small = [item for item in dealt if item[1].chunk.size_bytes < PACK_BELOW_BYTES]
    if len(small) <= COLUMNS_BEFORE_PACKING:
        return [], dealt
    by_alignment: dict[int, list[tuple[int, Write]]] = {}
    for item in small:
        by_alignment.setdefault(dtype_from_name(item[1].array.spec.dtype).alignment, []).append(item)
    packed = [item for width in sorted(by_alignment, reverse=True) for item in by_alignment[width]]
    return packed, [item for item in dealt if item[1].chunk.size_bytes >= PACK_BELOW_BYTES]


def _groups(dealt: list[tuple[int, Write]], target: int) -> list[list[tuple[int, Write]]]:
    """What goes into one file each: so many chunks that they reach `target` bytes."""
    out: list[list[tuple[int, Write]]] = []
    filled = target
    for item in dealt:
        if filled >= target:
            out.append([])
            filled = 0
        out[-1].append(item)
        filled += item[1].chunk.size_bytes
    return out


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


def settle(plan: SavePlan, checkpoint: str, digests: Mapping[tuple[str, int], bytes], stored: Stored) -> SavePlan:
    """Once everything is staged, names the files, and leaves out what is stored already or was staged twice.

    Args:
        plan: From `deal`; it is not changed.
        checkpoint: Id of the checkpoint, for file names.
        digests: Of what was staged, by server and offset.
        stored: What need not be written again.

    Returns:
        The plan of what is written.
    """
    keys = [
        (digests[server, column.offset], column.bytes)
        for server, files in plan.files.items()
        for file in files
        for column in file.columns
    ]
    unique = set(keys)
    known = stored.find(unique) if isinstance(stored, KnownChunks) else stored
    left = [key for key in unique if key not in known]
    target = file_target(sum(size for _, size in left), whole=len(left) == len(unique))
    key_of = iter(keys)
    moved: dict[Source, Source] = {}
    first: dict[Wanted, Source] = {}
    settled: dict[str, list[FilePlan]] = {}
    for server, files in plan.files.items():
        kept: list[list[ColumnPlan]] = []
        packed: list[bool] = []
        for f, file in enumerate(files):
            filled = target  # the first column begins a file
            for c, column in enumerate(file.columns):
                here, key = Source(server, f, c), next(key_of)
                old = known.get(key)
                if old is not None:
                    moved[here] = Source(old=old)
                    continue
                if key in first:
                    moved[here] = first[key]
                    continue
                if filled >= target:
                    kept.append([])
                    packed.append(file.packed)
                    filled = 0
                first[key] = Source(server, len(kept) - 1, len(kept[-1]))
                if first[key] != here:
                    moved[here] = first[key]
                kept[-1].append(column)
                filled += column.bytes
        if kept:
            settled[server] = [
                FilePlan(shard_file_name(checkpoint, server, k), tuple(columns), packed[k])
                for k, columns in enumerate(kept)
            ]
    sources = {place: moved.get(source, source) for place, source in plan.sources.items()} if moved else plan.sources
    return dataclasses.replace(plan, files=settled, sources=sources)


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
    new = {
        server: [ShardFileEntry(f.name, w.bytes) for f, w in zip(plan.files[server], done, strict=True)]
        for server, done in written.items()
        if server in plan.files
    }
    arrays, index, last = [], 0, None
    for a, array in enumerate(plan.merged.arrays):
        chunks = []
        for c, chunk in enumerate(array.chunks):
            source = plan.sources[a, c]
            if source.old is not None:
                file, old = source.old
                offset, digest = old.offset, old.digest
            else:
                file = new[source.server][source.file]
                offset = written[source.server][source.file].offsets[source.column]
                column = plan.files[source.server][source.file].columns[source.column]
                digest = digests[source.server, column.offset].hex()
            if file is not last:  # most lie in the file of the one before
                index, last = files.setdefault(file, len(files)), file
            chunks.append(Chunk(chunk.box, index, offset, chunk.size_bytes, digest))
        arrays.append(ArrayEntry(array.spec, tuple(chunks)))
    return tuple(files), tuple(arrays)
