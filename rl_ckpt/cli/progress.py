"""Progress of long work, on stderr: a bar on a terminal, elsewhere a line from time to time.

Owns: how progress looks. Promises: short work elsewhere than on a terminal says nothing; `update` may be called from
any thread, as often as one likes.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from rl_ckpt.cli.output import Output
from rl_ckpt.cli.text import duration, size

EVERY_S = 10.0
"""Between lines, elsewhere than on a terminal."""


class Meter:
    """Progress of one piece of work, in bytes; a context manager.

    Args:
        out: Of the command.
        what: For people: "verify", "pull".
    """

    def __init__(self, out: Output, what: str) -> None:
        self._out = out
        self._what = what
        self._lock = threading.Lock()
        self._begun = self._told = time.monotonic()
        self._bar: Progress | None = None
        if out.errors.is_terminal:
            columns = TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[said]}")
            self._bar = Progress(*columns, console=out.errors, transient=True)
            self._task = self._bar.add_task(what, total=None, said="")

    def __enter__(self) -> Meter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(
        self, done: int, total: int | None, note: str = "", rate: float | None = None, left_s: float | None = None
    ) -> None:
        """Says how far the work is.

        Args:
            done: Bytes.
            total: Of all; None where that is not known (yet).
            note: What is being done at this moment.
            rate: Bytes per second; None: on average, since the beginning.
            left_s: Seconds that are left; None: at that rate.
        """
        now = time.monotonic()
        with self._lock:
            if self._bar is None and now - self._told < EVERY_S:
                return
            self._told = now
        speed = rate if rate is not None else done / max(now - self._begun, 1e-3)
        if left_s is None and total and speed > 0:
            left_s = (total - done) / speed
        said = f"{_said(done, total, speed, left_s)}{f', {note}' if note else ''}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, said=escape(said))
        else:
            self._out.note(f"{self._what}: {said}")


def _said(done: int, total: int | None, rate: float, left_s: float | None) -> str:
    if not total:
        return f"{size(done)}, {size(rate)}/s"
    left = "" if left_s is None else f", {duration(left_s)} left"
    return f"{size(done)} of {size(total)} ({100 * done // total} %), {size(rate)}/s{left}"
