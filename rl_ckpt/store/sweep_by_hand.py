"""Sweeps and removals that a person or a timer asks for, beside the jobs that save.

Owns: the dry run, taking the run over for one sweep, and the grace time from one such sweep to the next. Promises: a
dry run writes nothing and tells what a sweep would do; a sweep deletes nothing while a job owns the run, nor where its
rules keep nothing. The deleting itself is store/sweep.py's, for these and for jobs alike.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import msgspec

from rl_ckpt.errors import CorruptionError, InvalidInputError, RunOwnedError, StorageError
from rl_ckpt.format import records
from rl_ckpt.format.records import CommitRecord, WaitingRecord
from rl_ckpt.info import SweepReport
from rl_ckpt.plan.retention import KeepRule, check_rules, decide
from rl_ckpt.store.base import ObjectMissingError, Store, StoredObject
from rl_ckpt.store.commit_log import Log
from rl_ckpt.store.committer import Committer
from rl_ckpt.store.labels import Labels, leftovers, missing, relabel
from rl_ckpt.store.orphans import checkpoint_of, is_base, list_parts, unnamed
from rl_ckpt.store.pins import holders, read_pins
from rl_ckpt.store.run import Run

_READERS = 16


@dataclass(frozen=True, slots=True)
class _Planned:
    """What a sweep would do, without having written anything."""

    report: SweepReport
    files: Mapping[str, frozenset[str]]
    """By checkpoint: the shard files that its manifest names."""
    idle: bool
    """Whether there is nothing to do at all."""
    unreadable: tuple[str, ...]
    """A notice where manifests can't be read."""


def dry_run(run: Run, log: Log, labels: Labels, keep: Sequence[KeepRule], grace_s: float) -> SweepReport:
    """What `sweep` would do; nothing is written.

    Raises:
        InvalidInputError: The rules keep nothing.
        CorruptionError: Checkpoints are to go, and the newest can't be read.
        StorageError: The store failed.
    """
    return _plan(run, log, labels, keep, grace_s).report


def sweep(run: Run, log: Log, labels: Labels, keep: Sequence[KeepRule], grace_s: float) -> SweepReport:
    """Takes the run over, sweeps once, and lets it go again; where there is nothing to do it is not taken.

    Args:
        run: The run.
        log: As it was read a moment ago.
        labels: As they were read a moment ago.
        keep: Retention rules.
        grace_s: How long files that no checkpoint names are kept, since a sweep has first seen them, in seconds.

    Raises:
        InvalidInputError: The rules keep nothing; nothing was written.
        CorruptionError: Checkpoints are to go, and the newest can't be read; nothing was written.
        RunOwnedError: A job that is alive owns the run; nothing was written.
        StorageError: The store failed; nothing live is harmed.
    """
    planned = _plan(run, log, labels, keep, grace_s)
    if planned.idle:
        return replace(planned.report, dry_run=False)
    try:
        committer = Committer(run, keep, grace_s, job="a sweep", beside=True)
    except RunOwnedError as error:
        raise RunOwnedError(
            f"{error}. Only the job that owns a run deletes of it: it sweeps after every save, by its own rules"
        ) from error
    try:
        return _sweep(run.store, committer, planned)
    finally:
        committer.close()


def _sweep(store: Store, committer: Committer, planned: _Planned) -> SweepReport:
    sweeper, notices = committer.sweeper, [*planned.unreadable]
    now = sweeper.store_now()
    before = _waiting(store)
    if now is None:
        notices.append("the store tells no times: files whose grace is not over wait for a sweep that runs as long")
    else:
        sweeper.seen({name: now - first for name, first in before.items()})
    sweeper.know(planned.files)
    try:
        committer.tidy()
    except (StorageError, InvalidInputError) as error:  # the latter: a base whose url can't be used here
        if not sweeper.done.uncleaned:
            raise
        notices.append(f"{sweeper.done.uncleaned}: {error}")
    waiting = sweeper.waiting()
    # A crash before this line leaves the times of the sweep before: what this one dropped waits once more.
    if now is not None and waiting:
        record = WaitingRecord(waiting={name: now - age_s for name, (age_s, _) in waiting.items()})
        store.put(records.WAITING_FILE, [records.encode(record)])
    elif before:
        store.delete([records.WAITING_FILE])
    done = sweeper.done
    return SweepReport(
        verdicts=tuple(committer.verdicts),
        deleted=tuple(done.deleted),
        pinned=dict(done.pinned),
        put_back=tuple(commit.id for commit in done.put_back),
        files=done.files,
        bytes=done.bytes,
        waiting_files=sum(not is_base(name) for name in waiting),
        waiting_bytes=sum(size for _, size in waiting.values()),
        partial_uploads=done.partial,
        notices=tuple(notices),
    )


def remove(
    run: Run, log: Log, labels: Labels, commits: Sequence[CommitRecord], force: bool, grace_s: float
) -> SweepReport:
    """Removes checkpoints, or leaves word for the job that owns the run.

    Args:
        run: The run.
        log: As it was read a moment ago.
        labels: As they were read a moment ago.
        commits: Which ones.
        force: Whether tagged ones too.
        grace_s: As for `sweep`.

    Raises:
        InvalidInputError: One is the newest, tagged, or held by a reader or a fork; nothing was written.
        CheckpointNotFoundError: One was dropped meanwhile.
        CorruptionError: The newest can't be read; nothing was written.
        StorageError: The store failed, or can't be written to.
    """
    _check_removable(run, log, labels, commits, force)
    # The request first: where a job owns the run, or this process is killed, the next sweep carries it out.
    changed = {c.id: relabel(run, c, lambda label: msgspec.structs.replace(label, remove=True)) for c in commits}
    now = Labels({**labels.by_checkpoint, **changed}, labels.damaged)
    try:
        return sweep(run, log, now, (), grace_s)
    except RunOwnedError:
        owner = log.last_epoch.owner if log.last_epoch else "its owner"
        when = f"{owner}, which owns the run, removes it after its next save; where it ends before, the next sweep does"
        report = dry_run(run, log, now, (), grace_s)
        none = replace(report, deleted=(), files=0, bytes=0, waiting_files=0, waiting_bytes=0, partial_uploads=0)
        return replace(none, dry_run=False, requested=dict.fromkeys(changed, when))


def _check_removable(run: Run, log: Log, labels: Labels, commits: Sequence[CommitRecord], force: bool) -> None:
    pins, _ = read_pins(run.store, time.time(), lambda: None)
    held, newest = holders(pins), log.commits[-1].id
    for commit in commits:
        name = f"checkpoint {commit.id} of {run.store.url}"
        tags = labels.tags(commit)
        if commit.id == newest:
            raise InvalidInputError(f"{name} is the newest, and is never removed; delete the run if all of it may go")
        if commit.id in held:
            raise InvalidInputError(f"{name} is held by {held[commit.id]}; it can be removed when that is done with it")
        if tags and not force:
            raise InvalidInputError(f"{name} is tagged {', '.join(tags)}; take the tags off, or force it")
    _check_newest(run, log)


def _check_newest(run: Run, log: Log) -> None:
    """None goes while the newest can't be read: the one before it may be all that there is."""
    try:
        run.manifest(log.commits[-1])
    except CorruptionError as error:
        raise CorruptionError(
            f"no checkpoint is removed while the newest can't be read: {error}. Put that back "
            "(`verify(repair=True)` says whether it can be had), or save again first"
        ) from error


def _plan(run: Run, log: Log, labels: Labels, keep: Sequence[KeepRule], grace_s: float) -> _Planned:
    said, now = labels.said(log.commits), time.time()
    check_rules(log.commits, keep, now, said)
    verdicts = decide(log.commits, keep, now, said)
    held = holders(read_pins(run.store, now, lambda: None)[0])
    going = [v.id for v in verdicts if not v.keep and v.id not in held]
    if going:
        _check_newest(run, log)
    ids = {commit.id for commit in log.commits}
    files, notices = _files(run, [commit for commit in log.commits if commit.id not in going])
    unreadable = tuple(notices)
    listed = list_parts(run)
    owner = _owner(run.store, log)
    if owner:
        notices.append(f"{owner} owns the run or was killed not long ago; while it lives only it sweeps")
    if log.damaged:
        notices.append(f"no files are deleted while records can't be read: {'; '.join(log.damaged.values())}")
    free: list[StoredObject] = []
    if not (log.damaged or len(files) < len(ids) - len(going)):
        named = frozenset[str]().union(*files.values())
        stay = ids.difference(going)
        free = unnamed(run, listed, named, stay)
        if owner:  # what no checkpoint names may be a save under way
            free = [item for item in free if checkpoint_of(item.name) in ids]
    partial = _half_written(run.store, grace_s, notices)
    report = SweepReport(
        verdicts=tuple(verdicts),
        deleted=tuple(going),
        pinned={v.id: held[v.id] for v in verdicts if not v.keep and v.id in held},
        put_back=tuple(missing(labels, ids, log.head)),
        files=sum(not is_base(item.name) for item in free),
        bytes=sum(item.size_bytes for item in free),
        partial_uploads=partial,
        dry_run=True,
        notices=tuple(notices),
    )
    idle = not (going or free or partial or report.put_back or leftovers(labels, ids, log.head))
    return _Planned(report, files, idle and not owner, unreadable)


def _owner(store: Store, log: Log) -> str:
    """Who has not let the run go, and may be alive; empty: nobody."""
    last = log.last_epoch
    if last is None or not store.exists(records.lease_name(last.epoch, last.lease)):
        return ""
    return last.owner


def _files(run: Run, commits: Sequence[CommitRecord]) -> tuple[dict[str, frozenset[str]], list[str]]:
    """Shard files by checkpoint, without those of which the manifest can't be read, and a notice if there are any."""

    def read(commit: CommitRecord) -> frozenset[str] | str:
        try:
            return frozenset(file.name for file in run.manifest(commit).files)
        except CorruptionError as error:
            return str(error)

    with ThreadPoolExecutor(min(_READERS, len(commits) or 1), "rl_ckpt-manifests") as pool:
        found = dict(zip((commit.id for commit in commits), pool.map(read, commits), strict=True))
    bad = [said for said in found.values() if isinstance(said, str)]
    notices = [f"no files are deleted while manifests can't be read: {'; '.join(bad)}"] if bad else []
    return {id_: files for id_, files in found.items() if not isinstance(files, str)}, notices


def _half_written(store: Store, grace_s: float, notices: list[str]) -> int:
    """How many half-written objects a sweep would remove."""
    names: list[str] = []

    def spare(name: str) -> bool:
        if not name.endswith("/"):
            names.append(name)
        return True

    try:
        store.clean_partial(grace_s, spare)
    except StorageError as error:
        notices.append(f"half-written objects can't be looked for: {error}")
    return len(names)


def _waiting(store: Store) -> Mapping[str, float]:
    """What the sweep before this one has left."""
    try:
        data = store.get(records.WAITING_FILE)
        return records.decode(store.object_url(records.WAITING_FILE), data, WaitingRecord).waiting
    except (ObjectMissingError, CorruptionError):  # then their grace begins now
        return {}


def check_grace(grace_s: object) -> float:
    """A grace time in seconds, 0 or more.

    Raises:
        InvalidInputError: It is none.
    """
    if isinstance(grace_s, bool) or not isinstance(grace_s, int | float) or not 0 <= grace_s < float("inf"):
        raise InvalidInputError(f"grace_s={grace_s!r} must be a number of seconds, 0 or more")
    return float(grace_s)
