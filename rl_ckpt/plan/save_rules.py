"""Rules that say when to save; see `when`, which asks them. Pure, but for what a user gives them to ask."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.info import Preemption

RESERVE = 0.8
"""Of the time before a preemption that an urgent save may take."""


class Asked(NamedTuple):
    """What a rule is asked about."""

    step: int
    last_step: int
    """Of the last save; before the first one, the step before the first that was asked about."""
    elapsed_s: float
    """Since the last save, or since the policy was made."""
    metrics: Mapping[str, Any]
    auto_s: float | None
    """The interval that is chosen, where there is an `Auto`; None too while the first save is on its way."""


class Found(NamedTuple):
    """A rule says that a save is due."""

    why: str
    after: Any = None
    """What the rule remembers once the save has begun."""
    preemption: Preemption | None = None
    reserve: float = RESERVE


@runtime_checkable
class SaveRule(Protocol):
    """A rule: says whether a save is due."""

    def ask(self, asked: Asked, memory: Any) -> Found | None:
        """Whether a save is due.

        Args:
            asked: Step, metrics, and how long ago the last save was.
            memory: `after` of the last save that this rule asked for; None before.
        """
        ...


@dataclass(frozen=True, slots=True)
class EverySteps:
    """At every multiple of `n` steps, or the first step asked about after it; not at step 0."""

    n: int

    def __post_init__(self) -> None:
        """Checks `n`: an integer of at least 1."""
        if not isinstance(self.n, int) or isinstance(self.n, bool) or self.n < 1:
            raise InvalidInputError(f"EverySteps({self.n!r}): n must be an integer of at least 1")

    def ask(self, asked: Asked, memory: Any) -> Found | None:
        """See `SaveRule.ask`."""
        passed = asked.step // self.n > max(asked.last_step, 0) // self.n
        return Found(f"step {asked.step}: every {self.n} steps") if passed else None


@dataclass(frozen=True, slots=True)
class EverySeconds:
    """When so many seconds have passed since the last save began."""

    seconds: float

    def __post_init__(self) -> None:
        """Checks `seconds`: greater than 0."""
        _check_seconds("EverySeconds: seconds", self.seconds)

    def ask(self, asked: Asked, memory: Any) -> Found | None:
        """See `SaveRule.ask`."""
        if asked.elapsed_s < self.seconds:
            return None
        return Found(f"{asked.elapsed_s:.0f} s since the last save: every {self.seconds:g} s")


@dataclass(frozen=True, slots=True)
class Best:
    """When a metric is better than at any save that this rule asked for. A value that is no finite number never is."""

    metric: str
    """Its name in the metrics that `due` is given."""
    mode: str = "max"
    """Which is better: "max" or "min"."""

    def __post_init__(self) -> None:
        """Checks both."""
        if not isinstance(self.metric, str) or not self.metric:
            raise InvalidInputError(f"Best({self.metric!r}): metric must be the name of a metric")
        if self.mode not in ("max", "min"):
            raise InvalidInputError(f"Best(mode={self.mode!r}): mode must be 'max' or 'min'")

    @property
    def name(self) -> str:
        """Of what is remembered for it, in `SavePolicy.get_state`."""
        return f"{self.mode} {self.metric}"

    def ask(self, asked: Asked, memory: Any) -> Found | None:
        """See `SaveRule.ask`."""
        value = _number(asked.metrics.get(self.metric))
        if value is None or (memory is not None and not (value > memory if self.mode == "max" else value < memory)):
            return None
        before = "" if memory is None else f" (before: {memory:g})"
        return Found(f"{self.metric} {value:g} is the best so far{before}", value)


@dataclass(frozen=True, slots=True)
class OnSignal:
    """When somebody asks for a save: a signal to the process, a file, a button.

    Example:
        with rl_ckpt.SignalWatch(signal.SIGUSR1) as asked:
            policy = SavePolicy(EverySteps(1000), OnSignal(asked.count))
    """

    count: Callable[[], int]
    """How often it was asked for so far."""

    def ask(self, asked: Asked, memory: Any) -> Found | None:
        """See `SaveRule.ask`."""
        count = self.count()
        return Found("asked for by a signal", count) if count > (memory or 0) else None


@dataclass(frozen=True, slots=True)
class OnPreemption:
    """When this process or nodes of the job are about to be taken away; once for each such notice, unless that fails.

    Example:
        with ckpt.preemption() as watch:
            policy = SavePolicy(Auto(), OnPreemption(lambda: watch.notice(workers)))
    """

    notice: Callable[[], Preemption | None]
    """Asked each time; `PreemptionWatch.notice`."""
    reserve: float = RESERVE
    """Part of the time until then that the save may take."""

    def __post_init__(self) -> None:
        """Checks `reserve`: greater than 0, at most 1."""
        if isinstance(self.reserve, bool) or not isinstance(self.reserve, int | float) or not 0 < self.reserve <= 1:
            raise InvalidInputError(f"OnPreemption(reserve={self.reserve!r}) must be greater than 0 and at most 1")

    def ask(self, asked: Asked, memory: Any) -> Found | None:
        """See `SaveRule.ask`."""
        notice = self.notice()
        if notice is None or memory == (notice.this_process, notice.nodes):
            return None
        return Found(notice.reason, (notice.this_process, notice.nodes), notice, self.reserve)


@dataclass(frozen=True, slots=True)
class Auto:
    """At the interval that loses least time, from what saves cost and how often something fails.

    Until the first save is begun, that is `min_s`; the second waits until the first is measured. See `plan.interval`
    for how it is chosen.
    """

    min_s: float = 30.0
    """Never more often than this, in seconds."""
    max_s: float = 3600.0
    """Never more seldom, in seconds; but where saves take longer to be durable, one is done before the next begins."""
    mtbf_s: float = 86400.0
    """Mean time between failures of the whole job that is believed before any was seen, in seconds. It counts as much
    as one failure that was seen."""

    def __post_init__(self) -> None:
        """Checks all three: greater than 0, and `min_s` at most `max_s`."""
        for name in ("min_s", "max_s", "mtbf_s"):
            _check_seconds(f"Auto: {name}", getattr(self, name))
        if self.min_s > self.max_s:
            raise InvalidInputError(f"Auto(min_s={self.min_s!r}, max_s={self.max_s!r}): min_s must not be the greater")

    def ask(self, asked: Asked, memory: Any) -> Found | None:
        """See `SaveRule.ask`."""
        if asked.auto_s is None or asked.elapsed_s < asked.auto_s:
            return None
        return Found(f"{asked.elapsed_s:.0f} s since the last save: every {asked.auto_s:.0f} s, as chosen")


def _number(value: object) -> float | None:
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a scalar of NumPy, PyTorch, JAX
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _check_seconds(name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:  # type: ignore[operator]  # a number by then
        raise InvalidInputError(f"{name}={value!r} must be a number of seconds greater than 0")
