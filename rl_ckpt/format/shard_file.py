"""Shard files: ordinary Arrow IPC files with one array chunk a column.

Owns: the layout of a shard file and the offsets of the values in it. Promises: any Arrow reader opens the file with no
help from us; every column's values start at a multiple of 64 bytes; composing copies no values. Does not write
anything.

pyarrow makes the file: the schema, the metadata of the one record batch, the footer. It aligns buffers to 8 bytes and
has no setting for more, so the batch's metadata (a flatbuffer) gets its buffer offsets, its body length and the
footer's block rewritten in place for 64 (`_arrow_patch.py`).
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rl_ckpt.format import _arrow_patch
from rl_ckpt.state.boxes import Box
from rl_ckpt.state.dtypes import arrow_storage

ALIGNMENT = 64
PAGE_BYTES = _arrow_patch.PAGE_BYTES
"""The first value of a file of 4 MiB or more starts at a multiple of it, as its staging memory should."""
_PADDING = bytes(ALIGNMENT)


@dataclass(frozen=True, slots=True)
class Column:
    """One chunk to be written."""

    name: str
    """Column name, unique in the file."""
    path: str
    """Path of the leaf in the state tree."""
    dtype: str
    """Name of the array's dtype (state/dtypes.py)."""
    box: Box
    """Which part of the array, in global coordinates, in elements."""
    data: memoryview
    """The values in C order, flat bytes; kept as they are until the file is written."""


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A composed file: its bytes in order (views of the columns' data among them) and where the values lie."""

    segments: list[bytes | memoryview]
    offsets: list[int]
    size_bytes: int


def compose(columns: Sequence[Column]) -> ShardFile:
    """Lays out one shard file.

    Args:
        columns: At least one; names must be unique and data not empty.

    Returns:
        Segments to be written one after the other, and each column's offset in the file, in bytes.
    """
    written = write_batch(_batch(columns))
    segments: list[bytes | memoryview] = [written.head]
    for column, (_, size, padding) in zip(columns, written.buffers, strict=True):
        assert size == len(column.data), "a column's only buffer is its values"
        segments.append(column.data)
        if padding:
            segments.append(padding)
    segments.append(written.tail)
    return ShardFile(segments, [at for at, _, _ in written.buffers], written.size_bytes)


@dataclass(frozen=True, slots=True)
class WrittenBatch:
    """A file of one record batch, in parts: what goes between head and tail are its buffers, each with its padding."""

    head: bytes
    buffers: list[tuple[int, int, bytes]]
    """Of each buffer that is not empty, in order: offset in the file, bytes, and padding to be written after it."""
    data: list[pa.Buffer]
    """The buffers themselves."""
    tail: bytes
    size_bytes: int


def write_batch(batch: pa.RecordBatch) -> WrittenBatch:
    """Makes a file of one record batch whose buffers start at multiples of `ALIGNMENT`; copies none of them."""
    sink = _Sink()
    # pyarrow writes into a sink that keeps references: its own bytes, and the buffers, of which none is copied.
    with pa.PythonFile(sink, mode="w") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    head = sink.joined(0, sink.first_buffer)
    tail = sink.joined(sink.first_buffer + _arrow_patch.body_bytes(head), sink.position)
    layout = _arrow_patch.align(head, tail, ALIGNMENT)
    buffers = [
        (at, size, _PADDING[: padded - size])
        for at, size, padded in zip(layout.offsets, layout.sizes, layout.padded, strict=True)
        if size
    ]
    if [size for _, size, _ in buffers] != [len(buffer) for buffer in sink.buffers]:
        raise AssertionError("pyarrow wrote other buffers than its metadata names")
    total = len(layout.head) + sum(layout.padded) + len(layout.tail)
    return WrittenBatch(layout.head, buffers, sink.buffers, layout.tail, total)


def _batch(columns: Sequence[Column]) -> pa.RecordBatch:
    fields, values = [], []
    for column in columns:
        storage = arrow_storage(column.dtype)
        shape = column.box.shape if storage.per_element == 1 else (*column.box.shape, storage.per_element)
        kind = _tensor_type(storage.value_type, shape)
        count = len(column.data) // _width(storage.value_type)
        flat = pa.Array.from_buffers(kind.value_type, count, [None, pa.py_buffer(column.data)])
        listed = pa.Array.from_buffers(kind.storage_type, 1, [None], children=[flat])
        values.append(pa.ExtensionArray.from_storage(kind, listed))
        fields.append(pa.field(column.name, kind, nullable=False, metadata=_metadata(column)))
    return pa.record_batch(values, schema=pa.schema(fields))


def _metadata(column: Column) -> dict[str, str]:
    out = {"rl_ckpt.path": column.path, "rl_ckpt.dtype": column.dtype, "rl_ckpt.shape": json.dumps(column.box.shape)}
    if any(column.box.offset):
        out["rl_ckpt.offset"] = json.dumps(column.box.offset)
    return out


@functools.lru_cache(4096)
def _tensor_type(value_type: str, shape: tuple[int, ...]) -> pa.FixedShapeTensorType:
    return pa.fixed_shape_tensor(pa.from_numpy_dtype(np.dtype(value_type)), shape)


@functools.cache
def _width(value_type: str) -> int:
    return np.dtype(value_type).itemsize


class _Sink(io.RawIOBase):
    """Keeps what pyarrow writes: its own pieces as bytes, a batch's buffers as they are."""

    def __init__(self) -> None:
        self.position = 0
        self.first_buffer = 0
        self.buffers: list[pa.Buffer] = []
        self._own: list[tuple[int, bytes]] = []

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def write(self, piece: bytes | pa.Buffer) -> int:
        if isinstance(piece, pa.Buffer):
            self.first_buffer = self.first_buffer or self.position
            self.buffers.append(piece)
            size: int = piece.size
        else:
            self._own.append((self.position, piece))
            size = len(piece)
        self.position += size
        return size

    def joined(self, start: int, end: int) -> bytes:
        """Joins pyarrow's own pieces that begin in `start` … `end`, without gaps between them."""
        return b"".join(piece for at, piece in self._own if start <= at < end)
