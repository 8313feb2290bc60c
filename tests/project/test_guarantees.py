"""Every promise on the page of guarantees names the tests that show it, and those are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "guarantees.md"
_NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def rows() -> list[list[str]]:
    """Cells of the rows that promise something."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if len(row) == 4 and row[0] != "What fails" and set(row[0]) != {"-"}]


def test_there_are_rows() -> None:
    assert len(rows()) > 30


@pytest.mark.parametrize("row", rows(), ids=lambda row: re.sub(r"\W+", "-", row[0])[:60])
def test_the_tests_that_a_promise_names_are_there(row: list[str]) -> None:
    named = _NAMED.findall(row[3])
    assert named, f"no test is named for: {row[0]}"
    for path, function in named:
        file = ROOT / path
        assert file.is_file(), f"{path} is not there"
        assert not function or f"def {function}(" in file.read_text(), f"{path} has no {function}"
