"""What the processes of a measurement use: CPU seconds and memory of this process and all its descendants.

Ray's processes are descendants of the driver that started its cluster. Memory is what would have to be there: anonymous
pages of all processes, and everything in /dev/shm once, whoever maps it. Nothing else may use /dev/shm meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import psutil

_SAMPLE_S = 0.02


def children() -> frozenset[int]:
    """Ids of all descendants of this process now: a server that was started before is none of ours."""
    return frozenset(child.pid for child in psutil.Process().children(recursive=True))


def _family(but: frozenset[int] = frozenset()) -> list[psutil.Process]:
    me = psutil.Process()
    return [me, *(child for child in me.children(recursive=True) if child.pid not in but)]


def cpu_seconds() -> float:
    """Of this process and all its living descendants, user and system, since each began."""
    total = 0.0
    for process in _family():
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def memory_bytes(but: frozenset[int] = frozenset()) -> int:
    """Anonymous memory of this process and all its descendants but those, and /dev/shm."""
    return sum(_anonymous(process.pid) for process in _family(but)) + shared_bytes()


def shared_bytes() -> int:
    """In use in /dev/shm."""
    found = os.statvfs("/dev/shm")
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def _anonymous(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status") as file:
            line = next((line for line in file if line.startswith("RssAnon:")), "RssAnon: 0 kB")
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return 0
    return int(line.split()[1]) << 10


class Peak:
    """The most memory that was in use at once, sampled every 20 ms."""

    def __init__(self, but: frozenset[int]) -> None:
        self._but = but
        self.before_bytes = memory_bytes(but)
        self.bytes = self.before_bytes

    @property
    def above_bytes(self) -> int:
        """Above what was in use at the beginning."""
        return self.bytes - self.before_bytes

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(_SAMPLE_S):
            self.bytes = max(self.bytes, memory_bytes(self._but))


@contextlib.contextmanager
def peak(but: frozenset[int] = frozenset()) -> Iterator[Peak]:
    """Watches for the time of the block.

    Args:
        but: Descendants that don't count, such as a server.
    """
    found, stop = Peak(but), threading.Event()
    thread = threading.Thread(target=found._watch, args=(stop,), daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
