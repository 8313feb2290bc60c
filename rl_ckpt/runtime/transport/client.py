"""Client: reads ranges of what a peer has on its shelf straight into memory of the caller's."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence

from rl_ckpt.errors import from_code
from rl_ckpt.runtime.transport.wire import (
    DATA,
    FAILED,
    RANGES,
    REFUSED,
    TEXT_BYTES,
    WAIT,
    Door,
    Line,
    Reply,
    Request,
    TransportError,
    introduce,
)

CONNECT_S = 5.0
"""For the connection, and for the handshake."""
STALL_S = 30.0
"""That a transfer may stand still: a listener gives a sign of life more often than that."""


def pull(
    door: Door,
    name: str,
    pieces: Sequence[tuple[int, memoryview]],
    *,
    by: float,
    stall_s: float = STALL_S,
    go_on: Callable[[], None] = lambda: None,
) -> Iterator[int]:
    """Reads ranges over one connection, each as soon as the peer has it.

    Args:
        door: The peer's.
        name: Of what is on its shelf.
        pieces: Offset at the peer in bytes, and the writable contiguous buffer to fill from there, of 1 byte or more.
        by: When all has to be there, by the monotonic clock.
        stall_s: How long nothing at all may come from the peer, in seconds.
        go_on: Called before each reply is taken, signs of life too; what it raises ends the transfer.

    Yields:
        The number of each piece when its buffer is filled, while it is hot; in the order in which the peer has them.

    Raises:
        TransportError: The peer refuses, is not who it should be, or breaks the rules. Pieces that were not yielded
            are undefined.
        OSError: It can't be reached, or the connection broke. The same.
        CheckpointError: The peer itself can't get what is missing, and this is why.
    """
    with socket.create_connection((door.host, door.port), CONNECT_S) as sock:
        line = Line(sock, stall_s)
        introduce(line, door.secret, door.name, time.monotonic() + CONNECT_S)
        for first in range(0, len(pieces), RANGES):
            some = pieces[first : first + RANGES]
            line.send_request(Request(name, [(offset, view.nbytes) for offset, view in some]))
            for number in _replies(line, some, by, go_on):
                yield first + number


def _replies(
    line: Line, pieces: Sequence[tuple[int, memoryview]], by: float, go_on: Callable[[], None]
) -> Iterator[int]:
    missing = set(range(len(pieces)))
    while missing:
        go_on()
        if time.monotonic() > by:
            raise TimeoutError("the peer did not have everything in time")
        reply = line.take_reply()
        if reply.kind == WAIT:
            continue
        if reply.kind != DATA:
            _raise(line, reply)
        if reply.index not in missing or reply.size_bytes != pieces[reply.index][1].nbytes:
            raise TransportError(f"the peer sent what was not asked for: {reply}")
        line.fill_much(pieces[reply.index][1])
        missing.discard(reply.index)
        yield reply.index


def _raise(line: Line, reply: Reply) -> None:
    if reply.kind not in (REFUSED, FAILED) or reply.size_bytes > TEXT_BYTES:
        raise TransportError(f"the peer sent no answer of this protocol: {reply}")
    text = line.take(reply.size_bytes).decode(errors="replace")
    if reply.kind == REFUSED:
        raise TransportError(text)
    code, _, message = text.partition("\n")
    raise from_code(code, message)
