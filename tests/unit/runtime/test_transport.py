"""The transport between shard servers, over real sockets in one process: what it serves, and what it refuses."""

from __future__ import annotations

import dataclasses
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_ckpt.errors import CorruptionError, StorageError
from rl_ckpt.runtime.transport import client, wire
from rl_ckpt.runtime.transport.client import pull
from rl_ckpt.runtime.transport.listener import Limits, Listener
from rl_ckpt.runtime.transport.shelf import Shelf
from rl_ckpt.runtime.transport.wire import Door, Line, Reply, Request, TransportError

SIZE = 3 << 20
WAIT_S = 30.0
LIMITS = Limits(connections=4, handshake_s=0.5, idle_s=0.5, stall_s=2.0, beat_s=0.05, absent_s=0.2)


class Place:
    """A listener with one file on its shelf."""

    def __init__(self, folder: Path, limits: Limits = LIMITS) -> None:
        self.path = folder / "memory"
        self.data = os.urandom(SIZE)
        self.path.write_bytes(self.data)
        self.shelf = Shelf()
        self.listener = Listener("127.0.0.1", "server-a", self.shelf, limits)
        self.lines: list[Line] = []

    @property
    def door(self) -> Door:
        return self.listener.door

    def publish(self, name: str = "x", *, filled: bool = True) -> None:
        self.shelf.publish(name, str(self.path), SIZE, filled=filled)

    def pull(self, ranges: list[tuple[int, int]], what: str = "x", **changed: object) -> list[bytes]:
        """The bytes of some ranges."""
        buffers = [bytearray(size) for _, size in ranges]
        pieces = [(offset, memoryview(b)) for (offset, _), b in zip(ranges, buffers, strict=True)]
        door = dataclasses.replace(self.door, **changed)  # type: ignore[arg-type]
        done = list(pull(door, what, pieces, by=time.monotonic() + WAIT_S, stall_s=2.0))
        assert sorted(done) == list(range(len(ranges)))
        return [bytes(b) for b in buffers]

    def refused(self, count: int = 1) -> None:
        """Waits until so many connections were refused, and shows that the listener still serves."""
        deadline = time.monotonic() + WAIT_S
        while self.listener.counts()["refused"] < count:
            assert time.monotonic() < deadline, self.listener.counts()
            threading.Event().wait(0.005)
        self.publish()
        assert self.pull([(5, 7)]) == [self.data[5:12]]

    def connect(self) -> Line:
        self.lines.append(Line(socket.create_connection((self.door.host, self.door.port), WAIT_S), WAIT_S))
        return self.lines[-1]

    def close(self) -> None:
        self.listener.close()
        for line in self.lines:
            line.sock.close()

    def introduced(self) -> Line:
        line = self.connect()
        wire.introduce(line, self.door.secret, self.door.name, time.monotonic() + WAIT_S)
        return line


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.close()


def closed(line: Line) -> bool:
    """Whether the other side has closed the connection; waits for it."""
    try:
        return line.sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_ranges_come_as_they_are(place: Place) -> None:
    place.publish()
    ranges = [(0, SIZE), (SIZE - 1, 1), (17, 1000), (17, 1000)]
    assert place.pull(ranges) == [place.data[o : o + s] for o, s in ranges]
    assert place.listener.counts() == {"connections": 1, "refused": 0, "bytes_served": SIZE + 2001}


def test_more_ranges_than_a_request_holds(place: Place) -> None:
    place.publish()
    ranges = [(3 * i, 2) for i in range(2 * wire.RANGES + 1)]
    assert place.pull(ranges) == [place.data[o : o + s] for o, s in ranges]


def test_a_request_of_the_most_ranges_fits_into_a_frame() -> None:
    largest = Request("n" * 255, [(1 << 62, 1 << 62)] * wire.RANGES)
    assert len(msgspec.msgpack.encode(largest)) <= wire.REQUEST_BYTES


def test_ranges_come_when_they_are_filled_and_in_that_order(place: Place) -> None:
    place.publish(filled=False)
    buffer = memoryview(bytearray(30))
    arriving = pull(
        place.door, "x", [(0, buffer[:10]), (10, buffer[10:20]), (20, buffer[20:])], by=time.monotonic() + 30
    )
    for number in (2, 0, 1):
        place.shelf.fill("x", [(10 * number, 10)])
        assert next(arriving) == number
        assert buffer[10 * number : 10 * number + 10] == place.data[10 * number : 10 * number + 10]


def test_signs_of_life_outlast_a_stall_while_the_peer_waits_for_the_store(place: Place) -> None:
    place.publish(filled=False)
    buffer = bytearray(10)
    arriving = pull(place.door, "x", [(0, memoryview(buffer))], by=time.monotonic() + WAIT_S, stall_s=0.5)
    timer = threading.Timer(1.5, place.shelf.fill, ("x", [(0, 10)]))
    timer.start()
    assert list(arriving) == [0]
    assert buffer == place.data[:10]


def test_what_is_published_later_is_waited_for(place: Place) -> None:
    timer = threading.Timer(0.05, place.publish)
    timer.start()
    assert place.pull([(1, 2)]) == [place.data[1:3]]


def test_the_peers_own_error_comes_over(place: Place) -> None:
    place.publish(filled=False)
    place.shelf.fill("x", [(0, 10)])
    place.shelf.fail("x", CorruptionError("chunk 7 is damaged"))
    assert place.pull([(0, 10)]) == [place.data[:10]], "what is there is still served"
    with pytest.raises(CorruptionError, match="chunk 7 is damaged"):
        place.pull([(0, 10), (10, 10)])


def test_what_was_withdrawn_is_refused_also_to_who_waits_for_it_and_never_comes_back(place: Place) -> None:
    place.publish(filled=False)
    timer = threading.Timer(0.1, place.shelf.withdraw, ("x",))
    timer.start()
    with pytest.raises(TransportError, match="not here any more"):
        place.pull([(0, 10)])
    with pytest.raises(StorageError, match="late"):
        place.publish()


@pytest.mark.parametrize("ranges", [(SIZE - 1, 2), (SIZE, 1), (1 << 62, 1 << 62)])
def test_ranges_out_of_bounds_are_refused(place: Place, ranges: tuple[int, int]) -> None:
    place.publish()
    line = place.introduced()
    line.send_request(Request("x", [ranges]))
    reply = line.take_reply()
    assert reply.kind == wire.REFUSED
    assert b"no part of x" in line.take(reply.size_bytes)
    place.refused()


@pytest.mark.parametrize("ranges", [(-1, 2), (0, 0), (0, -5)])
def test_ranges_that_are_none_are_refused(place: Place, ranges: tuple[int, int]) -> None:
    place.publish()
    line = place.introduced()
    line.send_request(Request("x", [ranges]))
    assert line.take_reply().kind == wire.REFUSED
    place.refused()


@pytest.mark.parametrize("name", ["y", "", "../memory", "/etc/passwd", "x\0"])
def test_unknown_names_are_refused(place: Place, name: str) -> None:
    place.publish()
    with pytest.raises(TransportError, match="nothing is known here"):
        place.pull([(0, 1)], name)
    place.refused()


def test_a_client_with_a_wrong_secret_is_refused(place: Place) -> None:
    place.publish()
    with pytest.raises((TransportError, ConnectionError)):
        place.pull([(0, 1)], secret=b"guess" * 8)
    place.refused()
    assert place.listener.counts()["bytes_served"] == 7


def test_a_listener_of_another_name_is_found_out(place: Place) -> None:
    place.publish()
    with pytest.raises((TransportError, ConnectionError)):
        place.pull([(0, 1)], name="server-b")
    place.refused()


def test_a_listener_that_does_not_know_the_secret_is_found_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def pretend() -> None:
            sock, _ = listening.accept()
            with sock:
                sock.sendall(wire.MAGIC + os.urandom(wire.NONCE_BYTES))
                answer = sock.recv(wire.NONCE_BYTES + wire.PROOF_BYTES, socket.MSG_WAITALL)
                sock.sendall(answer[wire.NONCE_BYTES :])  # the client's own proof, sent back

        thread = threading.Thread(target=pretend)
        thread.start()
        door = Door("127.0.0.1", listening.getsockname()[1], "server-a", os.urandom(32))
        with pytest.raises(TransportError, match="does not know the secret"):
            list(pull(door, "x", [(0, memoryview(bytearray(1)))], by=time.monotonic() + WAIT_S))
        thread.join()


def test_a_port_that_belongs_to_something_else_is_found_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def pretend() -> None:
            sock, _ = listening.accept()
            with sock:
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\n" * 4)

        thread = threading.Thread(target=pretend)
        thread.start()
        door = Door("127.0.0.1", listening.getsockname()[1], "server-a", os.urandom(32))
        with pytest.raises(TransportError, match="something else"):
            list(pull(door, "x", [(0, memoryview(bytearray(1)))], by=time.monotonic() + WAIT_S))
        thread.join()


def test_a_handshake_that_was_listened_to_opens_nothing_again(place: Place) -> None:
    line = place.connect()
    hello = line.take(len(wire.MAGIC) + wire.NONCE_BYTES)
    nonce = os.urandom(wire.NONCE_BYTES)
    proof = wire._proof(place.door.secret, "client", place.door.name, hello[len(wire.MAGIC) :], nonce)
    line.sock.sendall(nonce + proof)
    assert len(line.take(wire.PROOF_BYTES)) == wire.PROOF_BYTES, "the real client is let in"
    replayed = place.connect()
    replayed.take(len(hello))
    replayed.sock.sendall(nonce + proof)
    assert closed(replayed)
    place.refused()


@pytest.mark.parametrize("sent", [b"", b"\0" * 10, b"GET / HTTP/1.1\r\n\r\n"], ids=["nothing", "ten bytes", "http"])
def test_a_client_that_dribbles_its_handshake_is_closed_in_time(place: Place, sent: bytes) -> None:
    line = place.connect()
    line.take(len(wire.MAGIC) + wire.NONCE_BYTES)
    line.sock.sendall(sent)
    assert closed(line)
    place.refused()


def test_a_client_that_dribbles_its_request_is_closed_in_time(place: Place) -> None:
    line = place.introduced()
    stop = threading.Event()

    def dribble() -> None:
        line.sock.sendall(struct.pack(">I", 1000))
        while not stop.wait(0.05):  # each byte comes well before the limit: all of them do not
            try:
                line.sock.sendall(b"\x92")
            except OSError:
                return

    thread = threading.Thread(target=dribble)
    thread.start()
    assert closed(line)
    stop.set()
    thread.join()
    place.refused()


def test_a_client_that_asks_nothing_is_closed_in_time(place: Place) -> None:
    assert closed(place.introduced())
    place.refused()


def test_a_frame_that_is_too_large_is_refused_unread(place: Place) -> None:
    line = place.introduced()
    line.sock.sendall(struct.pack(">I", wire.REQUEST_BYTES + 1))
    assert closed(line)
    place.refused()


@pytest.mark.parametrize(
    "body",
    [
        b"\xc1" * 20,
        msgspec.msgpack.encode({"name": "x"}),
        msgspec.msgpack.encode(["x", [[0, "a"]]]),
        msgspec.msgpack.encode(["x", []]),
        msgspec.msgpack.encode(["x", [[0, 1]] * (wire.RANGES + 1)]),
        msgspec.msgpack.encode(["x", [[1 << 63, 1]]]),
    ],
    ids=["no msgpack", "a map", "a text for a number", "no ranges", "too many ranges", "a huge number"],
)
def test_requests_that_are_none_are_refused(place: Place, body: bytes) -> None:
    place.publish()
    line = place.introduced()
    line.sock.sendall(struct.pack(">I", len(body)) + body)
    got = b""
    while chunk := line.sock.recv(1 << 12):
        got += chunk
    assert not got or got[0] == wire.REFUSED
    place.refused()


@given(st.binary(max_size=300))
def test_garbage_after_the_handshake_harms_nobody(garbage: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ours = socket.create_connection(listening.getsockname())
        theirs, _ = listening.accept()
    with ours, theirs:
        ours.sendall(garbage)
        ours.close()
        try:
            request = Line(theirs, 1.0).take_request(1.0, 1.0)
        except (TransportError, OSError):
            return
        assert request is None or 0 < len(request.ranges) <= wire.RANGES


def test_connections_past_the_limit_are_closed_and_places_come_free_again(place: Place) -> None:
    place.publish()
    held = [place.introduced() for _ in range(LIMITS.connections)]
    with pytest.raises((TransportError, OSError)):
        place.pull([(0, 1)])
    for line in held:
        line.sock.close()
    deadline = time.monotonic() + WAIT_S
    while place.listener._connections:
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)
    place.refused()


def test_a_client_that_goes_away_in_the_middle_harms_nobody(place: Place) -> None:
    place.publish()
    line = place.introduced()
    line.send_request(Request("x", [(0, SIZE)] * 20))
    line.take_reply()
    line.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    line.sock.close()
    place.refused()


def test_a_client_that_stops_reading_is_closed_in_time(tmp_path: Path) -> None:
    place = Place(tmp_path, dataclasses.replace(LIMITS, stall_s=0.2))
    place.publish()
    line = place.introduced()
    line.send_request(Request("x", [(0, SIZE)] * 40))
    place.refused()
    place.close()


def test_a_listener_that_is_closed_in_the_middle_is_an_error_for_the_client(place: Place) -> None:
    place.publish(filled=False)
    place.shelf.fill("x", [(0, 10)])
    buffer = memoryview(bytearray(20))
    arriving = pull(place.door, "x", [(0, buffer[:10]), (10, buffer[10:])], by=time.monotonic() + WAIT_S)
    assert next(arriving) == 0
    place.listener.close()
    with pytest.raises((TransportError, OSError)):
        next(arriving)
    with pytest.raises(ConnectionRefusedError):
        place.pull([(0, 10)])


def test_a_file_shorter_than_was_published_is_an_error_for_the_client(place: Place) -> None:
    place.publish()
    os.truncate(place.path, SIZE // 2)
    with pytest.raises((TransportError, OSError)):
        place.pull([(0, SIZE)])


@pytest.mark.parametrize(
    "reply",
    [Reply(wire.DATA, 1, 10), Reply(wire.DATA, 0, 11), Reply(9, 0, 1), Reply(wire.REFUSED, 0, 1 << 40)],
    ids=["another range", "another size", "another kind", "an endless text"],
)
def test_a_listener_that_breaks_the_rules_is_left(reply: Reply) -> None:
    secret = os.urandom(32)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def pretend() -> None:
            sock, _ = listening.accept()
            with sock:
                line = Line(sock, WAIT_S)
                wire.admit(line, secret, "server-a", time.monotonic() + WAIT_S)
                line.take_request(WAIT_S, WAIT_S)
                line.send_reply(reply, b"0" * 64)

        thread = threading.Thread(target=pretend)
        thread.start()
        door = Door("127.0.0.1", listening.getsockname()[1], "server-a", secret)
        with pytest.raises(TransportError, match=r"not asked for|no answer of this protocol"):
            list(pull(door, "x", [(0, memoryview(bytearray(10)))], by=time.monotonic() + WAIT_S))
        thread.join()


@pytest.mark.parametrize("size", [1000, 1 << 20], ids=["little", "much"])
def test_a_listener_that_stands_still_in_the_middle_is_left_in_time(size: int) -> None:
    secret, done = os.urandom(32), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def pretend() -> None:
            sock, _ = listening.accept()
            with sock:
                line = Line(sock, WAIT_S)
                wire.admit(line, secret, "server-a", time.monotonic() + WAIT_S)
                line.take_request(WAIT_S, WAIT_S)
                line.send_reply(Reply(wire.DATA, 0, size), bytes(size // 2))
                done.wait(WAIT_S)

        thread = threading.Thread(target=pretend)
        thread.start()
        door = Door("127.0.0.1", listening.getsockname()[1], "server-a", secret)
        with pytest.raises(TimeoutError):
            list(pull(door, "x", [(0, memoryview(bytearray(size)))], by=time.monotonic() + WAIT_S, stall_s=0.2))
        done.set()
        thread.join()


def test_the_time_for_all_of_it_is_kept(place: Place) -> None:
    place.publish(filled=False)
    with pytest.raises(TimeoutError):
        list(pull(place.door, "x", [(0, memoryview(bytearray(1)))], by=time.monotonic() + 0.2))


def test_the_secret_is_not_shown(place: Place) -> None:
    assert repr(place.door.secret) not in repr(place.door)
    assert len(place.door.secret) == 32
    assert client.CONNECT_S < client.STALL_S


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)), max_size=12))
def test_filled_ranges_are_known_exactly(filled: list[tuple[int, int]]) -> None:
    shelf = Shelf()
    shelf.publish("x", "/path", 100)
    for one in filled:
        shelf.fill("x", [one])
    there = {byte for start, count in filled for byte in range(start, start + count)}
    ranges = {100 * offset + size: (offset, size) for offset in range(40) for size in range(1, 12)}
    expected = {n for n, (offset, size) in ranges.items() if set(range(offset, offset + size)) <= there}
    path, found = shelf.ready("x", ranges, 0)
    assert path == "/path"
    assert set(found) == expected


def test_all_ranges_are_waited_for_on_the_way_through_ray() -> None:
    shelf = Shelf()
    shelf.publish("x", "/path", 100)
    shelf.fill("x", [(0, 10)])
    timer = threading.Timer(0.05, shelf.fill, ("x", [(10, 10)]))
    timer.start()
    assert shelf.await_all("x", [(0, 10), (5, 10)], WAIT_S) == "/path"
    with pytest.raises(TransportError, match="not there after"):
        shelf.await_all("x", [(0, 10), (50, 10)], 0.05)


def test_a_listener_that_gets_no_thread_goes_on_later(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "rl_ckpt-serve":
            raise RuntimeError("can't start new thread")
        real(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        lines = [place.connect() for _ in range(LIMITS.connections + 1)]
        assert all(closed(line) for line in lines)
    place.refused(len(lines))
