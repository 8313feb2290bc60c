"""One request over a blocking socket: connections used again, servers that hang up, cancellation, TLS."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from botocore import exceptions as boto

from rl_ckpt.store.ranges import Span
from rl_ckpt.store.s3_bulk import BulkAnswer
from rl_ckpt.store.s3_errors import is_transient
from rl_ckpt.store.s3_wire import Exchange, WirePool, WireSettings

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@dataclass
class Server:
    url: str
    accepted: int = 0
    closed: threading.Event = field(default_factory=threading.Event)
    """A connection was closed by the server."""


@contextmanager
def run_server(talk: Callable[[socket.socket], None], tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """Accepts connections one after the other and hands each to `talk`."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        scheme = "https" if tls else "http"
        server = Server(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/bucket/key?partNumber=1")

        def serve() -> None:
            while True:
                try:
                    plain, _ = listener.accept()
                except OSError:
                    return
                server.accepted += 1
                try:
                    with tls.wrap_socket(plain, server_side=True) if tls else plain as connection:
                        talk(connection)
                except OSError:
                    plain.close()
                server.closed.set()

        done = pool.submit(serve)
        try:
            yield server
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            done.result()


def read_request(connection: socket.socket) -> bytes:
    """One request whole; empty when the client hung up."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        if not more:
            return b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    size = next((int(x.split(b":")[1]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length")), 0)
    while len(body) < size:
        body += connection.recv(1 << 20)
    return head + b"\r\n\r\n" + body


@contextmanager
def open_pool(verify: bool | str = True, read_timeout_s: float = 30.0) -> Iterator[WirePool]:
    pool = WirePool(WireSettings(5.0, read_timeout_s, verify, None, ()))
    try:
        yield pool
    finally:
        pool.close()


def put(pool: WirePool, server: Server, body: bytes = b"part") -> tuple[int, bytes | None]:
    exchange = Exchange(pool, "PUT", server.url, {"Content-Length": str(len(body))}, [memoryview(body)])
    status, _, data = exchange.run(lambda _status: True)
    return status, data


def test_a_connection_is_used_again():
    seen = []

    def talk(connection: socket.socket) -> None:
        while request := read_request(connection):
            seen.append(request)
            connection.sendall(OK)

    with run_server(talk) as server, open_pool() as pool:
        assert [put(pool, server, b"a" * n) for n in (1, 3_000_000)] == [(200, b"ok")] * 2
        pool.close()
    assert server.accepted == 1
    assert seen[1].startswith(b"PUT /bucket/key?partNumber=1 HTTP/1.1\r\nHost: 127.0.0.1:")
    assert seen[1].endswith(b"\r\n\r\n" + b"a" * 3_000_000)


def test_an_idle_connection_that_the_server_closed_is_not_used_again():
    def talk(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(OK)

    with run_server(talk) as server, open_pool() as pool:
        for count in (1, 2, 3):
            assert put(pool, server) == (200, b"ok")
            assert server.closed.wait(30)
            server.closed.clear()
            assert server.accepted == count


def test_a_server_that_refuses_and_hangs_up_within_the_body_is_heard():
    def talk(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 4\r\n\r\nslow")

    with run_server(talk) as server, open_pool() as pool:
        assert put(pool, server, bytes(64 << 20)) == (503, b"slow")


def test_a_server_that_takes_no_more_bytes_is_given_up():
    over = threading.Event()

    def talk(_connection: socket.socket) -> None:
        over.wait()

    with run_server(talk) as server, open_pool(read_timeout_s=0.2) as pool:
        with pytest.raises(boto.ReadTimeoutError):
            put(pool, server, bytes(64 << 20))
        over.set()


def test_cancellation_ends_when_no_thread_uses_the_buffers_any_more():
    sent, over = threading.Event(), threading.Event()

    def talk(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 1000000\r\n\r\nxxx")
        sent.set()
        over.wait()

    events: list[str] = []

    async def scenario(pool: WirePool, server: Server, threads: ThreadPoolExecutor) -> None:
        exchange = Exchange(pool, "GET", server.url, {}, [])
        answer = BulkAnswer(threads, exchange)
        await answer.in_thread(lambda: exchange.run(lambda _status: False))
        reading = asyncio.Event()
        loop = asyncio.get_running_loop()

        def read() -> None:
            loop.call_soon_threadsafe(reading.set)
            try:
                exchange.read_span(Span(0, 1_000_000, ((0, memoryview(bytearray(1_000_000))),)))
            finally:
                events.append("thread ended")

        task = asyncio.ensure_future(answer.in_thread(read))
        await reading.wait()
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()  # `gather` does it twice
        with pytest.raises(asyncio.CancelledError):
            await task
        events.append("caller told")

    with run_server(talk) as server, open_pool() as pool, ThreadPoolExecutor(1) as threads:
        try:
            asyncio.run(scenario(pool, server, threads))
        finally:
            over.set()
    assert events == ["thread ended", "caller told"]


def _certificate(folder: Path) -> tuple[str, str]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    hosts = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = (
        builder.not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(hosts, critical=False)
    )
    made = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    (folder / "cert.pem").write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(private)
    return str(folder / "cert.pem"), str(folder / "key.pem")


def test_tls_with_the_users_own_authority(tmp_path: Path):
    certificate, key = _certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    bodies = []

    def talk(connection: socket.socket) -> None:
        while request := read_request(connection):
            bodies.append(request.partition(b"\r\n\r\n")[2])
            connection.sendall(OK)

    data = bytes(range(256)) * 20_000
    with run_server(talk, tls) as server:
        for verify in (certificate, False):
            with open_pool(verify) as pool:
                assert [put(pool, server, data), put(pool, server, b"x")] == [(200, b"ok")] * 2
        assert server.accepted == 2
        with open_pool(True) as pool, pytest.raises(boto.SSLError, match="certificate"):
            put(pool, server, data)
    assert bodies == [data, b"x"] * 2


@pytest.mark.parametrize("farewell", [b"", b"\x15\x03\x03\x00\x02\x01\x00"], ids=["hangs up", "says close_notify"])
def test_a_server_that_hangs_up_within_the_tls_handshake_is_asked_again(farewell: bytes):
    def talk(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(farewell)

    with run_server(talk) as server, open_pool() as pool:
        server.url = server.url.replace("http:", "https:")
        with pytest.raises(boto.EndpointConnectionError) as caught:
            put(pool, server)
    assert is_transient(caught.value)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno"], ids=["OK", "403"])
def test_interim_answers_are_not_the_answer(answer: bytes):
    interim = b"HTTP/1.1 100 Continue\r\n\r\n" + b"HTTP/1.1 102 Processing\r\n\r\n" * 2
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\nContent-Length: 9\r\n\r\n"

    def talk(connection: socket.socket) -> None:
        while read_request(connection):
            connection.sendall(interim + hints + (answer or OK))

    with run_server(talk) as server, open_pool() as pool:
        assert [put(pool, server) for _ in range(2)] == [(403, b"no") if answer else (200, b"ok")] * 2
        pool.close()
    assert server.accepted == 1


def test_another_protocol_is_an_error_and_its_connection_is_not_used_again():
    def talk(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + OK)
        connection.recv(1)

    with run_server(talk) as server, open_pool() as pool:
        for _ in range(2):
            with pytest.raises(boto.ConnectionClosedError):
                put(pool, server)
    assert server.accepted == 2


def test_an_answer_that_comes_just_before_its_cancellation_leaves_no_connection_open():
    """Nobody will read its body."""

    def talk(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 100\r\n\r\n")
        connection.recv(1)  # until the client hangs up

    class Exchanged(Exchange):
        answered = threading.Event()
        may_return = threading.Event()

        def run(self, read_body: Callable[[int], bool]) -> tuple[int, dict[str, str], bytes | None]:
            found = super().run(read_body)
            self.answered.set()
            self.may_return.wait(10)
            return found

    async def cancelled(exchange: Exchanged, threads: ThreadPoolExecutor) -> None:
        task = asyncio.ensure_future(BulkAnswer(threads, exchange).in_thread(lambda: exchange.run(lambda _: False)))
        await asyncio.to_thread(exchange.answered.wait, 10)
        task.cancel()
        await asyncio.sleep(0)  # the task takes its cancellation
        exchange.may_return.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    with run_server(talk) as server, open_pool() as pool, ThreadPoolExecutor(1) as threads:
        exchange = Exchanged(pool, "GET", server.url, {}, [])
        asyncio.run(cancelled(exchange, threads))
        assert exchange._sock is None, "the connection was left open"
        assert server.closed.wait(10)
