"""A checkpoint's shard files on a local disk, held open and read in large pieces.

Owns: their descriptors, and scratch memory for each thread that reads. Promises: a file that was opened can be read to
the end, whoever removes it. Thread-safe once `open_all` has returned.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence

from rl_ckpt.errors import CorruptionError, StorageError
from rl_ckpt.format.manifest import Chunk, Manifest
from rl_ckpt.store.base import Store

PIECE_BYTES = 512 << 10
"""Fits a core's second cache, so that what is done with a piece after it was read costs no memory bandwidth."""
_GAP_BYTES = 64 << 10  # between small chunks that are read at once


class LocalFiles:
    """The shard files that some chunks of a manifest lie in."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        """None is open yet."""
        self._store = store
        self._manifest = manifest
        self._names = [file.name for file in manifest.files]
        self._open: dict[int, tuple[int, str]] = {}  # index of the name → descriptor and path
        self._scratch = threading.local()

    def also(self, name: str) -> int:
        """Takes a file in that the manifest does not name.

        Args:
            name: Its name in the store.

        Returns:
            Its index: chunks that name it may be read like the others.
        """
        if name not in self._names[len(self._manifest.files) :]:
            self._names.append(name)
        return self._names.index(name, len(self._manifest.files))

    def open_all(self, chunks: Iterable[Chunk]) -> None:
        """Opens the files of some chunks.

        Raises:
            CorruptionError: One is missing, or ends before its chunks do.
            StorageError: One can't be opened.
        """
        ends: dict[int, int] = {}
        for chunk in chunks:
            ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.offset + chunk.bytes)
        for file, end in ends.items():
            fd, path = self._opened(file)
            size = os.fstat(fd).st_size
            if size < end:
                raise CorruptionError(f"{path} has {size} bytes; checkpoint {self._manifest.id} names {end}")

    def _opened(self, file: int) -> tuple[int, str]:
        if file not in self._open:
            path = self._store.local_path(self._names[file])
            assert path is not None
            try:
                self._open[file] = (os.open(path, os.O_RDONLY | os.O_CLOEXEC), path)
            except FileNotFoundError as error:
                missing = self._store.missing(self._names[file])
                raise CorruptionError(f"{missing}, though checkpoint {self._manifest.id} names it") from error
            except OSError as error:
                raise StorageError(f"{path} can't be opened: {error}") from error
        return self._open[file]

    def read(self, chunk: Chunk, place: memoryview, start: int = 0) -> None:
        """Reads as much of a chunk as `place` holds, from its byte `start` on.

        Raises:
            CorruptionError: The file ends before, or the disk can't read it.
        """
        self._read(chunk.file, chunk.offset + start, place)

    def _read(self, file: int, offset: int, place: memoryview) -> None:
        fd, path = self._open[file]
        done = 0
        while done < len(place):
            try:
                count = os.preadv(fd, [place[done:]], offset + done)
            except OSError as error:
                raise CorruptionError(f"{path} can't be read at {offset + done}: {error}") from error
            if not count:
                raise CorruptionError(f"{path} ends at {offset + done}, though checkpoint {self._manifest.id} goes on")
            done += count
        self._store.stats.count_read(len(place), "files")

    def pieces(self, chunk: Chunk) -> Iterator[memoryview]:
        """A chunk piece by piece; each is overwritten by the next.

        Raises:
            CorruptionError: As `read`.
        """
        room = self._room(PIECE_BYTES)
        for start in range(0, chunk.bytes, PIECE_BYTES):
            piece = room[: min(PIECE_BYTES, chunk.bytes - start)]
            self.read(chunk, piece, start)
            yield piece

    def small(self, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, memoryview]]:
        """Those of some chunks that are smaller than a piece, neighbours read at once; a view holds until the next one.

        Raises:
            CorruptionError: As `read`.
        """
        small = sorted((c for c in chunks if c.bytes < PIECE_BYTES), key=lambda c: (c.file, c.offset))
        for run in _runs(small):
            start, end = run[0].offset, max(chunk.offset + chunk.bytes for chunk in run)
            room = self._room(end - start)[: end - start]
            self._read(run[0].file, start, room)
            for chunk in run:
                yield chunk, room[chunk.offset - start :][: chunk.bytes]

    def _room(self, size_bytes: int) -> memoryview:
        room: memoryview | None = getattr(self._scratch, "room", None)
        if room is None or len(room) < size_bytes:
            room = self._scratch.room = memoryview(bytearray(max(size_bytes, PIECE_BYTES)))
        return room

    def close(self) -> None:
        """Closes the files."""
        for fd, _ in self._open.values():
            os.close(fd)
        self._open.clear()


def _runs(chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    """Chunks, by place, that are read at once: near one another, and one or two pieces in all."""
    run: list[Chunk] = []
    for chunk in chunks:
        if run:
            end = run[-1].offset + run[-1].bytes
            apart = chunk.file != run[0].file or chunk.offset - end > _GAP_BYTES
            if apart or chunk.offset + chunk.bytes - run[0].offset > 2 * PIECE_BYTES:
                yield run
                run = []
        run.append(chunk)
    if run:
        yield run
