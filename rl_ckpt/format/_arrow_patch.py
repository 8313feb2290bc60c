"""Moves the values in a one-batch Arrow IPC file to 64-byte boundaries, by editing the metadata that pyarrow wrote.

Arrow's own writer pads buffers to 8 bytes. The format allows any multiple of 8 and recommends 64. Only four things say
where values lie: the batch's buffer list, its body length, its metadata length, and the footer's block; these are
rewritten, and nothing else. Layouts: the Arrow columnar format's Message.fbs, Schema.fbs and File.fbs; flatbuffers'
table encoding.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

_MAGIC = 8  # "ARROW1" and two bytes of padding
_PREFIX = 8  # continuation marker and metadata length, both int32
_MESSAGE_HEADER, _MESSAGE_BODY_LENGTH = 2, 3  # field numbers in the flatbuffer tables
_BATCH_BUFFERS = 2
_FOOTER_BATCHES = 3
PAGE_BYTES = 4096
"""Boundary of the first value of a large file."""
_LARGE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Layout:
    """A file's parts around the values."""

    head: bytes
    sizes: list[int]
    """Bytes of each buffer, in the order of the batch's metadata; most are 0 (columns without nulls)."""
    padded: list[int]
    offsets: list[int]
    """Of each buffer in the file."""
    tail: bytes


def align(head: bytes, tail: bytes, alignment: int) -> Layout:
    """Lays the buffers out anew.

    Args:
        head: The file up to the first buffer: magic, schema message, batch message.
        tail: The file after the last buffer and its padding: end marker, footer, magic.
        alignment: Multiple of 8 at which each buffer shall start. In a large file the first one starts at a page: from
            memory that is laid out alike, a disk can then take the values without a copy.

    Returns:
        The new head and tail, and each buffer's size, padded size and offset in the file.
    """
    message = _MAGIC + _PREFIX + struct.unpack_from("<i", head, _MAGIC + 4)[0]
    pad = -len(head) % (PAGE_BYTES if body_bytes(head) >= _LARGE_BYTES else alignment)
    new_head, new_tail = bytearray(head + bytes(pad)), bytearray(tail)

    root = _root(new_head, message + _PREFIX)
    batch = _follow(new_head, _field(new_head, root, _MESSAGE_HEADER))
    at, count = _vector(new_head, _field(new_head, batch, _BATCH_BUFFERS))
    table = np.frombuffer(new_head, np.int64, 2 * count, at).reshape(count, 2)
    sizes = table[:, 1].copy()
    padded = -(-sizes // alignment) * alignment
    starts = np.cumsum(padded) - padded
    table[:, 0] = starts
    del table  # it holds the head's memory
    body = int(padded.sum())
    struct.pack_into("<i", new_head, message + 4, struct.unpack_from("<i", head, message + 4)[0] + pad)
    struct.pack_into("<q", new_head, _field(new_head, root, _MESSAGE_BODY_LENGTH), body)

    footer = len(tail) - 6 - 4 - struct.unpack_from("<i", tail, len(tail) - 10)[0]
    blocks, _ = _vector(new_tail, _field(new_tail, _root(new_tail, footer), _FOOTER_BATCHES))
    struct.pack_into("<i", new_tail, blocks + 8, len(new_head) - message)
    struct.pack_into("<q", new_tail, blocks + 16, body)
    offsets = (starts + len(new_head)).tolist()
    return Layout(bytes(new_head), sizes.tolist(), padded.tolist(), offsets, bytes(new_tail))


def body_bytes(head: bytes) -> int:
    """Length of the batch's body as the batch message at the end of `head` gives it."""
    message = _MAGIC + _PREFIX + struct.unpack_from("<i", head, _MAGIC + 4)[0]
    root = _root(head, message + _PREFIX)
    found: int = struct.unpack_from("<q", head, _field(head, root, _MESSAGE_BODY_LENGTH))[0]
    return found


def _root(data: bytes | bytearray, start: int) -> int:
    return _follow(data, start)


def _follow(data: bytes | bytearray, at: int) -> int:
    target: int = at + struct.unpack_from("<I", data, at)[0]
    return target


def _field(data: bytes | bytearray, table: int, number: int) -> int:
    """Where a table's field is stored, by its vtable."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    offset = struct.unpack_from("<H", data, vtable + 4 + 2 * number)[0]
    if not offset:
        raise AssertionError(f"field {number} is absent from pyarrow's metadata")
    found: int = table + offset
    return found


def _vector(data: bytes | bytearray, at: int) -> tuple[int, int]:
    """Start of a vector's elements, and their number."""
    start = _follow(data, at)
    return start + 4, struct.unpack_from("<I", data, start)[0]
