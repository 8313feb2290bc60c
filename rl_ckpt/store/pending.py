"""A save under way, as the caller holds it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

from rl_ckpt.errors import CheckpointError, SaveTimeoutError
from rl_ckpt.info import CheckpointInfo

_SAVES_KEPT = 64

T = TypeVar("T")


class PendingSave:
    """A save that is staged: training may go on while it is written and committed."""

    def __init__(self, step: int, checkpoint: str, future: Future[CheckpointInfo]) -> None:
        """Made by the save methods."""
        self._step = step
        self._checkpoint = checkpoint
        self._future = future
        self._seen = False

    @property
    def checkpoint(self) -> str:
        """Id that the checkpoint has once it is committed."""
        return self._checkpoint

    @property
    def step(self) -> int:
        """The step that is being saved."""
        return self._step

    def done(self) -> bool:
        """Whether the save is committed or has failed."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> CheckpointInfo:
        """Waits until the checkpoint is committed.

        Args:
            timeout: How long to wait, in seconds; None: until it is decided.

        Returns:
            The committed checkpoint.

        Raises:
            SaveTimeoutError: Not decided yet; the save goes on.
            CheckpointError: Why the save failed; earlier checkpoints are untouched.
        """
        try:
            info = self._future.result(timeout)
        except FutureTimeoutError as error:
            if self._future.done():  # decided in this very moment, or the save itself ran into a timeout
                self._seen = True
                return self._future.result()
            raise SaveTimeoutError(
                f"step {self._step} is not committed after {timeout} s and is still being written; wait longer"
            ) from error
        except BaseException:
            self._seen = True
            raise
        self._seen = True
        return info

    def settled(self) -> bool:
        """Whether nothing is left to be said of it: committed, or failed and somebody was told."""
        return self._future.done() and (self._seen or self._future.exception() is None)

    def peek(self) -> CheckpointInfo | BaseException | None:
        """What came of it, or None while that is open. An error does not count as told by this."""
        if not self._future.done():
            return None
        return self._future.exception() or self._future.result()

    def take_failure(self) -> BaseException | None:
        """The error of a failed save that nobody has asked for yet; it counts as told from here on."""
        if self._seen or not self._future.done():
            return None
        self._seen = True
        return self._future.exception()

    def stored(self) -> bool:
        """Whether it is known that the checkpoint is in the store."""
        return self._future.done() and self._future.exception() is None and self._future.result().in_store

    def __repr__(self) -> str:
        """Step and state."""
        return f"PendingSave(step={self._step}, {'done' if self.done() else 'being written'})"


def raise_untold(saves: Iterable[PendingSave]) -> None:
    """Raises the oldest failure of a background save that nobody was told of; the next call raises the next one."""
    for pending in saves:
        failure = pending.take_failure()
        if failure is not None:
            raise failure


def decide(saves: Iterable[PendingSave], seconds: float) -> tuple[list[str], list[str]]:
    """Waits for saves under way, as long; ids of those that are checkpoints by now, and why others failed."""
    deadline = time.monotonic() + seconds
    committed, failed = list[str](), list[str]()
    for pending in saves:
        told = pending.settled()
        try:
            committed.append(pending.result(max(0.0, deadline - time.monotonic())).id)
        except CheckpointError as error:
            failed += [] if told else [f"step {pending.step}: {error}"]
    return committed, failed


class Branch:
    """What the next save continues: the checkpoint that was restored, until a save of it is in the store.

    From there on that is the newest one. While the outcome of earlier saves is open, the committer is told of them: it
    knows first, and a save that fails must not make a job that went back continue what it went back from.
    """

    def __init__(self) -> None:
        """Nothing was restored."""
        self._restored: str | None = None
        self._saves: list[PendingSave] = []

    def restored(self, checkpoint: str | None) -> None:
        """The job goes on from a checkpoint."""
        self._restored, self._saves = checkpoint, []

    def saved(self, pending: PendingSave) -> None:
        """A save is under way."""
        if self._restored is not None:
            self._saves = [*self._saves[-_SAVES_KEPT:], pending]

    def parent(self) -> tuple[str | None, tuple[str, ...]]:
        """For `SaveRequest`: `parent`, and `since`."""
        if any(pending.stored() for pending in self._saves):
            self.restored(None)
        return self._restored, tuple(pending.checkpoint for pending in self._saves)


def settle(set_outcome: Callable[[Any], None], outcome: object) -> None:
    """Sets a future's outcome, unless it was given up at its deadline."""
    with contextlib.suppress(InvalidStateError):
        set_outcome(outcome)


def in_thread(call: Callable[[], T], name: str) -> Future[T]:
    """Runs a blocking wait in a daemon thread, as a future."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 - it is not handled here but handed to whoever asks for the result
            settle(future.set_exception, error)
        else:
            settle(future.set_result, result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
