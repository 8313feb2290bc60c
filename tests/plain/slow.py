"""A store that waits until the test lets it go on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.unit.store.faulty import FaultyStore, faulty


class Gate:
    """Holds every PUT of a shard file until it is opened."""

    def __init__(self, store: FaultyStore) -> None:
        self.store = store
        self._open = threading.Event()
        self.waiting = threading.Semaphore(0)
        store.before = self._hold

    def _hold(self, operation: str, name: str) -> None:
        if operation == "put" and name.startswith("shards/") and not self._open.is_set():
            self.waiting.release()
            assert self._open.wait(60)

    def wait_until_writing(self) -> None:
        """Until a shard file is on its way."""
        assert self.waiting.acquire(timeout=60)

    def open(self) -> None:
        """Lets everything through from now on."""
        self._open.set()


@contextmanager
def gated(patch: pytest.MonkeyPatch, url: str) -> Iterator[Gate]:
    """A gate in front of the run's store while the block runs; open when it ends."""
    with faulty(patch, url) as store:
        gate = Gate(store)
        try:
            yield gate
        finally:
            gate.open()
