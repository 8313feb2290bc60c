"""What a shard file must look like around its values, as manifests tell it; to check one, and to make one anew.

Owns: the columns or rows of a file by the manifest of the checkpoint that wrote it, and reading a file's head and end
with Arrow, without its values. Promises: a file that is made anew has its values at the same offsets and the same size.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa

from rl_ckpt.format import packed_file, shard_file
from rl_ckpt.format.manifest import ArrayRef, Manifest, ShardFileEntry
from rl_ckpt.format.packed_file import Rows
from rl_ckpt.format.records import SHARDS, in_run
from rl_ckpt.format.shard_file import Column, ShardFile
from rl_ckpt.state.boxes import Box

_ARROW_SAYS = (pa.ArrowException, ValueError, OSError, KeyError, TypeError, IndexError, AttributeError, MemoryError)


class Leaf(NamedTuple):
    """What a chunk holds, for one of the arrays that refer to it."""

    path: str
    rank: int | None
    """The rank it belongs to, where ranks differ."""
    dtype: str
    box: Box
    whole: bool
    """Whether the chunk is the whole array."""


Leaves = Mapping[tuple[int, int], Sequence[Leaf]]
"""By offset in the file and size in bytes, ascending: the leaves that have their values there."""


def writer_of(file: str) -> str:
    """Id of the checkpoint that wrote a shard file."""
    return in_run(file).removeprefix(SHARDS).split("/")[0]


def leaves_in(manifest: Manifest, file: str) -> Leaves:
    """The chunks of a checkpoint that lie in one file."""
    owners: dict[int, tuple[str, int | None]] = {}
    for path, variants in manifest.nodes.items():
        for variant in variants:
            if isinstance(variant.node, ArrayRef):
                alone = len(variants) == 1 or not variant.ranks
                owners.setdefault(variant.node.index, (path, None if alone or not variant.ranks else variant.ranks[0]))
    out: dict[tuple[int, int], list[Leaf]] = {}
    numbers = {number for number, entry in enumerate(manifest.files) if entry.name == file}
    for index, entry in enumerate(manifest.arrays):
        for chunk in entry.chunks:
            if chunk.file in numbers:
                whole = chunk.box.shape == entry.spec.shape
                leaf = Leaf(*owners.get(index, ("", None)), entry.spec.dtype, chunk.box, whole)
                out.setdefault((chunk.offset, chunk.bytes), []).append(leaf)
    return dict(sorted(out.items()))


def compose_anew(entry: ShardFileEntry, leaves: Leaves, area: memoryview) -> ShardFile | None:
    """Lays a file out as its writer did.

    Args:
        entry: Name and size.
        leaves: All chunks of the file: those of the checkpoint that wrote it.
        area: As large as the file, with the values at their offsets.

    Returns:
        The file, whose segments are views of `area` and what goes around them; None where it would not be the same,
        as equal chunks were stored once under a name that is not known.
    """
    for compose in (_columns, _packed):
        made = compose(leaves, area)
        if made.offsets == [offset for offset, _ in leaves] and made.size_bytes == entry.bytes:
            return made
    return None


def _columns(leaves: Leaves, area: memoryview) -> ShardFile:
    columns: list[Column] = []
    taken: set[str] = set()
    for (offset, size), found in leaves.items():
        leaf = found[0]
        name = leaf.path or "~"
        name += f"#{leaf.rank}" if leaf.rank is not None else ""
        name += "" if leaf.whole else "@" + ",".join(map(str, leaf.box.offset))
        while name in taken:
            name += "'"
        taken.add(name)
        columns.append(Column(name, leaf.path, leaf.dtype, leaf.box, area[offset : offset + size]))
    return shard_file.compose(columns)


def _packed(leaves: Leaves, area: memoryview) -> ShardFile:
    rows = [found[0] for found in leaves.values()]
    return packed_file.compose(
        Rows(
            [leaf.path for leaf in rows],
            [leaf.rank for leaf in rows],
            [leaf.dtype for leaf in rows],
            [leaf.box for leaf in rows],
            [offset for offset, _ in leaves],
            [size for _, size in leaves],
        ),
        area,
    )


def new_area(size_bytes: int) -> memoryview:
    """Memory of zeros, of which only what is written or read takes any."""
    return memoryview(mmap.mmap(-1, size_bytes))


def arrow_problem(area: memoryview, leaves: Leaves, all_known: bool) -> str | None:
    """Reads a file as Arrow tools do.

    Args:
        area: The file; its values need not be there.
        leaves: Chunks that must be in it.
        all_known: Whether `leaves` are all of its chunks, by the manifest of its writer.

    Returns:
        What is wrong; None where Arrow finds every chunk in its place, as what the manifest says.
    """
    try:
        batch = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(area))).get_batch(0)
        batch.validate()
        packed = (batch.schema.metadata or {}).get(b"rl_ckpt.layout") == b"packed"
        found = _rows_found(batch, area) if packed else _columns_found(batch, area)
    except _ARROW_SAYS as error:
        return f"Arrow can't read it: {error}"
    for place, wanted in leaves.items():
        said = found.get(place)
        if said is None:
            return f"Arrow finds no values of {place[1]} bytes at {place[0]}"
        if all_known and said not in {(leaf.path, leaf.dtype) for leaf in wanted}:
            return f"the values at {place[0]} are called {said[0]!r} of {said[1]} in it, not {wanted[0].path!r}"
    return None


def _address(area: memoryview) -> int:
    found: int = pa.py_buffer(area).address
    return found


def _columns_found(batch: pa.RecordBatch, area: memoryview) -> dict[tuple[int, int], tuple[str, str]]:
    base = _address(area)
    out = {}
    for column, field in zip(batch.columns, batch.schema, strict=True):
        values = column.storage.buffers()[-1]
        about = field.metadata or {}
        said = (about[b"rl_ckpt.path"].decode("utf-8", "surrogatepass"), about[b"rl_ckpt.dtype"].decode())
        out[values.address - base, values.size] = said
    return out


def _rows_found(batch: pa.RecordBatch, area: memoryview) -> dict[tuple[int, int], tuple[str, str]]:
    values = batch.column("values")
    start = values.buffers()[2].address - _address(area)
    ends = memoryview(values.buffers()[1]).cast("q").tolist()
    said = zip(batch.column("path").to_pylist(), batch.column("dtype").to_pylist(), strict=True)
    return {
        (start + begin, end - begin): (path, dtype)
        for begin, end, (path, dtype) in zip(ends, ends[1:], said, strict=False)
    }
