"""An S3 store for what is not under test: plain requests to a server that believes any signature (moto), one at a time.

Of a crash point's requests, two thirds prepare it and look at what is left; by the real store they cost three times as
much.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

from rl_ckpt.store.base import Buffer, ObjectExistsError, ObjectMissingError, Store, StoredObject

_XML = "{http://s3.amazonaws.com/doc/2006-03-01/}"


_SIGNED = "AWS4-HMAC-SHA256 Credential=testing/20200101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
"""moto looks at whether there is a signature, not at what it is."""


class Wire:
    """One connection."""

    def __init__(self, endpoint: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(endpoint).netloc, timeout=60)
        self._lock = threading.Lock()

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        with self._lock:
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            self._connection.request(method, path, body, {"Authorization": _SIGNED, **given})
            answer = self._connection.getresponse()
            return answer.status, answer.read()

    def close(self) -> None:
        self._connection.close()


class LeanS3(Store):
    """Objects below a prefix."""

    def __init__(self, url: str, wire: Wire) -> None:
        super().__init__(url)
        self._wire = wire
        bucket, _, self._prefix = url.removeprefix("s3://").partition("/")
        self._bucket = f"/{bucket}"

    def _ask(self, method: str, name: str, body: bytes = b"", **headers: str) -> bytes:
        status, data = self._wire.ask(method, f"{self._bucket}/{self._prefix}/{quote(name)}", body, **headers)
        if status == 404:
            raise ObjectMissingError(name)
        if status == 412:
            raise ObjectExistsError(name)
        assert status in (200, 204, 206), (method, name, status, data)
        return data

    def put(self, name: str, segments: Sequence[Buffer]) -> None:
        self._ask("PUT", name, b"".join(segments))

    def create(self, name: str, data: bytes) -> None:
        self._ask("PUT", name, data, If_None_Match="*")

    def get(self, name: str) -> bytes:
        return self._ask("GET", name)

    def read_into(self, name: str, reads: Sequence[tuple[int, memoryview]]) -> None:
        data = self.get(name)
        for offset, view in reads:
            view[:] = data[offset : offset + view.nbytes]

    def list(self, prefix: str = "") -> list[StoredObject]:
        path = f"{self._bucket}?list-type=2&prefix={quote(f'{self._prefix}/{prefix}')}"
        status, data = self._wire.ask("GET", path)
        assert status == 200
        tree = ElementTree.fromstring(data)
        assert tree.findtext(f"{_XML}IsTruncated") == "false"
        return [self._stored(entry) for entry in tree.iter(f"{_XML}Contents")]

    def _stored(self, entry: Any) -> StoredObject:
        name = entry.findtext(f"{_XML}Key").removeprefix(f"{self._prefix}/")
        when = datetime.fromisoformat(entry.findtext(f"{_XML}LastModified"))
        return StoredObject(name, int(entry.findtext(f"{_XML}Size")), when.timestamp())

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            self._ask("DELETE", name)

    def exists(self, name: str) -> bool:
        return any(item.name == name for item in self.list(name))

    def clean_partial(self, *args: Any) -> int:  # type: ignore[override]
        return 0
