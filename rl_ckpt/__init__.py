"""rl_ckpt: checkpoints for reinforcement learning on Ray, written as Arrow files to local disk or S3.

Three lines do the work:

    ckpt = rl_ckpt.Checkpointer("s3://bucket/run-7")
    ckpt.save(step, workers)
    ckpt.restore(workers)

Importing the package imports neither Ray nor torch nor jax.
"""

from rl_ckpt._version import __version__
from rl_ckpt.checkpointer import Checkpointer
from rl_ckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CommitConflictError,
    CommitUnknownError,
    CorruptionError,
    FencedError,
    InvalidInputError,
    RunOwnedError,
    SaveSkippedError,
    SaveTimeoutError,
    StorageError,
    UntrustedDataError,
    WorkerFailuresError,
)
from rl_ckpt.info import (
    CheckpointInfo,
    Damage,
    Preemption,
    Recovery,
    RestoreReport,
    SuperviseReport,
    VerifyReport,
)
from rl_ckpt.plan.retention import EveryNSteps, KeepRule, LatestN
from rl_ckpt.plan.save_rules import Auto, Best, EverySeconds, EverySteps, OnPreemption, OnSignal, SaveRule
from rl_ckpt.plan.when import Due, SavePolicy
from rl_ckpt.signals import SignalWatch
from rl_ckpt.state.declare import PerRank, Replicated, Sharded
from rl_ckpt.store.pending import PendingSave

__all__ = [
    "Auto",
    "Best",
    "CheckpointError",
    "CheckpointInfo",
    "CheckpointNotFoundError",
    "Checkpointer",
    "CommitConflictError",
    "CommitUnknownError",
    "CorruptionError",
    "Damage",
    "Due",
    "EveryNSteps",
    "EverySeconds",
    "EverySteps",
    "FencedError",
    "InvalidInputError",
    "KeepRule",
    "LatestN",
    "OnPreemption",
    "OnSignal",
    "PendingSave",
    "PerRank",
    "Preemption",
    "Recovery",
    "Replicated",
    "RestoreReport",
    "RunOwnedError",
    "SavePolicy",
    "SaveRule",
    "SaveSkippedError",
    "SaveTimeoutError",
    "Sharded",
    "SignalWatch",
    "StorageError",
    "SuperviseReport",
    "UntrustedDataError",
    "VerifyReport",
    "WorkerFailuresError",
    "__version__",
]
