"""Arrays of a checkpoint, straight from its shard files to their places in another file, in bounded memory.

Owns: reading chunks in pieces, checking their digests, and writing each to where its values lie in the whole array in C
order. Promises: `ROOM_BYTES` for each of at most four threads, whatever the arrays' sizes; when `copy_arrays` returns,
every byte was verified.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from rl_ckpt.errors import CorruptionError
from rl_ckpt.format.digest import digest, hasher
from rl_ckpt.format.manifest import Chunk, Manifest
from rl_ckpt.state.dtypes import dtype_from_name
from rl_ckpt.store.chunk_check import Spot, read_ranges
from rl_ckpt.store.parallel import run_all, spare_threads
from rl_ckpt.store.repair import good_places
from rl_ckpt.store.run import Run

ROOM_BYTES = 16 << 20
"""Of each thread: a chunk of the default size at once, larger ones piece by piece."""


@dataclass(frozen=True, slots=True)
class Target:
    """A chunk, and where its values go."""

    name: str
    """Of the shard file."""
    chunk: Chunk
    place: int
    """Of the whole array's first byte in the new file."""
    shape: tuple[int, ...]
    """Of the whole array, in elements."""
    itemsize: int

    @property
    def spot(self) -> Spot:
        """The chunk's place in its shard file."""
        return Spot(self.chunk.offset, self.chunk.bytes, self.chunk.digest)

    def pieces(self, start: int, size: int) -> Iterator[tuple[int, int]]:
        """Where bytes `start` … `start + size` of the chunk go: offset in the new file and size, in their order."""
        box = self.chunk.box
        strides = [math.prod(self.shape[axis + 1 :]) * self.itemsize for axis in range(len(self.shape))]
        # Behind the last axis that the box has only a part of, its values lie together in the whole array too.
        cut = max((axis for axis, n in enumerate(self.shape) if box.shape[axis] != n), default=0)
        run = math.prod(box.shape[cut:]) * self.itemsize
        origin = self.place + sum(o * s for o, s in zip(box.offset, strides, strict=True))
        while size > 0:
            number, within = divmod(start, run)
            at = origin + within
            for axis in reversed(range(cut)):
                number, index = divmod(number, box.shape[axis])
                at += index * strides[axis]
            count = min(size, run - within)
            yield at, count
            start, size = start + count, size - count


def targets(manifest: Manifest, places: Mapping[int, int] | Iterable[tuple[int, int]]) -> list[Target]:
    """The chunks of some arrays.

    Args:
        manifest: The checkpoint's.
        places: Index into `manifest.arrays`, and the offset of the array's first byte in the new file; an array may
            stand there several times.
    """
    pairs = places.items() if isinstance(places, Mapping) else places
    out: list[Target] = []
    for index, place in pairs:
        entry = manifest.arrays[index]
        itemsize = dtype_from_name(entry.spec.dtype).itemsize
        out += [Target(manifest.files[c.file].name, c, place, entry.spec.shape, itemsize) for c in entry.chunks]
    return out


def copy_arrays(run: Run, manifest: Manifest, wanted: Sequence[Target], fd: int) -> list[str]:
    """Copies chunks into an open file.

    Args:
        run: The run.
        manifest: The checkpoint's.
        wanted: From `targets`.
        fd: Of the new file, open for writing. Its contents are undefined after an error.

    Returns:
        A text for each damaged chunk that was taken from another place which holds the same bytes.

    Raises:
        CorruptionError: A chunk is missing or damaged, and nothing else holds its bytes.
        StorageError: The store failed.
        OSError: The new file can't be written.
    """
    bad: dict[tuple[str, Spot], str] = {}  # threads only add to it
    run_all([partial(_copy, run, job, fd, bad) for job in _jobs(wanted)], spare_threads())
    if not bad:
        return []
    found = good_places(run, bad)
    lost = [key for key in bad if key not in found]
    if lost:
        said = "; ".join(
            f"the chunk at {spot.offset} of {run.store.object_url(n)} ({bad[n, spot]})" for n, spot in lost
        )
        raise CorruptionError(f"checkpoint {manifest.id}: no place holds the bytes that were committed for {said}")
    again: dict[tuple[str, Spot], str] = {}
    for target in wanted:
        place = found.get((target.name, target.spot))
        if place is not None:
            _copy_large(run, target, Spot(place.offset, *target.spot[1:]), place.file, fd, again)
    if again:
        raise CorruptionError(f"checkpoint {manifest.id}: what was good a moment ago is not any more: {[*again]}")
    return [
        f"the chunk at {spot.offset} of {run.store.object_url(name)} ({bad[name, spot]}) was taken from "
        f"{place.offset} of {place.file} (checkpoint {place.checkpoint})"
        for (name, spot), place in found.items()
    ]


def _jobs(wanted: Sequence[Target]) -> Iterator[list[Target]]:
    """Chunks of one file that are read together: neighbours up to a thread's room, or a larger one alone."""
    ordered = sorted(wanted, key=lambda target: (target.name, target.chunk.offset))
    for _, group in itertools.groupby(ordered, key=lambda target: target.name):
        job: list[Target] = []
        filled = 0
        for target in group:
            if job and filled + target.chunk.bytes > ROOM_BYTES:
                yield job
                job, filled = [], 0
            job.append(target)
            filled += target.chunk.bytes
        yield job


def _copy(run: Run, job: Sequence[Target], fd: int, bad: dict[tuple[str, Spot], str]) -> None:
    if job[0].chunk.bytes > ROOM_BYTES:
        _copy_large(run, job[0], job[0].spot, job[0].name, fd, bad)
        return
    room = memoryview(bytearray(sum(target.chunk.bytes for target in job)))
    reads, start = [], 0
    for target in job:
        reads.append((target.chunk.offset, room[start : start + target.chunk.bytes]))
        start += target.chunk.bytes
    why = read_ranges(run.store, job[0].name, reads)
    for target, read in zip(job, reads, strict=True):
        # What fails together is tried one by one: one bad sector must not make its neighbours bad.
        one = why and read_ranges(run.store, target.name, [read])
        found = one or digest(read[1]).hex()
        if found == target.chunk.digest:
            _write(fd, target, 0, read[1])
        else:
            bad[target.name, target.spot] = found


def _copy_large(run: Run, target: Target, spot: Spot, name: str, fd: int, bad: dict[tuple[str, Spot], str]) -> None:
    """Copies a chunk piece by piece, from `spot` of the shard file `name`."""
    room = memoryview(bytearray(min(ROOM_BYTES, spot.bytes)))
    running = hasher()
    for start in range(0, spot.bytes, len(room)):
        piece = room[: min(len(room), spot.bytes - start)]
        why = read_ranges(run.store, name, [(spot.offset + start, piece)])
        if why is not None:
            bad[target.name, target.spot] = why
            return
        running.update(piece)
        _write(fd, target, start, piece)  # before it is known to be good: nobody sees the file until it is
    if running.hexdigest() != spot.digest:
        bad[target.name, target.spot] = running.hexdigest()


def _write(fd: int, target: Target, start: int, data: memoryview) -> None:
    done = 0
    for at, count in target.pieces(start, len(data)):
        write_all(fd, data[done : done + count], at)
        done += count


def write_all(fd: int, data: bytes | memoryview, at: int) -> None:
    """Writes all of a buffer at an offset of an open file."""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, at)
        view, at = view[count:], at + count
