"""How often to save: the interval that loses least time, from what saves cost and how often something fails.

Owns: the formula, and what a choice says of itself. Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


def interval(cost_s: float, mtbf_s: float) -> float:
    """From the begin of one save to the begin of the next, so that saves and repeated work together take least time.

    Args:
        cost_s: What a save takes of training: its stall, in seconds.
        mtbf_s: Mean time between failures, in seconds.

    Returns:
        In seconds; without bounds. The time until a save is durable adds as much to what a failure loses whatever the
        interval is, and so is no part of this.

    Source: J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, FGCS 22 (2006),
    eq. 37; its first term is J. W. Young's sqrt(2 * cost * MTBF) (CACM 17, 1974).
    """
    if cost_s >= 2 * mtbf_s:
        return mtbf_s + cost_s
    share = cost_s / (2 * mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(share) / 3 + share / 9)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What `Auto` has chosen, and why."""

    interval_s: float
    """From the begin of one save to the begin of the next, in seconds."""
    stall_s: float | None
    """What a save costs: the median of the last ones; None before the first was measured."""
    durable_s: float
    """From its begin until it is committed, likewise."""
    mtbf_s: float
    """Mean time between failures, as believed and seen."""
    failures: int
    """That were seen."""

    @property
    def lost_share(self) -> float:
        """Of all time: stalls, and work that failures will have to be repeated."""
        return (self.stall_s or 0.0) / self.interval_s + self.at_risk_s / self.mtbf_s

    @property
    def at_risk_s(self) -> float:
        """Work that a failure loses on the average, in seconds."""
        return self.interval_s / 2 + self.durable_s

    @property
    def text(self) -> str:
        """In a line."""
        failures = f"{self.failures} failure{'' if self.failures == 1 else 's'} seen"
        if self.stall_s is None:
            return f"every {self.interval_s:.4g} s until a save is measured ({failures})"
        return (
            f"every {self.interval_s:.4g} s: a save stalls training {self.stall_s:.3g} s and is durable after "
            f"{self.durable_s:.3g} s, with a failure every {self.mtbf_s / 3600:.3g} h ({failures}) that loses "
            f"{self.at_risk_s:.3g} s on the average; {self.lost_share:.2%} of the time is lost to both"
        )
