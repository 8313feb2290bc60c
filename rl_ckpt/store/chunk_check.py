"""Whether chunks lie in the store as they were committed: read, hashed, and nothing kept of them.

Owns: reading much in bounded memory, and telling a damaged chunk from a store that failed. Promises: every chunk asked
for is either good or named with what was found in its place.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from rl_ckpt.errors import CorruptionError, StorageError
from rl_ckpt.format.digest import digest, hasher
from rl_ckpt.store.base import ObjectMissingError, Store
from rl_ckpt.store.parallel import run_all, spare_threads

_ROOM_BYTES = 8 << 20  # of each thread
_JOB_BYTES = 64 << 20


class Spot(NamedTuple):
    """A chunk's place in a shard file, and what must be there."""

    offset: int
    """In bytes."""
    bytes: int
    digest: str
    """32 hex digits."""


def bad_spots(
    store: Store, spots: Mapping[str, Iterable[Spot]], read: Callable[[int], None] = lambda _: None
) -> dict[tuple[str, Spot], str]:
    """Reads chunks and compares their digests, several files at a time.

    Args:
        store: The run's.
        spots: By name of the shard file.
        read: Told of so many bytes that were looked at, by any thread.

    Returns:
        Those that are missing or damaged, by file and place: the digest that was found, or why nothing was read.

    Raises:
        StorageError: The store failed.
    """
    bad: dict[tuple[str, Spot], str] = {}  # threads only add to it
    jobs = [partial(_check, store, name, job, bad, read) for name in spots for job in _jobs(spots[name])]
    run_all(jobs, spare_threads())
    return bad


def read_spot(store: Store, name: str, spot: Spot) -> bytes | None:
    """A chunk's bytes, if they are good; None where they are not."""
    room = memoryview(bytearray(spot.bytes))
    if read_ranges(store, name, [(spot.offset, room)]) is not None or digest(room).hex() != spot.digest:
        return None
    return bytes(room)


def read_ranges(store: Store, name: str, reads: Sequence[tuple[int, memoryview]]) -> str | None:
    """Reads ranges of a shard file.

    Returns:
        Why they can't be read, where that is the file's fault; None where all is well.

    Raises:
        StorageError: The store failed.
    """
    try:
        store.read_into(name, reads)
    except ObjectMissingError:
        return "the file is missing"
    except CorruptionError as error:
        return str(error)
    except StorageError as error:
        cause = error.__cause__
        if not (isinstance(cause, OSError) and cause.errno == errno.EIO):
            raise
        return str(error)  # a sector that can't be read any more: damage, as any other
    return None


def _jobs(spots: Iterable[Spot]) -> Iterator[list[Spot]]:
    """Places in their order, so many that a thread is worth it."""
    job: list[Spot] = []
    for spot in sorted(set(spots)):
        job.append(spot)
        if job[-1].offset + job[-1].bytes - job[0].offset >= _JOB_BYTES:
            yield job
            job = []
    if job:
        yield job


def _check(
    store: Store, name: str, spots: Sequence[Spot], bad: dict[tuple[str, Spot], str], read: Callable[[int], None]
) -> None:
    room = memoryview(bytearray(min(_ROOM_BYTES, sum(spot.bytes for spot in spots))))
    group: list[tuple[Spot, memoryview]] = []
    used = 0
    for spot in spots:
        if used + spot.bytes > len(room):
            _check_group(store, name, group, bad)
            read(used)
            group, used = [], 0
        if spot.bytes > len(room):
            found = _piecewise(store, name, spot, room)
            if found != spot.digest:
                bad[name, spot] = found
            read(spot.bytes)
            continue
        group.append((spot, room[used : used + spot.bytes]))
        used += spot.bytes
    _check_group(store, name, group, bad)
    read(used)


def _check_group(
    store: Store, name: str, group: Sequence[tuple[Spot, memoryview]], bad: dict[tuple[str, Spot], str]
) -> None:
    """Checks chunks that are read at once; where that fails, one by one."""
    why = read_ranges(store, name, [(spot.offset, place) for spot, place in group])
    if why is not None and len(group) > 1:
        for item in group:
            _check_group(store, name, [item], bad)
        return
    for spot, place in group:
        found = why or digest(place).hex()
        if found != spot.digest:
            bad[name, spot] = found


def _piecewise(store: Store, name: str, spot: Spot, room: memoryview) -> str:
    running = hasher()
    for start in range(0, spot.bytes, len(room)):
        piece = room[: min(len(room), spot.bytes - start)]
        why = read_ranges(store, name, [(spot.offset + start, piece)])
        if why is not None:
            return why
        running.update(piece)
    return running.hexdigest()
