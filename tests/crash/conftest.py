"""The number of crash points walked, at the end of the run."""

from __future__ import annotations

import pytest

from tests.crash import points


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = points.table()
    if lines:
        terminalreporter.section("crash points walked")
        for line in lines:
            terminalreporter.write_line(line)
