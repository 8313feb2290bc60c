"""The body of one upload request: the caller's buffers, cut into parts and sent without being joined first."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence

_SEND_BYTES = 256 << 10


class Body:
    """A part's bytes, sent from the caller's buffers without being joined first.

    aiohttp sends what it iterates asynchronously, botocore wants `read`, `seek`, `tell` and a length (it reads only
    where payload signing was asked for). Sending again starts from the beginning.

    Args:
        views: Flat byte views; the body is their concatenation.
    """

    def __init__(self, views: Sequence[memoryview]) -> None:
        self.views = views
        self._size = sum(view.nbytes for view in views)
        self._position = 0
        self.sent: int | None = None
        """Bytes that aiohttp has taken in its last try; None where something else sends the views."""

    def __len__(self) -> int:
        return self._size

    async def __aiter__(self) -> AsyncIterator[bytes | memoryview]:
        self.sent = 0
        for block in blocks(self.views, _SEND_BYTES):
            yield block
            self.sent += len(block)

    def read(self, size: int = -1) -> bytes:
        """Copy of the next `size` bytes, of all that is left when negative."""
        begin, left = self._position, self._size - self._position if size < 0 else size
        taken = list(take(self.views, begin, begin + left))
        self._position += sum(view.nbytes for view in taken)
        return b"".join(taken)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to an offset in bytes, from the beginning or (`os.SEEK_END`) the end."""
        self._position = offset + (self._size if whence == os.SEEK_END else 0)
        return self._position

    def tell(self) -> int:
        """Offset of the next byte that `read` gives."""
        return self._position


def take(views: Sequence[memoryview], begin: int, end: int) -> list[memoryview]:
    """The bytes `begin` to `end` of the concatenation of views, as views."""
    taken = []
    position = 0
    for view in views:
        low, high = max(begin - position, 0), min(end - position, view.nbytes)
        if low < high:
            taken.append(view[low:high])
        position += view.nbytes
        if position >= end:
            break
    return taken


def cut(views: Sequence[memoryview], size_bytes: int) -> list[list[memoryview]]:
    """Cut the concatenation of views into runs of `size_bytes` each, the last one shorter; nothing is copied."""
    runs: list[list[memoryview]] = []
    room = 0
    for view in views:
        begin = 0
        while begin < view.nbytes:
            if not room:
                runs.append([])
                room = size_bytes
            piece = view[begin : begin + room]
            runs[-1].append(piece)
            begin += piece.nbytes
            room -= piece.nbytes
    return runs


def blocks(views: Sequence[memoryview], size_bytes: int) -> list[bytes | memoryview]:
    """Pieces fit for one write to a socket: slices of large views, many small views joined."""
    runs = cut(views, size_bytes)
    return [run[0] if len(run) == 1 else b"".join(run) for run in runs]
