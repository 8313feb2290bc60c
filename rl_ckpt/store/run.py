"""A run on its store: run.json, the commit log, manifests.

Owns: opening and creating a run, finding a checkpoint, reading its manifest. Promises: what is returned was committed,
and its bytes are those that were. Does not write checkpoints (store/committer.py), nor read their values
(store/reader.py).
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from rl_ckpt import _version
from rl_ckpt.errors import CheckpointNotFoundError, CorruptionError, InvalidInputError
from rl_ckpt.format import manifest as manifests
from rl_ckpt.format import records
from rl_ckpt.format.manifest import Manifest
from rl_ckpt.format.manifest_check import check_manifest
from rl_ckpt.format.records import CommitRecord, RunRecord
from rl_ckpt.store.base import ObjectExistsError, ObjectMissingError, Store
from rl_ckpt.store.based import with_bases
from rl_ckpt.store.commit_log import CommitLog, Log
from rl_ckpt.store.probe import probe_create_only
from rl_ckpt.store.urls import open_store


def who() -> str:
    """This process, for records and messages."""
    return f"rl-ckpt {_version.__version__} on {socket.gethostname()}, process {os.getpid()}"


class Run:
    """One run, opened for reading, or for writing by `create`."""

    def __init__(self, store: Store, record: RunRecord, storage_options: Mapping[str, Any] | None = None) -> None:
        """A run whose run.json was read already; see `open` and `create`."""
        self.store = with_bases(store, record, storage_options)
        self.record = record
        self.log = CommitLog(store, record.run)  # of which a fork has one of its own

    @staticmethod
    def open(url: str, storage_options: Mapping[str, Any] | None = None) -> Run:
        """Opens a run that exists.

        Raises:
            CheckpointNotFoundError: There is none at `url`.
            CorruptionError: run.json is damaged.
            InvalidInputError: A newer release wrote it, or the url can't be used.
            StorageError: The store failed.
        """
        store = open_store(url, storage_options)
        try:
            data = store.get(records.RUN_FILE)
        except ObjectMissingError as error:
            if store.list(records.COMMITS) and not store.exists(records.RUN_FILE):
                raise CorruptionError(_headless(store)) from error
            found = [item.name for item in store.list()[:4]]
            what = f"it holds {found} but no run.json: it is not a run" if found else "nothing is there yet"
            raise CheckpointNotFoundError(
                f"no run at {store.url}: {what}. Give the url that was given to the Checkpointer which saved"
            ) from error
        return Run(store, records.decode_run(store.url, data), storage_options)

    @staticmethod
    def create(url: str, storage_options: Mapping[str, Any] | None = None, weak_commits: bool = False) -> Run:
        """Opens a run, creating it where there is none.

        Args:
            url: Where.
            storage_options: For fsspec.
            weak_commits: Does without the create-only promise, and without the probe for it.

        Raises:
            InvalidInputError: The store does not keep the create-only promise, or the url can't be used.
            CorruptionError: run.json is damaged.
            StorageError: The store failed.
        """
        store = open_store(url, storage_options)
        try:
            return Run(store, records.decode_run(store.url, store.get(records.RUN_FILE)), storage_options)
        except ObjectMissingError:
            pass
        if store.list(records.COMMITS) and not store.exists(records.RUN_FILE):  # a new run would take its place
            raise CorruptionError(_headless(store))
        if not weak_commits:
            try:
                probe_create_only(store)
            except (InvalidInputError, ObjectMissingError):
                # Another process created the run meanwhile, and its sweep took away what was being raced for.
                if not store.exists(records.RUN_FILE):
                    raise
        promise = "weak" if weak_commits else "probed"
        record = RunRecord(records.PLAIN_VERSION, uuid.uuid4().hex, time.time(), who(), promise)
        try:
            store.create(records.RUN_FILE, records.encode(record))
        except ObjectExistsError:  # another process created it meanwhile, or the reply to our own PUT was lost
            return Run.open(url, storage_options)
        return Run(store, record)

    def find(self, log: Log, step: int | str | None) -> CommitRecord:
        """The newest commit, the newest of a step, or the one with an id.

        Raises:
            CheckpointNotFoundError: There is none; the message lists what there is.
            CorruptionError: No record can be read, so that it is not known whether there is one.
        """
        if log.damaged and not log.commits:  # not the same as none: whoever finds none begins from nothing
            raise CorruptionError(
                f"{self.store.url} has no record of a checkpoint that can be read: {log.damaged}. "
                "`verify(repair=True)` may mend them; delete the run if it is to begin anew"
            )
        if not log.commits:
            raise CheckpointNotFoundError(f"{self.store.url} has no checkpoint yet")
        if step is None:
            return log.commits[-1]
        found = [commit for commit in log.commits if step in (commit.step, commit.id)]
        if not found:
            what = f"no checkpoint of step {step}" if isinstance(step, int) else f"no checkpoint {step}"
            raise CheckpointNotFoundError(f"{self.store.url} has {what}; {_steps(log)}")
        return found[-1]

    def manifest(self, commit: CommitRecord) -> Manifest:
        """Reads and verifies a checkpoint's manifest.

        Raises:
            CorruptionError: It is missing or damaged.
            StorageError: The store failed.
        """
        return self.manifest_file(commit)[0]

    def manifest_file(self, commit: CommitRecord) -> tuple[Manifest, bytes]:
        """As `manifest`, with the bytes of its file."""
        problem = records.problem(commit)
        if problem is not None:
            raise CorruptionError(f"{self.store.url}: {problem}")
        name = records.manifest_name(commit.id)
        url = self.store.object_url(name)
        try:
            data = self.store.get(name)
        except ObjectMissingError as error:
            raise CorruptionError(f"{url} is missing, though record {commit.number} commits it") from error
        manifest = manifests.decode(url, data, bytes.fromhex(commit.manifest_digest))
        if (manifest.run, manifest.id, manifest.step) != (commit.run, commit.id, commit.step):
            raise CorruptionError(
                f"{url} is of checkpoint {manifest.id} (step {manifest.step}, run {manifest.run}), though record "
                f"{commit.number} commits {commit.id} (step {commit.step}, run {commit.run}) by it"
            )
        check_manifest(url, manifest)
        return manifest, data

    def candidates(self, step: int | None) -> tuple[Sequence[CommitRecord], dict[str, str]]:
        """Commits to try for a restore.

        Args:
            step: The step asked for, or None.

        Returns:
            Best first: only the one asked for, or from the newest backwards. And the records that are newer than the
            first but can't be read: name → why.

        Raises:
            CheckpointNotFoundError: There is none.
        """
        log = self.log.read()
        first = self.find(log, step)
        if step is not None:
            return [first], {}
        return log.commits[::-1], {n: why for n, why in log.damaged.items() if n > records.commit_name(first.number)}


def lineage(commit: CommitRecord, commits: Sequence[CommitRecord]) -> tuple[str, ...]:
    """Ids of a checkpoint's ancestors, its parent first, as far back as there are records."""
    by_id = {c.id: c for c in commits}
    out: list[str] = []
    parent = commit.parent
    while parent is not None and parent not in out:
        out.append(parent)
        known = by_id.get(parent)
        parent = known.parent if known else None
    return tuple(out)


def _headless(store: Store) -> str:
    return (
        f"{store.url}/{records.RUN_FILE} is missing, though there is a commit log: `verify(repair=True)` makes it anew "
        "from that. If the run is to go, delete all of it"
    )


def _steps(log: Log) -> str:
    steps = [commit.step for commit in log.commits]
    shown = ", ".join(map(str, steps[-20:]))
    return f"its steps are {'… ' if len(steps) > 20 else ''}{shown}"
