"""A real store whose operations a test can make fail, before or after they took effect, or wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from rl_ckpt.store import run as run_module
from rl_ckpt.store.base import Buffer, Store, StoredObject, spare_none
from rl_ckpt.store.urls import open_store

Hook = Callable[[str, str], None]
CHANGES = ("put", "create", "delete")


class Stopped(Exception):
    """The process was killed here: nothing after it runs."""


class FaultyStore(Store):
    """Passes every operation on to `inner`; the hooks get its name and its object's, and may raise or wait."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner.url, inner.storage_options)
        self.inner = inner
        self.before: Hook = lambda operation, name: None
        self.after: Hook = lambda operation, name: None

    @contextmanager
    def _around(self, operation: str, name: str) -> Iterator[None]:
        self.before(operation, name)
        yield
        self.after(operation, name)

    def put(self, name: str, segments: Sequence[Buffer]) -> None:
        with self._around("put", name):
            self.inner.put(name, segments)

    def create(self, name: str, data: bytes) -> None:
        with self._around("create", name):
            self.inner.create(name, data)

    def get(self, name: str) -> bytes:
        with self._around("get", name):
            return self.inner.get(name)

    def read_into(self, name: str, reads: Sequence[tuple[int, memoryview]]) -> None:
        with self._around("read", name):
            self.inner.read_into(name, reads)

    def list(self, prefix: str = "") -> list[StoredObject]:
        with self._around("list", prefix):
            return self.inner.list(prefix)

    def delete(self, names: Sequence[str]) -> None:
        for name in names:  # one by one: a crash may come between any two
            with self._around("delete", name):
                self.inner.delete([name])

    def exists(self, name: str) -> bool:
        return self.inner.exists(name)

    def clean_partial(self, older_than_s: float, spare: Callable[[str], bool] = spare_none) -> int:
        return self.inner.clean_partial(older_than_s, spare)

    def local_path(self, name: str) -> str | None:
        return self.inner.local_path(name)


@contextmanager
def faulty(patch: pytest.MonkeyPatch, url: str) -> Iterator[FaultyStore]:
    """While the block runs, every run of this process is opened on one `FaultyStore`."""
    store = FaultyStore(open_store(url))
    with patch.context() as inner:
        inner.setattr(run_module, "open_store", lambda *_: store)
        yield store


def once(hook: Hook, *operations: str, prefix: str = "") -> Hook:
    """A hook that acts on the first of `operations` on an object that starts with `prefix`."""
    left = [hook]

    def act(operation: str, name: str) -> None:
        if left and operation in operations and name.startswith(prefix):
            left.pop()(operation, name)

    return act
