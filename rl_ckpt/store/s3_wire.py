"""One HTTP/1.1 request over a blocking socket, its bytes sent from and received into the caller's memory.

For threads; knows nothing of S3 or of signing. Connections are kept and used again for as long as they are idle for a
short time. Failures are told in botocore's words. Nothing is tried twice.
"""

from __future__ import annotations

import http.client
import select
import socket
import ssl
import struct
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from botocore import exceptions as boto
from botocore.httpsession import create_urllib3_context, get_cert_path

from rl_ckpt.store.ranges import Span, SpanWriter

_PORTS = {"http": 80, "https": 443}
_IDLE_S = 10.0
"""Servers and load balancers close what is idle for longer, some after 15 s."""
_BLOCK_BYTES = 256 << 10
_SMALL_PIECE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class WireSettings:
    """How connections are made: botocore's settings of the same names."""

    connect_timeout_s: float | None
    read_timeout_s: float | None
    """Longest wait for the next bytes."""
    verify: bool | str
    client_cert: str | tuple[str, str] | None
    socket_options: Sequence[tuple[int, int, int]]


_Idle = dict[tuple[str, str], list[tuple[float, socket.socket]]]
"""By scheme and server: connections, and since when they are idle."""


class WirePool:
    """Connections of one client, by server. Thread-safe.

    Args:
        settings: For new connections.
    """

    def __init__(self, settings: WireSettings) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._idle: _Idle = {}
        self._tls: ssl.SSLContext | None = None
        self._closed = False
        # A client that is dropped and not closed: its sockets must not wait for the collector.
        weakref.finalize(self, _close_all, self._idle)

    def take(self, url: SplitResult) -> socket.socket:
        """An open connection to the server of a url; it belongs to the caller until given back or closed.

        Raises:
            OSError: There is none.
        """
        while True:
            with self._lock:
                idle = self._idle.get((url.scheme, url.netloc))
                since, sock = idle.pop() if idle else (0.0, None)
            if sock is None:
                return self._connect(url)
            if time.monotonic() - since < _IDLE_S and not _readable(sock):
                return sock
            sock.close()

    def give_back(self, url: SplitResult, sock: socket.socket) -> None:
        """Keep a connection whose last answer was read to its end."""
        with self._lock:
            if not self._closed:
                self._idle.setdefault((url.scheme, url.netloc), []).append((time.monotonic(), sock))
                return
        sock.close()

    def close(self) -> None:
        """Close what is idle, and from now on whatever is given back."""
        with self._lock:
            self._closed = True
            _close_all(self._idle)

    def _connect(self, url: SplitResult) -> socket.socket:
        settings = self.settings
        port = url.port or _PORTS[url.scheme]
        try:
            sock = socket.create_connection((url.hostname, port), settings.connect_timeout_s)
        except TimeoutError as error:
            raise boto.ConnectTimeoutError(endpoint_url=url.geturl(), error=error) from error
        except OSError as error:
            raise boto.EndpointConnectionError(endpoint_url=url.geturl(), error=error) from error
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for option in settings.socket_options:
                sock.setsockopt(*option)
            if url.scheme == "https":
                sock = self._context().wrap_socket(sock, server_hostname=url.hostname)
            set_send_timeout(sock, settings.read_timeout_s)
        except TimeoutError as error:
            sock.close()
            raise boto.ConnectTimeoutError(endpoint_url=url.geturl(), error=error) from error
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:  # the server hung up: nothing about certificates
            sock.close()
            raise boto.EndpointConnectionError(endpoint_url=url.geturl(), error=error) from error
        except ssl.SSLError as error:
            sock.close()
            raise boto.SSLError(endpoint_url=url.geturl(), error=error) from error
        except OSError as error:
            sock.close()
            raise boto.EndpointConnectionError(endpoint_url=url.geturl(), error=error) from error
        return sock

    def _context(self) -> ssl.SSLContext:
        with self._lock:
            if self._tls is None:
                self._tls = _tls_context(self.settings)
            return self._tls


def _close_all(idle: _Idle) -> None:
    for socks in idle.values():
        for _, sock in socks:
            sock.close()
    idle.clear()


def _tls_context(settings: WireSettings) -> ssl.SSLContext:
    context: ssl.SSLContext = create_urllib3_context()
    if settings.verify:
        context.check_hostname = True
        context.load_verify_locations(get_cert_path(settings.verify))
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if settings.client_cert:
        files = (settings.client_cert,) if isinstance(settings.client_cert, str) else settings.client_cert
        context.load_cert_chain(*files)
    return context


def set_send_timeout(sock: socket.socket, timeout_s: float | None) -> None:
    """Limit how long a send waits for the other side to take more, also where the socket is a blocking one."""
    sock.settimeout(timeout_s)
    if timeout_s:
        whole, part = divmod(timeout_s, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(whole), int(part * 1e6)))


def acknowledge_at_once(sock: socket.socket) -> None:
    """Don't delay the acknowledgements of what comes next.

    A server that sends an answer in two pieces and has Nagle's algorithm on, as Ceph's has by default, holds the second
    piece until the first is acknowledged, which the system may put off for 40 ms. It forgets this setting by itself.
    """
    if sys.platform == "linux":
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


class _Answer(http.client.HTTPResponse):
    """An answer for which any number of interim ones (1xx) may go before: http.client itself skips only 100."""

    def _read_status(self) -> tuple[str, int, str]:
        while True:
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if status == 101:  # never asked for: what follows is no HTTP
                raise http.client.BadStatusLine(f"{version} {status} {reason}")
            if status // 100 != 1:
                return version, status, reason
            http.client.parse_headers(self.fp)


def _readable(sock: socket.socket) -> bool:
    """Whether an idle connection has something to say: that it is closed, or nothing that was asked for."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


class Exchange:
    """One request and its answer on one connection. Each method blocks; `cut` may be called from another thread.

    Args:
        pool: Where the connection comes from.
        method: Of the request.
        url: The whole, encoded.
        headers: All that are sent, except `Host`; `Content-Length` among them where there is a body.
        body: Views of the caller's memory.
    """

    def __init__(
        self, pool: WirePool, method: str, url: str, headers: Mapping[str, str | bytes], body: Sequence[memoryview]
    ) -> None:
        self._pool = pool
        self._url = urlsplit(url)
        self._method = method
        self._headers = headers
        self._body = body
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._answer: http.client.HTTPResponse | None = None
        self._was_cut = False

    def run(self, read_body: Callable[[int], bool]) -> tuple[int, dict[str, str], bytes | None]:
        """Send the request and read the answer.

        Args:
            read_body: Given the status, whether to read the body too; otherwise `read`, `read_span` or `close` must
                follow.

        Returns:
            Status, headers by lower-case name, and the body if it was to be read.

        Raises:
            BotoCoreError: The connection failed.
        """
        sock = self._pool.take(self._url)
        with self._lock:
            self._sock = sock
            if self._was_cut:  # before there was a connection to cut
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        answer = self._answer = _Answer(sock, method=self._method)
        with self._told(boto.ConnectionClosedError):
            self._send(sock, answer)
        status, headers = answer.status, {name.lower(): value for name, value in answer.getheaders()}
        return status, headers, self.read() if read_body(status) else None

    def _send(self, sock: socket.socket, answer: http.client.HTTPResponse) -> None:
        if not isinstance(sock, ssl.SSLSocket):
            sock.setblocking(True)  # then one call of the system sends a whole part; SO_SNDTIMEO still ends it
        try:
            sock.sendall(self._head())
            for view in self._body:
                sock.sendall(view)
            sock.settimeout(self._pool.settings.read_timeout_s)
            acknowledge_at_once(sock)
        except (BrokenPipeError, ConnectionResetError):
            # A server that refuses a request may answer and hang up before it has read all of it: hear it out.
            answer.begin()
            answer.will_close = True
        else:
            answer.begin()

    def _head(self) -> bytes:
        url = self._url
        host = f"[{url.hostname}]" if ":" in str(url.hostname) else str(url.hostname)
        if url.port and url.port != _PORTS[url.scheme]:
            host += f":{url.port}"
        target = url._replace(scheme="", netloc="", fragment="").geturl()
        headers = {"Host": host, "Accept-Encoding": "identity"}
        for name, value in self._headers.items():
            if name.lower() not in ("host", "accept-encoding"):
                headers[name] = value.decode() if isinstance(value, bytes) else value
        lines = [f"{self._method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode()

    def read(self) -> bytes:
        """The whole body; then the connection is free again.

        Raises:
            BotoCoreError: The connection failed, or the body ended early.
        """
        assert self._answer is not None
        with self._told(boto.ResponseStreamingError):
            data: bytes = self._answer.read()
        self.close()
        return data

    def read_span(self, span: Span) -> None:
        """Receive the body into the pieces of a span; then the connection is free again.

        Raises:
            BotoCoreError: The connection failed, or the body ended early.
        """
        assert self._answer is not None
        with self._told(boto.ResponseStreamingError):
            receive(self._answer, span)
        self.close()

    @contextmanager
    def _told(self, failed: type[boto.HTTPClientError]) -> Iterator[None]:
        """Close the connection after a failure, and tell it in botocore's words.

        A blocking socket says BlockingIOError when its time is over.
        """
        try:
            yield
        except (TimeoutError, BlockingIOError) as error:
            self.close()
            raise boto.ReadTimeoutError(endpoint_url=self._url.geturl(), error=error) from error
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise failed(endpoint_url=self._url.geturl(), error=repr(error)) from error

    def close(self) -> None:
        """Give the connection back if the answer was read to its end, else close it."""
        with self._lock:
            sock, self._sock = self._sock, None
        if sock is None:
            return
        if self._answer is None:
            sock.close()
        elif self._answer.isclosed() and not self._answer.will_close and not self._was_cut:
            self._pool.give_back(self._url, sock)
        else:
            self._answer.close()
            sock.close()

    def cut(self) -> None:
        """End a call that another thread is in: its connection is shut down, and the call fails at once."""
        with self._lock:
            self._was_cut = True
            if self._sock is not None:
                with suppress(OSError):
                    # The plain socket's: a TLS socket's own would change state that the other thread is using.
                    socket.socket.shutdown(self._sock, socket.SHUT_RDWR)


def receive(answer: http.client.HTTPResponse, span: Span) -> None:
    """Fill the pieces of a span from a body of its size; what lies between them is dropped.

    Raises:
        OSError: The body ended early.
    """
    if span.size_bytes < len(span.pieces) * _SMALL_PIECE_BYTES:
        writer = SpanWriter(span)
        while writer.position < span.end_bytes:
            block = memoryview(bytearray(min(_BLOCK_BYTES, span.end_bytes - writer.position)))
            _fill(answer, block)
            writer.write(block)
        return
    position = span.offset_bytes
    for offset, target in span.pieces:
        _fill(answer, memoryview(bytearray(offset - position)))
        _fill(answer, target)
        position = offset + target.nbytes


def _fill(answer: http.client.HTTPResponse, target: memoryview) -> None:
    while target.nbytes:
        count = answer.readinto(target)
        if not count:
            raise ConnectionError(f"the body ended {target.nbytes} bytes early")
        target = target[count:]
