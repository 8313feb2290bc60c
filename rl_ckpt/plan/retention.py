"""Retention: rules that say which checkpoints stay. One stays where any rule keeps it; the newest always stays.

Owns: the rules, and the verdict on each checkpoint with its reason, for sweeps and dry runs alike. Pure: the time is
given. Promises: no clock, however wrong, makes the newest or a tagged checkpoint go, and what lies in the future by the
given clock is kept by every rule about ages.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.format.records import CommitRecord
from rl_ckpt.info import Verdict
from rl_ckpt.state import leaves

_SKEW_S = 60.0  # by which clocks of a cluster may differ before it is worth a word


@runtime_checkable
class KeepRule(Protocol):
    """A rule: chooses the checkpoints to keep. One that needs the time is a `TimedRule` too."""

    def keep(self, commits: Sequence[CommitRecord]) -> set[str]:
        """Ids of the checkpoints that this rule keeps.

        Args:
            commits: All of the run, oldest commit first; not empty.
        """
        ...


@runtime_checkable
class TimedRule(KeepRule, Protocol):
    """A rule about ages."""

    def keep_at(self, commits: Sequence[CommitRecord], now: float) -> set[str]:
        """As `KeepRule.keep`, which is not asked then.

        Args:
            commits: All of the run, oldest commit first; not empty.
            now: Unix seconds.
        """
        ...


@dataclass(frozen=True, slots=True)
class LatestN:
    """Keeps the `n` newest checkpoints."""

    n: int

    def __post_init__(self) -> None:
        """Checks `n`: an integer of at least 1."""
        if not isinstance(self.n, int) or isinstance(self.n, bool) or self.n < 1:
            raise InvalidInputError(
                f"LatestN({self.n!r}): n must be an integer of at least 1; the newest is never deleted"
            )

    def keep(self, commits: Sequence[CommitRecord]) -> set[str]:
        """See `KeepRule.keep`."""
        return {commit.id for commit in commits[-self.n :]}


@dataclass(frozen=True, slots=True)
class EveryNSteps:
    """Keeps checkpoints at steps that are multiples of `n`."""

    n: int

    def __post_init__(self) -> None:
        """Checks `n`: an integer of at least 1."""
        if not isinstance(self.n, int) or isinstance(self.n, bool) or self.n < 1:
            raise InvalidInputError(f"EveryNSteps({self.n!r}): n must be an integer of at least 1")

    def keep(self, commits: Sequence[CommitRecord]) -> set[str]:
        """See `KeepRule.keep`."""
        return {commit.id for commit in commits if commit.step % self.n == 0}


@dataclass(frozen=True, slots=True)
class BestN:
    """Keeps the `n` checkpoints with the best value of a metric; of equal ones the newer.

    Where no checkpoint has the metric at all, nothing tells which is best, and all stay.
    """

    metric: str
    """Name, as given at save."""
    mode: str = "max"
    """Which is the best: "max" or "min"."""
    n: int = 1

    def __post_init__(self) -> None:
        """Checks `mode`, and `n`: an integer of at least 1."""
        if self.mode not in ("max", "min"):
            raise InvalidInputError(f"BestN(mode={self.mode!r}): mode must be 'max' or 'min'")
        if not isinstance(self.n, int) or isinstance(self.n, bool) or self.n < 1:
            raise InvalidInputError(f"BestN(n={self.n!r}): n must be an integer of at least 1")

    def keep(self, commits: Sequence[CommitRecord]) -> set[str]:
        """See `KeepRule.keep`."""
        sign = 1 if self.mode == "max" else -1
        found = self.values(commits)
        numbers = [(sign * found[c.id], place, c.id) for place, c in enumerate(commits) if c.id in found]
        return {id_ for _, _, id_ in sorted(numbers)[-self.n :]} if numbers else {c.id for c in commits}

    def values(self, commits: Sequence[CommitRecord]) -> dict[str, Any]:
        """The metric of those checkpoints that have it as a number, by id."""
        found: dict[str, Any] = {commit.id: leaves.decode(commit.metrics.get(self.metric)) for commit in commits}
        return {id_: value for id_, value in found.items() if _is_number(value)}


@dataclass(frozen=True, slots=True)
class NewerThan:
    """Keeps checkpoints that were committed less than so many seconds ago."""

    seconds: float

    def __post_init__(self) -> None:
        """Checks `seconds`: a number greater than 0."""
        _check_seconds(self, self.seconds)

    def keep(self, commits: Sequence[CommitRecord]) -> set[str]:
        """See `KeepRule.keep`; by this machine's clock."""
        return self.keep_at(commits, time.time())

    def keep_at(self, commits: Sequence[CommitRecord], now: float) -> set[str]:
        """See `TimedRule.keep_at`."""
        return {commit.id for commit in commits if now - commit.time < self.seconds}


@dataclass(frozen=True, slots=True)
class OnePer:
    """Keeps the last checkpoint of each period: `OnePer(3600)` one per hour, `OnePer(86400, 7)` one for each of 7 days.

    Periods are counted in Coordinated Universal Time; those without a checkpoint do not count.
    """

    seconds: float
    """Length of a period."""
    n: int | None = None
    """How many periods, from the newest backwards; None: all."""

    def __post_init__(self) -> None:
        """Checks `seconds`: a number greater than 0; and `n`: None, or an integer of at least 1."""
        _check_seconds(self, self.seconds)
        if self.n is not None and (not isinstance(self.n, int) or isinstance(self.n, bool) or self.n < 1):
            raise InvalidInputError(f"{self!r}: n must be an integer of at least 1, or None for all periods")

    def keep(self, commits: Sequence[CommitRecord]) -> set[str]:
        """See `KeepRule.keep`; by this machine's clock."""
        return self.keep_at(commits, time.time())

    def keep_at(self, commits: Sequence[CommitRecord], now: float) -> set[str]:
        """See `TimedRule.keep_at`."""
        future = {commit.id for commit in commits if commit.time > now + _SKEW_S}
        last = {math.floor(commit.time / self.seconds): commit.id for commit in commits if commit.id not in future}
        periods = sorted(last)
        return future | {last[period] for period in (periods if self.n is None else periods[-self.n :])}


@dataclass(frozen=True, slots=True)
class Tagged:
    """Keeps the tagged checkpoints, which every set of rules does: `[Tagged()]` keeps nothing else but the newest."""

    def keep(self, commits: Sequence[CommitRecord]) -> set[str]:
        """See `KeepRule.keep`. Of tags that were given or taken after the save, `decide` knows."""
        return {commit.id for commit in commits if commit.tag is not None}


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return number and not math.isnan(value)  # type: ignore[arg-type]  # numpy's too


def _check_seconds(rule: object, seconds: object) -> None:
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not 0 < seconds < math.inf:  # type: ignore[operator]  # a number by then
        raise InvalidInputError(f"{rule!r}: seconds must be a number greater than 0")


@dataclass(frozen=True, slots=True)
class Said:
    """What people have said of checkpoints after they were saved, by id."""

    tags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """All tags of the tagged ones, with those given at save."""
    removals: Mapping[str, str] = field(default_factory=dict)
    """Those that are to go: who asked for it."""
    unreadable: frozenset[str] = frozenset()
    """Those of which that can't be read: they may be tagged."""


def decide(
    commits: Sequence[CommitRecord], rules: Sequence[KeepRule], now: float, said: Said | None = None
) -> list[Verdict]:
    """Which checkpoints stay, and why.

    Args:
        commits: All of the run, oldest commit first.
        rules: None at all keeps everything.
        now: Unix seconds.
        said: Tags and requests to remove; None: the tags given at save alone.

    Returns:
        A verdict per checkpoint, in the same order. The newest stays whatever is said; of the others, one that was
        asked to be removed goes, and a tagged one stays whatever the rules say.
    """
    if not commits:
        return []
    said = said or Said({commit.id: (commit.tag,) for commit in commits if commit.tag is not None})
    kept: dict[str, list[str]] = {}
    for rule in rules:
        for checkpoint in _kept_by(rule, commits, now, said):
            kept.setdefault(checkpoint, []).append(_reason(rule, commits))
    return [_verdict(commit, commit is commits[-1], kept, not rules, said, now) for commit in commits]


def _reason(rule: KeepRule, commits: Sequence[CommitRecord]) -> str:
    if isinstance(rule, BestN) and not rule.values(commits):
        return f"{rule!r}: no checkpoint has this metric, so nothing tells which is best"
    return repr(rule)


def _kept_by(rule: KeepRule, commits: Sequence[CommitRecord], now: float, said: Said) -> set[str]:
    if isinstance(rule, Tagged):
        return {*said.tags}
    return rule.keep_at(commits, now) if isinstance(rule, TimedRule) else rule.keep(commits)


def _verdict(
    commit: CommitRecord, newest: bool, kept: Mapping[str, Sequence[str]], no_rules: bool, said: Said, now: float
) -> Verdict:
    def verdict(keep: bool, why: str) -> Verdict:
        return Verdict(commit.id, commit.step, keep, why)

    asked = said.removals.get(commit.id)
    if newest:
        return verdict(True, "the newest always stays" + (f", though {asked} asked to remove it" if asked else ""))
    if asked:
        return verdict(False, f"{asked} asked to remove it")
    if commit.id in said.unreadable:
        return verdict(True, "its label can't be read, and may say that it is tagged")
    if said.tags.get(commit.id):
        return verdict(True, f"tagged {', '.join(said.tags[commit.id])}")
    if no_rules:
        return verdict(True, "there are no rules")
    if commit.id not in kept:
        return verdict(False, "no rule keeps it")
    ahead_s = commit.time - now
    ahead = f"; its time is {ahead_s:.0f} s ahead of this clock" if ahead_s > _SKEW_S else ""
    return verdict(True, ", ".join(kept[commit.id]) + ahead)


def check_rules(commits: Sequence[CommitRecord], rules: Sequence[KeepRule], now: float, said: Said) -> None:
    """Refuses rules that keep nothing of a run: they are more likely a mistake than meant.

    Args:
        commits: All of the run, oldest commit first.
        rules: To be checked.
        now: Unix seconds.
        said: Tags and requests to remove.

    Raises:
        InvalidInputError: `rules` is no sequence of rules, or they keep none of the checkpoints.
    """
    wrong = isinstance(rules, type | str | KeepRule) or any(
        isinstance(r, type) or not isinstance(r, KeepRule) for r in rules
    )
    if wrong:
        raise InvalidInputError(f"keep={rules!r} must be a list of rules such as [LatestN(3), EveryNSteps(1000)]")
    if commits and rules and not any(_kept_by(rule, commits, now, said) for rule in rules):
        raise InvalidInputError(
            f"the rules {list(rules)} keep none of the {len(commits)} checkpoints (steps {commits[0].step} to "
            f"{commits[-1].step}), so that all but the newest and the tagged would go; add LatestN(1) if that is meant"
        )
