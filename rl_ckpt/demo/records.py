"""What a run of the demo is asked to do and what it leaves behind, as plain records.

Shared by `job`, which fills them, and `report`, which draws them; imports nothing of the room.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class JobConfig:
    """What to run."""

    url: str
    """Where the checkpoints go: a folder or any fsspec URL, e.g. `s3://bucket/run`."""
    iterations: int = 36
    """Training steps of the whole job; one is a round of playing and a round of learning."""
    workers: int = 4
    """Rollout workers until the failure."""
    workers_after: int = 3
    """Rollout workers after the recovery."""
    seed: int = 0
    save_every: int = 4
    """Iterations between saves."""
    envs: int = 8
    """Environments per rollout worker."""
    horizon: int = 128
    """Steps per environment and iteration."""
    address: str | None = None
    """Of the Ray cluster to run on, `auto` for the one of this machine; None: one of its own."""
    kill: str = "demo"
    """Who kills the node: `demo`, or `you`, for whom the job waits while it trains."""

    @property
    def fail_at(self) -> int:
        """The step after which the node is killed: in the middle, with work done since the save before it."""
        middle = max(self.iterations // 2, self.save_every)
        return middle - middle % self.save_every + self.save_every // 2


@dataclass(frozen=True, slots=True)
class IterationRecord:
    """One iteration of training."""

    step: int
    """Iterations the learner has done; it falls back when a checkpoint is restored."""
    mean_return: float
    """Of the episodes that ended in it; the iteration before's where none did; NaN where there is none yet."""
    ended: int
    """Episodes that ended in it."""
    life: int
    """0 until the failure, 1 after the recovery."""


@dataclass(frozen=True, slots=True)
class SaveRecord:
    """One save."""

    step: int
    mean_return: float
    stall_s: float
    """How long `save()` kept training waiting."""
    durable_s: float
    """From the call of `save()` to the commit, as seen by the driver."""
    bytes: int
    """Of the checkpoint."""
    bytes_written: int
    """New bytes in the store."""
    error: str = ""
    """Why it did not commit; empty where it did."""


@dataclass(frozen=True, slots=True)
class RecoveryRecord:
    """The failure and what followed."""

    failed_after: int
    """Last step done before the failure."""
    restored_step: int
    noticed_s: float
    """From the kill until the job saw that an actor had died; where somebody else killed, from its last answer."""
    rebuilt_s: float
    """From then until a new set of actors stood."""
    restored_s: float
    """Duration of the restore."""
    bytes_from: Mapping[str, int] = field(default_factory=dict)
    """What it read, by source; as in `RestoreReport`."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing the demo makes sure of after the recovery."""

    name: str
    passed: bool
    detail: str


@dataclass(slots=True)
class JobResult:
    """Everything a run left behind."""

    iterations: list[IterationRecord] = field(default_factory=list)
    saves: list[SaveRecord] = field(default_factory=list)
    recovery: RecoveryRecord | None = None
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the job recovered and everything that was checked held."""
        return self.recovery is not None and bool(self.checks) and all(check.passed for check in self.checks)
