"""Storage over many saves, by simulation (benchmarks/scale/storage.py)."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.scale.storage import PATTERNS, RULES, course


@pytest.mark.parametrize(
    ("pattern", "rules", "written"),
    [
        ("unchanged", "LatestN(3)", 0.0),
        ("90 % frozen", "LatestN(2), EveryNSteps(20)", 0.101),
        ("ring buffer", "LatestN(3)", 0.055),
        ("growing", "LatestN(1)", 0.02),
        ("random 10 %", "LatestN(3)", 0.12),
        ("mixed", "LatestN(2), tags", 0.17),
    ],
)
def test_storage_stays_near_what_live_checkpoints_hold(pattern: str, rules: str, written: float) -> None:
    found = course(pattern, rules, saves=60)
    assert max(found.stored) <= 1.3
    assert np.mean(found.written[1:]) <= written


@pytest.mark.soak
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_storage_stays_near_what_live_checkpoints_hold_over_a_thousand_saves(pattern: str, rules: str) -> None:
    assert max(course(pattern, rules).stored) <= 1.3
