"""Restore memory: a shard server's files for what it brings in, and who may still use them.

Owns: making one for a restore's candidate, putting it on the shelf, and giving it back: when it is told to, and when
another coordinator's restore begins, as nobody else knows what a dead one left. Promises: what was given back once
does not come back under its name, however late a call for it comes.
"""

from __future__ import annotations

import os
import threading

from rl_ckpt.errors import CheckpointError
from rl_ckpt.runtime import memory
from rl_ckpt.runtime.transport.shelf import Shelf


class RestoreMemory:
    """See the module. Threads may share it."""

    def __init__(self, owned: memory.ServerMemory, shelf: Shelf) -> None:
        """None yet.

        Args:
            owned: The server's files.
            shelf: What its peers may read.
        """
        self._owned = owned
        self._shelf = shelf
        self._lock = threading.Lock()
        self._incarnations: list[str] = []
        """Coordinators whose restores were seen, the current one last."""
        self._making: set[str] = set()

    def open(self, name: str, size_bytes: int) -> memoryview:
        """The memory of one candidate, on the shelf; made unless it is there.

        Args:
            name: `restore-<key>#<incarnation of the coordinator>-<number>`.
            size_bytes: Of all its chunks.

        Raises:
            StorageError: The shared memory is too small, or this one was given back already.
        """
        with self._lock:
            self._making.add(name)
            left = self._left_by_others(_incarnation(name))
        try:
            for other in left:
                self.forget(other)
            return self._open(name, size_bytes)
        finally:
            with self._lock:
                self._making.discard(name)

    def _left_by_others(self, incarnation: str) -> list[str]:
        if incarnation in self._incarnations:  # the current one, or a late call of one before
            return []
        self._incarnations.append(incarnation)
        known = {*self._owned.names(memory.RESTORE), *self._making}
        return [name for name in known if _incarnation(name) != incarnation]

    def _open(self, name: str, size_bytes: int) -> memoryview:
        path = self._owned.path(name)
        if not os.path.exists(path):
            self._owned.make(name, size_bytes)
        try:
            self._shelf.publish(name, path, size_bytes)
        except CheckpointError:  # `forget` overtook this call: nobody else would remove the file
            self._owned.remove(name)
            raise
        return memory.mapped(path)

    def forget(self, name: str) -> None:
        """Gives one back, once nobody has it mapped any more."""
        self._shelf.withdraw(name)
        self._owned.remove(name)
        memory.forget(self._owned.path(name))  # after it was removed: nobody maps it anew


def _incarnation(name: str) -> str:
    return name.rpartition("#")[2].partition("-")[0]
