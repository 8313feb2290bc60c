"""A real store whose operations are numbered, one of which goes wrong in a chosen way.

One `RecordingStore` is one process's view of the store: from its death on, every operation raises `Stopped`. Deletes of
several objects are one operation each, as a process may die between any two.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from rl_ckpt.errors import CheckpointError, StorageError
from rl_ckpt.store import run as run_module
from rl_ckpt.store.base import Buffer, ObjectExistsError, ObjectMissingError, Store, StoredObject
from rl_ckpt.store.urls import check_url, open_store

Kind = Literal[
    "before", "during", "after", "refused", "reply lost", "twice", "paused", "late", "echo", "lost, echo", "unknown"
]
CHANGES = ("put", "create", "delete", "clean")
ANSWERS = (ObjectExistsError, ObjectMissingError, CheckpointError)


class Stopped(StorageError):
    """The process was killed: nothing that it does after this reaches the store."""


@dataclass
class Fault:
    """What happens at operation number `at`."""

    kind: Kind
    at: int
    meanwhile: Callable[[], None] = lambda: None
    """What others do while the operation, or the process before it, is held up."""
    struck: str = ""
    """The operation that it was, once it happened."""
    held: list[Callable[[], Any]] = field(default_factory=list)
    """Requests that are still on their way when the process has ended."""

    def land(self) -> None:
        """The requests that were held up arrive; nobody hears the answers."""
        while self.held:
            with suppress(*ANSWERS):
                self.held.pop()()


class RecordingStore(Store):
    """Passes operations on to a real store, numbered from 0."""

    def __init__(self, inner: Store, fault: Fault | None = None, half: Callable[[str, bytes], None] | None = None):
        super().__init__(inner.url, inner.storage_options)
        self.inner = inner
        self.stats = inner.stats
        self.fault = fault
        self.half = half
        """Sends a request for an object and cuts it off in the middle."""
        self.dead = False
        self.seen: list[str] = []
        self._lock = threading.Lock()

    def _do(self, operation: str, name: str, act: Callable[[], Any], data: bytes = b"") -> Any:
        with self._lock:
            if self.dead:
                raise Stopped("dead")
            number = len(self.seen)
            self.seen.append(f"{operation} {name.partition('/')[0]}")
        fault = self.fault
        if fault is not None and fault.kind == "unknown" and number in (fault.at + 1, fault.at + 2):
            if number == fault.at + 1:
                raise StorageError(f"{operation} of {name} was refused: nothing is learnt of what went before")
            fault.meanwhile()
        if fault is None or number != fault.at:
            return act()
        fault.struck = f"{operation} {name}"
        return self._strike(fault, operation, name, act, data)

    def _strike(self, fault: Fault, operation: str, name: str, act: Callable[[], Any], data: bytes) -> Any:
        changes = operation in CHANGES
        match fault.kind:
            case "before":
                self._die()
            case "during":
                if self.half is not None and operation in ("put", "create"):
                    self.half(name, data)
                self._die()
            case "after":
                with suppress(*ANSWERS):
                    act()
                self._die()
            case "refused":
                raise StorageError(f"{operation} of {name} was refused")
            case "reply lost" | "lost, echo" | "unknown":
                with suppress(*ANSWERS):
                    act()
                if changes and fault.kind == "lost, echo":
                    fault.held.append(act)
                raise StorageError(f"the reply to {operation} of {name} was lost")
            case "twice":
                with suppress(*ANSWERS):
                    act()
                return act()
            case "paused":
                fault.meanwhile()
                return act()
            case "late":
                if changes:
                    fault.held.append(act)
                self._die()
            case "echo":
                if changes:
                    fault.held.append(act)
                return act()

    def _die(self) -> None:
        self.dead = True
        raise Stopped("killed")

    def put(self, name: str, segments: Sequence[Buffer]) -> None:
        data = b"".join(segments)  # a copy: what arrives late is what was sent
        self._do("put", name, lambda: self.inner.put(name, [data]), data)

    def create(self, name: str, data: bytes) -> None:
        self._do("create", name, lambda: self.inner.create(name, data), data)

    def get(self, name: str) -> bytes:
        found: bytes = self._do("get", name, lambda: self.inner.get(name))
        return found

    def read_into(self, name: str, reads: Sequence[tuple[int, memoryview]]) -> None:
        self._do("read", name, lambda: self.inner.read_into(name, reads))

    def list(self, prefix: str = "") -> list[StoredObject]:
        found: list[StoredObject] = self._do("list", prefix, lambda: self.inner.list(prefix))
        return found

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            self._do("delete", name, lambda name=name: self.inner.delete([name]))  # type: ignore[misc]

    def exists(self, name: str) -> bool:
        return bool(self._do("exists", name, lambda: self.inner.exists(name)))

    def clean_partial(self, *args: Any) -> int:  # type: ignore[override]
        return int(self._do("clean", "", lambda: self.inner.clean_partial(*args)))

    def local_path(self, name: str) -> str | None:
        return self.inner.local_path(name)

    def free_bytes(self) -> int | None:
        return self.inner.free_bytes()


_OPEN: dict[str, list[Store]] = {}


def _opened(url: Any, storage_options: Any = None) -> Store:
    stack = _OPEN.get(check_url(url))
    return stack[-1] if stack else open_store(url, storage_options)


@contextmanager
def process(store: Store) -> Iterator[None]:
    """While the block runs, a run at this store's url is opened through it; may be nested, the innermost one counts."""
    stack = _OPEN.setdefault(store.url, [])
    stack.append(store)
    try:
        yield
    finally:
        stack.pop()


@pytest.fixture
def numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are opened through the stores of `process`, and every process does its operations in one order."""
    monkeypatch.setattr(run_module, "open_store", _opened)
    monkeypatch.setattr("rl_ckpt.store.commit_log._READERS", 1)
    real = run_module.probe_create_only
    monkeypatch.setattr(run_module, "probe_create_only", lambda store: real(store, writers=2, rounds=1))
