"""Sweep: deleting what no checkpoint names.

Owns: the order of deletion (commit record, manifest, files) and the grace that readers get. Promises: nothing that a
live manifest names is touched, nor a checkpoint with a valid pin, nor the newest, nor an epoch record: those keep a
coordinator that was fenced long ago from finding its next record number free.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence

from rl_ckpt.errors import CorruptionError, StorageError
from rl_ckpt.format import records
from rl_ckpt.format.manifest import Manifest
from rl_ckpt.format.records import CommitRecord, PinRecord
from rl_ckpt.store.base import ObjectMissingError
from rl_ckpt.store.run import Run

_PARTIAL_AGE_S = 6 * 3600.0  # older than any write that may still be going on


class Sweeper:
    """Deletes orphans of one run; kept by the run's committer."""

    def __init__(self, run: Run, grace_s: float, hold: bool, lease: str = "") -> None:
        """A sweeper that waits `grace_s` seconds between first seeing an orphan and deleting it.

        Args:
            run: The run.
            grace_s: In seconds.
            hold: Whether to delete no orphans: commit records are damaged, and what they commit looks like orphans.
            lease: File of this writer's own lease.
        """
        self._lease = lease
        self._hold = hold
        self._run = run
        self.grace_s = grace_s
        self._files: dict[str, frozenset[str]] = {}  # by checkpoint: the shard files that its manifest names
        self._in_flight: dict[str, set[str]] = {}  # by checkpoint: files of older ones that it will name
        self._lock = threading.Lock()  # attempts begin in another thread than the one that sweeps
        self._orphans: dict[str, float] = {}  # name → when it was first seen as one, by this process's clock
        self._look = True  # whether there may be orphans that nobody has seen: at first, what a killed writer left

    def protect(self, checkpoint: str, files: set[str]) -> None:
        """Says that files of `checkpoint` are being written, and that it will name `files` of older ones.

        May be called while another thread sweeps.
        """
        with self._lock:
            self._in_flight[checkpoint] = files

    def committed(self, manifest: Manifest) -> None:
        """Says that `manifest` is committed."""
        self._files[manifest.id] = frozenset(file.name for file in manifest.files)
        with self._lock:
            self._in_flight.pop(manifest.id, None)

    def release(self, checkpoint: str) -> None:
        """Says that an attempt was given up."""
        with self._lock:
            self._in_flight.pop(checkpoint, None)
            self._look = True

    def sweep(self, dropped: Sequence[CommitRecord], live: Sequence[CommitRecord]) -> set[str]:
        """Deletes dropped checkpoints' records, and orphans past their grace.

        Args:
            dropped: Checkpoints that retention let go.
            live: All others, oldest first.

        Returns:
            Ids of the checkpoints that are gone; those that a pin holds are not among them. None where another
            coordinator owns the run: what may go is its decision.

        Raises:
            StorageError: The store failed; nothing live is harmed, and the next sweep goes on.
        """
        if not dropped and not self._orphans and not self._look:
            return set()
        with self._lock:  # another thread may set it while this one looks
            looking, self._look = self._look, False
        try:
            return self._sweep(dropped, live, looking)
        except StorageError:
            self._look = looking or self._look
            raise

    def _sweep(self, dropped: Sequence[CommitRecord], live: Sequence[CommitRecord], looking: bool) -> set[str]:
        store, pinned = self._run.store, self._pinned()
        if looking:
            store.clean_partial(_PARTIAL_AGE_S)  # temporary files and uploads of writers that were killed
        gone = {commit.id for commit in dropped} - pinned
        now = time.monotonic()
        kept = [*live, *(commit for commit in dropped if commit.id in pinned)]
        orphans = {name: self._orphans.get(name, now) for name in self._find_orphans(kept)}
        # After the listing: a newer coordinator's files look like orphans here, but its epoch record came before them.
        if self._run.log.overtaken():
            return set()
        if looking:
            store.delete(self._stale_leases())
        # Record first: a crash after this line leaves a manifest and files that no commit names, never the reverse.
        store.delete([records.commit_name(commit.number) for commit in dropped if commit.id in gone])
        due = [name for name, since in orphans.items() if now - since >= self.grace_s]
        store.delete(sorted(due, key=lambda name: (not name.startswith(records.MANIFESTS), name)))  # manifests first
        self._orphans = {name: since for name, since in orphans.items() if name not in set(due)}
        self._files = {commit.id: self._files[commit.id] for commit in kept if commit.id in self._files}
        return gone

    def _find_orphans(self, live: Sequence[CommitRecord]) -> list[str]:
        if self._hold:
            return []
        named: set[str] = set()
        for commit in live:
            known = self._named_by(commit)
            if known is None:
                return []  # an unreadable manifest may name any file: better to keep too much
            named |= known
        listed = [*self._run.store.list(records.MANIFESTS), *self._run.store.list(records.SHARDS)]
        with self._lock:  # after the listing: whoever wrote a listed file was in flight before it
            checkpoints = {commit.id for commit in live} | self._in_flight.keys()
            named = named.union(*self._in_flight.values())
        return [item.name for item in listed if item.name not in named and _checkpoint_of(item.name) not in checkpoints]

    def _named_by(self, commit: CommitRecord) -> frozenset[str] | None:
        if commit.id not in self._files:
            try:
                self._files[commit.id] = frozenset(file.name for file in self._run.manifest(commit).files)
            except CorruptionError:
                return None
        return self._files[commit.id]

    def _stale_leases(self) -> list[str]:
        """Leases of writers that were taken over from, or that lost the race for this epoch: nobody reads them."""
        return [
            item.name
            for item in self._run.store.list(records.LEASES)
            if item.name != self._lease and (records.lease_epoch(item.name) or math.inf) <= self._run.log.epoch
        ]

    def _pinned(self) -> set[str]:
        out: set[str] = set()
        for item in self._run.store.list(records.PINS):
            try:
                pin = records.decode(item.name, self._run.store.get(item.name), PinRecord)
            except ObjectMissingError:
                continue
            except CorruptionError:  # a pin that can't be read names no checkpoint
                self._run.store.delete([item.name])
                continue
            if pin.expires > time.time():
                out.add(pin.checkpoint)
            else:
                self._run.store.delete([item.name])
        return out


def _checkpoint_of(name: str) -> str:
    """The checkpoint that a manifest or shard file was written for."""
    if name.startswith(records.MANIFESTS):
        return name.removeprefix(records.MANIFESTS).removesuffix(".json")
    return name.removeprefix(records.SHARDS).split("/")[0]
