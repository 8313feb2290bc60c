"""What a pull counts, and what holds it back: bytes that moved, the limit of the bandwidth, and the word to stop.

Owns: one process's counts, and waiting. Promises: however many threads pay here, together they stay below the limit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rl_ckpt.errors import CheckpointError
from rl_ckpt.plan.pulling import TokenBucket


class PullStoppedError(CheckpointError):
    """Threads of a pull were told to stop; never leaves the pull."""

    code = "pull_stopped"


@dataclass(frozen=True, slots=True)
class Counts:
    """What was counted so far."""

    bytes_moved: int = 0
    bytes_kept: int = 0
    files_moved: int = 0
    files_kept: int = 0

    def __add__(self, other: Counts) -> Counts:
        """Of both together."""
        return Counts(
            self.bytes_moved + other.bytes_moved,
            self.bytes_kept + other.bytes_kept,
            self.files_moved + other.files_moved,
            self.files_kept + other.files_kept,
        )


class PullMeter:
    """Counts for all threads of one process; see `copier.Meter`."""

    def __init__(
        self,
        max_bytes_per_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        """Nothing has moved.

        Args:
            max_bytes_per_s: The limit; None: none.
            clock: Seconds, for the limit.
            wait: Waits so many seconds, or until `stop`.
        """
        self._bucket = TokenBucket(max_bytes_per_s) if max_bytes_per_s is not None else None
        self._clock = clock
        self._stopped = threading.Event()
        self._wait = self._stopped.wait if wait is None else wait
        self._lock = threading.Lock()
        self._counts = Counts()
        self._elsewhere = Counts()

    def counts(self) -> Counts:
        """Up to this moment, with those of other processes as far as they were told."""
        return self._counts + self._elsewhere

    def elsewhere(self, counts: Sequence[Counts]) -> None:
        """Says what other processes have counted so far."""
        self._elsewhere = sum(counts, Counts())

    def stop(self) -> None:
        """Has everybody who pays raise `PullStoppedError` from now on."""
        self._stopped.set()

    def reserve(self, size_bytes: int) -> float:
        """Books so many bytes; for how long to wait before they are read, in seconds."""
        with self._lock:
            return self._bucket.reserve(self._clock(), size_bytes) if self._bucket is not None else 0.0

    def pay(self, size_bytes: int) -> None:
        """See `copier.Meter.pay`."""
        delay = self.reserve(size_bytes)
        if delay > 0:
            self._wait(delay)
        if self._stopped.is_set():
            raise PullStoppedError("the pull was stopped")

    def step_bytes(self, most: int) -> int:
        """See `copier.Meter.step_bytes`."""
        return most if self._bucket is None else self._bucket.step_bytes(most)

    def arrived(self, moved: int, kept: int) -> None:
        """See `copier.Meter.arrived`."""
        self._add(Counts(moved, kept))

    def file_done(self, moved: bool) -> None:
        """See `copier.Meter.file_done`."""
        self._add(Counts(0, 0, int(moved), int(not moved)))

    def _add(self, more: Counts) -> None:
        with self._lock:
            self._counts += more
