"""Every promise on the page of guarantees, and every row beside RLlib, names tests, and those are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"guarantees.md": "What fails", "rllib.md": ""}  # and the head of the first column
_NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def rows(page: str) -> list[list[str]]:
    """Cells of the rows that promise something."""
    lines = [line for line in (ROOT / "docs" / page).read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if len(row) == 4 and row[0] != PAGES[page] and set(row[0]) != {"-"}]


@pytest.mark.parametrize(("page", "least"), [("guarantees.md", 30), ("rllib.md", 12)])
def test_there_are_rows(page: str, least: int) -> None:
    assert len(rows(page)) > least


@pytest.mark.parametrize(
    "row", [row for page in PAGES for row in rows(page)], ids=lambda row: re.sub(r"\W+", "-", row[0])[:60]
)
def test_the_tests_that_a_promise_names_are_there(row: list[str]) -> None:
    named = _NAMED.findall(row[3])
    assert named, f"no test is named for: {row[0]}"
    for path, function in named:
        file = ROOT / path
        assert file.is_file(), f"{path} is not there"
        assert not function or f"def {function}(" in file.read_text(), f"{path} has no {function}"
