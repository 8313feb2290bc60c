"""Parts: what one shard server staged of one checkpoint, and who has a copy of it in memory.

Owns: the records by which the memory tier (runtime/tier.py) is told about, and finding a chunk among parts. A part is
the byte image of a generation of staging memory, from its start to the end of what was staged, with a table of its
chunks. A holder has it in its node's shared memory: the origin, as the generation itself; a buddy, as a copy, byte for
byte, with the same offsets. Pure; moves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from rl_ckpt.format.manifest import ArrayEntry, ArrayRef, Chunk, Manifest, ShardFileEntry
from rl_ckpt.format.records import CommitRecord
from rl_ckpt.plan.deal import FilePlan, SavePlan, Source, Write, column, into_files
from rl_ckpt.plan.merge import Merged, MergedArray, MergedChunk

_MEMORY = "memory/"

PART = "part-"
"""How the names of parts begin."""


class ChunkAt(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A row of a part's table: a chunk, and where it lies in the part, in bytes."""

    digest: bytes
    offset: int
    size_bytes: int


class Part(msgspec.Struct, frozen=True):
    """What one shard server staged of one checkpoint, or is to bring in of it."""

    checkpoint: str
    origin: str
    """The shard server whose ranks staged it, or that is the first to be asked to bring it in."""
    bytes: int
    chunks: tuple[ChunkAt, ...]
    attempt: str = ""
    """Of the prefetch, where it is brought in: one that was given up comes back under another name only."""

    @property
    def name(self) -> str:
        """By which it is on every holder's shelf."""
        name = part_name(self.checkpoint, self.origin)
        return f"{name}-{self.attempt}" if self.attempt else name


def part_name(checkpoint: str, origin: str) -> str:
    """Name of the part that a shard server staged of a checkpoint."""
    return f"{PART}{checkpoint}-{origin}"


class Held(msgspec.Struct, frozen=True, gc=False):
    """A chunk in a holder's memory."""

    server: str
    part: str
    """Its name."""
    path: str
    """The file on that server's node, which ranks of that node may map."""
    offset: int


class Holdings:
    """Where the chunks of one checkpoint are in memory. Does not change: what is lost later is still named here."""

    def __init__(self, parts: Sequence[Part], holders: Mapping[str, Mapping[str, str]]) -> None:
        """What there is.

        Args:
            parts: Of one checkpoint.
            holders: By name of the part: its holders, and the file in which each has it.
        """
        self._parts = tuple(parts)
        self._holders = {name: tuple(files.items()) for name, files in holders.items()}
        self._found: dict[tuple[bytes, int], list[tuple[str, int, tuple[tuple[str, str], ...]]]] | None = None

    def find(self, digest: bytes, size_bytes: int) -> Sequence[Held]:
        """All copies of a chunk; none where memory has it not."""
        if self._found is None:  # when it is first asked for: most checkpoints are never restored
            self._found = {}
            for part in self._parts:
                name, holders = part.name, self._holders.get(part.name, ())
                for chunk in part.chunks:
                    key, place = (chunk.digest, chunk.size_bytes), (name, chunk.offset, holders)
                    if key in self._found:
                        self._found[key].append(place)
                    else:
                        self._found[key] = [place]
        return [
            Held(server, name, path, offset)
            for name, offset, holders in self._found.get((digest, size_bytes), ())
            for server, path in holders
        ]

    def servers(self) -> list[str]:
        """All holders."""
        return sorted({server for files in self._holders.values() for server, _ in files})

    def __iter__(self) -> Iterator[Part]:
        """The parts."""
        return iter(self._parts)


class Remembered(msgspec.Struct, frozen=True):
    """A checkpoint that the memory tier has."""

    id: str
    step: int
    manifest: bytes
    """Its JSON; where it is only in memory, its files are named `memory/<server>` and are nowhere."""
    record: CommitRecord | None
    """None: it is only in memory."""
    after: int
    """Number of the newest commit record when it was complete."""
    whole: bool
    """Whether every chunk has a holder that is alive."""
    time: float = 0.0
    """When it was complete, in Unix seconds: tells the order of those that name the same record."""

    @property
    def run(self) -> str:
        """Id of the run that it is of."""
        return self.record.run if self.record is not None else msgspec.json.decode(self.manifest, type=_OfRun).run


class _OfRun(msgspec.Struct):
    run: str


def parts_of(
    plan: SavePlan, servers: Sequence[str], checkpoint: str, digests: Mapping[tuple[str, int], bytes]
) -> list[Part]:
    """The parts of a save whose chunks are all staged.

    Args:
        plan: Of the save; from `deal`, settled or not.
        servers: Shard server of each rank's node, by rank.
        checkpoint: Its id.
        digests: Of what was staged, by server and offset.

    Returns:
        A part for each server that staged something; a table in ascending order of offsets.
    """
    tables: dict[str, list[ChunkAt]] = {}
    for rank, items in plan.stage.items():
        server = servers[rank]
        table = tables.setdefault(server, [])
        table += [ChunkAt(digests[server, item.offset], item.offset, item.size_bytes) for item in items]
    return [
        Part(checkpoint, server, plan.staged_bytes[server], tuple(sorted(table, key=lambda chunk: chunk.offset)))
        for server, table in sorted(tables.items())
        if table
    ]


def memory_entries(
    plan: SavePlan, digests: Mapping[tuple[str, int], bytes]
) -> tuple[tuple[ShardFileEntry, ...], tuple[ArrayEntry, ...]]:
    """The manifest's files and arrays of a checkpoint that is only in memory.

    Args:
        plan: From `deal`, not settled.
        digests: Of what was staged, by server and offset.

    Returns:
        A file `memory/<server>` for each part, which is nowhere; each chunk lies in it as in the part.
    """
    files: dict[str, int] = {}
    arrays: list[ArrayEntry] = []
    for a, array in enumerate(plan.merged.arrays):
        chunks: list[Chunk] = []
        for c, chunk in enumerate(array.chunks):
            source = plan.sources[a, c]
            column = plan.files[source.server][source.file].columns[source.column]
            index = files.setdefault(source.server, len(files))
            found = digests[source.server, column.offset].hex()
            chunks.append(Chunk(chunk.box, index, column.offset, chunk.size_bytes, found))
        arrays.append(ArrayEntry(array.spec, tuple(chunks)))
    return tuple(ShardFileEntry(_MEMORY + server, plan.staged_bytes[server]) for server in files), tuple(arrays)


def plan_of_memory(
    manifest: Manifest, write_streams: int, file_bytes: int, ending: str = ""
) -> tuple[SavePlan, dict[tuple[str, int], bytes]]:
    """The way back from `memory_entries`: a plan that writes what is only in memory, whoever staged it.

    Args:
        manifest: Of a checkpoint that is only in memory.
        write_streams: As for `deal`.
        file_bytes: As for `deal`.
        ending: Of the names of its lanes, and so of its files: an earlier try's, which it may still write, are others.

    Returns:
        A plan to be settled, with the files that `deal` would have made, and nothing to stage: a lane for each server
        that staged something, named after it; and the digests of what was staged, by lane and offset.
    """
    owners = {
        variant.node.index: (path, variant.ranks[0] if len(variants) > 1 and variant.ranks else None)
        for path, variants in manifest.nodes.items()
        for variant in variants
        if isinstance(variant.node, ArrayRef)
    }
    plan = SavePlan({}, {}, {}, Merged(manifest.world_size, dict(manifest.nodes)))
    digests: dict[tuple[str, int], bytes] = {}
    staged: dict[str, list[tuple[int, Write]]] = {}
    for a, entry in enumerate(manifest.arrays):
        path, rank = owners[a]
        array = MergedArray(path, entry.spec, [MergedChunk(c.box, c.bytes, b"", ()) for c in entry.chunks], rank)
        plan.merged.arrays.append(array)
        for c, chunk in enumerate(entry.chunks):
            server = manifest.files[chunk.file].name.removeprefix(_MEMORY) + ending
            digests[server, chunk.offset] = bytes.fromhex(chunk.digest)
            staged.setdefault(server, []).append((chunk.offset, Write(array, array.chunks[c], (a, c))))
    for server, found in sorted(staged.items()):
        files = plan.files[server] = list[FilePlan]()
        for group, packed in into_files(sorted(found, key=_place), write_streams, file_bytes):
            names: set[str] = set()
            for n, (_, write) in enumerate(group):
                plan.sources[write.place] = Source(server, len(files), n)
            files.append(FilePlan("", tuple(column(write, offset, packed, names) for offset, write in group), packed))
    return plan, digests


def _place(item: tuple[int, Write]) -> tuple[int, int]:
    return item[0], item[1].chunk.size_bytes  # what is empty lies where the next chunk begins
