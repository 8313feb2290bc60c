"""Forks of runs, and what differs between two checkpoints, without Ray.

    rl_ckpt.fork("s3://bucket/run-7", "s3://bucket/run-7b", at=1000)
    print(rl_ckpt.diff("s3://bucket/run-7"))

Owns: checking what people give, and the reports. The work is done in store/forks.py and store/compare.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.info import CheckpointInfo, Diff
from rl_ckpt.store.commit_log import Log
from rl_ckpt.store.committer import info_of
from rl_ckpt.store.compare import Side, diff_of
from rl_ckpt.store.forks import make_fork
from rl_ckpt.store.labels import Labels
from rl_ckpt.store.listing import LATEST, Ref, find_ref, infos, read
from rl_ckpt.store.run import Run
from rl_ckpt.store.urls import check_url


def fork(
    source: str,
    url: str,
    *,
    at: Ref | None = None,
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
        at: Which checkpoint: a step, an id, a tag or "latest". None: the newest.
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
    commit = find_ref(run, log, labels, LATEST if at is None else at)
    new, record = make_fork(run, commit, here, options, weak_commits=weak_commits, verify=verify)
    return info_of(new, record, [record])


def diff(
    a_url: str,
    b_url: str | None = None,
    *,
    a: Ref | None = None,
    b: Ref | None = None,
    select: str | Sequence[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    b_storage_options: Mapping[str, Any] | None = None,
) -> Diff:
    """Says what differs between two checkpoints, of one run or of two, and by how much.

    Only chunks that differ are read, as far as digests tell: the others are equal. Of an array whose dtype or shape
    changed nothing is read. Memory is bounded by chunks, not by arrays.

    Args:
        a_url: Url of the run with the checkpoint before.
        b_url: Url of the one with the checkpoint after; None: the same.
        a: Which checkpoint is the one before: step, id, tag or "latest". None: the parent of `b`; with two urls, the
            newest of `a_url`.
        b: Which is the one after; None: the newest.
        select: Globs of paths; None: everything.
        storage_options: For fsspec, of `a_url`.
        b_storage_options: Of `b_url`; None: as `storage_options`, where the scheme is the same.

    Returns:
        Paths that were added, removed and changed, and how many bytes it took to tell.

    Raises:
        CheckpointNotFoundError: No such run or checkpoint, or the parent of `b` is no longer there.
        InvalidInputError: `select` chooses nothing of either.
        CorruptionError: A checkpoint is damaged where it had to be read.
        StorageError: A store failed.
    """
    before_url, options = check_url(a_url), dict(storage_options or {})
    after_url = before_url if b_url is None else check_url(b_url)
    if b_url is None:
        run = read(before_url, options if b_storage_options is None else b_storage_options)
        after = _side(*run, LATEST if b is None else b)
        before = _side(*run, a if a is not None else _parent(after))
    else:
        after = _side(
            *read(after_url, _options(after_url, b_storage_options, before_url, options)), LATEST if b is None else b
        )
        before = _side(*read(before_url, options), LATEST if a is None else a)
    return diff_of(before, after, select)


def _side(run: Run, log: Log, labels: Labels, ref: Ref) -> Side:
    commit = find_ref(run, log, labels, ref)
    return Side(run, commit, next(info for info in infos(run, log.commits, labels) if info.id == commit.id))


def _parent(side: Side) -> str:
    if side.commit.parent is None:
        raise InvalidInputError(f"checkpoint {side.commit.id} continues none: say with `a` what it is compared with")
    return side.commit.parent


def _options(
    url: str, own: Mapping[str, Any] | None, other: str, others: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """The options of one of two runs: those of the other, where none were given and the scheme is the same."""
    if own is not None:
        return own
    return (others or {}) if url.partition("://")[0] == other.partition("://")[0] else {}
