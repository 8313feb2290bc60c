"""Shelf: what a shard server's peers may read, by name, as far as it is filled.

Owns: which ranges of which file are filled, and waking who waits for them. A range is put up only when its bytes have
been verified, so nobody passes on what is damaged. What has been withdrawn once never comes back under its name: a
call that Ray delivers late finds that out here.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rl_ckpt.errors import CheckpointError, StorageError, from_code
from rl_ckpt.runtime.transport.wire import TransportError

_WITHDRAWN_KEPT = 4096  # more than restores that may have late calls under way

Range = tuple[int, int]
"""Offset and size, in bytes."""


@dataclass(slots=True)
class _Entry:
    """A file of which parts are filled."""

    path: str
    size_bytes: int
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """Extents that are filled, ascending, disjoint and not touching."""
    failure: tuple[str, str] | None = None

    def add(self, start: int, end: int) -> None:
        """Marks an extent as filled; what it touches becomes one with it."""
        first = last = bisect_right(self.starts, start)
        if first and self.ends[first - 1] >= start:
            first -= 1
        while last < len(self.starts) and self.starts[last] <= end:
            last += 1
        if first < last:
            start, end = min(start, self.starts[first]), max(end, self.ends[last - 1])
        self.starts[first:last], self.ends[first:last] = [start], [end]

    def has(self, offset: int, size: int) -> bool:
        """Whether all of a range is filled."""
        i = bisect_right(self.starts, offset) - 1
        return i >= 0 and self.ends[i] >= offset + size


class Shelf:
    """See the module. Threads may share it."""

    def __init__(self) -> None:
        """An empty one."""
        self._entries: dict[str, _Entry] = {}
        self._withdrawn: OrderedDict[str, None] = OrderedDict()
        self._changed = threading.Condition()

    def publish(self, name: str, path: str, size_bytes: int, *, filled: bool = False) -> None:
        """Puts a file up; one that is there already stays as it is.

        Args:
            name: By which peers ask for it.
            path: Of the file.
            size_bytes: Of the file.
            filled: Whether all of it may be read at once; else what `fill` names.

        Raises:
            StorageError: It was withdrawn: this call comes late.
        """
        with self._changed:
            if name in self._withdrawn:
                raise StorageError(f"{name} was given up already: this call came late")
            entry = self._entries.setdefault(name, _Entry(path, size_bytes))
            if filled:
                entry.add(0, size_bytes)
            self._changed.notify_all()

    def fill(self, name: str, ranges: Iterable[Range]) -> None:
        """Ranges of it may be read now; nothing happens where it has been withdrawn."""
        with self._changed:
            entry = self._entries.get(name)
            if entry is not None:
                for offset, size in ranges:
                    entry.add(offset, offset + size)
                self._changed.notify_all()

    def fail(self, name: str, error: CheckpointError) -> None:
        """The rest of it will not come: who waits for it is told why."""
        with self._changed:
            entry = self._entries.get(name)
            if entry is not None:
                entry.failure = (error.code, error.message)
                self._changed.notify_all()

    def move(self, name: str, path: str) -> None:
        """The file has another path now; nothing happens where it has been withdrawn."""
        with self._changed:
            entry = self._entries.get(name)
            if entry is not None:
                entry.path = path

    def withdraw(self, name: str) -> None:
        """Takes it down for good; who waits for it is told."""
        with self._changed:
            self._entries.pop(name, None)
            self._withdrawn[name] = None
            while len(self._withdrawn) > _WITHDRAWN_KEPT:
                self._withdrawn.popitem(last=False)
            self._changed.notify_all()

    def is_withdrawn(self, name: str) -> bool:
        """Whether it was taken down."""
        with self._changed:
            return name in self._withdrawn

    def ready(self, name: str, wanted: Mapping[int, Range], wait_s: float) -> tuple[str, list[int]]:
        """Which of some ranges are filled; waits for the first of them.

        Args:
            name: As published, now or while this waits.
            wanted: Ranges by any number.
            wait_s: For how long, in seconds.

        Returns:
            The file's path (empty where nothing of that name is there yet), and numbers of ranges that are filled: none
            when the time is over.

        Raises:
            TransportError: It was withdrawn, or a range lies outside of it.
            CheckpointError: What is missing will not come, and this is why.
        """
        by = time.monotonic() + wait_s
        with self._changed:
            while True:
                if name in self._withdrawn:
                    raise TransportError(f"{name} is not here any more")
                entry = self._entries.get(name)
                found: list[int] = []
                if entry is not None:
                    _check(name, entry, wanted)
                    found = [number for number, (offset, size) in wanted.items() if entry.has(offset, size)]
                    if not found and entry.failure is not None:
                        raise from_code(*entry.failure)
                left = by - time.monotonic()
                if found or left <= 0:
                    return ("" if entry is None else entry.path), found
                self._changed.wait(left)

    def await_all(self, name: str, ranges: list[Range], wait_s: float) -> str:
        """Waits until all of some ranges are filled.

        Returns:
            The file's path.

        Raises:
            TransportError: They are not after `wait_s` seconds, or as for `ready`.
            CheckpointError: As for `ready`.
        """
        by = time.monotonic() + wait_s
        left, path = dict(enumerate(ranges)), ""
        while left:
            path, found = self.ready(name, left, by - time.monotonic())
            if not found:
                raise TransportError(f"{len(left)} ranges of {name} are not there after {wait_s:.0f} s")
            for number in found:
                del left[number]
        return path


def _check(name: str, entry: _Entry, wanted: Mapping[int, Range]) -> None:
    for offset, size in wanted.values():
        if offset < 0 or size < 1 or offset + size > entry.size_bytes:
            raise TransportError(f"{size} bytes at {offset} are no part of {name}, which has {entry.size_bytes}")
