"""The writing side of a run: opening it for writing, committing, retention and sweep.

Owns: the order in which a save becomes a checkpoint (manifest, then commit record, then retention, then sweep) and the
rules about steps. One committer at a time owns a run; a newer one fences it. Used by the coordinator and by saves
without Ray alike.
"""

from __future__ import annotations

import threading
import time
import uuid
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rl_ckpt.errors import CommitUnknownError, InvalidInputError, StorageError
from rl_ckpt.format import manifest as manifests
from rl_ckpt.format import records
from rl_ckpt.format.digest import digest
from rl_ckpt.format.manifest import ArrayEntry, Manifest, ShardFileEntry
from rl_ckpt.format.records import CommitRecord
from rl_ckpt.info import CheckpointInfo, Verdict
from rl_ckpt.plan.chunk_index import NOTHING_KNOWN, KnownChunks
from rl_ckpt.plan.compaction import lasting
from rl_ckpt.plan.deal import SavePlan, Written, entries
from rl_ckpt.plan.parts import memory_entries
from rl_ckpt.plan.retention import KeepRule
from rl_ckpt.state import leaves
from rl_ckpt.state.arrays import UnsupportedLeafError
from rl_ckpt.state.leaves import Json
from rl_ckpt.store.lease import LEASE_S, Lease
from rl_ckpt.store.reuse import Reuse
from rl_ckpt.store.run import Run, lineage, who
from rl_ckpt.store.sweep import Sweeper

_LANDED_KEPT = 4096  # checkpoints in memory alone whose steps are remembered


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """What a caller says of a save."""

    step: int
    metrics: Mapping[str, Json] = field(default_factory=dict)
    """Encoded by state/leaves.py."""
    tag: str | None = None
    parent: str | None = None
    """Id of the checkpoint that the job last restored or saved; None: the newest."""
    deadline_s: float | None = None
    """An urgent save: to memory first, and done with after so many seconds; None: no hurry."""
    since: tuple[str, ...] = ()
    """Ids of earlier saves that continue `parent`, in order: the last that came to be is what this one continues."""


@dataclass(frozen=True, slots=True)
class WrittenSave:
    """A save whose files are all written."""

    checkpoint: str
    """From `Committer.attempt`."""
    request: SaveRequest
    plan: SavePlan
    """Settled."""
    written: Mapping[str, Sequence[Written]]
    """What the shard servers wrote, by server."""
    digests: Mapping[tuple[str, int], bytes]
    """Of what was staged, by server and offset."""


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A save that is neither committed nor abandoned."""

    step: int
    line: set[str]
    """Ids of the checkpoints that it continues."""
    request: SaveRequest


class Committer:
    """Commits checkpoints to one run.

    `attempt`, `abandon`, `land` and `take_landed` may be called by any thread and wait for nothing that the store does;
    all else is for one thread at a time.
    """

    def __init__(
        self,
        run: Run,
        keep: Sequence[KeepRule],
        grace_s: float,
        *,
        take_over: bool = False,
        job: str = "",
        service: str = "",
        lease_s: float = LEASE_S,
        beside: bool = False,
    ) -> None:
        """Takes the run over: appends an epoch record, and keeps a lease from then on.

        Args:
            run: The run.
            keep: Retention rules.
            grace_s: How long orphans are kept, in seconds.
            take_over: Takes the run over from another writer that is alive too.
            job: What this writer works for, for messages.
            service: Id of what opens the run again from another process when this one dies (store/lease.py).
            lease_s: How long another writer must wait when this one dies where it can't see that, in seconds.
            beside: Whether another writer of this very process counts as another job; else it gives way.

        Raises:
            RunOwnedError: Another writer owns the run and is alive; nothing was written.
            StorageError, CommitUnknownError: The store failed.
        """
        self.run = run
        self._keep = tuple(keep)
        self._lease = Lease(run.store, who(), job=job, service=service, lease_s=lease_s, beside=beside)
        try:
            log = run.log.claim(who(), self._lease, take_over)
        except BaseException:
            self._lease.close()
            raise
        self._lease.start(run.log.look_for_newer)
        # A committer that nobody closed and nobody has any more does not keep the run from others.
        self._end = weakref.finalize(self, self._lease.stop)
        self._end.atexit = False
        self._commits = list(log.commits)
        self._sweeper = Sweeper(run, grace_s, hold=bool(log.damaged), lease=self._lease.name)
        self._open: dict[str, _Attempt] = {}
        self._lock = threading.Lock()  # held where commits and attempts change, never while the store is asked
        self._unsettled: set[str] = set()  # attempts whose commit record was sent and may yet land
        # In a local folder nothing is on its way any more once a process has ended.
        ended = self._lease.ended and run.store.local_path(records.RUN_FILE) is not None
        self._reuse = Reuse(run, self._sweeper.know, ended=ended)
        self._reuse.begin(self._commits)
        self._landed: dict[str, int] = {}  # only in memory, and in the line that goes on: the step
        self._parents: dict[str, str | None] = {}  # of all that landed, of other branches too: the committed parent
        self.verdicts: Sequence[Verdict] = ()  # of the last `tidy`
        self.last_manifest = b""  # of the last `commit`, as it was encoded

    def configure(self, keep: Sequence[KeepRule], grace_s: float) -> None:
        """Takes other retention rules, from the next commit on."""
        self._keep = tuple(keep)
        self._sweeper.grace_s = grace_s

    def is_gone(self) -> bool:
        """Whether the run was removed from its local folder under this process."""
        store = self.run.store
        return store.local_path(records.RUN_FILE) is not None and not store.exists(records.RUN_FILE)

    @property
    def commits(self) -> Sequence[CommitRecord]:
        """All commits of the run, oldest first."""
        return self._commits

    @property
    def sweeper(self) -> Sweeper:
        """What sweeps for this committer."""
        return self._sweeper

    def attempt(self, request: SaveRequest) -> str:
        """Checks a request and names its checkpoint; asks an object store nothing.

        Returns:
            A new id, `<step>-<attempt>`. Its files are kept from the sweep until it is committed or abandoned.

        Raises:
            InvalidInputError: The step is committed already in this line of checkpoints, or being saved.
            FencedError: It is known already that a newer coordinator owns the run.
        """
        self.run.log.check_owner()
        if self.is_gone():
            raise StorageError(f"{self.run.store.url} was removed under this process; make a new Checkpointer")
        with self._lock:
            if request.parent is not None and not request.since:  # what came after it is another branch from here on
                until = [*self._landed].index(request.parent) + 1 if request.parent in self._landed else 0
                self._landed = dict([*self._landed.items()][:until])
            before = self._before(request)
            line = self._line(request, before)
            twice = next((c for c in self._commits if c.step == request.step and c.id in line), None)
            if twice is not None:
                raise InvalidInputError(
                    f"step {request.step} is committed already as {twice.id} in {self.run.store.url}; save a later "
                    "step, or restore a checkpoint before it first (then the new one starts another branch)"
                )
            if request.step in self._landed.values():
                raise InvalidInputError(
                    f"step {request.step} is saved already, in memory; save a later step, or restore a checkpoint "
                    "before it first (then the new one starts another branch)"
                )
            if request.step in {self._open[one].step for one in before}:
                raise InvalidInputError(f"step {request.step} is being saved already; save a later step")
            checkpoint = f"{request.step}-{uuid.uuid4().hex[:12]}"
            self._sweeper.protect(checkpoint, set())
            self._open[checkpoint] = _Attempt(request.step, line, request)
        return checkpoint

    def fenced(self) -> bool:
        """Whether it is known that a newer coordinator owns the run."""
        return self.run.log.fenced_by is not None

    def close(self) -> None:
        """Lets the run go: no thread and no lease of this committer is left, and the next writer need not wait."""
        self._end.detach()
        self._lease.close()

    def _before(self, request: SaveRequest) -> list[str]:
        """Open attempts of the line that a save continues."""
        return [one for one in self._open if request.parent is None or one in request.since]

    def _line(self, request: SaveRequest, before: Sequence[str]) -> set[str]:
        """Ids of the checkpoint that a save continues and its ancestors; where others of its line are open, theirs."""
        if before:
            return self._open[before[-1]].line | {before[-1]}
        parent = self._continued(request)
        start = next((c for c in self._commits if c.id == parent), self._commits[-1] if self._commits else None)
        return {start.id, *lineage(start, self._commits)} if start else set()

    def _continued(self, request: SaveRequest) -> str | None:
        """Id of the checkpoint in the store that a save continues, as far as it is decided; None: the newest."""
        there = {*self._parents, *(commit.id for commit in self._commits)}
        parent = next((one for one in reversed(request.since) if one in there), request.parent)
        return self._parents.get(parent, parent) if parent is not None else None

    def stored(self, checkpoint: str) -> KnownChunks:
        """What an attempt need not write: the intact chunks of the live checkpoints that it may lean on.

        Their files are kept from the sweep until the attempt is committed or abandoned.

        Raises:
            StorageError: The store failed.
        """
        attempt = self._open.get(checkpoint)
        if attempt is None:
            return NOTHING_KNOWN  # given up meanwhile
        with self._lock:
            parent = self._continued(attempt.request)
        commits = [*self._commits, self._planned(checkpoint, attempt.request)]
        stays = lasting(commits, self._keep, self._sweeper.clock.now(), self._sweeper.said)
        stays |= self._sweeper.done.pinned.keys()  # a fork may hold one for ever
        urgent = attempt.request.deadline_s is not None
        stored = self._reuse.find(parent, self._commits, stays, lasts=checkpoint in stays, urgent=urgent)
        self._sweeper.protect(checkpoint, stored.names)
        with self._lock:
            given_up = checkpoint not in self._open
        if given_up:  # while the store was asked
            self._sweeper.release(checkpoint)
        return stored

    def _planned(self, checkpoint: str, request: SaveRequest) -> CommitRecord:
        """What the retention rules will see of an attempt."""
        return CommitRecord(
            number=0, run="", write_id="", epoch=0, id=checkpoint, step=request.step, manifest_bytes=0,
            manifest_digest="", bytes=0, bytes_written=0, time=time.time(), metrics=dict(request.metrics),
            tag=request.tag, parent=request.parent,
        )  # fmt: skip

    def commit(self, save: WrittenSave) -> CommitRecord:
        """Makes a checkpoint of what was written.

        Raises:
            FencedError, CommitConflictError, CommitUnknownError, StorageError: As `CommitLog.commit`. Unless the
                outcome is unknown, nothing is committed and the files are orphans for the sweep.
        """
        if self.is_gone():
            raise StorageError(f"{self.run.store.url} was removed under this process; make a new Checkpointer")
        manifest = self._manifest(save, *entries(save.plan, save.written, save.digests))
        data = manifests.encode(manifest)
        self.last_manifest = data
        self.run.store.put(records.manifest_name(manifest.id), [data])
        files = sum(w.bytes for server in save.written.values() for w in server)

        def make(number: int, write_id: str) -> CommitRecord:
            return self._record(manifest, data, number, write_id, files + len(data))

        # Commit record last: a crash before this line leaves orphans for the sweep, never half a checkpoint.
        try:
            record = self.run.log.commit(make)
        except (StorageError, CommitUnknownError):
            # The record may still land, until another stands in its place: until then its files are no orphans.
            self._unsettled.add(manifest.id)
            raise
        with self._lock:
            self._settle()
            self._commits.append(record)
            self._sweeper.committed(manifest)
            self._open.pop(manifest.id, None)
            self._landed.pop(manifest.id, None)
            self._parents.pop(manifest.id, None)
        self._reuse.committed(manifest, record)
        return record

    def land(self, save: WrittenSave) -> tuple[CommitRecord, bytes]:
        """Closes an attempt that stays in memory alone: nothing is stored, and the store is asked nothing.

        Returns:
            The record that it would have, its number that of the newest commit; and the manifest as it was encoded.
        """
        manifest = self._manifest(save, *memory_entries(save.plan, save.digests))
        data = manifests.encode(manifest)
        with self._lock:
            number = self._commits[-1].number if self._commits else 0
            record = self._record(manifest, data, number, "", 0)
            self._open.pop(manifest.id, None)
        self.take_landed(manifest.id, manifest.step, manifest.parent)
        self._sweeper.release(manifest.id)
        return record, data

    def _record(self, manifest: Manifest, data: bytes, number: int, write_id: str, bytes_written: int) -> CommitRecord:
        """The record of a manifest, `data` as it was encoded."""
        return CommitRecord(
            number=number,
            run=self.run.record.run,
            write_id=write_id,
            epoch=self.run.log.epoch,
            id=manifest.id,
            step=manifest.step,
            manifest_bytes=len(data),
            manifest_digest=digest(data).hex(),
            bytes=manifest.array_bytes,
            bytes_written=bytes_written,
            time=manifest.time,
            metrics=manifest.metrics,
            tag=manifest.tag,
            parent=manifest.parent,
            world_size=manifest.world_size,
        )

    def is_open(self, checkpoint: str) -> bool:
        """Whether this committer has named it, and it is neither committed nor abandoned."""
        with self._lock:
            return checkpoint in self._open

    def take_landed(self, checkpoint: str, step: int, parent: str | None) -> None:
        """Learns of a checkpoint that is in memory alone: it may be continued, and its step is taken."""
        with self._lock:
            self._landed[checkpoint], self._parents[checkpoint] = step, parent
            while len(self._parents) > _LANDED_KEPT:
                oldest = next(iter(self._parents))
                del self._parents[oldest]
                self._landed.pop(oldest, None)

    def attempt_landed(self, manifest: Manifest, after: int) -> bool:
        """What is in memory alone is to be stored after all: it is an attempt again, of the same id.

        Args:
            manifest: As it landed.
            after: Number of the newest commit that it is newer than.

        Returns:
            Whether it may be; not where it is of another run, or where there is a newer commit.
        """
        newest = self._commits[-1].number if self._commits else 0
        if manifest.run != self.run.record.run or newest > after:
            return False
        with self._lock:
            self._sweeper.protect(manifest.id, set())
            request = SaveRequest(manifest.step, manifest.metrics, manifest.tag, manifest.parent)
            line = self._line(request, self._before(request))
            self._open[manifest.id] = _Attempt(manifest.step, line, request)
        return True

    def _settle(self) -> None:
        """Takes up commits that landed although they had seemed to fail; the others can't land any more."""
        self._commits.extend(self.run.log.take_late())
        for checkpoint in self._unsettled:
            self._sweeper.release(checkpoint)
        self._unsettled.clear()

    def tidy(self) -> None:
        """Retention and sweep: drops the checkpoints that no rule keeps, then files that no checkpoint names.

        Raises:
            StorageError: The store failed; what is left goes at the next sweep.
        """
        back, self.verdicts = self._sweeper.judge(self._commits, self._keep)
        with self._lock:
            self._commits = sorted([*self._commits, *back], key=lambda commit: commit.number)
        dropped = {verdict.id for verdict in self.verdicts if not verdict.keep}
        self._reuse.load_all([commit for commit in self._commits if commit.id not in dropped])
        try:
            self._sweeper.sweep(
                [commit for commit in self._commits if commit.id in dropped],
                [commit for commit in self._commits if commit.id not in dropped],
            )
        finally:
            gone = self._sweeper.take_gone()
            self._reuse.dropped(gone)
            with self._lock:
                self._commits = [commit for commit in self._commits if commit.id not in gone]

    def abandon(self, checkpoint: str) -> None:
        """Says that an attempt will not be committed: its files are orphans from now on. No change to one that is."""
        with self._lock:
            known = self._open.pop(checkpoint, None) is not None
        if known and checkpoint not in self._unsettled:
            self._sweeper.release(checkpoint)

    def info(self, record: CommitRecord) -> CheckpointInfo:
        """A commit as callers see it."""
        return info_of(self.run, record, self._commits)

    def _manifest(
        self, save: WrittenSave, files: tuple[ShardFileEntry, ...], arrays: tuple[ArrayEntry, ...]
    ) -> Manifest:
        request, plan = save.request, save.plan
        with self._lock:
            parent = self._continued(request) or (self._commits[-1].id if self._commits else None)
        return Manifest(
            version=manifests.version_for(files),
            run=self.run.record.run,
            id=save.checkpoint,
            step=request.step,
            world_size=plan.merged.world_size,
            time=time.time(),
            writer=who(),
            parent=parent,
            metrics=dict(request.metrics),
            tag=request.tag,
            files=files,
            arrays=arrays,
            nodes=plan.merged.nodes,
        )


def info_of(
    run: Run,
    record: CommitRecord,
    commits: Sequence[CommitRecord],
    *,
    stall_s: float | None = None,
    durable_s: float | None = None,
) -> CheckpointInfo:
    """A commit record as callers see it."""
    url = run.store.object_url(records.manifest_name(record.id))
    return info_from(record, url, lineage(record, commits), stall_s=stall_s, durable_s=durable_s)


def info_from(
    record: CommitRecord,
    url: str,
    ancestors: tuple[str, ...],
    *,
    stall_s: float | None = None,
    durable_s: float | None = None,
    in_store: bool = True,
) -> CheckpointInfo:
    """A commit record as callers see it, from its parts as they travel between processes."""
    return CheckpointInfo(
        step=record.step,
        id=record.id,
        url=url,
        bytes=record.bytes,
        bytes_written=record.bytes_written,
        time=record.time,
        metrics={name: leaves.decode(value, name) for name, value in record.metrics.items()},
        tag=record.tag,
        lineage=ancestors,
        world_size=record.world_size,
        stall_s=stall_s,
        durable_s=durable_s,
        in_store=in_store,
        tags=(record.tag,) if record.tag is not None else (),
        parent=record.parent,
    )


def encode_metrics(metrics: Mapping[str, object]) -> dict[str, Json]:
    """Metrics for a commit record.

    Raises:
        InvalidInputError: A name is no string, or a value no plain data.
    """
    if not isinstance(metrics, Mapping):
        raise InvalidInputError(f"metrics={metrics!r} must be a dict of names and plain values")
    out: dict[str, Json] = {}
    for name, value in metrics.items():
        if not isinstance(name, str) or not leaves.is_utf8(name):
            raise InvalidInputError(f"metrics: the name {name!r} must be a string of Unicode text")
        try:
            out[name] = leaves.encode(value)
        except UnsupportedLeafError as error:
            raise InvalidInputError(
                f"metrics[{name!r}] must be a number, string or other plain value, not a {type(value).__name__}"
            ) from error
    return out
