"""Writing the bytes of one new file on a local disk or mounted file system.

Owns: how bytes get from memory to the file. Large files go past the page cache (`O_DIRECT`), where the file system can
do that: the disk then reads the memory itself, which takes a tenth of the processor time, and leaves the caches of the
training that goes on beside it alone. Does not make anything durable or visible: that is the caller's (`local.py`).

Measured on a 4-core machine with 1 GiB in 4 files while 4 processes trained: through the page cache a step's 99th
percentile was 3.9 times as long, and lowering the writers' priority made the save take minutes; past it 1.07 times.
Both take as long when nothing else runs, with 0.40 and 0.04 CPU-s. In exchange, the first read of the file comes from
the disk.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

DIRECT_FROM_BYTES = 4 << 20
"""Smaller files, such as most manifests, are rather kept in memory: they are read again soon."""
_WRITE_BYTES = 16 << 20
"""Largest single write. 8 MiB or one write for all are as fast; early writeback and fallocate gain nothing."""
_BLOCK_BYTES = 4096
"""Addresses, offsets and sizes of direct writes are multiples of it: no file system asks for more."""
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)
"""What file systems say that take no direct writes, or none like this."""
_BOUNCE_BYTES = 1 << 20
_IOV_MAX = 1024


def write_segments(fd: int, views: Sequence[memoryview]) -> None:
    """Writes segments one after another to an empty file.

    Args:
        fd: Open for writing, at offset 0.
        views: Flat bytes, none empty; not copied together.

    Raises:
        OSError: Writing failed; the file is of no use.
    """
    if sum(view.nbytes for view in views) >= DIRECT_FROM_BYTES and _set_direct(fd, True):
        writer = _DirectWriter(fd)
        for view in views:
            writer.write(np.frombuffer(view, np.uint8))
        writer.finish()
    else:
        _write_cached(fd, views)


class _DirectWriter:
    """Writes whole blocks: straight from the caller's memory where it lies as direct writes need it, else from a copy.

    The copy is made piece by piece in a buffer that stays in the processor's cache.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._direct = True
        self._bounce: Bytes = np.frombuffer(mmap.mmap(-1, _BOUNCE_BYTES), np.uint8)  # anonymous memory: page-aligned
        self._filled = 0  # the buffer's start always belongs at a multiple of the block size in the file

    def write(self, data: Bytes) -> None:
        """Takes the next bytes of the file."""
        address = data.ctypes.data
        if (address - self._filled) % _BLOCK_BYTES == 0 and len(data) >= 2 * _BLOCK_BYTES:
            begin = -self._filled % _BLOCK_BYTES
            self._copy(data[:begin])
            self._flush()
            end = begin + (len(data) - begin) // _BLOCK_BYTES * _BLOCK_BYTES
            self._write_blocks(data[begin:end])
            data = data[end:]
        self._copy(data)

    def finish(self) -> None:
        """Writes what is left: whole blocks, and then the file's end, which is none, through the page cache."""
        whole = self._filled // _BLOCK_BYTES * _BLOCK_BYTES
        self._write_blocks(self._bounce[:whole])
        if whole < self._filled:
            self._leave_direct()
            self._write_blocks(self._bounce[whole : self._filled])

    def _copy(self, data: Bytes) -> None:
        while len(data):
            count = min(len(data), _BOUNCE_BYTES - self._filled)
            # By numpy, which lets the other writers' threads run meanwhile.
            np.copyto(self._bounce[self._filled : self._filled + count], data[:count])
            self._filled += count
            data = data[count:]
            if self._filled == _BOUNCE_BYTES:
                self._flush()

    def _flush(self) -> None:
        self._write_blocks(self._bounce[: self._filled])
        self._filled = 0

    def _write_blocks(self, blocks: Bytes) -> None:
        while len(blocks):
            try:
                count = os.write(self._fd, blocks[:_WRITE_BYTES].data)
            except OSError as error:
                # The file system wants larger blocks, or a disk that is nearly full took part of one: as far as it
                # got the file is good, and the page cache takes any size.
                if error.errno not in _REFUSED or not self._direct:
                    raise
                self._leave_direct()
                continue
            blocks = blocks[count:]

    def _leave_direct(self) -> None:
        if self._direct:
            _set_direct(self._fd, False)
            self._direct = False


def _set_direct(fd: int, on: bool) -> bool:
    """Has later writes to `fd` go past the page cache, or not; answers whether they do as asked."""
    if sys.platform != "linux":
        return not on
    import fcntl

    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return False  # this file system has no such thing
    return True


def _write_cached(fd: int, views: Sequence[memoryview]) -> None:
    """Large views in pieces, small ones in batches."""
    batch: list[memoryview] = []
    size = 0
    for view in views:
        for begin in range(0, view.nbytes, _WRITE_BYTES):
            piece = view[begin : begin + _WRITE_BYTES]
            batch.append(piece)
            size += piece.nbytes
            if size >= _WRITE_BYTES or len(batch) == _IOV_MAX:
                _write_batch(fd, batch)
                batch, size = [], 0
    _write_batch(fd, batch)


def _write_batch(fd: int, batch: list[memoryview]) -> None:
    while batch:
        batch = advance(batch, os.writev(fd, batch))


def advance(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of `views` after their first `count` bytes."""
    for index, view in enumerate(views):
        if count < view.nbytes:
            return [view[count:], *views[index + 1 :]]
        count -= view.nbytes
    return []
