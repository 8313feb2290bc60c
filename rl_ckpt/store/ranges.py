"""Which requests fetch a set of ranges: pure, no input or output.

Small ranges that lie near each other become one request, large ones are cut so that several requests can run at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.store.base import as_bytes_view


@dataclass(frozen=True, slots=True)
class Span:
    """One request: a contiguous range of an object and the buffers its bytes go to."""

    offset_bytes: int
    size_bytes: int
    pieces: tuple[tuple[int, memoryview], ...]
    """Offset in the object and buffer, ascending, disjoint, all inside the range; bytes between them are dropped."""

    @property
    def end_bytes(self) -> int:
        """Offset of the first byte after the range."""
        return self.offset_bytes + self.size_bytes


def plan_spans(reads: Sequence[tuple[int, memoryview]], *, span_bytes: int, gap_bytes: int) -> list[Span]:
    """Cut and group ranges into requests.

    Args:
        reads: Offset in the object and writable buffer, in any order.
        span_bytes: No request is larger.
        gap_bytes: Ranges at most this far apart share a request; the bytes between them are fetched and dropped.

    Returns:
        Requests by ascending offset that together fill every buffer. Ranges that overlap are fetched once each.

    Raises:
        InvalidInputError: A negative offset, or a buffer that cannot be written.
    """
    spans: list[Span] = []
    group: list[tuple[int, memoryview]] = []
    start = end = 0
    for offset, view in sorted(_cut(reads, span_bytes), key=lambda piece: piece[0]):
        size = view.nbytes
        if group and not (end <= offset <= end + gap_bytes and offset + size - start <= span_bytes):
            spans.append(Span(start, end - start, tuple(group)))
            group = []
        if not group:
            start = offset
        group.append((offset, view))
        end = offset + size
    if group:
        spans.append(Span(start, end - start, tuple(group)))
    return spans


def _cut(reads: Sequence[tuple[int, memoryview]], span_bytes: int) -> Iterable[tuple[int, memoryview]]:
    for offset, buffer in reads:
        view = as_bytes_view(buffer)
        if offset < 0 or view.readonly:
            what = f"offset {offset} is negative" if offset < 0 else "a buffer to read into is read-only"
            raise InvalidInputError(f"read_into: {what}")
        for begin in range(0, view.nbytes, span_bytes):
            yield offset + begin, view[begin : begin + span_bytes]


class SpanWriter:
    """Spreads the bytes of one request, as they arrive in pieces, over the buffers of its span."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._next = 0
        self.position = span.offset_bytes
        """Offset in the object of the next byte to arrive."""

    def write(self, chunk: bytes | memoryview) -> None:
        """Take the next bytes of the range; what lies beyond its end is dropped."""
        source = memoryview(chunk)
        begin = self.position
        end = self.position = begin + source.nbytes
        pieces = self._span.pieces
        while self._next < len(pieces):
            offset, target = pieces[self._next]
            low, high = max(offset, begin), min(offset + target.nbytes, end)
            if low < high:
                target[low - offset : high - offset] = source[low - begin : high - begin]
            if end < offset + target.nbytes:
                return
            self._next += 1
