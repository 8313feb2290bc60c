"""Supervision: a training loop that recovers from lost workers, objects and nodes.

Owns: the order of a recovery, what is tried again and how often. Promises: errors of the user's own code, damage and
states that do not fit are raised at once; workers begin anew only where nothing was ever saved; only workers that
`make_workers` returned are ended. It keeps nothing that a crash of the driver would lose: a new driver that calls
`supervise` again goes on from the newest checkpoint, by the same steps.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from rl_ckpt import logs
from rl_ckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CommitUnknownError,
    InvalidInputError,
    SaveTimeoutError,
    StorageError,
    WorkerFailuresError,
)
from rl_ckpt.info import CheckpointInfo, Recovery, RestoreReport, SuperviseReport
from rl_ckpt.runtime.losses import in_one_line, is_loss, lost_ranks, origin

_log = logs.logger(__name__)

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 10.0
_SILENCE_S = 20.0  # longer than Ray takes to find a dead node: who is silent for longer is busy
_DECIDED_S = 60.0  # how long to wait until Ray knows that a worker which can't be reached is dead
_END_S = 30.0

# A worker that dies takes saves with it, and what they say of it comes in these.
_MAYBE_A_LOSS = (CommitUnknownError, SaveTimeoutError, StorageError, WorkerFailuresError)

Workers = Sequence[Any]


@dataclass(frozen=True)
class Limits:
    """How often and how long; see `Checkpointer.supervise`."""

    max_failures: int
    retry_on: tuple[type[Exception], ...]
    recover_timeout_s: float
    settle_timeout_s: float

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
            InvalidInputError: A value is out of range.
        """
        if not isinstance(self.max_failures, int) or isinstance(self.max_failures, bool) or self.max_failures < 0:
            raise InvalidInputError(f"max_failures={self.max_failures!r} must be an integer of at least 0")
        if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in self.retry_on):
            raise InvalidInputError(f"retry_on={self.retry_on!r} must be a list of exception classes")
        for name in ("recover_timeout_s", "settle_timeout_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise InvalidInputError(f"{name}={value!r} must be a number of seconds, 0 or more")


class Restorer(Protocol):
    """What is needed of a Checkpointer."""

    def restore(self, workers: Workers) -> RestoreReport:
        """Restores the newest good checkpoint."""

    def latest(self) -> CheckpointInfo | None:
        """The newest checkpoint."""


@dataclass(frozen=True, slots=True)
class _Team:
    """Workers that are ready to train."""

    workers: list[Any]
    restored: RestoreReport | None
    attempts: int
    rebuilt_s: float
    restored_s: float


class Supervisor:
    """One supervised job."""

    def __init__(
        self,
        checkpointer: Restorer,
        decided: Callable[[float], tuple[Sequence[str], Sequence[str]]],
        settle: Callable[[float], None],
        make_workers: Callable[[], Workers],
        train: Callable[[list[Any], RestoreReport | None], Any],
        limits: Limits,
    ) -> None:
        """Nothing is done yet.

        Args:
            checkpointer: Restores.
            decided: Waits so many seconds for saves of this process; gives the ids of the checkpoints that these are
                by now, and why others failed.
            settle: Waits so many seconds for saves that workers began themselves, once these are ended.
            make_workers: Of the user.
            train: Of the user.
            limits: Of all of it.
        """
        self._checkpointer = checkpointer
        self._decided = decided
        self._settle = settle
        self._make_workers = make_workers
        self._train = train
        self._limits = limits
        self._seen: set[str] = set()
        """Ids of checkpoints that were the newest at some time."""
        self._in_a_row = 0
        """Losses since then."""
        self._retried: tuple[type[Exception], ...] = (ray.exceptions.RayError, CheckpointError, *limits.retry_on)

    def run(self) -> SuperviseReport:
        """See `Checkpointer.supervise`."""
        team = self._begin(recovers=False)
        first, recoveries = team.restored, list[Recovery]()
        while True:
            try:
                result = self._train(team.workers, team.restored)
            except self._retried as error:
                if not self._is_loss(error, team.workers):
                    raise
                team, recovery = self._recover(team.workers, error)
                recoveries.append(recovery)
            else:
                return SuperviseReport(result, first, tuple(recoveries))

    def _is_loss(self, error: Exception, workers: Workers) -> bool:
        """Whether `train` failed as something was lost."""
        if is_loss(error) or isinstance(error, self._limits.retry_on):
            return True
        return isinstance(origin(error), _MAYBE_A_LOSS) and bool(lost_ranks(workers, _SILENCE_S))

    def _recover(self, workers: Workers, error: Exception) -> tuple[_Team, Recovery]:
        noticed, begun = time.time(), time.monotonic()
        lost = tuple(lost_ranks(workers, _SILENCE_S, _DECIDED_S))
        _log.warning("recovering from a loss (dead ranks: %s): %s", list(lost) or "none", _line(error))
        # Decided first: what is being saved right now is the newest checkpoint in a moment, or never.
        committed, failed = self._decided(self._limits.settle_timeout_s)
        _end(workers)
        self._settle(max(0.0, begun + self._limits.settle_timeout_s - time.monotonic()))
        self._count(committed, error, lost)
        settled_s = time.monotonic() - begun
        team = self._begin(recovers=True)
        times = (settled_s, team.rebuilt_s, team.restored_s)
        recovery = Recovery(_line(error), noticed, lost, tuple(failed), team.restored, team.attempts, *times)
        step = "nothing, as nothing was saved yet" if team.restored is None else f"step {team.restored.step}"
        _log.warning("%d workers restored from %s", len(team.workers), step)
        return team, recovery

    def _count(self, committed: Sequence[str], error: Exception, lost: Sequence[int]) -> None:
        """Counts a loss; from the start where there are new checkpoints.

        Raises:
            WorkerFailuresError: It was one too many.
        """
        new = {*committed, *self._newest()} - self._seen
        self._seen |= new
        self._in_a_row = 1 if new else self._in_a_row + 1
        if self._in_a_row > self._limits.max_failures:
            text = (
                f"gave up after {self._in_a_row} losses in a row with no new checkpoint "
                f"(max_failures={self._limits.max_failures}); the last one: {_line(error)}"
            )
            raise WorkerFailuresError(text, dict.fromkeys(lost, _line(error)), lost) from error

    def _newest(self) -> list[str]:
        """Id of the newest checkpoint; none where it is not known."""
        try:
            info = self._checkpointer.latest()
        except StorageError:  # whether it can be restored is seen next
            return []
        return [] if info is None else [info.id]

    def _begin(self, recovers: bool) -> _Team:
        """Makes workers and restores them, again and again until it works or the time is over.

        Args:
            recovers: Whether something was lost before, which may be why the store fails: it is asked again. At the
                first start, a store that fails is most likely one that refuses (keys, policies): said at once.
        """
        deadline, wait_s, attempts = time.monotonic() + self._limits.recover_timeout_s, _FIRST_WAIT_S, 0
        begun = time.monotonic()
        while True:
            workers, attempts = list[Any](), attempts + 1
            try:
                workers += _checked(self._make_workers())
                rebuilt = time.monotonic()
                restored = self._restored(workers)
            except self._retried as error:
                again = self._again(error, workers, recovers)  # asks the workers, so before they are ended
                _end(workers)
                if not again:
                    raise
                if time.monotonic() + wait_s > deadline:
                    if isinstance(error, StorageError):  # the caller may tell a store that fails from lost workers
                        raise
                    text = f"no workers could be made and restored within {self._limits.recover_timeout_s} s"
                    raise WorkerFailuresError(f"{text}, after {attempts} attempts: {_line(error)}") from error
                _log.warning("workers could not be made and restored, trying again: %s", _line(error))
                time.sleep(wait_s * random.uniform(0.5, 1.0))
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            else:
                done = time.monotonic()
                return _Team(workers, restored, attempts, rebuilt - begun, done - rebuilt)

    def _restored(self, workers: Workers) -> RestoreReport | None:
        try:
            report = self._checkpointer.restore(workers)
        except CheckpointNotFoundError:
            if self._seen:  # it was there: never silently start from nothing
                raise
            return None
        self._seen.add(report.id)
        return report

    def _again(self, error: Exception, workers: Workers, recovers: bool) -> bool:
        """Whether making and restoring workers may work the next time."""
        if is_loss(error) or isinstance(error, (SaveTimeoutError, *self._limits.retry_on)):
            return True
        return isinstance(error, StorageError) and (recovers or bool(lost_ranks(workers, _SILENCE_S)))


def _checked(workers: Workers) -> list[Any]:
    found = list(workers)
    for rank, handle in enumerate(found):
        if not isinstance(handle, ray.actor.ActorHandle):
            raise InvalidInputError(f"make_workers returned a {type(handle).__name__} as rank {rank}, no actor handle")
    if not found:
        raise InvalidInputError("make_workers returned no workers; give at least one Ray actor handle")
    return found


def _end(workers: Workers) -> None:
    """Ends workers, and waits until they are: what they hold, GPUs say, is needed by the next ones."""
    for worker in workers:
        with contextlib.suppress(ray.exceptions.RayError, ValueError):  # it has ended by itself
            ray.kill(worker, no_restart=True)
    if workers:
        gone = [worker.__ray_call__.remote(_nothing) for worker in workers]
        ray.wait(gone, num_returns=len(gone), timeout=_END_S)


def _nothing(_actor: Any) -> None:
    """Runs in no worker, where all are ended."""


def _line(error: BaseException) -> str:
    first = origin(error)
    return f"{type(first).__name__}: {in_one_line(first)}"
