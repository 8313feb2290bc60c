"""The runs that are damaged, saved once."""

from __future__ import annotations

import pytest

from tests.fuzz.runs import SavedRun, make_runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[SavedRun, SavedRun, SavedRun]:
    """One of every kind of leaf, one of packed files, and a stranger."""
    return make_runs(tmp_path_factory.mktemp("runs"))
