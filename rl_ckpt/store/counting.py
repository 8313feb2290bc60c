"""Counting: what a process that saves or loads without Ray tells metrics and logs.

Owns: how many of its saves are under way, by run. Promises: only tells; see `metrics`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from rl_ckpt import logs, metrics
from rl_ckpt.errors import CheckpointError
from rl_ckpt.format.records import CommitRecord

_log = logs.logger()
_counting = threading.Lock()
_under_way: Counter[str] = Counter()

QUIET = frozenset({"invalid_input", "save_skipped", "not_found", "run_owned"})
"""Codes of errors that are the caller's to mend, who is told: no warning in the log."""


class Counted:
    """A save, from its begin to its end, both of which are told."""

    def __init__(self, run: str) -> None:
        """It begins; `run` is the run's url."""
        self._run = run
        metrics.record(metrics.SAVES_BEGUN, 1, run)
        self._count(1)

    def _count(self, more: int) -> None:
        with _counting:
            _under_way[self._run] += more
            metrics.record(metrics.SAVES_QUEUED, _under_way[self._run], self._run)

    def committed(
        self, record: CommitRecord, staged_bytes: int, new_bytes: int, stall_s: float, durable_s: float
    ) -> None:
        """It is a checkpoint."""
        self._count(-1)
        run = self._run
        metrics.record(metrics.SAVES_COMMITTED, 1, run)
        metrics.record(metrics.STALL, stall_s, run)
        metrics.record(metrics.DURABLE, durable_s, run)
        metrics.record(metrics.BYTES_STAGED, staged_bytes, run)
        metrics.record(metrics.BYTES_DEDUPLICATED, staged_bytes - new_bytes, run)
        tell_newest(run, record)
        text = "checkpoint %s is in the store after %.2f s: %d bytes staged, %d written, training waited %.3f s"
        numbers = (durable_s, staged_bytes, new_bytes, stall_s)
        _log.info(text, record.id, *numbers, extra={"run": run, **logs.fields(record.id)})

    def failed(self, error: BaseException, checkpoint: str) -> None:
        """It is none; `checkpoint` is the id that it would have had, where it had got one."""
        self._count(-1)
        code = code_of(error)
        metrics.record(metrics.SAVES_FAILED, 1, self._run, code)
        level = logging.INFO if code in QUIET else logging.WARNING
        about = {"run": self._run, **logs.fields(checkpoint)}
        _log.log(level, "save %s failed (%s): %s", checkpoint, code, error, extra=about)


def tell_newest(run: str, record: CommitRecord) -> None:
    """The run's newest checkpoint in the store, as it is now: also where nothing was saved yet by who tells it."""
    metrics.record(metrics.LAST_STEP, record.step, run)
    metrics.record(metrics.LAST_TIME, record.time, run)
    metrics.record(metrics.LAST_AGE, max(0.0, time.time() - record.time), run)


@contextmanager
def restoring(run: str) -> Iterator[None]:
    """Tells how a restore in this block ends."""
    begun = time.monotonic()
    try:
        yield
    except BaseException as error:
        metrics.record(metrics.RESTORES, 1, run, code_of(error))
        raise
    seconds = time.monotonic() - begun
    metrics.record(metrics.RESTORES, 1, run, "ok")
    metrics.record(metrics.RESTORE_SECONDS, seconds, run, "total")
    _log.info("a restore is done after %.2f s", seconds, extra={"run": run})


def code_of(error: BaseException) -> str:
    """What `reason` and `outcome` say of an error."""
    return error.code if isinstance(error, CheckpointError) else "internal"
