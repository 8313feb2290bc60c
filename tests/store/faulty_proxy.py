"""A real HTTP server in front of an S3 server that breaks chosen requests in a chosen way."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from tests.s3_servers import S3Server


@dataclass(frozen=True)
class Fault:
    """What happens to one request, instead of what should."""

    when: Callable[[str, str], bool]
    """Given method and path with query: whether it is this one's turn."""
    status: int = 0
    """Answer with this, and do not pass the request on."""
    code: str = ""
    lose_reply: bool = False
    """Pass the request on, then cut the connection instead of answering."""
    cut_reply_after_bytes: int | None = None
    """Pass the request on, then cut the connection within the body of the answer."""
    hang: bool = False
    """Read the request and never answer, until the proxy is closed."""
    cut_request_after_bytes: int | None = None
    """Read so much of the body, then cut the connection; the server hears nothing of it."""
    stop_reading: bool = False
    """Take nothing of the body, and never answer, until the proxy is closed."""
    pass_on_bytes: int | None = None
    """Pass on so much of the request's body as if it were all, and the answer as it comes."""
    announce_bytes: int | None = None
    """Pass the request on, and answer with so many bytes of the body, as if they were all; zeros follow its end."""
    body: bytes | None = None
    """With `status`: the body of the answer."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """With `status`: more headers."""
    lasting: bool = False
    """Strike every time, and not only once."""


_NONE = Fault(lambda _method, _path: False)


def on(method: str, *, having: str = "", lacking: str = "no such thing") -> Callable[[str, str], bool]:
    """Whether a request is of this method, with something in its path and without something else."""
    return lambda m, path: m == method and having in path and lacking not in path


@dataclass
class Proxy:
    """The running proxy; a fault in the list strikes once."""

    url: str
    faults: list[Fault] = field(default_factory=list)
    seen: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of each request, in the order in which they came."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    def take(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.seen.append((method, path))
            for index, fault in enumerate(self.faults):
                if fault.when(method, path):
                    return fault if fault.lasting else self.faults.pop(index)
        return None


@contextmanager
def run_proxy(server: S3Server) -> Iterator[Proxy]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            fault = proxy.take(self.command, self.path) or _NONE
            if fault.stop_reading:
                proxy.closing.wait()
                self.cut()
                return
            size = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(size if fault.cut_request_after_bytes is None else fault.cut_request_after_bytes)
            if fault.hang:
                proxy.closing.wait()
                self.cut()
            elif fault.cut_request_after_bytes is not None:
                self.cut()
            elif fault.status:
                error = f"<Error><Code>{fault.code}</Code><Message>as told</Message></Error>".encode()
                headers = {"Content-Type": "application/xml", **fault.headers}
                self.reply(fault.status, headers, error if fault.body is None else fault.body)
            else:
                self.forward(body[: fault.pass_on_bytes], fault)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

        def forward(self, body: bytes, fault: Fault) -> None:
            connection = http.client.HTTPConnection(urlsplit(server.endpoint_url).netloc, timeout=30)
            try:
                headers = dict(self.headers)
                if "Content-Length" in headers:
                    headers["Content-Length"] = str(len(body))
                connection.request(self.command, self.path, body, headers)
                response = connection.getresponse()
                data = response.read()
            finally:
                connection.close()
            if fault.lose_reply:
                self.cut()
                return
            headers = {k: v for k, v in response.getheaders() if k.lower() not in ("connection", "transfer-encoding")}
            if fault.announce_bytes is not None:
                data = data[: fault.announce_bytes].ljust(fault.announce_bytes, b"\0")
            if fault.cut_reply_after_bytes is not None:
                self.reply(response.status, headers, data, fault.cut_reply_after_bytes)
                self.cut()
                return
            self.reply(response.status, headers, data)

        def reply(self, status: int, headers: dict[str, str], data: bytes, only_bytes: int | None = None) -> None:
            self.send_response_only(status)
            headers = {k: v for k, v in headers.items() if k.lower() != "content-length" or self.command == "HEAD"}
            if self.command != "HEAD":
                headers["Content-Length"] = str(len(data))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[:only_bytes])

        def cut(self) -> None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """The client may have gone: what it says of that is what the tests look at."""

    with Server(("127.0.0.1", 0), Handler) as listener:
        proxy = Proxy(f"http://127.0.0.1:{listener.server_address[1]}")
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.closing.set()
            listener.shutdown()
            thread.join()
