"""The stores that the crash points are walked on: where runs are, and what a look behind the store shows."""

from __future__ import annotations

import http.client
import itertools
import os
import shutil
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rl_ckpt.store.base import Store
from rl_ckpt.store.local import LocalStore
from rl_ckpt.store.s3 import S3Store
from rl_ckpt.store.urls import check_url
from tests.crash.lean_s3 import LeanS3, Wire
from tests.s3_servers import S3Server


class World(ABC):
    """Runs on one kind of store; each crash point gets one of its own."""

    name: str

    def __init__(self) -> None:
        self._numbers = itertools.count()

    @abstractmethod
    def new(self) -> str:
        """The url of a run that is not there yet."""

    @abstractmethod
    def store(self, url: str) -> Store:
        """The real store of a run."""

    def other(self, url: str) -> Store:
        """A store for those that the walk is not about: who looks at what is left, and other processes."""
        return self.store(url)

    @abstractmethod
    def copy(self, url: str) -> str:
        """A run's copy, at a url of its own."""

    @abstractmethod
    def everything(self, url: str) -> set[str]:
        """Names of all that is there, hidden files, empty folders and unfinished uploads too."""

    @abstractmethod
    def age(self, url: str) -> None:
        """Half-written things are as if nobody had touched them for a day."""

    def half(self, url: str, name: str, data: bytes) -> None:
        """A request to store an object, cut off in the middle of its body."""
        raise NotImplementedError

    @abstractmethod
    def remove(self, url: str) -> None:
        """Away with a run."""


class Disk(World):
    """Folders of a local disk."""

    name = "local disk"

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    def new(self) -> str:
        return check_url(str(self._root / f"run{next(self._numbers)}"))

    def store(self, url: str) -> Store:
        return LocalStore(url)

    def copy(self, url: str) -> str:
        to = self.new()
        shutil.copytree(_path(url), _path(to))
        return to

    def everything(self, url: str) -> set[str]:
        root = _path(url)
        found = set()
        for folder, folders, files in os.walk(root):
            names = [*files, *([] if files or folders or folder == root else ["(empty)"])]
            found |= {os.path.relpath(os.path.join(folder, name), root) for name in names}
        return found

    def age(self, url: str) -> None:
        then = time.time() - 86400
        for folder, _, files in os.walk(_path(url)):
            os.utime(folder, (then, then))
            for file in files:
                if file.startswith("."):
                    os.utime(os.path.join(folder, file), (then, then))

    def remove(self, url: str) -> None:
        shutil.rmtree(_path(url), ignore_errors=True)


class Bucket(World):
    """Prefixes of one bucket; all stores share a connection, which holds nothing of a run."""

    def __init__(self, server: S3Server, bucket: str) -> None:
        super().__init__()
        self.name = f"S3 ({server.name})"
        self._server, self._bucket = server, bucket
        self._client = server.client()
        self._client.create_bucket(Bucket=bucket)
        self._copied: dict[str, dict[str, bytes]] = {}
        self._wire = Wire(server.endpoint_url) if server.name == "moto" else None
        self._first = S3Store(f"s3://{bucket}/first", self._options())

    def _options(self) -> dict[str, Any]:
        return self._server.storage_options(retry_base_s=0.01)

    def new(self) -> str:
        return f"s3://{self._bucket}/run{next(self._numbers)}"

    def store(self, url: str) -> S3Store:
        store = S3Store(url, self._options())
        store._connection = self._first._connection
        return store

    def other(self, url: str) -> Store:
        return LeanS3(url, self._wire) if self._wire else self.store(url)

    def copy(self, url: str) -> str:
        to = self.new()
        if url not in self._copied:
            source = self.other(url)
            self._copied[url] = {item.name: source.get(item.name) for item in source.list()}
        target = self.other(to)
        for name, data in self._copied[url].items():
            target.put(name, [data])
        return to

    def everything(self, url: str) -> set[str]:
        prefix = url.removeprefix(f"s3://{self._bucket}/") + "/"
        uploads = self._client.list_multipart_uploads(Bucket=self._bucket, Prefix=prefix).get("Uploads", ())
        unfinished = {f"upload of {entry['Key'].removeprefix(prefix)}" for entry in uploads}
        return unfinished | {item.name for item in self.other(url).list()}

    def age(self, url: str) -> None:
        """Uploads are swept at once in these tests; see `no_waiting`."""

    def half(self, url: str, name: str, data: bytes) -> None:
        key = f"{url.removeprefix(f's3://{self._bucket}/')}/{name}"
        signed = self._client.generate_presigned_url("put_object", Params={"Bucket": self._bucket, "Key": key})
        cut_request(signed, data)

    def remove(self, url: str) -> None:
        store = self.other(url)
        store.delete([item.name for item in store.list()])

    def close(self) -> None:
        """Closes connections."""
        if self._wire:
            self._wire.close()


def cut_request(url: str, data: bytes) -> None:
    """A PUT that promises all of `data`, sends half of it, and is cut off."""
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.netloc, timeout=30)
    connection.putrequest("PUT", f"{where.path}?{where.query}")
    connection.putheader("Content-Length", str(len(data)))
    connection.endheaders()
    connection.send(data[: len(data) // 2])
    connection.close()


def _path(url: str) -> str:
    return url.removeprefix("file://")
