"""How many crash points were walked, by store, life and kind of fault; printed at the end of the test run.

A plugin of pytest (tests/conftest.py names it): where several processes run the tests, each tells what it walked.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

POINTS: Counter[tuple[str, str, str]] = Counter()
"""(store, life, kind of fault) → points."""
_TOLD = "crash_points"


def table() -> list[str]:
    """A line per walk, and the sum."""
    lines = [f"{store:<14} {life:<12} {kind:<40} {count:>6}" for (store, life, kind), count in sorted(POINTS.items())]
    return [*lines, f"{'in all':<68} {POINTS.total():>6}"] if lines else []


def pytest_sessionfinish(session: pytest.Session) -> None:
    told: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if told is not None:  # this is one of several processes
        told[_TOLD] = [(*walk, count) for walk, count in POINTS.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for *walk, count in getattr(node, "workeroutput", {}).get(_TOLD, []):  # one that crashed has told nothing
        store, life, kind = walk
        POINTS[store, life, kind] += count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = table()
    if lines:
        terminalreporter.section("crash points walked")
        for line in lines:
            terminalreporter.write_line(line)
