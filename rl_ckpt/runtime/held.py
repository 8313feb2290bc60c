"""Held parts: what a shard server keeps in its memory of checkpoints, its own parts and copies of others'.

Owns: the files of copies, small files beside the data that say what is held (so that a server which was killed finds it
again, and tells a coordinator that comes after another), and having parts on the shelf. Promises: what it says it has
was staged here or verified here, chunk by chunk; every method may run twice. Decides nothing.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from rl_ckpt.errors import CheckpointError, StorageError
from rl_ckpt.plan.parts import PART, Part
from rl_ckpt.runtime import huge_pages
from rl_ckpt.runtime.memory import GENERATION, ServerMemory
from rl_ckpt.runtime.messages import FoundParts, HoldOrder, RememberOrder, decode, encode
from rl_ckpt.runtime.transport.shelf import Shelf

_HELD, _DONE = "held-", "remembered-"


@dataclass(slots=True)
class _Has:
    """What is known of one part; the table is in its file, and read when it is asked for."""

    checkpoint: str
    path: str
    bytes: int


class _Turn:
    """Whose turn it is to make a copy."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


class HeldParts:
    """See the module. Threads may share it."""

    def __init__(self, owned: ServerMemory, shelf: Shelf, generations: int) -> None:
        """Takes up what a server of this name held before it was killed.

        Args:
            owned: The server's files.
            shelf: What its peers may read.
            generations: Of staging memory that there may be; copies leave room for them.
        """
        self._owned = owned
        self._shelf = shelf
        self._generations = generations
        self._lock = threading.Lock()
        # For as long as somebody makes the copy, or waits for it.
        self._copying = weakref.WeakValueDictionary[str, _Turn]()
        self._has: dict[str, _Has] = {}
        self._maps: dict[int, memoryview] = {}  # of files of copies, by inode: used again, so that no page faults recur
        self.bytes_copied = 0
        for name in owned.names(_HELD):
            held = decode(owned.read(name), HoldOrder)
            if os.path.exists(held.path):
                self._put_up(held.part, held.path)
            else:
                owned.remove(name)
        kept = {os.path.basename(has.path) for has in self._has.values()}
        for name in set(owned.names(PART)) - kept:
            owned.remove(name)  # a copy that was being made

    def counts(self) -> dict[str, int]:
        """Parts held, their bytes, and bytes copied here so far."""
        with self._lock:
            held = [has.bytes for has in self._has.values()]
        return {"parts_held": len(held), "bytes_held": sum(held), "bytes_copied": self.bytes_copied}

    def hold(self, part: Part, path: str) -> str:
        """Keeps what was staged here.

        Returns:
            The file's path.

        Raises:
            StorageError: Its memory is gone, or was given up; or there is no room for the part's table.
        """
        name = os.path.basename(path)
        self._owned.keep(name)
        if not os.path.exists(path):
            raise StorageError(f"staging memory {path} is gone: its save is over, or its server was ended")
        try:
            self._record(part, path)
        except CheckpointError:
            self._owned.give_up(name)
            raise
        return path

    def copy(self, part: Part, fill: Callable[[memoryview], object]) -> str:
        """Makes a copy of another server's part.

        Args:
            part: Which.
            fill: Brings its bytes into the memory that it is given, and verifies them; may raise CheckpointError.

        Returns:
            The file's path.

        Raises:
            StorageError: There is no room beside what staging needs, or the part was given up.
            CheckpointError: From `fill`.
        """

        def whole(target: memoryview) -> Part:
            fill(target)
            self.bytes_copied += part.bytes
            return part

        return self.bring(part, whole).path

    def bring(self, part: Part, fill: Callable[[memoryview], Part]) -> HoldOrder:
        """Makes memory for a part, and keeps what can be had of it.

        Args:
            part: Which.
            fill: Brings bytes into the memory that it is given, verifies them, and says what is good: the part, maybe
                without some of its chunks; may raise CheckpointError.

        Returns:
            What is held: of an earlier call, where there was one.

        Raises:
            StorageError: There is no room beside what staging needs, or the part was given up.
            CheckpointError: From `fill`.
        """
        with self._lock:
            turn = self._copying.setdefault(part.name, _Turn())
        with turn.lock:  # asked twice: the second has what the first made
            has = self._has.get(part.name)
            if has is not None:
                return self._order(part.name)
            if self._shelf.is_withdrawn(part.name):
                raise StorageError(f"{part.name} was given up already: this call came late")
            path: str = self._room(part)
            with contextlib.ExitStack() as undo:  # whatever fails: else the file would stay
                undo.callback(self._drop, path, spare=False)
                good = fill(self._map(path)[: part.bytes])
                self._record(good, path)
                undo.pop_all()
            return HoldOrder(good, path)

    def _order(self, name: str) -> HoldOrder:
        order: HoldOrder = decode(self._owned.read(_HELD + name), HoldOrder)
        return order

    def room(self) -> int:
        """Bytes of shared memory that there are beside what staging will still take; spare files count as free."""
        return self._owned.room(self._generations) + self._owned.spare_bytes()

    def _room(self, part: Part) -> str:
        path = self._owned.take_spare(part.name, part.bytes)
        if path:
            return path
        self._owned.drop_spares()  # none of them fits: they are from another time
        self._prune_maps()
        room = self._owned.room(self._generations)
        if part.bytes > room:
            raise StorageError(
                f"shared memory has no room for a copy of {part.bytes} bytes beside what staging needs ({room} left); "
                "give the node or container more (docker: --shm-size), or set replicas=0 or memory_bytes"
            )
        return self._owned.make(part.name, part.bytes)

    def _record(self, part: Part, path: str) -> None:
        self._owned.write(_HELD + part.name, encode(HoldOrder(part, path)))
        try:
            self._put_up(part, path)
        except CheckpointError:  # `release` overtook this call
            self._owned.remove(_HELD + part.name)
            raise

    def _put_up(self, part: Part, path: str) -> None:
        self._shelf.publish(part.name, path, part.bytes, filled=True)
        if os.path.basename(path).startswith(GENERATION):
            self._owned.keep(os.path.basename(path))
        with self._lock:
            self._has[part.name] = _Has(part.checkpoint, path, part.bytes)

    def remember(self, memo: RememberOrder) -> None:
        """Writes down what the parts here are parts of.

        Raises:
            StorageError: There is no room for it.
        """
        self._owned.write(_DONE + memo.done.id, encode(memo))

    def release(self, name: str) -> None:
        """Gives a part up: peers find it no more, and its memory is for other things."""
        self._shelf.withdraw(name)
        self._owned.remove(_HELD + name)
        with self._lock:
            has = self._has.pop(name, None)
            last = has is not None and not any(other.checkpoint == has.checkpoint for other in self._has.values())
        if has is not None:
            if last:
                self._owned.remove(_DONE + has.checkpoint)
            self._drop(has.path, spare=True)

    def _drop(self, path: str, spare: bool) -> None:
        """A file is needed no more. As many copies as there are may be spares: one comes when another goes."""
        name = os.path.basename(path)
        if name.startswith(GENERATION):
            self._owned.give_up(name)
        elif spare and self._owned.spares() < max(1, len(self._owned.names(PART)) - 1):
            self._owned.spare(name)
        else:
            self._owned.remove(name)
            self._prune_maps()

    def _map(self, path: str) -> memoryview:
        with open(path, "r+b") as file:
            found = os.fstat(file.fileno())
            with self._lock:
                if found.st_ino not in self._maps:
                    self._maps[found.st_ino] = huge_pages.map_file(file.fileno(), found.st_size)
                return self._maps[found.st_ino]

    def _prune_maps(self) -> None:
        """Unmaps files that are gone: their memory is free once nobody maps them."""
        there = self._owned.inodes()
        with self._lock:
            self._maps = {inode: view for inode, view in self._maps.items() if inode in there}

    def found(self, adopt: bool) -> FoundParts:
        """What is held here.

        Args:
            adopt: Whether another coordinator asks, which knows of no generations: they become files of the parts' own.
        """
        with self._lock:
            names = list(self._has)
        parts: list[HoldOrder] = []
        for name in names:
            with contextlib.suppress(KeyError, FileNotFoundError):  # `release` runs beside it: not held any more
                if adopt:
                    self._adopt(name)
                parts.append(self._order(name))
        memos: list[RememberOrder] = []
        for name in self._owned.names(_DONE):
            with contextlib.suppress(FileNotFoundError):
                memos.append(decode(self._owned.read(name), RememberOrder))
        return FoundParts(tuple(parts), tuple(memos))

    def _adopt(self, name: str) -> None:
        path = self._has[name].path
        if os.path.basename(path).startswith(GENERATION):
            held = self._order(name)
            new = HoldOrder(held.part, self._owned.path(name))
            # Its new name is written first: a crash between the two leaves a record without a file, which is dropped,
            # and a generation that nobody keeps.
            self._owned.write(_HELD + name, encode(new))
            self._owned.rename(os.path.basename(path), name)
            self._shelf.move(name, new.path)
            with self._lock:
                self._has[name].path = new.path
