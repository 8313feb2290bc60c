"""A file on a local disk that arrives piece by piece, and of which a process that was killed leaves what had arrived.

Owns: the hidden file beside the object's place, its name, and its becoming the object. Promises: the object appears
under its name only when `finish` is called, whole and on the disk. Does not know which pieces are there: whoever goes
on with such a file reads it and compares digests.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

SUFFIX = ".rl_ckpt-part"
KEPT_S = 24 * 3600.0
"""An unfinished file that nobody wrote to for so long is left over: `clean_partial` removes it."""
_NAME_CHARS = 200
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems say that have no locks: two processes at one file then write the same bytes twice."""


def partial_path(path: str) -> str:
    """The hidden file for the object at `path`: always the same, so that the next process finds it."""
    folder, last = os.path.split(path)
    return os.path.join(folder, f".{last[:_NAME_CHARS]}{SUFFIX}")


def is_left_over(path: str) -> bool:
    """Whether a file is an unfinished one that nobody goes on with.

    Raises:
        FileNotFoundError: It is gone.
    """
    return path.endswith(SUFFIX) and os.stat(path).st_mtime <= time.time() - KEPT_S


def kept_bytes(path: str) -> int:
    """Disk space that the unfinished file of an object takes already."""
    try:
        return os.stat(partial_path(path)).st_blocks * 512
    except OSError:
        return 0


class PartialFile:
    """One unfinished file, open; for many threads of one process."""

    def __init__(
        self,
        path: str,
        size_bytes: int,
        guard: Callable[[], AbstractContextManager[None]],
        count: Callable[[int], None],
    ) -> None:
        """Opens it, or makes it, of its full size.

        Args:
            path: Of the object; its folder is there.
            size_bytes: Of the object.
            guard: Held while the disk is used: makes the store's errors of what it says.
            count: Told the bytes of each write.

        Raises:
            BlockingIOError: Another process is at it.
            OSError: The disk.
        """
        self._guard, self._count = guard, count
        self._path = path
        self._hidden = partial_path(path)
        self._size = size_bytes
        self._fd = _open_alone(self._hidden)
        try:
            self.resumed = os.fstat(self._fd).st_size == size_bytes
            """Whether there may be pieces in it."""
            if not self.resumed:
                os.ftruncate(self._fd, 0)
                os.ftruncate(self._fd, size_bytes)
        except BaseException:
            os.close(self._fd)
            raise

    def read(self, offset: int, view: memoryview) -> None:
        """Fills a buffer from there; zeros where nothing has arrived."""
        with self._guard():
            while view:
                count = os.preadv(self._fd, [view], offset)
                if count == 0:  # cut short by somebody: as if nothing had arrived
                    view[:] = bytes(len(view))
                    return
                view, offset = view[count:], offset + count

    def write(self, offset: int, view: memoryview) -> None:
        """Writes a piece; durable after `finish`."""
        size = len(view)
        with self._guard():
            while view:
                count = os.pwrite(self._fd, view, offset)
                view, offset = view[count:], offset + count
        self._count(size)

    def finish(self) -> None:
        """Makes it the object. A crash before the last line leaves the hidden file, or the object's old state."""
        with self._guard():
            os.fsync(self._fd)
            os.rename(self._hidden, self._path)
            folder = os.open(os.path.dirname(self._path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def close(self) -> None:
        """Closes the file; what has arrived stays."""
        os.close(self._fd)


def _open_alone(path: str) -> int:
    """Opens a file, or makes it, that nobody else has open in this way."""
    import fcntl  # which only Unix has

    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(fd).st_ino:
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # whoever had it has finished it in this moment
