"""How many crash points were walked, by store, life and kind of fault; printed at the end of the test run."""

from __future__ import annotations

from collections import Counter

POINTS: Counter[tuple[str, str, str]] = Counter()
"""(store, life, kind of fault) → points."""


def table() -> list[str]:
    """A line per walk, and the sum."""
    lines = [f"{store:<14} {life:<12} {kind:<40} {count:>6}" for (store, life, kind), count in sorted(POINTS.items())]
    return [*lines, f"{'in all':<68} {POINTS.total():>6}"] if lines else []
