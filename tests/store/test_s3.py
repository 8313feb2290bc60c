"""S3 on real servers: the contract on each, what is left behind on failure, and what is said about wrong settings."""

from __future__ import annotations

import multiprocessing
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from aiobotocore.httpsession import AIOHTTPSession

from rl_ckpt.errors import CheckpointError, InvalidInputError, StorageError
from rl_ckpt.store.base import ObjectExistsError, Store
from rl_ckpt.store.s3 import part_bytes
from rl_ckpt.store.s3_client import S3Connection
from rl_ckpt.store.s3_wire import Exchange
from rl_ckpt.store.urls import open_store
from tests.s3_servers import S3Server, free_port
from tests.store.contract import StoreContract, some_bytes


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> str:
    return s3_server.new_bucket()


@pytest.fixture(params=["sockets", "aiohttp"])
def client_options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Parts and reads over our own sockets, and over aiohttp, which is what a proxy or another connector gets."""
    return {} if request.param == "sockets" else {"config_kwargs": {"http_session_cls": AIOHTTPSession}}


@pytest.fixture
def store(s3_server: S3Server, bucket: str, client_options: dict[str, Any]) -> Store:
    return open_store(f"s3://{bucket}/{uuid.uuid4().hex}/run", s3_server.storage_options(**client_options))


class TestS3Store(StoreContract):
    pass


def _create(url: str, options: dict[str, Any], names: list[str], barrier: Any, won: Any) -> None:
    store = open_store(url, options)
    for name in names:
        barrier.wait()
        try:
            store.create(name, str(os.getpid()).encode())
        except ObjectExistsError:
            continue
        won.put(name)


ONE_CLIENT = pytest.mark.parametrize("client_options", ["sockets"], indirect=True)
"""For what goes the same way with both: all but parts and reads."""


@ONE_CLIENT
def test_of_racing_processes_exactly_one_creates(store: Store):
    context = multiprocessing.get_context("spawn")
    names = [f"commits/{n:08d}.json" for n in range(10)]
    barrier, won = context.Barrier(4), context.Queue()
    args = (store.url, store.storage_options, names, barrier, won)
    processes = [context.Process(target=_create, args=args) for _ in range(4)]
    for process in processes:
        process.start()
    winners = [won.get(timeout=60) for _ in names]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(winners) == names
    assert won.empty()


def test_works_after_a_fork(store: Store):
    """Ray and multiprocessing fork: the child gets no connection and no loop thread of the parent."""
    store.put("a", [b"parent"])
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            store.put("b", [store.get("a") + b" and child"])
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert store.get("b") == b"parent and child"


def test_settings_come_from_the_environment(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch):
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    store = open_store(f"s3://{bucket}/{uuid.uuid4().hex}")
    store.create("a", b"x")
    assert store.get("a") == b"x"


def test_settings_come_from_a_profile(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any):
    config = tmp_path / "config"
    config.write_text(
        f"[profile lab]\nregion = us-east-1\nendpoint_url = {s3_server.endpoint_url}\n"
        f"aws_access_key_id = {s3_server.key}\naws_secret_access_key = {s3_server.secret}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    store = open_store(f"s3://{bucket}/{uuid.uuid4().hex}")
    store.put("a", [b"x"])
    assert store.get("a") == b"x"


def test_a_whole_bucket_can_be_the_run(s3_server: S3Server):
    store = open_store(f"s3://{s3_server.new_bucket()}", s3_server.storage_options())
    store.put("commits/1", [b"x"])
    assert [o.name for o in store.list("commits/")] == ["commits/1"]


@ONE_CLIENT
def test_list_of_more_than_one_page(store: Store):
    names = [f"many/{n:05d}" for n in range(1001)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: store.put(name, [b"x"]), names))
    assert [o.name for o in store.list("many/")] == names
    store.delete(names)
    assert store.list() == []


def test_markers_of_folders_and_hidden_keys_are_not_listed(s3_server: S3Server, store: Store):
    store.put("a", [b"x"])
    bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
    for key in ("folder/", ".hidden", "x/.hidden"):
        s3_server.client().put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=b"")
    assert [o.name for o in store.list()] == ["a"]


def test_large_put_is_in_parts_and_counted(store: Store):
    store.put("large", [some_bytes(40_000_000)])
    traffic = store.stats.snapshot()
    assert (traffic.writes, traffic.bytes_written) == (3, 40_000_000)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ["PUT", "PUT", "PUT", "GET", "GET", "GET"]),
        ({"http_session_cls": AIOHTTPSession}, []),
        ({"connector_args": {"use_dns_cache": False}}, []),
        ({"proxies": {}}, []),
    ],
    ids=["sockets", "aiohttp", "own connector", "proxy"],
)
def test_parts_and_reads_take_the_sockets_unless_more_is_asked_of_a_connection(
    moto_server: S3Server, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], expected: list[str]
):
    seen: list[str] = []
    real = Exchange.__init__

    def spy(self: Exchange, pool: Any, method: str, *rest: Any) -> None:
        seen.append(method)
        real(self, pool, method, *rest)

    monkeypatch.setattr(Exchange, "__init__", spy)
    if "proxies" in config:  # the server takes requests as a proxy gets them
        config = {"proxies": {"http": moto_server.endpoint_url}}
    store = open_store(f"s3://{moto_server.new_bucket()}/x", moto_server.storage_options(config_kwargs=config))
    store.put("a", [bytes(40_000_000)])
    store.create("b", b"small")
    back = bytearray(20_000_000)
    store.read_into("a", [(0, memoryview(back))])
    assert store.get("b") == b"small"
    assert seen == expected


def test_unfinished_uploads_are_cleaned(s3_server: S3Server, store: Store):
    bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
    client = s3_server.client()
    for name in ("a", "b/c"):
        client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/{name}")
    other = client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}2/other")
    if s3_server.name != "moto":  # moto says of every upload that it began in 2010
        assert store.clean_partial(3600) == 0
    assert store.clean_partial(-2) == 2  # servers tell whole seconds
    left = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    assert [upload["UploadId"] for upload in left if upload["Key"].startswith(prefix)] == [other["UploadId"]]


@pytest.mark.parametrize(
    ("size_mib", "expected_mib"), [(1, 16), (160_000, 16), (160_001, 17), (1_000_000, 100), (5 << 20, 525)]
)
def test_part_size_keeps_within_the_limit_of_parts(size_mib: int, expected_mib: int):
    assert part_bytes(size_mib << 20) == expected_mib << 20


class TestWrongSettings:
    """What the user reads; each within seconds, from the first call that touches the server."""

    def every_call(self, store: Store) -> list[CheckpointError]:
        calls = [
            lambda: store.put("a", [b"x"]),
            lambda: store.put("a", [bytes(20_000_000)]),
            lambda: store.create("a", b"x"),
            lambda: store.get("a"),
            lambda: store.read_into("a", [(0, memoryview(bytearray(1)))]),
            lambda: store.list("commits/"),
            lambda: store.exists("a"),
        ]
        raised = []
        for call in calls:
            with pytest.raises(CheckpointError) as told:
                call()
            raised.append(told.value)
        return raised

    def test_missing_bucket(self, s3_server: S3Server):
        store = open_store(f"s3://no-such-{uuid.uuid4().hex}/x", s3_server.storage_options())
        for error in self.every_call(store):
            assert isinstance(error, InvalidInputError)
            assert "Create the bucket" in str(error)
            assert store.url in str(error)

    def test_wrong_secret(self, ceph_server: S3Server):
        store = open_store(f"s3://{ceph_server.new_bucket()}/x", ceph_server.storage_options(secret="wrongsecret"))
        errors = self.every_call(store)
        assert all(isinstance(error, StorageError) and "403" in str(error) for error in errors)
        assert "SignatureDoesNotMatch" in str(errors[0])
        assert "check AWS_SECRET_ACCESS_KEY" in str(errors[0])
        assert not any("wrongsecret" in str(error) for error in errors)
        assert store.stats.snapshot().retries == 0

    def test_unknown_key(self, ceph_server: S3Server):
        store = open_store(f"s3://{ceph_server.new_bucket()}/x", ceph_server.storage_options(key="nobody"))
        with pytest.raises(StorageError, match=r"InvalidAccessKeyId \(HTTP 403\).*check AWS_ACCESS_KEY_ID"):
            store.create("a", b"x")

    def test_no_permission(self, ceph_server: S3Server):
        options = {"endpoint_url": ceph_server.endpoint_url, "anon": True}
        store = open_store(f"s3://{ceph_server.new_bucket()}/x", options)
        with pytest.raises(StorageError, match=r"AccessDenied \(HTTP 403\).*allow s3:GetObject"):
            store.put("a", [b"x"])

    def test_no_credentials(self, s3_server: S3Server):
        store = open_store("s3://bucket/x", {"endpoint_url": s3_server.endpoint_url})
        for error in self.every_call(store):
            assert isinstance(error, InvalidInputError)
            assert "no credentials found. Set AWS_ACCESS_KEY_ID" in str(error)

    def test_unreachable_endpoint(self):
        options = {"endpoint_url": f"http://127.0.0.1:{free_port()}", "key": "k", "secret": "s", "first_contact_s": 2.0}
        store = open_store("s3://bucket/x", options)
        with pytest.raises(StorageError, match=r"cannot reach the server after \d+ tries .*Check AWS_ENDPOINT_URL"):
            store.put("a", [b"x"])
        assert store.stats.snapshot().retries >= 1

    def test_unknown_host(self):
        options = {"endpoint_url": "http://no-such-host.invalid", "key": "k", "secret": "s", "first_contact_s": 0.2}
        with pytest.raises(StorageError, match="cannot reach the server"):
            open_store("s3://bucket/x", options).list()

    def test_unknown_profile(self):
        with pytest.raises(InvalidInputError, match="no-such-profile"):
            open_store("s3://bucket/x", {"profile": "no-such-profile"}).list()

    @pytest.mark.parametrize(
        "options",
        [
            {"endpoint_url": "not a url", "key": "k", "secret": "s"},
            {"no_such_option": 1},
            {"key": "k", "username": "u"},
            {"client_kwargs": {"no_such_option": 1}, "key": "k", "secret": "s"},
            {"config_kwargs": {"no_such_option": 1}, "key": "k", "secret": "s"},
        ],
    )
    def test_options_that_do_not_fit(self, options: dict[str, Any]):
        with pytest.raises(InvalidInputError, match="storage_options"):
            open_store("s3://bucket/x", options).list()

    def test_bucket_name_that_cannot_be(self, s3_server: S3Server):
        with pytest.raises(InvalidInputError, match=r"[Ii]nvalid bucket name|InvalidBucketName"):
            open_store("s3://not%a%name/x", s3_server.storage_options()).put("a", [b"x"])


def test_a_failed_upload_leaves_nothing(s3_server: S3Server, store: Store, monkeypatch: pytest.MonkeyPatch):
    """A part that fails for good: the others are stopped, the upload is aborted, the earlier object stays."""
    by_server: dict[str, dict[str, Any]] = {"moto": {"PartNumber": 0}, "ceph": {"UploadId": "2~no-such-upload"}}
    store.put("a", [b"earlier"])
    real = S3Connection.call

    async def call(self: S3Connection, method: str, **parameters: Any) -> dict[str, Any]:
        if method == "upload_part" and parameters["PartNumber"] == 3:
            parameters |= by_server[s3_server.name]
        return await real(self, method, **parameters)

    monkeypatch.setattr(S3Connection, "call", call)
    with pytest.raises(StorageError, match=r"UploadPart of .*/a at http.* failed after 1 try"):
        store.put("a", [bytes(100_000_000)])
    monkeypatch.undo()
    bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
    uploads = s3_server.client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    assert [upload for upload in uploads if upload["Key"].startswith(prefix)] == []
    assert store.get("a") == b"earlier"
