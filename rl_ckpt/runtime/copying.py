"""Copying: brings another server's part into this one's memory, and verifies all of it.

Promises: when `copy_part` returns, every chunk's digest was found right here. The ways, in order: a socket, Ray's
object store; a chunk that came damaged by the first is asked for by the second. One stream, of low priority: copies are
made beside training and are in no hurry.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from rl_ckpt import logs
from rl_ckpt.errors import CorruptionError, StorageError
from rl_ckpt.format.digest import digest
from rl_ckpt.format.shard_file import ALIGNMENT
from rl_ckpt.plan.parts import ChunkAt, Part
from rl_ckpt.runtime.fetching import Peer
from rl_ckpt.runtime.transport.client import pull
from rl_ckpt.runtime.transport.wire import TransportError

_PIECE_BYTES = 8 << 20
_BY_RAY_BYTES = 64 << 20
_NICE = 10

_log = logs.logger()

Piece = Sequence[ChunkAt]
"""Chunks that lie together, and travel as one; in the order of their offsets."""


def copy_part(part: Part, holder: str, target: memoryview, find: Callable[[str], Peer], limit_s: float) -> str:
    """Copies a part.

    Args:
        part: Which.
        holder: The server that has it.
        target: Where it goes; the same offsets.
        find: Gives the peer of a name; raises TransportError.
        limit_s: For everything, in seconds.

    Returns:
        By which way the last of it came: "socket", "ray", or empty where there was nothing to copy.

    Raises:
        CorruptionError: What the holder has is damaged, whichever way it comes.
        StorageError: The holder can't be reached.
    """
    by, why, damaged, way = time.monotonic() + limit_s, "", False, ""
    missing: list[Piece] = pieces(part.chunks)
    for way, take in (("socket", _by_socket), ("ray", _by_ray)):
        left: dict[int, Piece] = dict(enumerate(missing))
        bad: list[Piece] = []
        try:
            for number in take(find(holder), part.name, missing, target, by):
                if any(digest(_view(target, [chunk])) != chunk.digest for chunk in left[number]):
                    bad.append(left[number])
                del left[number]
        except (TransportError, OSError) as error:
            why = why or f"{type(error).__name__}: {error}"
            _log.warning("the copy of %s from %s does not come by %s: %s", part.name, holder, way, why)
        missing, damaged = [*left.values(), *bad], bool(bad)
        if not missing:
            return way
    if damaged:
        raise CorruptionError(f"what {holder} has of {part.name} in its memory is damaged")
    raise StorageError(f"{part.name} can't be copied from {holder}: {why}")


def pieces(chunks: Sequence[ChunkAt]) -> list[Piece]:
    """Cuts a part's table, in ascending order, into what travels as one: neighbours, but for their padding."""
    out: list[list[ChunkAt]] = []
    for chunk in chunks:
        if not chunk.size_bytes:
            continue
        if out:
            first, last = out[-1][0], out[-1][-1]
            gap = chunk.offset - last.offset - last.size_bytes
            if 0 <= gap < ALIGNMENT and chunk.offset + chunk.size_bytes - first.offset <= _PIECE_BYTES:
                out[-1].append(chunk)
                continue
        out.append([chunk])
    return list(out)


def be_in_no_hurry() -> None:
    """From now on this thread yields to whatever else the machine has to do (on Linux)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def _by_socket(peer: Peer, name: str, missing: Sequence[Piece], target: memoryview, by: float) -> Iterator[int]:
    door = peer.door()
    if door is None:
        raise TransportError("it has no listener")
    yield from pull(door, name, [(piece[0].offset, _view(target, piece)) for piece in missing], by=by)


def _by_ray(peer: Peer, name: str, missing: Sequence[Piece], target: memoryview, by: float) -> Iterator[int]:
    done = 0
    while done < len(missing):
        some = [missing[done]]
        while done + len(some) < len(missing) and sum(map(_size, some)) < _BY_RAY_BYTES:
            some.append(missing[done + len(some)])
        came = peer.serve(name, [(piece[0].offset, _size(piece)) for piece in some], max(0.0, by - time.monotonic()))
        for piece, values in zip(some, came, strict=True):
            _view(target, piece)[:] = values
            yield done
            done += 1


def _size(piece: Piece) -> int:
    return piece[-1].offset + piece[-1].size_bytes - piece[0].offset


def _view(target: memoryview, piece: Piece) -> memoryview:
    return target[piece[0].offset : piece[0].offset + _size(piece)]
