"""The error tree: what may go wrong, grouped by what the caller does about it.

CheckpointError                          code: a stable string; every class survives pickling
├── InvalidInputError(ValueError)        the caller must change the call
├── CheckpointNotFoundError(FileNotFoundError)
├── CorruptionError                      which file and chunk, expected and found digest
├── CommitConflictError                  somebody else committed; who, and what to do
│   └── RunOwnedError                    another job that is alive owns the run; who, since when, how to take over
├── CommitUnknownError                   the store's answer was lost and could not be found out
├── FencedError                          a newer coordinator owns this run
├── SaveSkippedError                     the previous saves were still writing and the user chose to skip
├── StorageError                         what the store said, after how many tries
├── SaveTimeoutError(TimeoutError)       which workers are missing, and the option to change
├── WorkerFailuresError                  by rank
└── UntrustedDataError                   the checkpoint holds pickled data the caller did not allow

A message says what happened, to which step, rank or file, what was expected and found, and the next thing to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar


class CheckpointError(Exception):
    """Base of all errors of this package.

    Attributes:
        code: Stable string for programs; it never changes once released.
    """

    code: ClassVar[str] = "checkpoint_error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class InvalidInputError(CheckpointError, ValueError):
    """The caller must change the call; nothing was written."""

    code = "invalid_input"


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No such checkpoint, run or file."""

    code = "not_found"


class CorruptionError(CheckpointError):
    """Stored bytes are not what was committed."""

    code = "corruption"


class CommitConflictError(CheckpointError):
    """Somebody else committed what this call wanted to commit."""

    code = "commit_conflict"


class RunOwnedError(CommitConflictError):
    """Another job, which is alive, owns the run; nothing was written. `take_over=True` takes it over."""

    code = "run_owned"


class CommitUnknownError(CheckpointError):
    """The store's answer to a commit was lost and could not be found out."""

    code = "commit_unknown"


class FencedError(CheckpointError):
    """A newer coordinator owns this run; this one may not commit any more."""

    code = "fenced"


class SaveSkippedError(CheckpointError):
    """The save was skipped because earlier ones were still being written (`when_busy="skip"`)."""

    code = "save_skipped"


class StorageError(CheckpointError):
    """The store refused or failed; the message holds what it said and after how many tries."""

    code = "storage"


class SaveTimeoutError(CheckpointError, TimeoutError):
    """Workers did not join or stage in time; the message names them and the option to change."""

    code = "save_timeout"


class WorkerFailuresError(CheckpointError):
    """Workers failed.

    Attributes:
        failures: What went wrong, by rank.
        lost: Those of them that are dead or can't be reached, or that lost an actor or a node which they needed; the
            others' own code failed.
    """

    code = "worker_failures"

    def __init__(self, message: str, failures: Mapping[int, str] | None = None, lost: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.failures: dict[int, str] = dict(failures or {})
        self.lost: tuple[int, ...] = tuple(sorted(set(lost)))

    def __reduce__(self) -> tuple[type[WorkerFailuresError], tuple[str, dict[int, str], tuple[int, ...]]]:
        return type(self), (self.message, self.failures, self.lost)


class UntrustedDataError(CheckpointError):
    """The checkpoint holds pickled data, which runs code when it is loaded, and the caller did not allow it."""

    code = "untrusted_data"


_BY_CODE: dict[str, type[CheckpointError]] = {
    cls.code: cls
    for cls in (
        CheckpointError,
        InvalidInputError,
        CheckpointNotFoundError,
        CorruptionError,
        CommitConflictError,
        RunOwnedError,
        CommitUnknownError,
        FencedError,
        SaveSkippedError,
        StorageError,
        SaveTimeoutError,
        WorkerFailuresError,
        UntrustedDataError,
    )
}


def from_code(
    code: str, message: str, failures: Mapping[int, str] | None = None, lost: Iterable[int] = ()
) -> CheckpointError:
    """The error that `code` stands for, as it travelled between processes as plain data.

    Args:
        code: One of the `code` attributes above; an unknown one gives a plain `CheckpointError`.
        message: The message, ready for a person.
        failures: By rank, for `WorkerFailuresError`.
        lost: The ranks among them that were lost.

    Returns:
        The error, not raised.
    """
    if code == WorkerFailuresError.code:
        return WorkerFailuresError(message, failures, lost)
    return _BY_CODE.get(code, CheckpointError)(message)
