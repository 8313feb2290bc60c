"""The storage interface: whole objects by name below one run url, on whatever holds them.

Promises that every backend keeps, and that one contract suite (`tests/store/contract.py`) checks for each: an object is
there wholly or not at all, `put` and `create` are durable when they return, `create` never replaces, what a backend
says in its own words comes out as `StorageError` (it failed) or `InvalidInputError` (the caller must change the
configuration), and traffic is counted.

What it does not do: it knows nothing of commits, manifests or checkpoints, it caches nothing, and it does not retry
what is not transient.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from rl_ckpt.errors import InvalidInputError

Buffer = bytes | bytearray | memoryview
"""Contiguous memory with the buffer protocol; a numpy array of native type passes as `memoryview(array)`."""

StorageOptions = Mapping[str, Any]
"""Options of the backend as fsspec's file system for that scheme takes them, plus those of `retry.RetryPolicy`."""


class StoredObject(msgspec.Struct, frozen=True):
    """One object as a listing tells it."""

    name: str
    """Path relative to the run url, with `/` between folders."""
    size_bytes: int
    modified: float
    """Unix seconds, by the clock of the store."""


class ObjectExistsError(Exception):
    """`create` found an object of that name. Inside the store floor only: callers translate it."""


class ObjectMissingError(Exception):
    """There is no object of that name. Inside the store floor only: callers translate it."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What went over the wire or to the disk so far."""

    reads: int = 0
    """Requests that fetched object bytes."""
    bytes_read: int = 0
    """Object bytes fetched, the gaps between coalesced ranges included."""
    writes: int = 0
    """Requests that stored object bytes; each part of a multipart upload is one."""
    bytes_written: int = 0
    """Object bytes stored."""
    retries: int = 0
    """Tries beyond the first, of any request."""


class TrafficStats:
    """Thread-safe counters; `snapshot` is what tests and metrics read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._traffic = Traffic()

    def snapshot(self) -> Traffic:
        """The counts at this moment."""
        return self._traffic

    def count_read(self, size_bytes: int) -> None:
        """Count one request that fetched `size_bytes`."""
        with self._lock:
            t = self._traffic
            self._traffic = Traffic(t.reads + 1, t.bytes_read + size_bytes, t.writes, t.bytes_written, t.retries)

    def count_write(self, size_bytes: int) -> None:
        """Count one request that stored `size_bytes`."""
        with self._lock:
            t = self._traffic
            self._traffic = Traffic(t.reads, t.bytes_read, t.writes + 1, t.bytes_written + size_bytes, t.retries)

    def count_retry(self) -> None:
        """Count one try beyond the first."""
        with self._lock:
            t = self._traffic
            self._traffic = Traffic(t.reads, t.bytes_read, t.writes, t.bytes_written, t.retries + 1)


def spare_none(name: str) -> bool:
    """Of `Store.clean_partial`: nothing is spared."""
    return False


class PartialObject(Protocol):
    """An unfinished object; see `Store.partial`."""

    resumed: bool
    """Whether another writer left pieces in it: any may be missing or damaged."""

    def read(self, offset: int, view: memoryview) -> None:
        """Fill a buffer from there, with whatever is there."""

    def write(self, offset: int, view: memoryview) -> None:
        """Take a piece."""

    def finish(self) -> None:
        """Make it the object, durably."""

    def close(self) -> None:
        """Let it go; unfinished, it stays for who comes next."""


class Store(ABC):
    """Whole objects by name below one url.

    A store may be used by many threads at once. It pickles as its url and options and reopens on the other side, with
    new connections and counters at zero; so it may be handed to other processes, and used after a fork.

    Attributes:
        url: Normalised url of the run, without secrets, without a trailing slash: `file:///abs/path`,
            `s3://bucket/prefix`, `memory://name`.
        storage_options: What `open_store` was given; may hold secrets, never print it.
        stats: Counters of this object's traffic.
    """

    def __init__(self, url: str, storage_options: StorageOptions | None = None) -> None:
        self.url = url
        self.storage_options: dict[str, Any] = dict(storage_options or {})
        self.stats = TrafficStats()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def __reduce__(self) -> tuple[Callable[..., Store], tuple[str, dict[str, Any]]]:
        return type(self), (self.url, self.storage_options)

    def object_url(self, name: str) -> str:
        """Full url of an object, for messages."""
        return f"{self.url}/{name}"

    @abstractmethod
    def put(self, name: str, segments: Sequence[Buffer]) -> None:
        """Store an object, replacing any of that name; durable on return, all or nothing.

        Args:
            name: Where, relative to `url`.
            segments: Contiguous buffers of 1 byte to GiBs, in order; the object is their concatenation. They are not
                changed, and must not be until this returns.

        Raises:
            StorageError: The store failed, also after retries; nothing of the object is visible.
            InvalidInputError: The name or the store's configuration is not usable.
        """

    @abstractmethod
    def create(self, name: str, data: bytes) -> None:
        """Store a small object unless one of that name exists: of many racing writers exactly one succeeds.

        When the store's reply to a write that landed was lost, the retry finds the name taken and this raises
        `ObjectExistsError` although the object is this caller's. Only the layer above can tell: it reads the object
        back and compares the write id in it.

        Args:
            name: Where, relative to `url`.
            data: The whole object, small (sent in one request).

        Raises:
            ObjectExistsError: The name is taken, possibly by this very call (see above).
            StorageError: The store failed, also after retries; whether the object landed is unknown.
            InvalidInputError: The name or the store's configuration is not usable.
        """

    @abstractmethod
    def get(self, name: str) -> bytes:
        """The whole object.

        Raises:
            ObjectMissingError: There is none.
            StorageError: The store failed, also after retries.
        """

    def getter(self) -> Callable[[str], bytes]:
        """A `get` for many small objects in a row, by any number of threads: the same, at less cost where possible."""
        return self.get

    @abstractmethod
    def read_into(self, name: str, reads: Sequence[tuple[int, memoryview]]) -> None:
        """Fill buffers from ranges of one object; near ranges become one request, large ones several in parallel.

        Args:
            name: The object.
            reads: Offset in the object, in bytes, and the writable contiguous buffer to fill from there. Any order;
                empty buffers are allowed. After an error the contents of the buffers are undefined.

        Raises:
            ObjectMissingError: There is no such object.
            CorruptionError: The object ends before a range does; names both sizes.
            StorageError: The store failed, also after retries.
            InvalidInputError: An offset is negative or a buffer is read-only.
        """

    @abstractmethod
    def list(self, prefix: str = "") -> list[StoredObject]:
        """All objects whose name starts with `prefix`, sorted by name; never an object that is still being written.

        Args:
            prefix: A string prefix such as `"commits/"`; empty for everything below the run url.
        """

    @abstractmethod
    def delete(self, names: Sequence[str]) -> None:
        """Delete objects; those that are missing already are fine. Durable on return.

        Raises:
            StorageError: The store failed; some of the objects may be gone.
        """

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is an object of that name."""

    @abstractmethod
    def clean_partial(self, older_than_s: float, spare: Callable[[str], bool] = spare_none) -> int:
        """Remove what writers that were killed left half-written (temporary files, unfinished uploads).

        Args:
            older_than_s: Leave alone what is younger, in seconds: its writer may be alive.
            spare: Given the name of the object that was being written, or of a folder that was left empty, with a `/`
                at its end: whether to leave it alone although it is old enough.

        Returns:
            How many were removed.
        """

    def local_path(self, name: str) -> str | None:
        """Absolute path where a process of this machine can map the object; None where there is no such thing."""
        check_name(name)
        return None

    def partial(self, name: str, size_bytes: int) -> PartialObject | None:
        """A large object that arrives piece by piece, and of which a killed writer leaves what had arrived.

        Args:
            name: Of the object.
            size_bytes: Of the whole object.

        Returns:
            None where the store has no such thing, or another process is at it: then the object goes by `put`, whole.

        Raises:
            StorageError, InvalidInputError: As `put`, here and from its methods.
        """
        check_name(name)
        return None

    def partial_bytes(self, name: str) -> int:
        """Space that the unfinished object of that name takes already, in bytes."""
        check_name(name)
        return 0

    def is_local(self) -> bool:
        """Whether processes of this machine can map all objects."""
        return self.local_path("any") is not None

    def missing(self, name: str) -> str:
        """Says of an object that is not there where it should be, for messages."""
        return f"{self.object_url(name)} is missing"

    def free_bytes(self) -> int | None:
        """Bytes that can still be stored; None where the store does not tell."""
        return None


def check_name(name: str) -> str:
    """Return `name` when it can be an object's name on every backend.

    Raises:
        InvalidInputError: It is empty, absolute, has empty, `.` or `..` parts, hidden ones, or control characters.
    """
    parts = name.split("/")
    if any(not part or part.startswith(".") for part in parts) or not name.isprintable() or "\\" in name:
        raise InvalidInputError(
            f"{name!r} cannot be the name of a stored object: use relative paths such as 'commits/00000001.json', "
            "without empty parts and without parts that begin with a dot"
        )
    return name


def check_prefix(prefix: str) -> str:
    """Return `prefix` when names can start with it; see `check_name` for what it raises."""
    if prefix:
        check_name(prefix.removesuffix("/"))
    return prefix


def as_bytes_view(segment: Buffer) -> memoryview:
    """Flat view of the bytes of a contiguous buffer, without a copy.

    Not by `pickle.PickleBuffer(segment).raw()`, which takes more kinds of buffers: on CPython 3.11 such a view crashes
    the garbage collector when it is part of a cycle, as the frames of an exception are.

    Raises:
        InvalidInputError: The buffer is not C-contiguous, or its elements are of no native type.
    """
    view = memoryview(segment)
    if not view.nbytes:
        return memoryview(bytearray())
    try:
        return view.cast("B")
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InvalidInputError(f"a buffer must be contiguous bytes, as array.view(np.uint8): {error}") from error


def flat_segments(segments: Sequence[Buffer]) -> list[memoryview]:
    """The non-empty segments as flat byte views."""
    return [view for view in map(as_bytes_view, segments) if view.nbytes]
