"""S3: a process is killed before, during and after every request of a multipart upload.

The object is there wholly or not at all, and what is left of the upload is removed by the sweep's `clean_partial`.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import pytest

from rl_ckpt.store import s3
from rl_ckpt.store.base import ObjectMissingError
from rl_ckpt.store.s3_client import S3Connection
from tests.crash.points import POINTS
from tests.crash.recording import Stopped
from tests.crash.worlds import Bucket, cut_request
from tests.s3_servers import S3Server

_PART = 5 << 20  # the least that S3 takes
DATA = bytes(range(256)) * ((_PART + (1 << 16)) // 256)


class Requests:
    """The requests of a process that dies at one of them."""

    def __init__(self, bucket: Bucket, at: int, how: Literal["before", "during", "after"]) -> None:
        self._bucket, self._at, self._how = bucket, at, how
        self.seen: list[str] = []
        self.dead = False

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = S3Connection.call

        async def call(connection: S3Connection, method: str, **parameters: Any) -> dict[str, Any]:
            if self.dead:
                raise Stopped("dead")
            self.seen.append(method)
            if len(self.seen) <= self._at:
                return await real(connection, method, **parameters)
            self.dead = True
            if self._how == "during" and method == "upload_part":
                body = parameters.pop("Body").read()
                cut_request(self._bucket._client.generate_presigned_url("upload_part", Params=parameters), body)
            if self._how == "after":
                await real(connection, method, **parameters)
            raise Stopped("killed")

        monkeypatch.setattr(S3Connection, "call", call)


@pytest.mark.parametrize("how", ["before", "during", "after"])
def test_killed_at_any_request_of_an_upload(
    s3_server: S3Server, how: Literal["before", "during", "after"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_PART_BYTES", _PART)
    bucket = Bucket(s3_server, f"crash-uploads-{how}")
    at, outcomes = 0, set()
    while True:
        url = bucket.new()
        store = bucket.store(url)
        requests = Requests(bucket, at, how)
        with monkeypatch.context() as patch:
            requests.patch(patch)
            with contextlib.suppress(Stopped):
                store.put("shards/1-a/s-0.arrow", [memoryview(DATA)])
        if not requests.dead:
            break
        try:
            outcomes.add(found := store.get("shards/1-a/s-0.arrow") == DATA)
            assert found
        except ObjectMissingError:
            outcomes.add(False)
        store.clean_partial(-2)  # servers tell whole seconds
        assert bucket.everything(url) == ({"shards/1-a/s-0.arrow"} if found_whole(bucket, url) else set())
        POINTS[bucket.name, "upload", f"{how} a request"] += 1
        at += 1
    assert at >= 5  # begin, two parts, complete, head
    assert outcomes == {True, False}
    bucket.close()


def found_whole(bucket: Bucket, url: str) -> bool:
    return bucket.store(url).exists("shards/1-a/s-0.arrow")
