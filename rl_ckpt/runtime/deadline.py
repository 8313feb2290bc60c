"""Deadlines of urgent saves, counted by the clock of whoever called.

Owns: telling the coordinator, a little before the deadline, that nobody waits for the save any more, so that it is
absent; and giving the caller an answer at the deadline, whatever else hangs by then. A commit record that is on its way
is let land: whether it did is then not known.
"""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import Future

import ray

from rl_ckpt.errors import CommitUnknownError, InvalidInputError
from rl_ckpt.info import CheckpointInfo
from rl_ckpt.runtime.links import coordinator
from rl_ckpt.runtime.spec import RunSpec
from rl_ckpt.store.committer import SaveRequest
from rl_ckpt.store.pending import settle

_MARGIN = 0.1  # of the time there is: for the word to the coordinator and back
_MARGIN_S = 1.0  # at most


class Deadline:
    """Of one save; a thread of its own waits for it until `over` is called."""

    def __init__(self, spec: RunSpec, key: str, request: SaveRequest, begun: float, for_good: bool) -> None:
        """Begins to count.

        Args:
            spec: The run.
            key: Of the save.
            request: With a `deadline_s`, in seconds from `begun`.
            begun: When the save was called for, by `time.monotonic`.
            for_good: Whether the key never comes again.
        """
        assert request.deadline_s is not None
        self.at = begun + request.deadline_s
        """By `time.monotonic`."""
        self._tell_at = self.at - min(_MARGIN_S, _MARGIN * request.deadline_s)
        self._spec, self._key, self._for_good = spec, key, for_good
        self._what = f"step {request.step}"
        self._limit = f"its deadline of {request.deadline_s} s"
        self._over = threading.Event()
        self._future: Future[CheckpointInfo] | None = None
        threading.Thread(target=self._count, name=f"rl_ckpt-deadline-{request.step}", daemon=True).start()

    def guard(self, future: Future[CheckpointInfo]) -> None:
        """Has a future decided at the deadline at the latest; one that is decided ends the counting."""
        self._future = future
        future.add_done_callback(lambda _: self.over())

    def over(self) -> None:
        """The save is decided."""
        self._over.set()

    def _count(self) -> None:
        if self._over.wait(max(0.0, self._tell_at - time.monotonic())):
            return
        with contextlib.suppress(InvalidInputError, ray.exceptions.RayError):  # no coordinator left to tell
            text = f"{self._what} was not committed before {self._limit}; nothing of it remains"
            coordinator(self._spec).expire_save.remote(self._key, text, self._for_good)
        if self._over.wait(max(0.0, self.at - time.monotonic())) or self._future is None:
            return
        text = f"{self._what}: its commit was under way at {self._limit}, or the coordinator could not be reached"
        error = CommitUnknownError(f"{text}; `checkpoints()` tells later whether it is there")
        settle(self._future.set_exception, error)
