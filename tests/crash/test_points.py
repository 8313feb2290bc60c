"""The crash points that several processes walked are counted together."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.crash import points


def told(monkeypatch: pytest.MonkeyPatch, walked: dict[tuple[str, str, str], int]) -> dict[str, Any]:
    """What a process says at its end."""
    monkeypatch.setattr(points, "POINTS", Counter(walked))
    config = SimpleNamespace(workeroutput=dict[str, Any]())
    points.pytest_sessionfinish(cast(pytest.Session, SimpleNamespace(config=config)))
    return config.workeroutput


def test_what_several_processes_walked_is_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    first = told(monkeypatch, {("disk", "job", "late"): 2, ("disk", "job", "twice"): 3})
    second = told(monkeypatch, {("disk", "job", "late"): 5})
    monkeypatch.setattr(points, "POINTS", Counter())
    assert points.table() == []
    for output in (first, second):
        points.pytest_testnodedown(SimpleNamespace(workeroutput=output))
    points.pytest_testnodedown(SimpleNamespace())  # it crashed
    late, twice, total = (line.split() for line in points.table())
    assert (late[-2:], twice[-2:], total) == (["late", "7"], ["twice", "3"], ["in", "all", "10"])
