"""Status: what a run does at this moment, from its coordinator where a cluster has one, and from its store.

Owns: the records of a status, and asking for them. Promises: asking changes nothing, and takes no run over; the log's
records are read once each, so that asking again and again costs a list. Needs Ray only where the caller is connected
to a cluster. Decides nothing; what the coordinator says of itself is made in `status_work`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from rl_ckpt.errors import CheckpointError, CheckpointNotFoundError
from rl_ckpt.options import Options
from rl_ckpt.runtime.spec import NAMESPACE, RunSpec
from rl_ckpt.store.commit_log import Log
from rl_ckpt.store.lease import holder
from rl_ckpt.store.run import Run
from rl_ckpt.store.urls import check_url

_ANSWER_S = 10.0  # a coordinator that does not answer within it is said not to


@dataclass(frozen=True, slots=True)
class LastCommit:
    """The newest checkpoint in the store."""

    step: int
    """Training step."""
    id: str
    """Of the checkpoint."""
    time: float
    """Of the commit, in Unix seconds."""
    age_s: float
    """How long ago that was when the status was made, by this machine's clock, in seconds; never negative."""
    bytes: int
    """Of all its arrays, each once."""


@dataclass(frozen=True, slots=True)
class OwnerStatus:
    """The writer that has the run."""

    by: str
    """Release, host and process."""
    job: str
    """What it works for; may be empty."""
    since: float
    """When it took the run over, in Unix seconds of its own clock."""
    seen: float
    """When it last renewed its lease, in Unix seconds of its own clock."""
    lease_s: float
    """How long the lease holds without being renewed, in seconds. Much later than that after `seen`, it is dead."""


@dataclass(frozen=True, slots=True)
class SaveStatus:
    """A save under way."""

    step: int
    """Training step."""
    checkpoint: str
    """Its id; empty while it has none yet."""
    state: str
    """As in docs/architecture.md: joining, waiting, reserving, staging, landing, settling, writing, committing."""
    ranks: int
    """That take part."""
    joined: int
    """Of them, that have joined."""
    staged: int
    """Of them, that have staged all of theirs."""
    bytes: int
    """That are to be staged, all ranks together; 0 while there is no plan yet."""
    bytes_staged: int
    """Of them, by ranks that have staged all of theirs."""
    bytes_to_write: int
    """What the store does not have yet; 0 until that is known, and for what stays in memory."""
    bytes_written: int
    """Of them, by shard servers that are done: files, so a little more than their values."""
    state_s: float
    """How long it has been in this state, in seconds."""
    seconds: float
    """How long it has been under way."""


@dataclass(frozen=True, slots=True)
class RestoreStatus:
    """A restore under way."""

    step: int | None
    """That is restored; None while it is not known."""
    checkpoint: str
    """Its id; empty while it is not known."""
    phase: str
    """As in docs/architecture.md: opening, matching, awaiting, fetching, searching, verifying, over."""
    ranks: int
    """That take part."""
    ready: int
    """Of them, that have done their part of this phase."""
    bytes_from: Mapping[str, int]
    """Brought in by shard servers that are done with their part, by source; as in `RestoreReport`."""
    state_s: float
    """How long it has been in this phase, in seconds."""
    seconds: float
    """How long it has been under way."""


@dataclass(frozen=True, slots=True)
class PrefetchStatus:
    """A prefetch under way, or what the last one has brought in while it is still in memory."""

    step: int
    """Of the checkpoint."""
    checkpoint: str
    """Its id."""
    bytes: int
    """To be brought in, each chunk once."""
    bytes_in_memory: int
    """Of them, that are in some node's memory."""
    under_way: bool
    """Whether more is on its way."""


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """A node's shard server."""

    name: str
    """Of its actor."""
    answers: bool
    """Whether it answered; all numbers are 0 if not."""
    parts: int = 0
    """Parts of checkpoints that it holds in memory, its own and copies."""
    bytes: int = 0
    """Of those parts."""
    store_bytes_read: int = 0
    """From the store, since it was started."""
    store_bytes_written: int = 0
    """To the store, since it was started."""
    store_retries: int = 0
    """Requests to the store that were sent again, since it was started."""
    bytes_from_peers: int = 0
    """From other nodes, since it was started."""


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """What a run's coordinator says."""

    saves: tuple[SaveStatus, ...] = ()
    """Under way."""
    restores: tuple[RestoreStatus, ...] = ()
    """Under way."""
    prefetch: PrefetchStatus | None = None
    """None: there is none."""
    servers: tuple[ServerStatus, ...] = ()
    """By name."""
    memory_bytes: int = 0
    """Held in the nodes' memory, all copies counted."""
    memory_parts: int = 0
    """As many."""
    copies_missing: int = 0
    """Copies that there should be and are not (yet)."""
    in_memory: tuple[str, ...] = ()
    """Ids of the checkpoints that memory has, at least in part, the newest first."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """What a run does at this moment. Plain data: `dataclasses.asdict` gives what `json.dumps` takes."""

    url: str
    """Of the run."""
    time: float
    """When the status was made, in Unix seconds."""
    last: LastCommit | None
    """The newest checkpoint in the store; None where there is none, or the store can't be read (see `notice`)."""
    owner: OwnerStatus | None
    """Who may write; None where nobody owns the run now."""
    service: ServiceStatus | None
    """None: this cluster has no service of the run, or Ray is not connected: only the store was asked."""
    checkpoints: int = 0
    """In the store."""
    notice: str = ""
    """What could not be found out, and why; mostly empty."""


@dataclass(slots=True)
class StatusReader:
    """Reads a run's status again and again; what was read of the log is not read again."""

    url: str
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    _run: Run | None = None

    def __post_init__(self) -> None:
        """Normalises the url; raises InvalidInputError where it can't be used."""
        self.url = check_url(self.url)

    def read(self) -> RunStatus:
        """As `run_status`."""
        notices: list[str] = []
        service = self._service(notices)
        now = time.time()
        last: LastCommit | None = None
        owner: OwnerStatus | None = None
        checkpoints = 0
        try:
            log, run = self._log()
            checkpoints = len(log.commits)
            if log.commits:
                newest = log.commits[-1]
                age_s = max(0.0, now - newest.time)
                last = LastCommit(newest.step, newest.id, newest.time, age_s, newest.bytes)
            owner = _owner(run, log)
        except CheckpointError as error:
            if service is None:
                raise
            if not isinstance(error, CheckpointNotFoundError):  # nothing is saved yet, while the first save goes on
                notices.append(f"the store could not be read: {error}")
        return RunStatus(self.url, now, last, owner, service, checkpoints, "; ".join(notices))

    def _log(self) -> tuple[Log, Run]:
        if self._run is None:
            self._run = Run.open(self.url, self.storage_options)
        return self._run.log.read(), self._run

    def _service(self, notices: list[str]) -> ServiceStatus | None:
        ray: Any = sys.modules.get("ray")  # who has not imported it is not connected
        if ray is None or not ray.is_initialized():
            return None
        name = RunSpec(self.url, {}, (), Options(), "", "").coordinator
        try:
            link: Any = ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            return None
        try:
            data = ray.get(link.status.remote(), timeout=_ANSWER_S)
        except ray.exceptions.RayError as error:
            why = str(error).strip().splitlines()[0]
            notices.append(f"the run's coordinator did not answer: {type(error).__name__}: {why}")
            return None
        return msgspec.msgpack.decode(data, type=ServiceStatus)


def run_status(url: str, *, storage_options: Mapping[str, Any] | None = None) -> RunStatus:
    """What a run does at this moment.

    Args:
        url: Of the run.
        storage_options: For the file system, as fsspec takes them.

    Returns:
        What the coordinator says, where this process is connected to a Ray cluster that has one for this run, and what
        the store says.

    Raises:
        CheckpointNotFoundError: There is neither such a run nor a service of one.
        InvalidInputError: The url can't be used.
        StorageError: The store failed, and there is no service of the run either.
    """
    return StatusReader(url, dict(storage_options or {})).read()


def _owner(run: Run, log: Log) -> OwnerStatus | None:
    if log.last_epoch is None or not log.last_epoch.lease:
        return None
    lease = holder(run.store, log.last_epoch)
    if lease is None:
        return None
    return OwnerStatus(lease.owner, lease.job, lease.since, lease.seen, lease.lease_s)
