"""Signals by which somebody asks a process for a save, counted; for `OnSignal`.

Owns: the handlers while a watch is open. Promises: a handler does nothing but count; when the watch is closed the
handlers of before are back. Does not: SIGTERM, which is a preemption (`Checkpointer.preemption`).
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from rl_ckpt.errors import InvalidInputError


class SignalWatch:
    """Counts signals while its `with` block runs. Entered by the main thread (Python's rule).

    Example:
        with SignalWatch(signal.SIGUSR1) as asked:
            policy = SavePolicy(EverySteps(1000), OnSignal(asked.count))
    """

    def __init__(self, *numbers: int) -> None:
        """Watches nothing yet.

        Args:
            numbers: Which signals; none given: SIGUSR1.

        Raises:
            InvalidInputError: One can't be caught, or is SIGTERM or SIGINT, which end a process.
        """
        try:
            found = [signal.Signals(number) for number in numbers or (signal.SIGUSR1,)]
        except ValueError as error:
            raise InvalidInputError(f"SignalWatch{numbers}: {error}") from error
        for number in found:
            if number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGINT):
                raise InvalidInputError(
                    f"SignalWatch({number.name}): it stops or ends processes; take SIGUSR1, say. For SIGTERM there is "
                    "Checkpointer.preemption()"
                )
        self._numbers = found
        self._count = 0
        self._before: dict[signal.Signals, Any] = {}

    def count(self) -> int:
        """How many there were so far."""
        return self._count

    def __enter__(self) -> SignalWatch:
        """Begins to count.

        Raises:
            InvalidInputError: This is not the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            raise InvalidInputError("SignalWatch must be entered by the main thread; signals come there alone")
        for number in self._numbers:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The handlers of before are back, unless somebody has put another on top."""
        for number, before in self._before.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Runs between two bytecodes of the main thread: counts, and nothing else of ours."""
        self._count += 1
        before = self._before.get(signal.Signals(number))
        if callable(before):
            before(number, frame)
