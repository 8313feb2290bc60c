"""Many small objects by copies of one signed request: the same bytes and errors as `get`, without botocore's work."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from rl_ckpt import Checkpointer, CheckpointError
from rl_ckpt.store.base import ObjectMissingError
from rl_ckpt.store.s3 import S3Store
from rl_ckpt.store.s3_client import S3Connection
from rl_ckpt.store.s3_small import Sent, Template
from rl_ckpt.store.s3_wire import Exchange
from tests.s3_servers import S3Server

NAMES = [f"records/{n:03d}.json" for n in range(40)]
ODD = ["a b.json", "ü/ß~x.json", "plus+sign&more=1.json", "per%20cent.json", "(round)'quote'.json"]


@pytest.fixture
def store(s3_server: S3Server) -> S3Store:
    """Forty small objects, and some of strange names."""
    made = S3Store(f"s3://{s3_server.new_bucket()}/run", s3_server.storage_options())
    for name in NAMES + ODD:
        made.put(name, [name.encode() * 20])
    return made


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Requests that botocore makes."""
    made: list[str] = []
    real = S3Connection.call

    async def call(self: S3Connection, method: str, **parameters: Any) -> dict[str, Any]:
        made.append(method)
        return await real(self, method, **parameters)

    monkeypatch.setattr(S3Connection, "call", call)
    return made


def read(store: S3Store, names: list[str]) -> list[bytes]:
    get = store.getter()
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(get, names))


def test_all_but_the_first_are_read_without_botocore(store: S3Store, requests: list[str]) -> None:
    before = store.stats.snapshot()
    assert read(store, NAMES + ODD) == [name.encode() * 20 for name in NAMES + ODD]
    assert requests == ["get_object"]
    after = store.stats.snapshot()
    assert (after.reads - before.reads, after.retries) == (45, 0)
    assert after.bytes_read - before.bytes_read == sum(20 * len(name.encode()) for name in NAMES + ODD)


def test_what_is_missing_is_missing(store: S3Store) -> None:
    get = store.getter()
    with pytest.raises(ObjectMissingError):
        get("none-0")
    assert get(NAMES[0])
    assert get(NAMES[1])
    with pytest.raises(ObjectMissingError):
        get("none-1")
    assert get(NAMES[2])


def test_an_answer_that_is_not_good_is_asked_for_the_ordinary_way(
    store: S3Store, requests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Busy(Exchange):
        def run(self, read_body: Callable[[int], bool]) -> tuple[int, dict[str, str], bytes | None]:
            return status, {}, b"slow down"

    get = store.getter()
    get(NAMES[0])
    status = 503
    with monkeypatch.context() as patch:
        patch.setattr("rl_ckpt.store.s3_small.Exchange", Busy)
        assert get(NAMES[1]) == NAMES[1].encode() * 20
    assert get(NAMES[2]) == NAMES[2].encode() * 20
    assert requests == ["get_object"] * 3  # from then on: the server is to be left in peace


def test_other_bytes_are_not_taken(store: S3Store, requests: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    get = store.getter()
    get(NAMES[0])
    monkeypatch.setattr("rl_ckpt.store.s3._has_tag", lambda answer, views: False)
    assert get(NAMES[1]) == NAMES[1].encode() * 20
    assert requests.count("get_object") == 2


def test_wrong_keys_are_told_as_ever(s3_server: S3Server) -> None:
    options = {**s3_server.storage_options(), "secret": "wrong"}
    store = S3Store(f"s3://{s3_server.new_bucket()}/run", options)
    if s3_server.name == "moto":  # takes any keys
        with pytest.raises(ObjectMissingError):
            store.getter()("x")
        return
    with pytest.raises(CheckpointError, match="SignatureDoesNotMatch"):
        store.getter()("x")


def test_a_log_of_many_records(s3_server: S3Server, requests: list[str]) -> None:
    url = f"s3://{s3_server.new_bucket()}/run"
    with Checkpointer(url, storage_options=s3_server.storage_options(), memory_tier=False) as ckpt:
        for step in range(12):
            ckpt.save_state(step, {"a": step}).result()
    requests.clear()
    found = Checkpointer(url, storage_options=s3_server.storage_options()).checkpoints()
    assert [info.step for info in found] == list(range(12))
    assert len(requests) <= 5, requests  # run.json, a list, the first record, and a spare


_KEYS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=30).filter(
    lambda key: not key.startswith("/") and "//" not in key and key not in (".", "..")
)


def signed(key: str, **more: str) -> Sent:
    """A GET as botocore signs it."""
    from botocore.utils import percent_encode

    request = AWSRequest("GET", f"https://bucket.s3.example.com/{percent_encode(key, safe='/~')}", headers=more)
    request.context["signing"] = {}
    S3SigV4Auth(Credentials("AKIA", "secret", more.pop("token", None)), "s3", "eu-west-1").add_auth(request)
    made = request.prepare()
    return Sent(made.url, dict(made.headers.items()), "secret")


@given(_KEYS, _KEYS)
def test_the_signature_is_botocores(first: str, second: str) -> None:
    sent, wanted = signed(first), signed(second)
    template = Template.of(sent, first)
    assert template is not None
    url, headers = template.request(second)
    assert url == wanted.url
    if headers["x-amz-date"] == wanted.headers["X-Amz-Date"]:  # of the same second
        assert headers["authorization"] == wanted.headers["Authorization"]


def test_what_can_not_be_copied() -> None:
    sent = signed("a")
    assert Template.of(sent, "a") is not None
    assert Template.of(sent, "b") is None
    assert Template.of(Sent(sent.url, sent.headers, "other"), "a") is None
    assert Template.of(Sent(sent.url + "?versionId=1", sent.headers, "secret"), "a") is None
    assert Template.of(Sent(sent.url, {}, "secret"), "a") is None
    v4a = {**sent.headers, "Authorization": "AWS4-ECDSA-P256-SHA256 Credential=x"}
    assert Template.of(Sent(sent.url, v4a, "secret"), "a") is None
