"""Pull: bringing checkpoints of a run to another place, with only what is missing on the way.

Owns: the order of a pull. All is looked at and every error that can be known is raised before anything is written; then
the source is pinned, run.json, the manifests and the files are brought, and the commit records last. Promises: a
checkpoint is at the destination wholly or not at all, at whatever line the process is killed; what had arrived is taken
up by the next pull. Does not know who moves the bytes (`move`): threads of this process, or the nodes of a cluster.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from rl_ckpt.errors import (
    CheckpointNotFoundError,
    CorruptionError,
    InvalidInputError,
    StorageError,
)
from rl_ckpt.format import records
from rl_ckpt.format.digest import check
from rl_ckpt.format.manifest import Manifest
from rl_ckpt.format.records import CommitRecord
from rl_ckpt.plan.pulling import Place
from rl_ckpt.store.base import ObjectExistsError, ObjectMissingError, Store
from rl_ckpt.store.commit_log import Log
from rl_ckpt.store.copier import FileJob, missing_bytes
from rl_ckpt.store.labels import LabelReader, Labels
from rl_ckpt.store.listing import find_ref
from rl_ckpt.store.mirror import HOLD_S, Arriving, Mirror
from rl_ckpt.store.pins import pin
from rl_ckpt.store.repair import spots
from rl_ckpt.store.run import Run, who

ALL = "all"
_BATCH_BYTES = 1 << 30
_BATCH_COMMITS = 16  # that are copied at once: of many small ones, each alone would wait for the store at every step
_READERS = 16
_TRIES = 3  # to bring files that somebody deletes at the destination

Move = Callable[[Sequence[FileJob]], None]
"""Brings files; raises what `Copier.copy` raises."""
Tell = Callable[[str, str], None]
"""Told of each phase, and of the newest checkpoint in it."""


@dataclass(slots=True)
class Survey:
    """What is to be done."""

    todo: list[CommitRecord] = field(default_factory=list)
    """Oldest first."""
    already: list[CommitRecord] = field(default_factory=list)
    files: dict[str, FileJob] = field(default_factory=dict)
    """All that the checkpoints to do need, by name."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """By checkpoint: the files that it needs."""
    kept: set[str] = field(default_factory=set)
    """Files that checkpoints at the destination name already, with every chunk that is needed."""

    @property
    def bytes(self) -> int:
        """Of all files, in bytes."""
        return sum(job.bytes for job in self.files.values())


@dataclass(slots=True)
class Outcome:
    """What was done."""

    committed: list[CommitRecord] = field(default_factory=list)
    unpinned: str = ""
    """Why the source could not be pinned; empty where it was."""
    notices: list[str] = field(default_factory=list)


def survey(source: Run, mirror: Mirror, at: int | str | Sequence[str]) -> tuple[Survey, Labels]:
    """Looks at both sides; writes nothing.

    Args:
        source: The run.
        mirror: The destination.
        at: A reference, "all", or ids.

    Raises:
        CheckpointNotFoundError: There is no such checkpoint.
        CorruptionError: A manifest is damaged in the source.
        StorageError: A store failed, or the destination has too little space.
        CheckpointError: As `Mirror.open`.
    """
    theirs = source.log.read()
    labels = LabelReader(source).read()
    if isinstance(at, int | str):
        chosen = _chosen(source, theirs, labels, at)
    else:
        chosen = [commit for commit in theirs.commits if commit.id in set(at)]
    ours = mirror.open()
    there = {commit.id for commit in ours.commits}
    found = Survey([c for c in chosen if c.id not in there], [c for c in chosen if c.id in there])
    if found.todo:
        _find_files(source, mirror, ours, found)
        _check_space(source, mirror.store, found)
    return found, labels


def _chosen(source: Run, log: Log, labels: Labels, at: int | str) -> list[CommitRecord]:
    newest = source.find(log, None)  # also says where there is none at all
    if at != ALL:
        newest = find_ref(source, log, labels, at)
    newer = {name: why for name, why in log.damaged.items() if name > records.commit_name(newest.number)}
    if newer and at in ("latest", ALL):
        raise CorruptionError(
            f"{source.store.url} has newer records that can't be read: {newer}. `verify(repair=True)` there may mend "
            f"them; or pull at={newest.id!r}"
        )
    return list(log.commits) if at == ALL else [newest]


def _find_files(source: Run, mirror: Mirror, ours: Log, found: Survey) -> None:
    """What each checkpoint needs, and what of it is there."""
    sizes: dict[str, int] = {}
    places: dict[str, set[Place]] = {}
    with ThreadPoolExecutor(_READERS, "rl_ckpt-pull") as pool:
        for begin in range(0, len(found.todo), _READERS):  # not all at once: a manifest may take many megabytes
            for manifest in pool.map(partial(_manifest, source), found.todo[begin : begin + _READERS]):
                for name, some in spots(manifest).items():
                    places.setdefault(name, set()).update(some)
                sizes.update({file.name: file.bytes for file in manifest.files})
                found.names[manifest.id] = [file.name for file in manifest.files]
    there = sizes_at(mirror.store, sizes)
    present = {name: set(places.get(name, ())) for name, size in sizes.items() if there.get(name) == size}
    _leave_out_vouched(mirror, ours, present)
    for name, size in sizes.items():
        known = present.get(name)
        mine = tuple(sorted(places.get(name, ())))
        found.files[name] = FileJob(name, size, mine, None if known is None else tuple(sorted(known)))
        if known is not None and not known:
            found.kept.add(name)


def _leave_out_vouched(mirror: Mirror, ours: Log, present: Mapping[str, set[Place]]) -> None:
    """Takes out the chunks that a checkpoint at the destination names: they were verified when it was brought.

    The others of files that are there, as a killed pull left them, are read and compared before they count.
    """
    for commit in reversed(ours.commits):
        if mirror.run is None or not any(present.values()):
            return
        with contextlib.suppress(CorruptionError):  # its own readers are told; here it vouches for nothing
            for name, some in spots(mirror.run.manifest(commit)).items():
                if name in present:
                    present[name].difference_update(some)


def sizes_at(target: Store, names: Iterable[str]) -> dict[str, int]:
    """Sizes of the shard files at a destination, in bytes."""
    prefixes = {records.BASES if name.startswith(records.BASES) else records.SHARDS for name in names}
    return {item.name: item.size_bytes for prefix in sorted(prefixes) for item in target.list(prefix)}


def _manifest(source: Run, commit: CommitRecord) -> Manifest:
    try:
        return source.manifest(commit)
    except CorruptionError as error:
        _raise_if_gone(source, commit.id, "", error)
        raise


def _check_space(source: Run, target: Store, found: Survey) -> None:
    needed = missing_bytes(list(found.files.values()), target) + sum(c.manifest_bytes for c in found.todo)
    free = target.free_bytes()
    if free is not None and needed > free:
        raise StorageError(
            f"too little space at {target.url}: {needed} bytes of {source.store.url} are missing there, {free} are "
            "free. Free space, or pull fewer checkpoints. Nothing was written"
        )


def bring(source: Run, mirror: Mirror, found: Survey, labels: Labels, move: Move, tell: Tell, weak: bool) -> Outcome:
    """Carries a survey out.

    Args:
        source: The run.
        mirror: The destination.
        found: From `survey`.
        labels: Of the source.
        move: Brings files.
        tell: Told of the phases.
        weak: Does without the destination's create-only promise.

    Raises:
        CheckpointNotFoundError: A checkpoint was dropped at the source meanwhile.
        CorruptionError: A chunk is damaged in the source.
        CommitConflictError, RunOwnedError: Somebody writes to the destination.
        StorageError: A store failed.
    """
    done: set[str] = set(found.kept)
    outcome = Outcome()
    for batch in _batches(found):
        with _pinned(source, batch, outcome, some=len(found.todo) > 1) as held:
            if held:
                mirror.create(weak)
                _bring_batch(source, mirror, found, held, done, move, tell, outcome.unpinned)
                _bring_labels(source, mirror.store, labels, held)
                outcome.committed += held
    return outcome


def _bring_batch(
    source: Run,
    mirror: Mirror,
    found: Survey,
    batch: Sequence[CommitRecord],
    done: set[str],
    move: Move,
    tell: Tell,
    why: str,
) -> None:
    store, newest, ids = mirror.store, batch[-1].id, [commit.id for commit in batch]
    named = dict.fromkeys(name for commit in batch for name in found.names[commit.id])
    arriving = Arriving(store, ids, f"a pull from {source.store.url}, {who()}")
    try:
        # Before the files: together with the pins it tells a sweep which files of older checkpoints are waited for.
        with ThreadPoolExecutor(_READERS, "rl_ckpt-pull") as pool:
            raw = dict(
                zip(ids, pool.map(lambda commit: _bring_manifest(source, store, commit, why), batch), strict=True)
            )
        jobs = [found.files[name] for name in named if name not in done]
        for _ in range(_TRIES):
            tell("copying", newest)
            try:
                move(jobs)
            except ObjectMissingError as error:
                for commit in batch:
                    _raise_if_gone(source, commit.id, why, error)
                raise CorruptionError(
                    f"{error} is missing in the source, though {newest} or one before it needs it; "
                    "`verify(repair=True)` there looks for other copies"
                ) from error
            done.update(named)
            # Of what was there before the pins were, a sweep may have been deleting something.
            sizes = sizes_at(store, named)
            jobs = [_anew(found.files[name]) for name in named if sizes.get(name) != found.files[name].bytes]
            if not jobs:
                break
        else:
            raise StorageError(
                f"{store.url}: files vanish as fast as they arrive, {jobs[0].name} among them; who deletes there?"
            )
        tell("committing", newest)
        # Commit records last: a crash before this line leaves what the next pull takes up, never half a checkpoint.
        mirror.commit(batch, raw)
    finally:
        arriving.close()


def _anew(job: FileJob) -> FileJob:
    return FileJob(job.name, job.bytes, job.places)


def _bring_manifest(source: Run, target: Store, commit: CommitRecord, why: str) -> bytes:
    """Brings a manifest; gives the commit record as it stands in the source, while it does."""
    name = records.manifest_name(commit.id)
    try:
        data, record = source.store.get(name), source.store.get(records.commit_name(commit.number))
    except ObjectMissingError as error:
        _raise_if_gone(source, commit.id, why, error)
        raise CorruptionError(f"{source.store.object_url(name)} is missing, though it is committed") from error
    check(source.store.object_url(name), data, bytes.fromhex(commit.manifest_digest))
    target.put(name, [data])
    return record


def _bring_labels(source: Run, target: Store, labels: Labels, commits: Sequence[CommitRecord]) -> None:
    """After the commit record: a label may put a record back, which must not come before its files."""
    for commit in commits:
        label = labels.by_checkpoint.get(commit.id)
        if label is not None and not label.remove:
            with contextlib.suppress(ObjectExistsError):  # what was said of it there stays
                target.create(records.label_name(commit.id), records.encode(label))


def bring_labels(source: Run, target: Store, labels: Labels, commits: Sequence[CommitRecord]) -> None:
    """Brings tags and notes of checkpoints that are there already, where they have none there.

    Raises:
        StorageError: A store failed.
    """
    wanted = [c for c in commits if c.id in labels.by_checkpoint]
    if wanted:
        there = {item.name for item in target.list(records.LABELS)}
        _bring_labels(source, target, labels, [c for c in wanted if records.label_name(c.id) not in there])


@contextlib.contextmanager
def _pinned(
    source: Run, commits: Sequence[CommitRecord], outcome: Outcome, some: bool
) -> Iterator[Sequence[CommitRecord]]:
    """Holds checkpoints of the source while the block runs, where this process may write there; gives those there are.

    Args:
        source: The run.
        commits: The checkpoints.
        outcome: Told of what could not be held.
        some: Whether those that were dropped meanwhile are left out; else that is an error.
    """
    with contextlib.ExitStack() as stack:
        held = []
        for commit in commits:
            try:
                if not outcome.unpinned:
                    stack.enter_context(pin(source, commit.id, HOLD_S))
            except CheckpointNotFoundError as error:
                if not some:
                    raise CheckpointNotFoundError(f"{error}. Nothing was written at the destination") from error
                outcome.notices.append(f"{commit.id} was dropped at the source before its turn came")
                continue
            except (StorageError, InvalidInputError) as error:
                outcome.unpinned = str(error)
            held.append(commit)
        yield held


def _raise_if_gone(source: Run, checkpoint: str, why: str, error: BaseException) -> None:
    """Says that the source changed, where that is what happened.

    Raises:
        CheckpointNotFoundError: The checkpoint is no more.
    """
    if checkpoint in {commit.id for commit in source.log.read().commits}:
        return
    unpinned = f" It could not be held there ({why}): give this reader the right to write to pins/." if why else ""
    raise CheckpointNotFoundError(
        f"the source changed meanwhile: checkpoint {checkpoint} of {source.store.url} was dropped by its retention "
        f"rules while it was being pulled.{unpinned} Pull again: the newest is taken then, and what "
        "has arrived is kept; or have the checkpoint tagged first"
    ) from error


def _batches(found: Survey) -> Iterator[list[CommitRecord]]:
    batch: list[CommitRecord] = []
    names: set[str] = set()
    for commit in found.todo:
        batch.append(commit)
        names.update(found.names[commit.id])
        if len(batch) == _BATCH_COMMITS or sum(found.files[name].bytes for name in names) >= _BATCH_BYTES:
            yield batch
            batch, names = [], set()
    if batch:
        yield batch
