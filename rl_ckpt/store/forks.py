"""Forks: a new run that begins with a checkpoint of another one, without copying its bytes.

Owns: what is checked before anything is written, the pins that keep the source's checkpoint there, and the order of the
writes. Promises: the fork exists once its commit record does; what a crash leaves before that is taken up by the same
call, or goes by itself; nothing of the source is changed but for pins. Reading through a fork is store/based.py.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from rl_ckpt.errors import CheckpointNotFoundError, CorruptionError, InvalidInputError, StorageError
from rl_ckpt.format import manifest as manifests
from rl_ckpt.format import records
from rl_ckpt.format.digest import digest
from rl_ckpt.format.manifest import Manifest, ShardFileEntry
from rl_ckpt.format.records import CommitRecord, PinRecord, RunRecord
from rl_ckpt.store.base import ObjectExistsError, ObjectMissingError, Store
from rl_ckpt.store.based import BasedStore, base_entry, sizes_of
from rl_ckpt.store.chunk_check import bad_spots
from rl_ckpt.store.commit_log import CommitLog
from rl_ckpt.store.pins import FOREVER
from rl_ckpt.store.probe import PROBE, probe_create_only
from rl_ckpt.store.repair import spots
from rl_ckpt.store.run import Run, who
from rl_ckpt.store.urls import BASE_OPTIONS, open_store

_BEGIN_S = 3600.0  # the source is held for as long at first: a pin that nothing came of goes by itself
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class _Base:
    """A run whose files the fork will name."""

    store: Store
    """Its own, as it is opened for the source."""
    held: str
    """Id of its checkpoint that names those files."""
    log: CommitLog


def make_fork(
    source: Run,
    commit: CommitRecord,
    url: str,
    storage_options: Mapping[str, Any],
    *,
    weak_commits: bool = False,
    verify: bool = False,
) -> tuple[Run, CommitRecord]:
    """Makes a run whose first checkpoint is one of another run.

    Args:
        source: The other run.
        commit: Of the checkpoint.
        url: Of the new run.
        storage_options: For fsspec, of the new run.
        weak_commits: Does without the create-only promise, and without the probe for it.
        verify: Reads all of the checkpoint first.

    Returns:
        The new run, and the record of its checkpoint.

    Raises:
        InvalidInputError: There is something at `url`, it lies within the source, or the source can't be read with its
            options; nothing was written.
        CorruptionError: The checkpoint is damaged; nothing was written.
        CheckpointNotFoundError: The checkpoint was dropped meanwhile; nothing was written.
        CommitConflictError: Another process is making a run at `url`.
        StorageError: A store failed, or may not be written to. The same call takes up what was written.
    """
    own = open_store(url, storage_options)
    _check_apart(source.store.url, own.url)
    begun = _unfinished(own)
    manifest = source.manifest(commit)
    _check_files(source, manifest, verify)
    files, bases = _based(source, commit, manifest)
    record = RunRecord(
        version=records.FORMAT_VERSION if bases else records.PLAIN_VERSION,
        run=uuid.uuid4().hex if begun is None else begun.run,
        created=time.time(),
        by=who(),
        create_only="weak" if weak_commits else "probed",
        bases=tuple(base_entry(own.url, base.store.url) for base in bases),
        held=tuple(base.held for base in bases),
        forked_from=base_entry(own.url, source.store.url),
    )
    _check_begun(own, begun, record)
    _check_readable(BasedStore(own, record.bases, storage_options.get(BASE_OPTIONS)), files)
    if begun is None:
        if not weak_commits:
            probe_create_only(own)
        _begin(own, record, bases)
    else:
        record = begun
    # From here on the fork is a run without a checkpoint, whose bases must stay: a crash leaves that, and the same call
    # goes on. The pins come first, so that a fork with a checkpoint always has them.
    _hold(own, record, bases, FOREVER)
    _let_go_all(bases, _begin_pin(record))
    own.put(records.FORK_FILE, [records.encode(record)])
    fork = Run(own, record, storage_options)
    first = msgspec.structs.replace(
        manifest,
        version=manifests.version_for(files),
        run=record.run,
        id=f"{commit.step}-{uuid.uuid4().hex[:12]}",
        writer=who(),
        time=time.time(),
        parent=commit.id,
        tag=None,  # it said something about the source: kept here, it would keep the source's files for ever
        files=files,
    )
    return fork, _commit(fork, first, commit)


def _commit(fork: Run, manifest: Manifest, source: CommitRecord) -> CommitRecord:
    data = manifests.encode(manifest)
    fork.store.put(records.manifest_name(manifest.id), [data])
    fork.log.claim(who())

    def make(number: int, write_id: str) -> CommitRecord:
        return msgspec.structs.replace(
            source,
            number=number,
            run=manifest.run,
            write_id=write_id,
            epoch=fork.log.epoch,
            id=manifest.id,
            manifest_bytes=len(data),
            manifest_digest=digest(data).hex(),
            bytes_written=len(data),
            time=manifest.time,
            tag=None,
            parent=manifest.parent,
        )

    return fork.log.commit(make)


def _begin(own: Store, record: RunRecord, bases: Sequence[_Base]) -> None:
    """Holds the source for a while, and creates the run.

    Raises:
        CheckpointNotFoundError: A checkpoint was dropped before it was held.
        InvalidInputError: Another process created a run there.
    """
    _hold(own, record, bases, time.time() + _BEGIN_S)
    try:
        own.create(records.RUN_FILE, records.encode(record))
    except ObjectExistsError as error:  # by another process, or by this one, and the reply was lost
        if records.decode_run(own.url, own.get(records.RUN_FILE)).run != record.run:
            _let_go_all(bases, _begin_pin(record))
            raise InvalidInputError(f"{own.url} was created by another process meanwhile") from error


def _hold(own: Store, record: RunRecord, bases: Sequence[_Base], expires: float) -> None:
    """Pins the checkpoints that the fork leans on.

    Raises:
        CheckpointNotFoundError: One was dropped before; no pin is left.
    """
    name = records.pin_name(record.run) if expires == FOREVER else _begin_pin(record)
    for base in bases:
        pin = PinRecord(checkpoint=base.held, by=f"fork {own.url}", expires=expires)
        try:
            base.store.put(name, [records.encode(pin)])
        except (StorageError, InvalidInputError) as error:
            raise type(error)(f"{base.store.url} could not be pinned, and must be for a fork: {error}") from error
    for base in bases:  # after its pin: what is there now stays (store/pins.py)
        if base.held not in {commit.id for commit in base.log.read().commits}:
            _let_go_all(bases, name)
            raise CheckpointNotFoundError(
                f"checkpoint {base.held} of {base.store.url} was dropped by the retention rules meanwhile; choose "
                "another"
            )


def _begin_pin(record: RunRecord) -> str:
    """File of the pin that is over by itself.

    Not the one that lasts: a sweep which finds a pin over deletes it by its name, a while after it has read it.
    """
    return records.pin_name(f"{record.run}-begin")


def _let_go_all(bases: Sequence[_Base], pin: str) -> None:
    for base in bases:
        base.store.delete([pin])


def _unfinished(own: Store) -> RunRecord | None:
    """The run.json of a fork that has no checkpoint yet, where there is one; None where nothing is there.

    Raises:
        InvalidInputError: There is something else.
    """
    try:
        record = records.decode_run(own.url, own.get(records.RUN_FILE))
    except ObjectMissingError:
        found = [item.name for item in own.list() if not item.name.startswith(PROBE)]
        if found:
            raise InvalidInputError(
                f"{own.url} is not empty, it holds {found[:_SHOWN]}; a fork begins a run of its own: give another url"
            ) from None
        return None
    log = CommitLog(own, record.run).read()
    if log.commits or log.damaged or not record.bases:
        raise InvalidInputError(
            f"{own.url} is a run already, of {len(log.commits)} checkpoints; a fork begins a run of its own: give "
            "another url"
        )
    return record


def _check_begun(own: Store, begun: RunRecord | None, wanted: RunRecord) -> None:
    if begun is not None and (begun.bases, begun.held) != (wanted.bases, wanted.held):
        raise InvalidInputError(
            f"{own.url} holds a fork of checkpoint {', '.join(begun.held)} that was never finished, as its process was "
            "killed: fork that one, give another url, or delete it"
        )


def _check_apart(source: str, url: str) -> None:
    for outer, inner in ((source, url), (url, source)):
        if inner == outer:
            raise InvalidInputError(f"{url} is the run that is to be forked; give another url")
        if inner.startswith(outer + "/"):
            raise InvalidInputError(f"{inner} lies within {outer}: give the fork a place of its own")


def _check_files(source: Run, manifest: Manifest, verify: bool) -> None:
    """Looks whether a checkpoint's files are there, and reads them where told so.

    Raises:
        CorruptionError: Some are missing, of another size, or damaged.
    """
    sizes = sizes_of(source.store, [file.name for file in manifest.files])
    bad = [
        source.store.missing(file.name)
        if file.name not in sizes
        else f"{source.store.object_url(file.name)} has {sizes[file.name]} bytes, not {file.bytes}"
        for file in manifest.files
        if sizes.get(file.name) != file.bytes
    ]
    if verify and not bad:
        found = bad_spots(source.store, spots(manifest))
        bad = [
            f"the chunk at {spot.offset} of {source.store.object_url(name)}: {why}"
            for (name, spot), why in found.items()
        ]
    if bad:
        more = f" … and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise CorruptionError(
            f"checkpoint {manifest.id} of {source.store.url} is damaged and can't be forked: {'; '.join(bad[:_SHOWN])}"
            f"{more}. `verify(repair=True)` may mend it, or fork one before it"
        )


def _based(source: Run, commit: CommitRecord, manifest: Manifest) -> tuple[tuple[ShardFileEntry, ...], list[_Base]]:
    """The checkpoint's files as the fork will call them, and the runs in which they lie."""
    store = source.store
    own = store.own if isinstance(store, BasedStore) else store
    bases: dict[str, tuple[int, _Base]] = {}
    files = []
    for file in manifest.files:
        base, name = _Base(own, commit.id, source.log), file.name
        based = records.split_base(file.name)
        if based is not None and isinstance(store, BasedStore) and store.is_outer(based[0]):
            number, name = based
            url = store.base(number).url
            base = bases[url][1] if url in bases else _opened(store.base(number), source.record.held[number])
        place, _ = bases.setdefault(base.store.url, (len(bases), base))
        files.append(ShardFileEntry(records.based_name(place, name), file.bytes))
    return tuple(files), [base for _, base in bases.values()]


def _opened(store: Store, held: str) -> _Base:
    """A run that the source was forked from.

    Raises:
        CheckpointNotFoundError: It is not there.
    """
    try:
        record = records.decode_run(store.url, store.get(records.RUN_FILE))
    except ObjectMissingError as error:
        raise CheckpointNotFoundError(f"{store.url}, from which the source was forked, is not there") from error
    return _Base(store, held, CommitLog(store, record.run))


def _check_readable(store: Store, files: Sequence[ShardFileEntry]) -> None:
    """Whether the fork will find its files, as it opens them itself.

    Raises:
        InvalidInputError: It will not.
    """
    sizes = sizes_of(store, [file.name for file in files])
    lost = [file.name for file in files if sizes.get(file.name) != file.bytes]
    if lost:
        raise InvalidInputError(
            f"{store.object_url(lost[0])} can't be read with the storage options of the fork, as its readers will have "
            "to; give what the source needs as storage_options={'bases': {...}}, there and to whoever reads the fork"
        )


def bases_held(run: Run) -> set[str]:
    """The bases in which a run has pins, as `base/<k>`."""
    return {f"{records.BASES}{number}" for number, held in enumerate(run.record.held) if held}


def let_go(run: Run, base: str) -> None:
    """Removes a fork's pin, once no checkpoint of it names files of a base.

    Args:
        run: The fork.
        base: As `bases_held` names it.

    Raises:
        StorageError, InvalidInputError: The base's store failed, or may not be written to.
    """
    assert isinstance(run.store, BasedStore)
    run.store.base(int(base.removeprefix(records.BASES))).delete([records.pin_name(run.record.run)])
