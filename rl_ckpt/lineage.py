"""Forks of runs, and what differs between two checkpoints, without Ray.

    rl_ckpt.fork("s3://bucket/run-7", "s3://bucket/run-7b", at=1000)
    print(rl_ckpt.diff("s3://bucket/run-7"))

Owns: checking what people give, and the reports. The work is done in store/forks.py and store/compare.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rl_ckpt.info import CheckpointInfo
from rl_ckpt.store.committer import info_of
from rl_ckpt.store.forks import make_fork
from rl_ckpt.store.listing import find_ref, read
from rl_ckpt.store.urls import check_url


def fork(
    source: str,
    url: str,
    *,
    at: int | str = "latest",
    storage_options: Mapping[str, Any] | None = None,
    source_storage_options: Mapping[str, Any] | None = None,
    weak_commits: bool = False,
    verify: bool = False,
) -> CheckpointInfo:
    """Begins a new run with a checkpoint of another one, without copying its bytes.

    The new run goes on like any other: it is restored, saved to, swept and verified by its own url. It reads the
    checkpoint's files where they are, in the source; a pin there keeps them, until no checkpoint of the fork needs them
    any more. The source may go on too, in another job.

    Args:
        source: Url of the run to be forked, itself a fork or not. It must be writable, for the pin.
        url: Of the new run; nothing may be there yet.
        at: Which checkpoint: a step, an id, a tag or "latest".
        storage_options: For fsspec, of the new run. Its readers read the source with the same, where the scheme is;
            else, or where those are not right, with what is given as `storage_options={"bases": {...}}`.
        source_storage_options: Of the source; None: as `storage_options`, where the scheme is the same.
        weak_commits: As for `Checkpointer`: does without the create-only promise at `url`.
        verify: Reads and compares every chunk of the checkpoint first; without it only the sizes of files are.

    Returns:
        The new run's first checkpoint; its parent is the source's.

    Raises:
        InvalidInputError: There is something at `url`, or it lies within the source; nothing was written.
        CheckpointNotFoundError: No such run or checkpoint; nothing was written.
        CorruptionError: The checkpoint is damaged; nothing was written.
        StorageError: A store failed, or may not be written to. The same call takes up what was written.
    """
    there, here = check_url(source), check_url(url)
    options = dict(storage_options or {})
    run, log, labels = read(there, _options(there, source_storage_options, here, options))
    commit = find_ref(run, log, labels, at)
    new, record = make_fork(run, commit, here, options, weak_commits=weak_commits, verify=verify)
    return info_of(new, record, [record])


def _options(
    url: str, own: Mapping[str, Any] | None, other: str, others: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """The options of one of two runs: those of the other, where none were given and the scheme is the same."""
    if own is not None:
        return own
    return (others or {}) if url.partition("://")[0] == other.partition("://")[0] else {}
