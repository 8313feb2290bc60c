"""Packed shard files: ordinary Arrow IPC files with one small array chunk a row.

Owns: the layout of a packed file and the offsets of the values in it. Promises: any Arrow reader opens the file with no
help from us; the values of all rows lie one after the other, from a multiple of 64 bytes on; composing copies no
values. Does not write anything.

A column costs Arrow some 470 bytes of metadata and 30 µs, however small its chunk. A row costs 60 bytes and less than
a microsecond.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rl_ckpt.format.shard_file import ShardFile, write_batch
from rl_ckpt.state.boxes import Box

_LISTS = pa.list_(pa.field("item", pa.int64(), nullable=False))
SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("rank", pa.int32()),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("offset", _LISTS, nullable=False),
        pa.field("shape", _LISTS, nullable=False),
        pa.field("values", pa.large_binary(), nullable=False),
    ],
    metadata={"rl_ckpt.layout": "packed"},
)


@dataclass(frozen=True, slots=True)
class Rows:
    """The chunks of one packed file, by row; for 100,000 of them, one object of sequences is cheaper than rows."""

    paths: Sequence[str]
    """Of the leaves in the state tree."""
    ranks: Sequence[int | None]
    """The rank that a chunk belongs to; None where all have it, or it is sharded."""
    dtypes: Sequence[str]
    """Names of the arrays' dtypes (state/dtypes.py)."""
    boxes: Sequence[Box]
    """Which parts of the arrays, in global coordinates, in elements."""
    starts: Sequence[int]
    """Where the values lie in staging memory, in bytes; ascending."""
    sizes: Sequence[int]
    """How many bytes they are, at least 1."""


def compose(rows: Rows, staged: memoryview) -> ShardFile:
    """Lays out one packed shard file.

    Args:
        rows: At least one.
        staged: The staging memory that holds the values, flat bytes; kept as it is until the file is written. Rows that
            lie side by side in it are one segment.

    Returns:
        Segments to be written one after the other, and each row's offset in the file, in bytes.
    """
    ends = np.cumsum(np.asarray(rows.sizes, np.int64))
    begins = np.concatenate([np.zeros(1, np.int64), ends])
    # pyarrow writes a record batch's buffers without looking into them. What lies in staging memory may have gaps, so
    # it is told of as many bytes from the front, and what belongs there is put in their place.
    stand_in = pa.py_buffer(staged[: int(ends[-1])])
    values = pa.Array.from_buffers(pa.large_binary(), len(rows.sizes), [None, pa.py_buffer(begins), stand_in])
    columns = [
        pa.array(rows.paths, pa.string()),
        pa.array(rows.ranks, pa.int32()),
        pa.array(rows.dtypes, pa.string()),
        _lists([box.offset for box in rows.boxes]),
        _lists([box.shape for box in rows.boxes]),
        values,
    ]
    written = write_batch(pa.record_batch(columns, schema=SCHEMA))
    at, size, padding = written.buffers[-1]
    assert size == len(stand_in), "the values are the last buffer of the file"
    segments: list[bytes | memoryview] = [written.head]
    for buffer, (_, _, pad) in zip(written.data[:-1], written.buffers[:-1], strict=True):
        segments += [memoryview(buffer), pad]
    segments += [*_runs(rows.starts, rows.sizes, staged), padding, written.tail]
    return ShardFile([s for s in segments if len(s)], (begins[:-1] + at).tolist(), written.size_bytes)


def _lists(tuples: Sequence[tuple[int, ...]]) -> pa.ListArray:
    counts = np.fromiter(map(len, tuples), np.int32, len(tuples))
    ends = np.concatenate([np.zeros(1, np.int32), np.cumsum(counts, dtype=np.int32)])
    flat: Iterable[int] = itertools.chain.from_iterable(tuples)
    items = np.fromiter(flat, np.int64, int(ends[-1]))
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(items), type=_LISTS)


def _runs(starts: Sequence[int], sizes: Sequence[int], staged: memoryview) -> Iterator[memoryview]:
    """Views of the staging memory that hold the rows, in order."""
    begin = np.asarray(starts, np.int64)
    end = begin + np.asarray(sizes, np.int64)
    breaks = np.flatnonzero(begin[1:] != end[:-1])
    firsts = np.concatenate([np.zeros(1, np.int64), breaks + 1])
    lasts = np.concatenate([breaks, [len(begin) - 1]])
    for low, high in zip(begin[firsts].tolist(), end[lasts].tolist(), strict=True):
        yield staged[low:high]
