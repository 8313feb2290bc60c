"""What a restore of an Algorithm did. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class AlgorithmRestore:
    """What a restore of an Algorithm did."""

    step: int
    """Of the checkpoint."""
    id: str
    """Of the checkpoint."""
    iteration: int
    """Training iteration that the Algorithm goes on from."""
    policies: Mapping[str, str]
    """Policies that were restored: id in the checkpoint → id here."""
    learners: int
    """Learners that hold the restored weights and optimizers, a local one included."""
    env_runners: int
    """Env runners that hold them, a local one included."""
    eval_env_runners: int
    """The same of evaluation runners."""
    digests: Mapping[str, str]
    """By policy id here: digest of the weights that act, the same on all learners and runners (compared before the
    restore returned)."""
    bytes: int
    """Of arrays, all processes together."""
    bytes_from: Mapping[str, int]
    """As in `RestoreReport`."""
    seconds: float
    """That it took."""
    fell_back: Mapping[str, str] = field(default_factory=dict)
    """Newer checkpoints that could not be used: id → why."""
    repaired: Mapping[str, str] = field(default_factory=dict)
    """As in `RestoreReport`."""
    notices: tuple[str, ...] = ()
    """What did not come back as it was, for people: runners that have no counterpart in the checkpoint, environments
    that can't be restored and begin new episodes."""
