"""Objects on any file system that fsspec knows: Google Cloud Storage, Azure, HDFS, SFTP and others.

Whatever the backend raises comes out in our own errors. `create` uses the backend's exclusive creation; whether it
keeps that promise under a race is not taken on trust: `probe.probe_create_only` finds out before the first commit.
`put` writes under the final name, as most such stores show an object only when it is whole; on one that does not, a
crash leaves a short object that no manifest names yet.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem

from rl_ckpt.errors import CheckpointError, CorruptionError, InvalidInputError, StorageError
from rl_ckpt.store.base import (
    Buffer,
    ObjectExistsError,
    ObjectMissingError,
    StorageOptions,
    Store,
    StoredObject,
    check_name,
    check_prefix,
    flat_segments,
    spare_none,
)
from rl_ckpt.store.local import short_message
from rl_ckpt.store.ranges import Span, SpanWriter, plan_spans
from rl_ckpt.store.retry import RetryPolicy, Tries, run_with_retries

T = TypeVar("T")

_SPAN_BYTES = 16 << 20
_GAP_BYTES = 64 << 10
_ONE_REQUEST_BYTES = 16 << 20
_MODIFIED_KEYS = ("mtime", "LastModified", "last_modified", "updated")
_TRANSIENT_ERRNO = (errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENETUNREACH)


class FsspecStore(Store):
    """Objects below one path of an fsspec file system.

    Args:
        url: Normalised, with the scheme.
        storage_options: What `fsspec.filesystem` takes for that scheme, and the fields of `RetryPolicy`.
    """

    def __init__(self, url: str, storage_options: StorageOptions | None = None) -> None:
        super().__init__(url, storage_options)
        self._policy, options = RetryPolicy.take(self.storage_options)
        scheme = url.partition("://")[0]
        try:
            self._fs: AbstractFileSystem = fsspec.filesystem(
                scheme, use_listings_cache=False, skip_instance_cache=True, **options
            )
        except Exception as error:  # Each backend raises its own kinds; all mean that the options do not fit.
            raise InvalidInputError(f"cannot open {url}: {error}. Check the url and storage_options") from error
        self._root: str = self._fs._strip_protocol(url).rstrip("/")

    def put(self, name: str, segments: Sequence[Buffer]) -> None:
        """Store an object in one request when it is small, else as a stream."""
        views = flat_segments(segments)
        size = sum(view.nbytes for view in views)
        path = self._path(name)
        self._call("put", name, lambda: self._write(path, views, size))
        self.stats.count_write(size)

    def create(self, name: str, data: bytes) -> None:
        """Create an object by the backend's exclusive creation."""
        path = self._path(name)
        self._call("create", name, lambda: self._create(path, data))
        self.stats.count_write(len(data))

    def get(self, name: str) -> bytes:
        """Fetch the whole object in one request."""
        path = self._path(name)
        data: bytes = self._call("get", name, lambda: self._fs.cat_file(path))
        self.stats.count_read(len(data))
        return data

    def read_into(self, name: str, reads: Sequence[tuple[int, memoryview]]) -> None:
        """Fetch range by range; asynchronous backends fetch a window of them at once."""
        path = self._path(name)
        spans = plan_spans(reads, span_bytes=_SPAN_BYTES, gap_bytes=_GAP_BYTES)
        if not spans and not self.exists(name):
            raise ObjectMissingError(self.object_url(name))
        window = 8 if isinstance(self._fs, AsyncFileSystem) else 1
        for begin in range(0, len(spans), window):
            some = spans[begin : begin + window]
            for span, data in zip(some, self._call("read", name, partial(self._fetch, path, some)), strict=True):
                if len(data) < span.size_bytes:
                    found = int(self._call("size", name, lambda: self._fs.size(path)))
                    raise CorruptionError(short_message(self.object_url(name), span.end_bytes, found))
                SpanWriter(span).write(data)
                self.stats.count_read(len(data))

    def list(self, prefix: str = "") -> list[StoredObject]:
        """List recursively below the folder part of the prefix."""
        folder = check_prefix(prefix).rpartition("/")[0]
        start = f"{self._root}/{folder}" if folder else self._root
        try:
            entries = self._call("list", prefix, lambda: self._fs.find(start, detail=True))
        except ObjectMissingError:
            return []
        found = [self._stored(path, info) for path, info in entries.items() if info.get("type") == "file"]
        shown = (o for o in found if o.name.startswith(prefix) and not any(p[:1] == "." for p in o.name.split("/")))
        return sorted(shown, key=lambda o: o.name)

    def delete(self, names: Sequence[str]) -> None:
        """Delete one by one."""
        for name in names:
            path = self._path(name)
            try:
                self._call("delete", name, partial(self._fs.rm_file, path))
            except ObjectMissingError:
                continue

    def exists(self, name: str) -> bool:
        """Ask for the object's metadata."""
        path = self._path(name)
        try:
            return bool(self._call("exists", name, lambda: self._fs.info(path))["type"] == "file")
        except ObjectMissingError:
            return False

    def clean_partial(self, older_than_s: float, spare: Callable[[str], bool] = spare_none) -> int:
        """Nothing to remove: fsspec has no name for what such a backend keeps of unfinished writes."""
        return 0

    def _path(self, name: str) -> str:
        return f"{self._root}/{check_name(name)}"

    def _write(self, path: str, views: Sequence[memoryview], size_bytes: int) -> None:
        self._fs.makedirs(self._fs._parent(path), exist_ok=True)
        if size_bytes <= _ONE_REQUEST_BYTES:
            self._fs.pipe_file(path, b"".join(views))
            return
        with self._fs.open(path, "wb") as file:
            for view in views:
                file.write(view)

    def _create(self, path: str, data: bytes) -> None:
        self._fs.makedirs(self._fs._parent(path), exist_ok=True)
        if isinstance(self._fs, AsyncFileSystem):
            self._fs.pipe_file(path, data, mode="create")
            return
        # fsspec's own pipe_file(mode="create") of synchronous backends looks first and then overwrites: not for us.
        with self._fs.open(path, "xb") as file:
            file.write(data)

    def _fetch(self, path: str, spans: Sequence[Span]) -> Sequence[bytes]:
        starts, ends = [span.offset_bytes for span in spans], [span.end_bytes for span in spans]
        fetched: Sequence[bytes] = self._fs.cat_ranges([path] * len(spans), starts, ends, on_error="raise")
        return fetched

    def _stored(self, path: str, info: dict[str, Any]) -> StoredObject:
        modified = next((info[key] for key in _MODIFIED_KEYS if key in info), None)
        if modified is None:
            modified = self._fs.modified(path)
        if isinstance(modified, str):
            modified = datetime.fromisoformat(modified)
        seconds = modified.timestamp() if isinstance(modified, datetime) else float(modified)
        return StoredObject(path.removeprefix(self._root).lstrip("/"), int(info["size"]), seconds)

    def _call(self, operation: str, name: str, attempt: Callable[[], T]) -> T:
        """Run one request with retries; the backend's errors come out as ours."""
        tries = Tries(self._policy)
        try:
            return run_with_retries(attempt, tries, is_transient=_is_transient, on_retry=self.stats.count_retry)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise ObjectMissingError(self.object_url(name)) from error
        except FileExistsError as error:
            raise ObjectExistsError(self.object_url(name)) from error
        except (CheckpointError, ObjectExistsError, ObjectMissingError):
            raise
        except Exception as error:  # Each backend raises its own kinds: this is where they become one.
            raise StorageError(
                f"{operation} of {self.object_url(name)} failed after {tries.told()}: {type(error).__name__}: {error}. "
                "Check the store, the permissions and storage_options, then try again"
            ) from error


def _is_transient(error: Exception) -> bool:
    """Failures of the connection, and answers that ask to come again (by HTTP status, where the backend tells it)."""
    if isinstance(error, FileExistsError | FileNotFoundError | PermissionError):
        return False
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    status = getattr(error, "status", None) or getattr(error, "status_code", None) or getattr(error, "code", None)
    if isinstance(status, int) and (status in (408, 429) or 500 <= status < 600):
        return True
    return isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO
