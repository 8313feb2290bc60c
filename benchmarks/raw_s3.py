"""Raw S3 clients: the fastest ways known to move a buffer to an object and back, 16 MiB parts, `at_once` of them.

obstore is a binding to Rust's object_store; botocore runs in threads. Neither signs nor hashes payloads, as ours does
not. Used inside workers, one client per process and setting.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

_PART_BYTES = 16 << 20
CLIENTS = ("obstore", "botocore")


class Client(Protocol):
    """One process's client of a bucket."""

    def put(self, key: str, data: memoryview) -> None:
        """Creates or replaces an object."""

    def get(self, key: str, target: memoryview) -> None:
        """Fills `target` from an object of that size."""


def missing(name: str) -> str | None:
    """Why a client can't be used here; None if it can."""
    return None if importlib.util.find_spec(name) else "not installed"


def client(name: str, server: Mapping[str, str], at_once: int) -> Client:
    """The client of this process.

    Args:
        name: One of `CLIENTS`.
        server: `endpoint_url`, `key`, `secret`, `bucket`.
        at_once: Requests on their way at a time.
    """
    return _made(name, tuple(sorted(server.items())), at_once)


@functools.cache
def _made(name: str, server: tuple[tuple[str, str], ...], at_once: int) -> Client:
    return (_Obstore if name == "obstore" else _Botocore)(dict(server), at_once)


def _starts(size_bytes: int) -> range:
    return range(0, size_bytes, _PART_BYTES)


class _Obstore:
    def __init__(self, server: Mapping[str, str], at_once: int) -> None:
        self._library: Any = importlib.import_module("obstore")
        stores: Any = importlib.import_module("obstore.store")
        self._store = stores.S3Store(
            server["bucket"],
            endpoint=server["endpoint_url"],
            access_key_id=server["key"],
            secret_access_key=server["secret"],
            region="us-east-1",
            virtual_hosted_style_request=False,
            unsigned_payload=True,
            client_options={"allow_http": True},
        )
        self._at_once = at_once
        self._pool = ThreadPoolExecutor(at_once)

    def put(self, key: str, data: memoryview) -> None:
        # The buffer itself: a file object around it came to 0.8 of the speed.
        options = {"use_multipart": True, "chunk_size": _PART_BYTES, "max_concurrency": self._at_once}
        self._library.put(self._store, key, data, **options)

    def get(self, key: str, target: memoryview) -> None:
        def fetch(start: int) -> None:
            end = min(start + _PART_BYTES, len(target))
            target[start:end] = memoryview(self._library.get_range(self._store, key, start=start, end=end))

        list(self._pool.map(fetch, _starts(len(target))))


class _Botocore:
    def __init__(self, server: Mapping[str, str], at_once: int) -> None:
        import botocore.config
        import botocore.session

        config = botocore.config.Config(
            s3={"addressing_style": "path", "payload_signing_enabled": False},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            max_pool_connections=at_once,
        )
        self._client: Any = botocore.session.get_session().create_client(
            "s3",
            region_name="us-east-1",
            config=config,
            endpoint_url=server["endpoint_url"],
            aws_access_key_id=server["key"],
            aws_secret_access_key=server["secret"],
        )
        self._bucket = server["bucket"]
        self._pool = ThreadPoolExecutor(at_once)

    def put(self, key: str, data: memoryview) -> None:
        place = {"Bucket": self._bucket, "Key": key}
        upload = self._client.create_multipart_upload(**place)["UploadId"]

        def part(item: tuple[int, int]) -> dict[str, Any]:
            number, start = item
            body = bytes(data[start : start + _PART_BYTES])
            done = self._client.upload_part(**place, UploadId=upload, PartNumber=number, Body=body)
            return {"PartNumber": number, "ETag": done["ETag"]}

        parts = list(self._pool.map(part, enumerate(_starts(len(data)), 1)))
        self._client.complete_multipart_upload(**place, UploadId=upload, MultipartUpload={"Parts": parts})

    def get(self, key: str, target: memoryview) -> None:
        fetch: Callable[[int], None] = functools.partial(self._range, key, target)
        list(self._pool.map(fetch, _starts(len(target))))

    def _range(self, key: str, target: memoryview, start: int) -> None:
        piece = target[start : start + _PART_BYTES]
        wanted = f"bytes={start}-{start + len(piece) - 1}"
        body = self._client.get_object(Bucket=self._bucket, Key=key, Range=wanted)["Body"]
        filled = 0
        while filled < len(piece):
            filled += body.readinto(piece[filled:])
