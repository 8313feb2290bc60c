"""When to save: one object that a training loop asks at every step. Pure; the clock is injected.

Owns: what rules (`save_rules`) remember of saves so far, and what saves cost. Promises: asking changes nothing, so a
save that was skipped or raised is due again at the next step; a metric that is missing or not finite is never the best;
a clock that jumps back delays a save by one interval at most, and one that jumps forward makes one save and not many.
Does not: save, wait, or touch signals (`rl_ckpt.signals` does).
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.info import CheckpointInfo, Preemption
from rl_ckpt.plan.interval import Chosen, interval
from rl_ckpt.plan.save_rules import Asked, Auto, Best, Found, OnPreemption, SaveRule

_SEEN = 8  # saves whose cost counts: the median of a few, so that a slow first one is soon forgotten
_LEAST_S = 1.0  # that an urgent save gets, however late the notice


@dataclass(frozen=True, slots=True)
class Due:
    """A save is due."""

    step: int
    """The step that was asked about."""
    reasons: tuple[str, ...]
    """Why, for people; one for each rule that says so."""
    urgent: bool = False
    """Whether something is about to be taken away: save at once, and wait for it."""
    deadline_s: float | None = None
    """For `save(deadline_s=...)`; None where nothing presses."""
    preemption: Preemption | None = None
    """The notice, where it is for one."""

    @property
    def text(self) -> str:
        """All reasons in a line."""
        return "; ".join(self.reasons)

    @property
    def leave(self) -> bool:
        """Whether this process has to go once it has saved."""
        return self.preemption is not None and self.preemption.this_process


class Saving(Protocol):
    """A save under way; `PendingSave` is one."""

    def peek(self) -> CheckpointInfo | BaseException | None:
        """What came of it; None where that is open."""
        ...


class SavePolicy:
    """When to save: asked by a training loop at every step. For one thread.

    Example:
        policy = SavePolicy(EverySteps(1000), Best("return"), Auto(min_s=60))
        for step in range(1, steps + 1):
            metrics = train()
            if due := policy.due(step, metrics):
                policy.began(due, ckpt.save(step, workers, metrics=metrics, deadline_s=due.deadline_s))
    """

    def __init__(self, *rules: SaveRule, clock: Callable[[], float] = time.monotonic) -> None:
        """A policy by which nothing was saved yet.

        Args:
            rules: A save is due when any of them says so; at least one. Any save counts as the last for all of them.
            clock: In seconds.

        Raises:
            InvalidInputError: There is no rule, something is no rule, or there are two `Auto`.
        """
        if not rules:
            raise InvalidInputError("SavePolicy() has no rules and would never save; give one, such as Auto()")
        for rule in rules:
            if isinstance(rule, type) or not isinstance(rule, SaveRule):
                raise InvalidInputError(f"{rule!r} is no rule; give rules such as EverySteps(1000) or Auto()")
        autos = [rule for rule in rules if isinstance(rule, Auto)]
        if len(autos) > 1:
            raise InvalidInputError("two Auto rules choose two intervals; leave one of them")
        self._rules, self._clock = rules, clock
        self._auto = autos[0] if autos else None
        self._memory: list[Any] = [None] * len(rules)
        self._found: dict[int, Found] = {}  # by place of the rule: of the last `due`
        self._found_step: int | None = None
        self._asked_at = self._saved_at = self._seen_at = clock()
        self._last_step: int | None = None
        self._under_way: list[tuple[Saving, dict[int, Any], dict[int, Any]]] = []
        self._stalls: deque[float] = deque(maxlen=_SEEN)
        self._durables: deque[float] = deque(maxlen=_SEEN)
        self._observed_s = 0.0
        self._failures = 0

    def due(self, step: int, metrics: Mapping[str, Any] | None = None) -> Due | None:
        """Whether to save now. Asking again gives the same answer until `began` or `saved`.

        Args:
            step: The step that was just done.
            metrics: By name, for `Best`.

        Returns:
            Why, and how much time there is; None: go on.
        """
        now = self._now()
        self._collect()
        if self._last_step is None or step < self._last_step:  # the first step, or the loop went back
            self._last_step = step - 1
        chosen = self.chosen
        unmeasured = not self._stalls and self._under_way  # how long the first takes is not known yet: one at a time
        auto_s = None if chosen is None or unmeasured else chosen.interval_s
        asked = Asked(step, self._last_step, now - self._saved_at, metrics or {}, auto_s)
        answers = [rule.ask(asked, memory) for rule, memory in zip(self._rules, self._memory, strict=True)]
        self._found = {place: found for place, found in enumerate(answers) if found is not None}
        self._found_step, self._asked_at = step, now
        return _due(step, list(self._found.values())) if self._found else None

    def began(self, due: Due, saving: Saving | None = None) -> None:
        """The save that was due is under way: what it was due for is done.

        Args:
            due: From `due`.
            saving: The `PendingSave`; asked by later calls of `due` what the save has cost, and whether it failed.
        """
        before = {place: self._memory[place] for place in self._found}
        after = {place: found.after for place, found in self._found.items()}
        if due.step == self._found_step:
            for place, memory in after.items():
                self._memory[place] = memory
        if saving is not None:
            self._under_way.append((saving, before, after))
        self._last_step, self._saved_at = due.step, self._asked_at
        self._found, self._found_step = {}, None

    def saved(self, info: CheckpointInfo) -> None:
        """A save is committed: for loops that wait for it, and so have no use for `began`."""
        if info.step == self._found_step:
            self.began(Due(info.step, ()))
        self._last_step = info.step if self._last_step is None else max(self._last_step, info.step)
        self._measure(info)

    def restored(self, step: int) -> None:
        """The job went (back) to a step: the next save is counted from there."""
        self._under_way = []
        self._found, self._found_step = {}, None
        self._last_step, self._saved_at = step, self._now()

    def lost(self, count: int = 1) -> None:
        """Something failed and work was lost: `Auto` learns how often that is.

        Args:
            count: How many failures.

        Raises:
            InvalidInputError: It is no integer of at least 0.
        """
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise InvalidInputError(f"lost({count!r}): count must be an integer of at least 0")
        self._failures += count

    @property
    def chosen(self) -> Chosen | None:
        """The interval that `Auto` has chosen, and why; None where there is no `Auto`."""
        auto = self._auto
        if auto is None:
            return None
        mtbf_s = (auto.mtbf_s + self._observed_s) / (1 + self._failures)
        durable_s = statistics.median(self._durables) if self._durables else 0.0
        if not self._stalls:
            return Chosen(auto.min_s, None, durable_s, mtbf_s, self._failures)
        stall_s = statistics.median(self._stalls)
        # Two saves at a time would wait for each other: one is durable before the next begins.
        least_s = max(auto.min_s, durable_s)
        chosen_s = max(least_s, min(auto.max_s, interval(stall_s, mtbf_s)))
        return Chosen(chosen_s, stall_s, durable_s, mtbf_s, self._failures)

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint can hold of it: the best values, costs and failures so far. Plain data."""
        best: dict[str, float] = {}
        for place, rule in enumerate(self._rules):
            # As it is once the save that is due has begun: this is what that save holds.
            memory = self._found[place].after if place in self._found else self._memory[place]
            if isinstance(rule, Best) and memory is not None:
                best[rule.name] = memory
        return {
            "best": best,
            "stalls_s": list(self._stalls),
            "durables_s": list(self._durables),
            "observed_s": self._observed_s,
            "failures": self._failures,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Takes `get_state` back; of rules that are not there any more, nothing."""
        best = state["best"]
        for place, rule in enumerate(self._rules):
            if isinstance(rule, Best) and rule.name in best:
                self._memory[place] = best[rule.name]
        self._stalls = deque(state["stalls_s"], _SEEN)
        self._durables = deque(state["durables_s"], _SEEN)
        self._observed_s, self._failures = state["observed_s"], state["failures"]

    def _now(self) -> float:
        """The time; where the clock has gone back, as if no time had passed meanwhile."""
        now = self._clock()
        passed = now - self._seen_at
        if passed < 0:
            self._saved_at += passed
            self._asked_at += passed
        else:
            self._observed_s += passed
        self._seen_at = now
        return now

    def _collect(self) -> None:
        """Takes what came of saves under way."""
        open_ = []
        for saving, before, after in self._under_way:
            outcome = saving.peek()
            if outcome is None:
                open_.append((saving, before, after))
            elif isinstance(outcome, CheckpointInfo):
                self._measure(outcome)
            else:  # it is no checkpoint: the best is not saved, and what is taken away is in danger still
                for place, memory in after.items():
                    if isinstance(self._rules[place], Best | OnPreemption) and self._memory[place] == memory:
                        self._memory[place] = before[place]
        self._under_way = open_

    def _measure(self, info: CheckpointInfo) -> None:
        for seen, value in ((self._stalls, info.stall_s), (self._durables, info.durable_s)):
            if value is not None and math.isfinite(value) and value >= 0:
                seen.append(value)


def _due(step: int, found: Sequence[Found]) -> Due:
    reasons = tuple(one.why for one in found)
    pressing = [one for one in found if one.preemption is not None]
    if not pressing:
        return Due(step, reasons)
    first = min(pressing, key=lambda one: one.preemption.deadline if one.preemption else math.inf)
    assert first.preemption is not None
    left_s = max(first.preemption.seconds_left * first.reserve, _LEAST_S)
    return Due(step, reasons, True, left_s, first.preemption)
