"""rl_ckpt: checkpoints for reinforcement learning on Ray, written as Arrow files to local disk or S3.

Three lines do the work:

    ckpt = rl_ckpt.Checkpointer("s3://bucket/run-7")
    ckpt.save(step, workers)
    ckpt.restore(workers)

Importing the package imports neither Ray nor torch nor jax.
"""

from rl_ckpt._version import __version__
from rl_ckpt.catalog import Catalog
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
    ArrayChange,
    CheckpointInfo,
    Damage,
    Diff,
    LeafChange,
    Preemption,
    PrefetchReport,
    Progress,
    PullReport,
    Recovery,
    RestoreReport,
    SuperviseReport,
    SweepReport,
    Verdict,
    VerifyReport,
)
from rl_ckpt.lineage import diff, fork
from rl_ckpt.plan.retention import BestN, EveryNSteps, KeepRule, LatestN, NewerThan, OnePer, Tagged
from rl_ckpt.prefetching import Prefetch, prefetch
from rl_ckpt.state.declare import PerRank, Replicated, Sharded
from rl_ckpt.store.pending import PendingSave
from rl_ckpt.transfer import pull, watch

__all__ = [
    "ArrayChange",
    "BestN",
    "Catalog",
    "CheckpointError",
    "CheckpointInfo",
    "CheckpointNotFoundError",
    "Checkpointer",
    "CommitConflictError",
    "CommitUnknownError",
    "CorruptionError",
    "Damage",
    "Diff",
    "EveryNSteps",
    "FencedError",
    "InvalidInputError",
    "KeepRule",
    "LatestN",
    "LeafChange",
    "NewerThan",
    "OnePer",
    "PendingSave",
    "PerRank",
    "Preemption",
    "Prefetch",
    "PrefetchReport",
    "Progress",
    "PullReport",
    "Recovery",
    "Replicated",
    "RestoreReport",
    "RunOwnedError",
    "SaveSkippedError",
    "SaveTimeoutError",
    "Sharded",
    "StorageError",
    "SuperviseReport",
    "SweepReport",
    "Tagged",
    "UntrustedDataError",
    "Verdict",
    "VerifyReport",
    "WorkerFailuresError",
    "__version__",
    "diff",
    "fork",
    "prefetch",
    "pull",
    "watch",
]
