"""Saves and loads through an S3 server that misbehaves, from the state to the state again: what passes, what is told.

Every fault strikes at the socket, in front of a real server.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiobotocore.httpsession import AIOHTTPSession

from rl_ckpt import Checkpointer, CheckpointError, InvalidInputError, PendingSave, StorageError
from rl_ckpt.store import s3
from rl_ckpt.store.base import TrafficStats
from rl_ckpt.store.urls import open_store
from tests.s3_servers import S3Server
from tests.store.faulty_proxy import Fault, Proxy, on, run_proxy
from tests.store.tcp_proxy import deaf_address, run_wire
from tests.unit.trees import assert_same

QUICK = {"retry_base_s": 0.001, "retry_cap_s": 0.02}
PARTS_BYTES = 6 << 20  # of one file: more than one request takes, so it goes in parts
SHARD = "/shards/"


def state(step: int) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    return {"w": rng.integers(0, 255, PARTS_BYTES, np.uint8), "small": rng.random(7), "step": step}


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_PART_BYTES", 5 << 20)  # the least that S3 allows


@pytest.fixture
def retries(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Tries beyond the first so far, of all stores of this process."""
    count = [0]
    real = TrafficStats.count_retry

    def spy(self: TrafficStats) -> None:
        count[0] += 1
        real(self)

    monkeypatch.setattr(TrafficStats, "count_retry", spy)
    return lambda: count[0]


def through(server: S3Server, url: str, endpoint: str, **options: Any) -> Checkpointer:
    config = {"read_timeout": 5, **options.pop("config_kwargs", {})}
    found = server.storage_options(endpoint_url=endpoint, config_kwargs=config) | QUICK | options
    return Checkpointer(url, storage_options=found, write_streams=1)


def uploads(server: S3Server, url: str) -> list[dict[str, Any]]:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    found: list[dict[str, Any]] = (
        server.client().list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads", [])
    )
    return found


HTML = b"<html><body>Gateway: try again</body></html>"
PASSING = {
    "part cut mid-body": [Fault(on("PUT", having="partNumber=1"), cut_request_after_bytes=100_000)],
    "manifest cut mid-body": [Fault(on("PUT", having="/manifests/"), cut_request_after_bytes=10)],
    "answers cut mid-body": [Fault(on("GET", having=SHARD), cut_reply_after_bytes=100_000)] * 2,
    "manifest's answer cut": [Fault(on("GET", having="/manifests/"), cut_reply_after_bytes=10)],
    "500 for parts": [Fault(on("PUT", having="partNumber"), status=500, code="InternalError")] * 4,
    "SlowDown everywhere": [Fault(lambda _m, _p: True, status=503, code="SlowDown")] * 20,
    "part stored short": [Fault(on("PUT", having="/manifests/"), pass_on_bytes=50)],
    "range announced short": [Fault(on("GET", having=SHARD), announce_bytes=1000)] * 2,
    "range announced long": [Fault(on("GET", having=SHARD), announce_bytes=7 << 20)],
    "manifest announced short": [Fault(on("GET", having="/manifests/"), announce_bytes=100)],
    "record announced long": [Fault(on("GET", having="/commits/0"), announce_bytes=5000)],
    "a gateway's page for a listing": [Fault(on("GET", having="list-type"), status=200, body=HTML)],
    "an error inside a 200": [Fault(on("POST", having="uploadId="), status=200, code="InternalError")],
    "record's answer lost": [Fault(on("PUT", having="/commits/"), lose_reply=True)],
}


@dataclass
class Behind:
    """A run behind a proxy, that several tests use one after the other: to make one costs more than a test."""

    proxy: Proxy
    ckpt: Checkpointer
    step: int = 0

    def save(self) -> PendingSave:
        self.step += 1
        return self.ckpt.save_state(self.step, state(self.step))


@contextmanager
def behind(server: S3Server, **options: Any) -> Iterator[Behind]:
    url = f"s3://{server.new_bucket()}/run"
    with run_proxy(server) as proxy, through(server, url, proxy.url, **options) as ckpt:
        run = Behind(proxy, ckpt)
        run.save().result(60)
        yield run


@pytest.fixture(scope="module")
def patient(moto_server: S3Server) -> Iterator[Behind]:
    with behind(moto_server) as run:
        yield run


@pytest.fixture(scope="module")
def impatient(moto_server: S3Server) -> Iterator[Behind]:
    options = {"retry_deadline_s": 0.3, "retry_throttled_s": 0.3, "config_kwargs": {"read_timeout": 1.5}}
    with behind(moto_server, **options) as run:
        yield run


@pytest.mark.parametrize("faults", PASSING.values(), ids=PASSING.keys())
def test_a_fault_that_passes_is_retried_and_nothing_is_lost(
    moto_server: S3Server, patient: Behind, faults: Sequence[Fault], retries: Callable[[], int]
) -> None:
    patient.proxy.faults = list(faults)
    patient.save().result(60)
    assert_same(patient.ckpt.load_state(), state(patient.step))
    assert patient.proxy.faults == []
    assert retries() >= len(faults)
    assert uploads(moto_server, patient.ckpt.url) == []


LASTING = {
    "500": (Fault(on("PUT", having=SHARD), status=500, code="InternalError"), r"tries in .*InternalError \(HTTP 500\)"),
    "SlowDown": (
        Fault(on("PUT", having=SHARD), status=503, code="SlowDown"),
        r"UploadPart of .* after \d+ tries in [\d.]+ s: .*SlowDown \(HTTP 503\).*retry_throttled_s",
    ),
    "SlowDown for records": (
        Fault(on("PUT", having="/manifests/"), status=503, code="SlowDown"),
        r"\d+ tries .*SlowDown",
    ),
    "connections cut": (Fault(on("PUT", having=SHARD), cut_request_after_bytes=9), r"failed after \d+ tries"),
    "never answered": (Fault(on("PUT", having=SHARD), hang=True), r"failed after \d+ tr.*Timeout"),
    "expired": (
        Fault(on("PUT", having=SHARD), status=403, code="ExpiredToken"),
        r"after 1 try.*ExpiredToken .*no newer one was found: renew the credentials",
    ),
    "clock": (
        Fault(on("PUT", having=SHARD), status=403, code="RequestTimeTooSkewed"),
        r"after 1 try.*RequestTimeTooSkewed .*clocks .* are apart",
    ),
    "denied": (Fault(on("PUT", having=SHARD), status=403, code="AccessDenied"), r"after 1 try.*allow s3:GetObject"),
    "gateway's page": (
        Fault(on("POST", having="?uploads"), status=200, body=HTML),
        r"after 3 tries.*the answer is not S3's: it has no UploadId",
    ),
    "stored short": (
        Fault(on("PUT", having="/manifests/"), pass_on_bytes=50),
        r"failed after 3 tries .*\d+ bytes went over the wire, the object has 50",
    ),
    "moved": (
        Fault(on("PUT", having=SHARD), status=301, code="PermanentRedirect", headers={"Location": "/elsewhere"}),
        "bucket is in another region",
    ),
}


# On a busy machine, a sweep beside may wait longer than this Checkpointer is willing to; the next save says so.
@pytest.mark.filterwarnings("ignore:old checkpoints could not be swept")
@pytest.mark.parametrize(("fault", "told"), LASTING.values(), ids=LASTING.keys())
def test_a_fault_that_lasts_fails_this_save_only_and_is_told(
    moto_server: S3Server, impatient: Behind, fault: Fault, told: str
) -> None:
    ckpt, before = impatient.ckpt, impatient.step
    impatient.proxy.faults = [replace(fault, lasting=True)]
    failure = impatient.save()._future.exception(60)  # staged: training went on
    with pytest.raises(CheckpointError, match=told) as caught:
        impatient.save()  # nobody asked for the result: the next call tells
    assert caught.value is failure
    assert isinstance(failure, InvalidInputError if fault.status == 301 else StorageError)
    impatient.proxy.faults = []
    assert_same(ckpt.load_state(), state(before))
    assert uploads(moto_server, ckpt.url) == []
    impatient.save().result(60)
    assert_same(ckpt.load_state(), state(impatient.step))
    assert [info.step for info in ckpt.checkpoints()][-2:] == [before, impatient.step]


@pytest.mark.parametrize("session", [None, AIOHTTPSession], ids=["sockets", "aiohttp"])
def test_a_blackhole_is_noticed_and_left_by_new_connections(
    moto_server: S3Server, session: Any, retries: Callable[[], int]
) -> None:
    url = f"s3://{moto_server.new_bucket()}/run"
    config = {"read_timeout": 0.4} | ({"http_session_cls": session} if session else {})
    with (
        run_wire(moto_server) as wire,
        through(moto_server, url, wire.server.endpoint_url, config_kwargs=config) as ckpt,
    ):
        ckpt.save_state(1, state(1)).result(60)
        wire.open_blackhole()
        pending = ckpt.save_state(2, state(2))
        assert wire.swallowed.wait(60)
        accepted = wire.accepted
        _until(lambda: wire.accepted > accepted)  # the first connections were given up
        assert not pending.done()
        wire.close_blackhole()
        pending.result(60)
        assert retries() > 0
        wire.open_blackhole()
        loaded: list[Any] = []
        loading = threading.Thread(target=lambda: loaded.append(ckpt.load_state()))
        loading.start()
        assert wire.swallowed.wait(60)
        wire.close_blackhole()
        loading.join()
        assert_same(loaded[0], state(2))


@pytest.mark.parametrize("session", [None, AIOHTTPSession], ids=["sockets", "aiohttp"])
def test_a_server_that_takes_no_more_of_a_part_is_left(
    moto_server: S3Server, session: Any, retries: Callable[[], int]
) -> None:
    url = f"s3://{moto_server.new_bucket()}/run"
    config = {"read_timeout": 0.4} | ({"http_session_cls": session} if session else {})
    with run_proxy(moto_server) as proxy, through(moto_server, url, proxy.url, config_kwargs=config) as ckpt:
        proxy.faults = [Fault(on("PUT", having="partNumber=1"), stop_reading=True)]
        ckpt.save_state(1, state(1)).result(60)
        assert_same(ckpt.load_state(), state(1))
        assert retries() == 1


@pytest.mark.parametrize(
    ("session", "bytes_per_s", "limit_s"),
    [
        (None, 4_000_000, 2),
        pytest.param(AIOHTTPSession, 4_000_000, 2, marks=pytest.mark.soak),
        pytest.param(None, 1_000_000, 8, marks=pytest.mark.soak),  # what lies in the buffers takes some seconds
    ],
)
def test_what_is_slow_and_moves_is_not_given_up(
    moto_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    retries: Callable[[], int],
    session: Any,
    bytes_per_s: int,
    limit_s: float,
) -> None:
    """One request takes longer than the limit, each piece of it less."""
    monkeypatch.setattr(s3, "_PART_BYTES", 16 << 20)
    url = f"s3://{moto_server.new_bucket()}/run"
    config = {"read_timeout": limit_s} | ({"http_session_cls": session} if session else {})
    with (
        run_wire(moto_server) as wire,
        through(moto_server, url, wire.server.endpoint_url, config_kwargs=config) as ckpt,
    ):
        ckpt.save_state(0, {"w": np.zeros(1)}).result(60)
        wire.bytes_per_s = bytes_per_s
        saved = {"w": np.random.default_rng(0).integers(0, 255, 14_000_000, np.uint8)}
        ckpt.save_state(1, saved).result(60)
        assert_same(ckpt.load_state(), saved)
        assert retries() == 0


def test_ten_times_the_latency(moto_server: S3Server, retries: Callable[[], int]) -> None:
    url = f"s3://{moto_server.new_bucket()}/run"
    with run_wire(moto_server) as wire, through(moto_server, url, wire.server.endpoint_url) as ckpt:
        wire.latency_s = 0.02
        small = state(1) | {"w": np.arange(1000)}
        ckpt.save_state(1, small).result(60)
        assert_same(ckpt.load_state(), small)
        assert retries() == 0


def test_an_address_where_packets_are_dropped(moto_server: S3Server) -> None:
    url = f"s3://{moto_server.new_bucket()}/run"
    with deaf_address() as address:
        ckpt = through(moto_server, url, address, first_contact_s=0.3, config_kwargs={"connect_timeout": 0.2})
        with pytest.raises(StorageError, match=r"cannot reach the server after \d+ tr.*Check AWS_ENDPOINT_URL"):
            ckpt.save_state(1, {"w": np.zeros(3)})
        bulk = open_store(url, ckpt._storage_options)
        with pytest.raises(StorageError, match=r"cannot reach the server after \d+ tr.*onnect"):
            bulk.put("a", [bytes(200_000)])


def test_credentials_that_were_renewed_are_found_within_the_save(
    moto_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, retries: Callable[[], int]
) -> None:
    """A tool renews a file: the request that was refused is signed anew."""
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))

    def write(key: str) -> None:
        file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\naws_session_token = t\n")

    write("first")
    with run_proxy(moto_server) as proxy:
        options = {"endpoint_url": proxy.url, **QUICK}
        url = f"s3://{moto_server.new_bucket()}/run"
        with Checkpointer(url, storage_options=options, write_streams=1) as ckpt:
            ckpt.save_state(1, state(1)).result(60)
            proxy.faults = [Fault(on("PUT", having="partNumber=2"), status=403, code="ExpiredToken")]
            with pytest.raises(StorageError, match="no newer one was found"):
                ckpt.save_state(2, state(2)).result(60)
            write("second")
            proxy.faults = [Fault(on("PUT", having="partNumber"), status=403, code="ExpiredToken")] * 2
            before = retries()
            ckpt.save_state(3, state(3)).result(60)
            assert retries() - before == 2
            assert_same(ckpt.load_state(), state(3))


def test_many_requests_that_are_told_to_slow_down_come_back_fewer(moto_server: S3Server) -> None:
    url = f"s3://{moto_server.new_bucket()}/x"
    with run_proxy(moto_server) as proxy:
        store = open_store(url, moto_server.storage_options(endpoint_url=proxy.url, **QUICK))
        store.put("a", [b"x"])
        proxy.faults = [Fault(on("PUT", having="partNumber"), status=503, code="SlowDown")] * 40
        data = np.random.default_rng(0).bytes(20 * PARTS_BYTES // 2)
        store.put("large", [data])
        assert store.stats.snapshot().retries == 40
        assert math.isfinite(_pace(store))
        back = bytearray(len(data))
        store.read_into("large", [(0, memoryview(back))])
        assert back == data


def _pace(store: Any) -> float:
    limit: float = store._connection.pace.limit
    return limit


def _until(true: Callable[[], bool]) -> None:
    event = threading.Event()
    for _ in range(3000):
        if true():
            return
        event.wait(0.02)
    raise AssertionError("waited a minute")


@pytest.mark.soak
def test_thirty_seconds_of_blackhole_with_the_limits_as_they_are(moto_server: S3Server) -> None:
    url = f"s3://{moto_server.new_bucket()}/run"
    with run_wire(moto_server) as wire:
        options = moto_server.storage_options(endpoint_url=wire.server.endpoint_url)
        with Checkpointer(url, storage_options=options, write_streams=1) as ckpt:
            ckpt.save_state(1, state(1)).result(60)
            wire.open_blackhole()
            pending = ckpt.save_state(2, state(2))
            assert wire.swallowed.wait(60)
            threading.Event().wait(30)
            wire.close_blackhole()
            pending.result(120)
            assert_same(ckpt.load_state(), state(2))
