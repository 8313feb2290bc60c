"""Progress of long work, on stderr: a bar on a terminal, elsewhere a line from time to time.

Owns: how progress looks. Promises: short work elsewhere than on a terminal says nothing; `update` may be called from
any thread, as often as one likes.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

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
            self._bar = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(binary_units=True),
                TransferSpeedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False),
                console=out.errors, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(what, total=None, note="")

    def __enter__(self) -> Meter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int | None, note: str = "") -> None:
        """Says how far the work is.

        Args:
            done: Bytes.
            total: Of all; None where that is not known (yet).
            note: What is being done at this moment.
        """
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, note=note)
            return
        now = time.monotonic()
        with self._lock:
            if now - self._told < EVERY_S:
                return
            self._told = now
        self._out.note(f"{self._what}: {_said(done, total, now - self._begun)}{f', {note}' if note else ''}")


def _said(done: int, total: int | None, seconds: float) -> str:
    rate = done / seconds if seconds > 0 else 0.0
    if not total:
        return f"{size(done)}, {size(rate)}/s"
    left = duration((total - done) / rate) if rate > 0 else "?"
    return f"{size(done)} of {size(total)} ({100 * done // total} %), {size(rate)}/s, {left} left"
