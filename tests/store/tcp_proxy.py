"""A TCP proxy that passes bytes on as slowly as told, or not at all: what networks do, below HTTP."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tests.s3_servers import S3Server

_BLOCK_BYTES = 16 << 10


@dataclass
class Wire:
    """The way to a server, which a test may change at any time."""

    server: S3Server
    """As reached through it."""
    latency_s: float = 0.0
    """What each piece of either direction takes longer, in seconds."""
    bytes_per_s: float | None = None
    """Of each connection and direction."""
    accepted: int = 0
    swallowed: threading.Event = field(default_factory=threading.Event)
    """Set once a blackhole has swallowed bytes."""
    _hole: bool = False
    _closing: threading.Event = field(default_factory=threading.Event)

    def open_blackhole(self) -> None:
        """From here on connections are accepted and bytes taken, and nothing is ever passed on or answered."""
        self.swallowed.clear()
        self._hole = True

    def close_blackhole(self) -> None:
        """New connections work; those that bytes were lost of stay silent."""
        self._hole = False

    def pump(self, source: socket.socket, target: socket.socket) -> None:
        """Pass on one direction until it ends."""
        lost = False
        try:
            while block := source.recv(_BLOCK_BYTES):
                if self._hole:
                    lost = True
                    self.swallowed.set()
                    while source.recv(_BLOCK_BYTES):
                        pass
                    return
                wait_s = self.latency_s + (len(block) / self.bytes_per_s if self.bytes_per_s else 0.0)
                if wait_s:
                    self._closing.wait(wait_s)
                target.sendall(block)
        except OSError:
            return  # one of the two hung up
        finally:
            for sock in () if lost else (source, target):
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)


@contextmanager
def run_wire(server: S3Server) -> Iterator[Wire]:
    """A proxy in front of a server; gone afterwards with all its connections."""
    host = urlsplit(server.endpoint_url)
    address = (str(host.hostname), int(host.port or 80))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)  # of what it accepts, too
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        wire = Wire(S3Server("wire", url, server.key, server.secret))
        socks: list[socket.socket] = []
        threads: list[threading.Thread] = []

        def accept() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                wire.accepted += 1
                upstream = socket.create_connection(address)
                socks.extend((client, upstream))
                for pair in ((client, upstream), (upstream, client)):
                    threads.append(threading.Thread(target=wire.pump, args=pair, daemon=True))
                    threads[-1].start()

        acceptor = threading.Thread(target=accept, daemon=True)
        acceptor.start()
        try:
            yield wire
        finally:
            wire._closing.set()
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            acceptor.join()
            for sock in socks:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()
            for sock in socks:
                sock.close()


@contextmanager
def deaf_address() -> Iterator[str]:
    """A url at which packets are dropped: nobody accepts, and the queue of connections is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        fillers = []
        try:
            for _ in range(3):
                filler = socket.socket()
                filler.setblocking(False)
                fillers.append(filler)
                with suppress(BlockingIOError):
                    filler.connect(address)
            yield f"http://127.0.0.1:{address[1]}"
        finally:
            for filler in fillers:
                filler.close()
