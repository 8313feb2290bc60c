"""Huge pages: staging memory made of 2 MiB pages, and mapped so that processes get them as such.

Owns: filling a new file with huge pages, and mapping a file where the kernel can use them. Promises nothing: where the
kernel (before 6.1), the file system or the free memory does not allow huge pages, everything works with small ones.

Why: making 1 GiB of shared memory and copying into it for the first time took 0.06 + 0.06 s with huge pages and
0.30 + 0.36 s with small ones, of which each process that maps the memory pays the second part anew. `/dev/shm` is
usually mounted without huge pages, but `MADV_COLLAPSE` asks for them by hand and needs no administrator.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

HUGE_BYTES = 2 << 20
_STEP_BYTES = 32 << 20
_THREADS = 2
_MADV_POPULATE_WRITE = 23
_MADV_COLLAPSE = 25
_PUNCH_HOLE = 0x1 | 0x2  # and keep the size, so that a late write meets no end of file
_MAP_NORESERVE = 0x4000
_MAP_FIXED = 0x10
_NO_MORE = (errno.EINVAL, errno.ENOMEM, errno.ENOSPC)
"""No such thing in this kernel or file system, no huge page left, or the file system is full."""


def fill(fd: int, size_bytes: int) -> int:
    """Fills a new, empty file in shared memory with huge pages, as far as there are any.

    Args:
        fd: Of the file, open for reading and writing; it gets its size here.
        size_bytes: Its size.

    Returns:
        How many bytes got huge pages; the rest is holes.
    """
    os.ftruncate(fd, size_bytes)
    end = size_bytes // HUGE_BYTES * HUGE_BYTES
    if not end or sys.platform != "linux":
        return 0
    steps = [(start, min(_STEP_BYTES, end - start)) for start in range(0, end, _STEP_BYTES)]
    view = map_file(fd, size_bytes)
    refused = threading.Event()

    def collapse(step: tuple[int, int]) -> int:
        if refused.is_set() or not _collapse(fd, view, *step):
            refused.set()  # looking for huge pages where none are left takes the kernel long
            return 0
        return step[1]

    with ThreadPoolExecutor(_THREADS, "rl_ckpt-reserve") as pool:
        return sum(pool.map(collapse, steps))


def map_file(fd: int, size_bytes: int) -> memoryview:
    """Maps a file for reading and writing, at an address where huge pages fit; unmapped once no view of it is left."""
    if sys.platform != "linux" or size_bytes < HUGE_BYTES:
        return memoryview(mmap.mmap(fd, size_bytes))
    # Python's mmap takes no address: so this makes room for the file and the way to the next boundary, and puts the
    # file into it. When Python unmaps the room, the file's mapping goes with it.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    room = memoryview(mmap.mmap(-1, size_bytes + HUGE_BYTES, flags=flags))
    skip = -_address(room) % HUGE_BYTES
    view = room[skip : skip + size_bytes]
    at, prot = _address(view), mmap.PROT_READ | mmap.PROT_WRITE
    if _libc().mmap(at, size_bytes, prot, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) != at:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return view


def populate(view: memoryview) -> None:
    """Has all pages of a map (or a part of it) ready in this process, so that the first copy into it meets no faults.

    Costs next to nothing with huge pages, and 0.3 s/GiB with small ones. Its values stay.
    """
    start = _address(view)
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    if view.nbytes and sys.platform == "linux":
        # Before Linux 5.14 this does nothing, and the copy meets its faults.
        _libc().madvise(first, start + view.nbytes - first, _MADV_POPULATE_WRITE)


def empty(fd: int, size_bytes: int) -> None:
    """Gives a file's memory back, whoever still maps it: they find zeros, and what they write is lost."""
    if sys.platform == "linux" and size_bytes:
        whole = -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        _libc().fallocate(fd, _PUNCH_HOLE, 0, whole)  # where it can't: the memory goes with the last map


def _collapse(fd: int, view: memoryview, start: int, size_bytes: int) -> bool:
    """Makes huge pages of one part of a file; answers whether all of it got them."""
    try:
        for at in range(start, start + size_bytes, HUGE_BYTES):
            os.posix_fallocate(fd, at, mmap.PAGESIZE)  # where there is no page at all, the kernel does not start
    except OSError as error:
        if error.errno not in _NO_MORE:
            raise
        return False
    found: int = _libc().madvise(_address(view) + start, size_bytes, _MADV_COLLAPSE)
    return found == 0


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


@functools.cache
def _libc() -> Any:
    """The C library; calls let other threads run, as Python's own `mmap.madvise` does not."""
    libc = ctypes.CDLL(None, use_errno=True)
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    libc.mmap.argtypes = [pointer, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mmap.restype = pointer
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    libc.madvise.argtypes = [pointer, size, ctypes.c_int]
    return libc
