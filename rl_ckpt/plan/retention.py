"""Retention: rules that say which checkpoints stay. One stays where any rule keeps it; the newest always stays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.format.records import CommitRecord
from rl_ckpt.state import leaves


@runtime_checkable
class KeepRule(Protocol):
    """A rule: chooses the checkpoints to keep."""

    def keep(self, commits: Sequence[CommitRecord]) -> set[str]:
        """Ids of the checkpoints that this rule keeps.

        Args:
            commits: All of the run, oldest commit first; not empty.
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
    """Keeps the `n` checkpoints with the best value of a metric; of equal ones the newer."""

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
        values: dict[str, Any] = {commit.id: leaves.decode(commit.metrics.get(self.metric)) for commit in commits}
        sign = 1 if self.mode == "max" else -1
        numbers = [(sign * value, place, id_) for place, (id_, value) in enumerate(values.items()) if _is_number(value)]
        return {id_ for _, _, id_ in sorted(numbers)[-self.n :]}


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return number and not math.isnan(value)  # type: ignore[arg-type]  # numpy's too


def to_drop(commits: Sequence[CommitRecord], rules: Sequence[KeepRule]) -> list[CommitRecord]:
    """Checkpoints that no rule keeps.

    Args:
        commits: All of the run, oldest commit first.
        rules: None at all keeps everything. Tagged checkpoints and the newest stay whatever the rules say.
    """
    if not rules or not commits:
        return []
    kept = {commits[-1].id}.union(*(rule.keep(commits) for rule in rules))
    return [commit for commit in commits if commit.id not in kept and commit.tag is None]
