"""Copying shard files from one store to another, verified on the way, by several threads.

Owns: which piece is read next, the memory that takes, comparing digests, and finishing a file. Promises: a file appears
at the destination only when every chunk in it that was asked for has its digest; of one that was left unfinished, only
what is missing or damaged is read from the source; one that is there whole does not travel, unless a chunk of it is
damaged. Does not know: checkpoints, commits, nodes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

import msgspec

from rl_ckpt.errors import CorruptionError
from rl_ckpt.format.digest import digest, hasher
from rl_ckpt.plan.pulling import PIECE_BYTES, Piece, Place, cut
from rl_ckpt.store.base import PartialObject, Store
from rl_ckpt.store.chunk_check import Spot, bad_spots
from rl_ckpt.store.layout import new_area
from rl_ckpt.store.parallel import run_all

ROOM_BYTES = 1 << 30
"""Memory for files on their way to a store that takes them only whole; one file may always be on its way."""
_READ_TRIES = 2  # a chunk that came damaged is read once more: the way may be to blame, and not the source


class FileJob(msgspec.Struct, frozen=True):
    """A shard file that must be at the destination."""

    name: str
    bytes: int
    places: tuple[Place, ...]
    """Its chunks, which are verified."""
    check: tuple[Place, ...] | None = None
    """Of a file of that name and size that is there: the chunks that nobody vouches for. None: there is none."""


class Meter(Protocol):
    """What is told of every byte, and says when it may move."""

    def pay(self, size_bytes: int) -> None:
        """Wait until so much may be read from the source; raises where the pull was stopped."""

    def step_bytes(self, most: int) -> int:
        """How much to read at once."""

    def arrived(self, moved: int, kept: int) -> None:
        """Bytes of a file are at the destination, or on their way in memory: moved, or there already."""

    def file_done(self, moved: bool) -> None:
        """A file is whole at the destination."""


class _OpenFile:
    """A file on its way."""

    def __init__(self, job: FileJob, target: PartialObject | None) -> None:
        self.job = job
        self.partial = target
        self.area = new_area(job.bytes) if target is None else None
        pieces = cut(job.bytes, job.places)
        self.waiting = deque(pieces)
        self.left = len(pieces)

    def close(self) -> None:
        if self.partial is not None:
            self.partial.close()


class Copier:
    """Copies files between two stores; see the module."""

    def __init__(self, source: Store, target: Store, meter: Meter, room_bytes: int = ROOM_BYTES) -> None:
        """Nothing is read yet.

        Args:
            source: Read from.
            target: Written to.
            meter: Told of all bytes; may be shared by several copiers.
            room_bytes: See `ROOM_BYTES`.
        """
        self._source, self._target, self._meter = source, target, meter
        self._room = room_bytes
        self._used = 0
        self._jobs: deque[FileJob] = deque()
        self._open: list[_OpenFile] = []
        self._opening = 0
        self._failed = False
        self._turn = threading.Condition()

    def copy(self, jobs: Iterable[FileJob], streams: int) -> None:
        """Brings files, in their order; for one call at a time.

        Args:
            jobs: The files.
            streams: Threads, of which each reads one piece at a time.

        Raises:
            CorruptionError: A chunk is damaged in the source, or its file ends before it does.
            ObjectMissingError: A file is missing in the source.
            StorageError, InvalidInputError: A store failed.
        """
        self._jobs = deque(jobs)
        self._failed = False
        try:
            run_all([self._work] * streams, streams)
        finally:
            for file in self._open:
                file.close()
            self._open, self._used = [], 0

    def _work(self) -> None:
        room = memoryview(bytearray(PIECE_BYTES))
        try:
            while (turn := self._next()) is not None:
                file, piece = turn
                if piece is not None:
                    self._bring(file, piece, room)
                self._piece_done(file, piece is not None)
        except BaseException:
            with self._turn:
                self._failed = True
                self._turn.notify_all()
            raise

    def _next(self) -> tuple[_OpenFile, Piece | None] | None:
        """A piece of the first open file that has one, else of the next file; None: there is nothing left to do."""
        while True:
            with self._turn:
                while True:
                    if self._failed:
                        return None
                    for file in self._open:
                        if file.waiting:
                            return file, file.waiting.popleft()
                    if self._jobs and (not self._used or self._used + self._jobs[0].bytes <= self._room):
                        break
                    if not self._jobs and not self._opening:
                        return None
                    self._turn.wait()
                job = self._jobs.popleft()
                self._opening += 1
                self._used += job.bytes
            opened = self._begin(job)
            with self._turn:
                self._opening -= 1
                if opened is None or opened.partial is not None:
                    self._used -= job.bytes  # it takes no memory
                if opened is not None:
                    self._open.append(opened)
                self._turn.notify_all()
            if opened is not None and not opened.left:
                return opened, None

    def _begin(self, job: FileJob) -> _OpenFile | None:
        """Opens a file; None where it is whole at the destination."""
        if job.check is not None and self._is_good(job):
            self._meter.arrived(0, job.bytes)
            self._meter.file_done(False)
            return None
        return _OpenFile(job, self._target.partial(job.name, job.bytes))

    def _is_good(self, job: FileJob) -> bool:
        return not job.check or not bad_spots(self._target, {job.name: [Spot(*place) for place in job.check]})

    def _piece_done(self, file: _OpenFile, counts: bool) -> None:
        with self._turn:
            file.left -= counts
            if file.left:
                return
            self._open.remove(file)
        try:
            if file.partial is not None:
                file.partial.finish()
            elif file.area is not None:
                self._target.put(file.job.name, [file.area])
        finally:
            file.close()
            with self._turn:
                if file.area is not None:
                    self._used -= file.job.bytes
                self._turn.notify_all()
        self._meter.file_done(True)

    # Pieces.

    def _bring(self, file: _OpenFile, piece: Piece, room: memoryview) -> None:
        left_over = file.partial if file.partial is not None and file.partial.resumed and piece.places else None
        if left_over is not None and self._pass_over(file, piece, room, left_over.read, None) is None:
            self._meter.arrived(0, piece.bytes)
            return
        wrong: tuple[Place, str] | None = None
        for _ in range(_READ_TRIES):
            write = file.partial.write if file.partial is not None else None
            wrong = self._pass_over(file, piece, room, partial(self._read, file.job.name), write)
            if wrong is None:
                self._meter.arrived(piece.bytes, 0)
                return
        assert wrong is not None
        (offset, size, expected), found = wrong
        raise CorruptionError(
            f"the chunk of {size} bytes at {offset} of {self._source.object_url(file.job.name)} is damaged: "
            f"{expected} was committed, {found} was read. `verify(repair=True)` there looks for other copies; or pull "
            "another checkpoint. Nothing of this one was committed at the destination"
        )

    def _read(self, name: str, offset: int, view: memoryview) -> None:
        """Reads from the source, as fast as it may."""
        step = self._meter.step_bytes(len(view))
        for at in range(0, len(view), step):
            part = view[at : at + step]
            self._meter.pay(len(part))
            half = -(-len(part) // 2) if len(part) > PIECE_BYTES else len(part)
            self._source.read_into(name, [(offset + at + i, part[i : i + half]) for i in range(0, len(part), half)])

    def _pass_over(
        self,
        file: _OpenFile,
        piece: Piece,
        room: memoryview,
        read: Callable[[int, memoryview], None],
        write: Callable[[int, memoryview], None] | None,
    ) -> tuple[Place, str] | None:
        """Reads a piece, verifies it and writes it; the first chunk that is not what it should be, and its digest."""
        if file.area is not None:
            view = file.area[piece.offset : piece.offset + piece.bytes]
        elif len(piece.places) == 1 and piece.bytes > len(room) and piece.places[0][:2] == (piece.offset, piece.bytes):
            return _stream(piece, room, read, write)
        else:
            view = room[: piece.bytes] if piece.bytes <= len(room) else memoryview(bytearray(piece.bytes))
        read(piece.offset, view)
        wrong = _first_wrong(piece, view)
        if wrong is None and write is not None:
            write(piece.offset, view)
        return wrong


def _first_wrong(piece: Piece, view: memoryview) -> tuple[Place, str] | None:
    for place in piece.places:
        begin = place[0] - piece.offset
        found = digest(view[begin : begin + place[1]]).hex()
        if found != place[2]:
            return place, found
    return None


def _stream(
    piece: Piece,
    room: memoryview,
    read: Callable[[int, memoryview], None],
    write: Callable[[int, memoryview], None] | None,
) -> tuple[Place, str] | None:
    """A single chunk that is larger than the room, part by part; written even where it turns out damaged."""
    running = hasher()
    for begin in range(0, piece.bytes, len(room)):
        part = room[: min(len(room), piece.bytes - begin)]
        read(piece.offset + begin, part)
        running.update(part)
        if write is not None:
            write(piece.offset + begin, part)
    found = running.hexdigest()
    return None if found == piece.places[0][2] else (piece.places[0], found)


def missing_bytes(jobs: Sequence[FileJob], target: Store) -> int:
    """Space that files will take at the destination beside what is there."""
    return sum(max(0, job.bytes - target.partial_bytes(job.name)) for job in jobs if job.check is None)
