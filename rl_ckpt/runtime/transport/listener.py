"""Listener: serves what is on a shelf to peers that know its secret, a thread to a connection.

Bytes go from the file's pages to the socket by sendfile: this process never touches them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from dataclasses import dataclass

from rl_ckpt.errors import CheckpointError
from rl_ckpt.plan.parts import PART
from rl_ckpt.runtime.transport.shelf import Range, Shelf
from rl_ckpt.runtime.transport.wire import (
    DATA,
    FAILED,
    REFUSED,
    TEXT_BYTES,
    WAIT,
    Door,
    Line,
    Reply,
    Request,
    TransportError,
    admit,
)

_BACKLOG = 128


@dataclass(frozen=True)
class Limits:
    """What a listener puts up with; times in seconds."""

    connections: int = 256
    """At a time; further ones are closed at once, and their owners go another way."""
    handshake_s: float = 5.0
    """For the whole handshake, and for a request from its first byte to its last."""
    idle_s: float = 60.0
    """Between requests."""
    stall_s: float = 30.0
    """That a transfer may stand still."""
    beat_s: float = 5.0
    """Between signs of life while nothing is filled."""
    absent_s: float = 60.0
    """That a peer may wait for something to be put on the shelf at all."""


class Listener:
    """See the module.

    Attributes:
        door: Where it is and what opens it: for peers, by a Ray call.
    """

    def __init__(self, host: str, name: str, shelf: Shelf, limits: Limits | None = None) -> None:
        """Listens on a free port of one address.

        Args:
            host: The node's address; no other of its addresses is listened on.
            name: Of this server.
            shelf: What is served.
            limits: Defaults to `Limits()`.

        Raises:
            OSError: It can't listen there.
        """
        self._shelf = shelf
        self._limits = limits or Limits()
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        self._socket = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
        self.door = Door(host, self._socket.getsockname()[1], name, os.urandom(32))
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._counts = {"connections": 0, "refused": 0, "bytes_served": 0}
        self._closed = threading.Event()
        threading.Thread(target=self._accept, name="rl_ckpt-listen", daemon=True).start()

    def counts(self) -> dict[str, int]:
        """Connections that proved themselves, refused ones (of any reason), and bytes sent, so far."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        """Ends all connections and listens no more."""
        self._closed.set()
        with self._lock:
            for sock in [self._socket, *self._connections]:
                with contextlib.suppress(OSError):  # not connected any more
                    sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits on it
        self._socket.close()

    def _count(self, what: str, number: int = 1) -> None:
        with self._lock:
            self._counts[what] += number

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                sock, _ = self._socket.accept()
            except OSError:  # closed, or out of file descriptors for a while
                self._closed.wait(0.1)
                continue
            with self._lock:
                full = self._closed.is_set() or len(self._connections) >= self._limits.connections
                if not full:
                    self._connections.add(sock)
            if full:
                self._count("refused")
                sock.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(sock,), name="rl_ckpt-serve", daemon=True).start()
            except RuntimeError:  # no thread can be had now: this peer goes another way, later ones may come
                self._count("refused")
                self._let_go(sock)

    def _let_go(self, sock: socket.socket) -> None:
        with self._lock:
            self._connections.discard(sock)
        sock.close()

    def _serve(self, sock: socket.socket) -> None:
        limits = self._limits
        try:
            line = Line(sock, limits.stall_s)
            admit(line, self.door.secret, self.door.name, time.monotonic() + limits.handshake_s)
            self._count("connections")
            while (request := line.take_request(limits.idle_s, limits.handshake_s)) is not None:
                sock.settimeout(limits.stall_s)
                self._answer(line, request)
        except (OSError, TransportError):  # a stranger, or a peer that went away: nothing to be done for either
            self._count("refused")
        finally:
            self._let_go(sock)

    def _answer(self, line: Line, request: Request) -> None:
        """Sends each range when it is filled.

        Raises:
            TransportError: The request can't be met; the peer was told, and the connection is to be closed.
            OSError: The peer is gone.
        """
        wanted: dict[int, Range] = dict(enumerate(request.ranges))
        # A part is put up before anybody is told of it: one that is not there will not come.
        by = time.monotonic() + (0.0 if request.name.startswith(PART) else self._limits.absent_s)
        while wanted:
            try:
                path, found = self._shelf.ready(request.name, wanted, self._limits.beat_s)
                if not path and time.monotonic() > by:
                    raise TransportError(f"nothing is known here of {request.name}")
            except TransportError as error:
                text = str(error).encode()[:TEXT_BYTES]
                line.send_reply(Reply(REFUSED, 0, len(text)), text)
                raise
            except CheckpointError as error:
                text = f"{error.code}\n{error.message}".encode()[:TEXT_BYTES]
                line.send_reply(Reply(FAILED, 0, len(text)), text)
                return
            if found:
                self._send(line, path, {number: wanted.pop(number) for number in found})
            else:
                line.send_reply(Reply(WAIT))

    def _send(self, line: Line, path: str, ranges: dict[int, Range]) -> None:
        with open(path, "rb") as file:  # given up meanwhile: FileNotFoundError ends the connection
            for number, (offset, size) in ranges.items():
                line.send_reply(Reply(DATA, number, size))
                self._count("bytes_served", size)  # before: whoever has the bytes finds them counted
                line.send_file(file.fileno(), offset, size)
