"""Results: samples by round, the goals they are held against, and what is left of a run as JSON. Pure; no Ray.

Every series is of a quantity where less is better (seconds, bytes), so that one rule serves all goals. Promises:
nothing is rounded in our favour. "Met" is decided on unrounded medians; a ratio is cut against us before it is shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Literal

import msgspec

LIMIT = "limit"
"""Name in a goal for the row's limit; other names are alternatives, "" is no comparison."""

_DIGITS = 2


class Series(msgspec.Struct, frozen=True):
    """What one way of doing it took, round by round."""

    name: str
    values: tuple[float, ...]
    """In the row's unit; rounds that were warm-up are left out."""
    note: str = ""
    """What a reader must know of this way (such as that it does not fsync)."""

    @property
    def median(self) -> float:
        """Of all rounds."""
        return median(self.values)

    def quartiles(self) -> tuple[float, float]:
        """First and third."""
        if len(self.values) < 2:
            return self.values[0], self.values[0]
        low, _, high = quantiles(self.values, n=4, method="inclusive")
        return low, high


class Goal(msgspec.Struct, frozen=True):
    """`at most`: ours ≤ factor × the other + plus. `at least`: the other ≥ factor × ours."""

    sense: Literal["at most", "at least"]
    factor: float
    against: str = LIMIT
    plus: float = 0.0
    """In the row's unit."""

    def text(self, unit: str) -> str:
        """For people."""
        if not self.against:
            return f"≤ {shown(self.plus, unit)}"
        sign = "≤" if self.sense == "at most" else "≥"
        more = f" + {shown(self.plus, unit)}" if self.plus else ""
        if self.against == LIMIT:
            return f"{sign} {self.factor:g}×{more}"
        return f"{sign} {self.factor:g}× less than {self.against}"


class Verdict(msgspec.Struct, frozen=True):
    """One goal, decided."""

    goal: Goal
    ratio: float | None
    """Ours / the other for `at most`, the other / ours for `at least`; cut against us. None without a comparison."""
    spread: tuple[float, float] | None
    """Quartiles of the ratio by round."""
    met: bool | None
    """None: what the goal compares with was not measured."""


class Row(msgspec.Struct, frozen=True):
    """One case of one question."""

    question: str
    case: str
    unit: Literal["s", "bytes"]
    ours: Series
    limit: Series | None = None
    alternatives: tuple[Series, ...] = ()
    goals: tuple[Goal, ...] = ()
    skipped: Mapping[str, str] = {}
    """Alternatives that were not run: name → why."""

    def best_alternative(self) -> Series | None:
        """The one with the least median; raw ways are shown beside them, and are none."""
        real = [series for series in self.alternatives if not series.name.startswith("raw ")]
        return min(real, key=lambda series: series.median, default=None)

    def verdicts(self) -> list[Verdict]:
        """One for each goal."""
        return [self._verdict(goal) for goal in self.goals]

    def _verdict(self, goal: Goal) -> Verdict:
        if not goal.against:
            return Verdict(goal, None, None, self.ours.median <= goal.plus)
        other = self.other(goal.against)
        if other is None:
            return Verdict(goal, None, None, None)
        pairs = list(zip(self.ours.values, other.values, strict=False))
        if goal.sense == "at most":
            met = self.ours.median <= goal.factor * other.median + goal.plus
            ratio = _cut(_over(self.ours.median, other.median), up=True)
            by_round = [_over(ours, theirs) for ours, theirs in pairs]
        else:
            met = other.median >= goal.factor * self.ours.median
            ratio = _cut(_over(other.median, self.ours.median), up=False)
            by_round = [_over(theirs, ours) for ours, theirs in pairs]
        return Verdict(goal, ratio, Series("", tuple(by_round)).quartiles(), met)

    def other(self, name: str) -> Series | None:
        """The limit, or an alternative by its name."""
        if name == LIMIT:
            return self.limit
        return next((series for series in self.alternatives if series.name == name), None)


class Failed(msgspec.Struct, frozen=True):
    """A question that gave no figures."""

    question: str
    why: str


class Results(msgspec.Struct, frozen=True):
    """Everything of one run."""

    made: str
    """When, in UTC."""
    machine: Mapping[str, str]
    settings: Mapping[str, int]
    seconds: float
    """That the run took."""
    rows: tuple[Row, ...]
    failed: tuple[Failed, ...] = ()

    def questions(self) -> list[str]:
        """In the order of the run."""
        return list(dict.fromkeys(row.question for row in self.rows))

    def of(self, question: str) -> list[Row]:
        """The rows of a question."""
        return [row for row in self.rows if row.question == question]


def keep(results: Results, path: Path) -> None:
    """Writes a run down."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1))


def load(path: Path) -> Results:
    """A run that was kept.

    Raises:
        msgspec.DecodeError: The file is not one.
    """
    return msgspec.json.decode(path.read_bytes(), type=Results)


def series(name: str, values: Sequence[float], warm_up: int = 0, note: str = "") -> Series:
    """A series without its warm-up rounds."""
    return Series(name, tuple(values[warm_up:]), note)


def shown(value: float, unit: str) -> str:
    """A quantity for people: three digits and a fitting unit."""
    steps = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)) if unit == "s" else (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    if value == 0:
        return "0 s" if unit == "s" else "0 B"
    name, size = next(((name, size) for name, size in steps if abs(value) >= size), steps[-1])
    scaled = value / size
    digits = 0 if abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2
    return f"{scaled:.{digits}f} {name}"


def _over(a: float, b: float) -> float:
    return a / b if b else math.inf


def _cut(value: float, *, up: bool) -> float:
    """To two digits after the point, against us."""
    if math.isinf(value):
        return value
    scale: int = 10**_DIGITS
    return (math.ceil if up else math.floor)(value * scale) / scale
