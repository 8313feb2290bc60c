"""S3 when it is overloaded, slow or cut off: a real server behind a proxy that breaks chosen requests."""

from __future__ import annotations

import gc
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from aiobotocore.httpsession import AIOHTTPSession
from botocore.exceptions import ProfileNotFound

from rl_ckpt.errors import StorageError
from rl_ckpt.store import s3_client
from rl_ckpt.store.base import ObjectExistsError, Store
from rl_ckpt.store.s3_bulk import BulkSession
from rl_ckpt.store.urls import open_store
from tests.s3_servers import S3Server
from tests.store.contract import some_bytes
from tests.store.faulty_proxy import Fault, Proxy, run_proxy
from tests.store.faulty_proxy import on as is_

LARGE_BYTES = 40_000_000


@pytest.fixture
def proxy(moto_server: S3Server) -> Iterator[Proxy]:
    with run_proxy(moto_server) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def bucket(moto_server: S3Server) -> str:
    return moto_server.new_bucket()


@pytest.fixture(params=[BulkSession, AIOHTTPSession], ids=["sockets", "aiohttp"])
def session(request: pytest.FixtureRequest) -> type[AIOHTTPSession]:
    """How parts and reads get to the server and back."""
    session: type[AIOHTTPSession] = request.param
    return session


@pytest.fixture
def open_through(
    moto_server: S3Server, bucket: str, proxy: Proxy, session: type[AIOHTTPSession]
) -> Callable[..., Store]:
    url = f"s3://{bucket}/{uuid.uuid4().hex}"

    def opener(config_kwargs: dict[str, Any] | None = None, **options: Any) -> Store:
        quick = {"retry_base_s": 0.001, "endpoint_url": proxy.url}
        config = {"http_session_cls": session, **(config_kwargs or {})}
        return open_store(url, moto_server.storage_options(config_kwargs=config) | quick | options)

    return opener


@pytest.fixture
def store(open_through: Callable[..., Store]) -> Store:
    return open_through()


TRANSIENT = [
    pytest.param({"status": 503, "code": "SlowDown"}, id="503 SlowDown"),
    pytest.param({"status": 500, "code": "InternalError"}, id="500"),
    pytest.param({"status": 429, "code": "TooManyRequests"}, id="429"),
    pytest.param({"status": 502, "code": ""}, id="502 from a gateway"),
    pytest.param({"status": 400, "code": "RequestTimeout"}, id="RequestTimeout"),
    pytest.param({"lose_reply": True}, id="connection cut"),
]


@pytest.mark.parametrize("what", TRANSIENT)
def test_transient_failures_are_retried_and_counted(
    store: Store, proxy: Proxy, what: dict[str, Any], session: type[AIOHTTPSession]
):
    proxy.faults = [Fault(is_("PUT"), **what), Fault(is_("PUT"), **what), Fault(is_("GET"), **what)]
    store.put("a", [b"x"])
    assert store.get("a") == b"x"
    assert (proxy.faults, len(proxy.seen)) == ([], 5)
    # aiohttp by itself sends again, uncounted, once, what it sent into a connection that was open from before.
    assert store.stats.snapshot().retries == (2 if "lose_reply" in what and session is AIOHTTPSession else 3)


@pytest.mark.parametrize("what", TRANSIENT)
def test_each_request_of_an_upload_is_retried(store: Store, proxy: Proxy, what: dict[str, Any]):
    proxy.faults = [
        Fault(is_("POST", having="?uploads"), **what),
        Fault(is_("PUT", having="partNumber=2"), **what),
        Fault(is_("POST", having="uploadId="), **what),
    ]
    data = some_bytes(LARGE_BYTES)
    store.put("a", [data])
    assert store.get("a") == data
    assert store.stats.snapshot().retries == 3


@pytest.mark.parametrize("at", [0, 1, 100_000, 6_000_000])
def test_a_body_cut_within_is_fetched_again(store: Store, proxy: Proxy, at: int):
    data = some_bytes(LARGE_BYTES)
    store.put("a", [data])
    proxy.faults = [Fault(is_("GET"), cut_reply_after_bytes=at) for _ in range(2)]
    back = bytearray(LARGE_BYTES)
    store.read_into("a", [(0, memoryview(back))])
    assert back == data
    assert store.stats.snapshot().retries == 2
    proxy.faults = [Fault(is_("GET"), cut_reply_after_bytes=at)]
    assert store.get("a") == data
    assert store.stats.snapshot().retries == 3


def test_create_whose_reply_is_lost_says_that_the_object_exists(store: Store, proxy: Proxy):
    proxy.faults = [Fault(is_("PUT"), lose_reply=True)]
    with pytest.raises(ObjectExistsError):
        store.create("commits/1", b"mine")
    assert store.get("commits/1") == b"mine"


def test_create_that_meets_another_under_way_tries_again(store: Store, proxy: Proxy):
    proxy.faults = [Fault(is_("PUT"), status=409, code="ConditionalRequestConflict")]
    store.create("commits/1", b"mine")
    assert store.get("commits/1") == b"mine"
    assert store.stats.snapshot().retries == 1


@pytest.mark.parametrize("code", ["PreconditionFailed", ""])
def test_create_knows_a_lost_race_by_status_alone(store: Store, proxy: Proxy, code: str):
    proxy.faults = [Fault(is_("PUT"), status=412, code=code)]
    with pytest.raises(ObjectExistsError):
        store.create("commits/1", b"mine")
    assert store.stats.snapshot().retries == 0


def test_the_deadline_ends_the_retries_and_the_error_says_it_all(open_through: Callable[..., Store], proxy: Proxy):
    store = open_through(retry_throttled_s=1.5)
    proxy.faults = [Fault(is_("PUT"), status=503, code="SlowDown") for _ in range(10_000)]
    with pytest.raises(StorageError) as told:
        store.put("a", [b"x"])
    retries = store.stats.snapshot().retries
    assert f"PutObject of {store.url}/a at {proxy.url} failed after {retries + 1} tries in " in str(told.value)
    assert "SlowDown (HTTP 503): as told" in str(told.value)
    assert "raise storage_options['retry_throttled_s']" in str(told.value)
    assert len(proxy.seen) == retries + 1 > 2


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (400, "InvalidRequest"), (501, "NotImplemented")])
def test_lasting_failures_are_told_at_once(store: Store, proxy: Proxy, status: int, code: str):
    proxy.faults = [Fault(is_("PUT"), status=status, code=code)]
    with pytest.raises(StorageError, match=rf"after 1 try .*{code} \(HTTP {status}\)"):
        store.put("a", [b"x"])
    assert len(proxy.seen) == 1


@pytest.mark.parametrize("status", [400, 403])
def test_credentials_that_expire_during_an_upload_or_a_read(store: Store, proxy: Proxy, status: int):
    store.put("a", [bytes(LARGE_BYTES)])
    proxy.faults = [Fault(is_("PUT", having="partNumber=2"), status=status, code="ExpiredToken")]
    with pytest.raises(StorageError, match=r"UploadPart .*after 1 try.*ExpiredToken .*renew the credentials"):
        store.put("b", [bytes(LARGE_BYTES)])
    assert not store.exists("b")
    proxy.faults = [Fault(is_("GET"), status=status, code="ExpiredToken")]
    with pytest.raises(StorageError, match=r"GetObject .*after 1 try.*ExpiredToken .*renew the credentials"):
        store.read_into("a", [(0, memoryview(bytearray(LARGE_BYTES)))])
    assert store.clean_partial(-2) == 0


def test_newer_credentials_that_cannot_be_read_hide_nothing(
    store: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
):
    store.put("a", [b"x"])

    def half_written(**options: object) -> None:
        raise ProfileNotFound(profile="prod")  # its file is just being written anew

    monkeypatch.setattr(s3_client, "S3FileSystem", half_written)
    proxy.faults = [Fault(is_("GET"), status=403, code="ExpiredToken")]
    with pytest.raises(StorageError, match=r"GetObject .*after 1 try.*ExpiredToken .*renew the credentials"):
        store.get("a")


def test_a_part_or_range_that_is_never_answered_is_tried_again(open_through: Callable[..., Store], proxy: Proxy):
    store = open_through(config_kwargs={"read_timeout": 0.5})
    data = some_bytes(LARGE_BYTES)
    proxy.faults = [Fault(is_("PUT", having="partNumber=2"), hang=True), Fault(is_("GET"), hang=True)]
    store.put("a", [data])
    back = bytearray(LARGE_BYTES)
    store.read_into("a", [(0, memoryview(back))])
    assert (back, proxy.faults) == (data, [])


def test_a_server_that_never_answers_is_given_up(open_through: Callable[..., Store], proxy: Proxy):
    store = open_through(first_contact_s=0.1, config_kwargs={"read_timeout": 0.2})
    proxy.faults = [Fault(is_("PUT"), hang=True) for _ in range(3)]
    with pytest.raises(StorageError, match=r"PutObject of .*/a at .* failed after 1 try in .*Timeout"):
        store.put("a", [b"x"])


def test_an_upload_that_fails_for_good_is_aborted(open_through: Callable[..., Store], proxy: Proxy):
    store = open_through(retry_deadline_s=0.05)
    proxy.faults = [Fault(is_("PUT", having="partNumber=2"), status=503, code="SlowDown") for _ in range(1000)]
    with pytest.raises(StorageError, match=r"UploadPart .*SlowDown"):
        store.put("a", [bytes(LARGE_BYTES)])
    assert [method for method, path in proxy.seen if "uploadId=" in path].count("DELETE") == 1
    assert store.clean_partial(-2) == 0
    assert store.list() == []


def test_an_abort_that_fails_too_hides_nothing(open_through: Callable[..., Store], proxy: Proxy):
    store = open_through()
    proxy.faults = [
        Fault(is_("PUT", having="partNumber=2"), status=403, code="AccessDenied"),
        Fault(is_("DELETE"), status=403, code="AccessDenied"),
    ]
    with pytest.raises(StorageError, match=r"UploadPart .*AccessDenied"):
        store.put("a", [bytes(LARGE_BYTES)])
    assert store.clean_partial(-2) == 1


def test_every_call_survives_one_bad_answer(store: Store, proxy: Proxy):
    calls: list[Callable[[], object]] = [
        lambda: store.put("a", [b"x"]),
        lambda: store.create("b", b"x"),
        lambda: store.get("a"),
        lambda: store.read_into("a", [(0, memoryview(bytearray(1)))]),
        store.list,
        lambda: store.exists("a"),
        lambda: store.delete(["a"]),
        lambda: store.clean_partial(0),
    ]
    for number, call in enumerate(calls, 1):
        proxy.faults = [Fault(lambda _method, _path: True, status=503, code="SlowDown")]
        call()
        assert store.stats.snapshot().retries == number


@pytest.mark.parametrize("session", [BulkSession], indirect=True, ids=["sockets"])  # aiohttp has cycles of its own
def test_a_failed_read_keeps_no_buffer(store: Store, proxy: Proxy):
    """No cycle of an error and a frame: a buffer may be most of a machine's memory, and the collector comes late."""
    store.put("a", [some_bytes(LARGE_BYTES)])
    gc.disable()
    try:
        for fault in (Fault(is_("GET"), cut_reply_after_bytes=1), Fault(is_("GET"), status=403, code="AccessDenied")):
            proxy.faults = [fault]
            back = np.empty(LARGE_BYTES, np.uint8)
            kept = weakref.ref(back)
            with pytest.raises(StorageError, match="AccessDenied") if fault.status else nullcontext():
                store.read_into("a", [(0, back.data)])
            del back
            deadline = time.monotonic() + 10
            while kept() is not None:  # a thread lets go of its last job a moment after it has told its end
                assert time.monotonic() < deadline
    finally:
        gc.enable()
