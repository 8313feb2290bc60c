"""Pulling, the pure part: whether it may be, in which pieces, how fast, and how long it will take.

Owns: whether a destination is a mirror of the source, how a shard file is cut for its way, the limit of the bandwidth,
and the estimate of the time that is left. Promises: no input, no output, no clock of its own. Does not know: stores,
threads, nodes (store/pull.py, store/copier.py).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.format.records import CommitRecord, EpochRecord

PIECE_BYTES = 16 << 20
"""What is read at once: as large as a chunk is at most, unless the run was told otherwise."""
_SLACK_BYTES = 1 << 20  # a piece may be so much larger: heads, ends and paddings travel with a chunk beside them
_WINDOW_S = 10.0  # over which the rate is measured

Place = tuple[int, int, str]
"""A chunk in a shard file: offset and size in bytes, digest in hex."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A contiguous part of a shard file, with the chunks that lie in it; no chunk lies in two."""

    offset: int
    """In bytes."""
    bytes: int
    places: tuple[Place, ...]
    """By offset; what lies between them no manifest explains."""


def cut(file_bytes: int, places: Iterable[Place], piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """Cuts a shard file into pieces that can be read and verified by themselves.

    Args:
        file_bytes: Size of the file.
        places: The chunks in it, in any order.
        piece_bytes: Pieces are about so large at most, unless a single chunk is larger.

    Returns:
        Pieces by offset that together are the file.

    Raises:
        InvalidInputError: A chunk lies outside of the file.
    """
    pieces: list[Piece] = []
    begin, inside = 0, list[Place]()
    at = 0  # up to where the file is taken care of by `begin` and `inside`

    def close(end: int) -> None:
        nonlocal begin, inside
        if inside:
            pieces.append(Piece(begin, end - begin, tuple(inside)))
            begin, inside = end, []
        while begin < end:
            size = min(piece_bytes, end - begin)
            pieces.append(Piece(begin, size, ()))
            begin += size

    for offset, size, digest in sorted(set(places)):
        end = offset + size
        if offset < 0 or end > file_bytes:
            raise InvalidInputError(f"a chunk of {size} bytes at {offset} lies outside of a file of {file_bytes} bytes")
        if offset >= at and end - begin > piece_bytes + _SLACK_BYTES:
            close(at)
            if offset - begin > _SLACK_BYTES:
                close(offset)
        inside.append((offset, size, digest))
        at = max(at, end)
    if file_bytes - at > _SLACK_BYTES:
        close(at)
    close(file_bytes)
    return pieces


@dataclass(slots=True)
class TokenBucket:
    """Limits bytes per second over all who ask the same bucket. Not thread-safe; its user sees to that.

    In any `t` seconds at most `bytes_per_s * (t + burst_s)` bytes pass, and one piece.
    """

    bytes_per_s: float
    burst_s: float = 0.25
    _free_at: float = -math.inf

    def reserve(self, now: float, size_bytes: int) -> float:
        """Books a piece.

        Args:
            now: Seconds, of a clock that never goes back.
            size_bytes: Of the piece.

        Returns:
            For how long the caller must wait before it reads the piece, in seconds.
        """
        begins = max(self._free_at, now - self.burst_s)
        self._free_at = begins + size_bytes / self.bytes_per_s
        return max(0.0, begins - now)

    def step_bytes(self, most: int) -> int:
        """How much to read at once so that the bytes flow evenly: a quarter of a second's, 64 KiB at least."""
        return min(most, max(64 << 10, int(self.bytes_per_s / 4)))


@dataclass(slots=True)
class Estimate:
    """Rate and time left, from what has moved so far. Not thread-safe."""

    begun: float
    """Seconds, of the clock of all `now`."""
    _seen: deque[tuple[float, int]] = field(default_factory=deque)

    def rate(self, now: float, moved_bytes: int) -> float:
        """Bytes per second over the last seconds.

        Args:
            now: When `moved_bytes` was read.
            moved_bytes: All that has moved so far.
        """
        if not self._seen:
            self._seen.append((self.begun, 0))
        self._seen.append((now, moved_bytes))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _WINDOW_S:
            self._seen.popleft()
        since, moved = self._seen[0]
        return (moved_bytes - moved) / (now - since) if now > since else 0.0

    @staticmethod
    def seconds_left(left_bytes: int, rate: float) -> float | None:
        """Until so much has moved too; None where nothing moves."""
        if left_bytes <= 0:
            return 0.0
        return left_bytes / rate if rate > 0 else None


@dataclass(frozen=True, slots=True)
class LogRecords:
    """The commit log of one side."""

    head: int
    """Highest record number."""
    commits: Sequence[CommitRecord]
    """Oldest first."""
    epochs: Sequence[EpochRecord]
    """Oldest first."""


def not_a_mirror(source: LogRecords, target: LogRecords) -> str | None:
    """Why a destination can't take the source's checkpoints under their numbers: it went a way of its own.

    Epoch records of the destination's own are no obstacle, as long as no checkpoint follows them: a sweep of a mirror
    leaves one. Nor is a checkpoint that the source has swept since.

    Args:
        source: Its log.
        target: The destination's, which holds copies of the source's records, and what was written there.

    Returns:
        For a message; None where the destination is a mirror of the source, whole or in part.
    """
    theirs = {commit.number: commit for commit in source.commits}
    known = {epoch.number: epoch for epoch in source.epochs}
    foreign = [epoch for epoch in target.epochs if known.get(epoch.number) != epoch]
    for commit in target.commits:
        told = f"checkpoint {commit.id} (step {commit.step})"
        there = theirs.get(commit.number) or known.get(commit.number)
        if there == commit:
            continue
        before = [e for e in target.epochs if e.epoch == commit.epoch and e.number < commit.number]
        if there is not None or (before and before[-1] in foreign):
            return f"it holds {told}, which was saved there and not in the source"
        if commit.number > source.head:
            return f"it holds {told}, which is newer than everything that the source has"
    return None
