"""Leases: how a writer says that it lives, so that a second one is told and does not take the run over unasked.

Owns: the lease objects, the thread that renews this writer's, and the judgement whether another writer is alive.
Promises: nothing is written while another writer may be alive, but a lease of this writer's own, which nobody reads
and which is deleted before the error is raised; clocks of two machines are never compared, only times that the store
itself gave. Fencing rests on none of this: it is the epoch record that decides who may commit (store/commit_log.py).
Readers look at no lease.

A lease is written before the epoch record that names it. So an epoch record without its lease means that its writer
has let the run go, and not that it has only just come; and a lease that no epoch record names means nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import msgspec

from rl_ckpt.errors import CheckpointError, CorruptionError, RunOwnedError
from rl_ckpt.format import records
from rl_ckpt.format.records import EpochRecord, LeaseRecord
from rl_ckpt.store.base import ObjectMissingError, Store
from rl_ckpt.store.pending import in_thread

_log = logging.getLogger("rl_ckpt")

LEASE_S = 30.0
_BEATS = 3  # in which a lease is renewed within its time: one or two may be lost
_LOOKS = 10  # at a lease that may be over, within its time
_GRANULARITY_S = 1.0  # of the times that a store gives
_JOIN_S = 5.0  # how long a close waits for a renewal that hangs in the store, and then for the delete


def moment(seconds: float, now: float | None = None) -> str:
    """A point in time for a person: absolute, and how long ago that is by this machine's clock."""
    ago = max(0.0, (time.time() if now is None else now) - seconds)
    unit, size = next(((u, n) for u, n in (("d", 86400), ("h", 3600), ("min", 60)) if ago >= 2 * n), ("s", 1))
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(seconds))} UTC ({ago / size:.0f} {unit} ago)"


@dataclass(frozen=True, slots=True)
class Process:
    """A process, so that another on the same machine can tell whether it lives."""

    host: str
    pid: int
    started: str
    """When it began, in clock ticks after the start of the machine."""
    machine: str
    """Id of this start of the machine, and the process namespace; empty where the system does not tell."""


def this_process() -> Process:
    """The process that asks."""
    state = _stat(os.getpid())
    return Process(socket.gethostname(), os.getpid(), state[1] if state else "", _machine())


def liveness(process: Process, machine: str | None = None) -> Literal["alive", "dead", "unknown"]:
    """Whether a process lives, where that can be proven from here: on the same machine, in the same namespace."""
    if not process.machine or not process.started or process.machine != (_machine() if machine is None else machine):
        return "unknown"
    try:
        os.kill(process.pid, 0)  # /proc may hide other users' processes; this does not
    except ProcessLookupError:
        return "dead"
    except PermissionError:
        pass
    state = _stat(process.pid)
    if state is None:
        return "unknown"
    return "alive" if state[1] == process.started and state[0] not in "ZX" else "dead"


def _stat(pid: int) -> tuple[str, str] | None:
    """State and time of start of a process, where the system tells."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return (fields[0], fields[19]) if len(fields) > 19 else None


def _machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


class Lease:
    """This writer's lease. `claim` and `close` are for one thread at a time."""

    def __init__(
        self,
        store: Store,
        owner: str,
        *,
        job: str = "",
        service: str = "",
        lease_s: float = LEASE_S,
        beside: bool = False,
    ) -> None:
        """Nothing is written yet.

        Args:
            store: Of the run.
            owner: This process, for messages.
            job: What it works for, for messages.
            service: Id of what goes on in another process when this one dies: that one takes over at once.
            lease_s: How long the lease holds without being renewed, in seconds.
            beside: Whether another writer of this very process counts as another job; else it gives way.
        """
        self._store = store
        self._beside = beside
        now, process = time.time(), this_process()
        self._record = LeaseRecord(
            epoch=0, id=uuid.uuid4().hex[:12], owner=owner, job=job, host=process.host, pid=process.pid,
            started=process.started, machine=process.machine, service=service, since=now, seen=now, beat=0,
            lease_s=lease_s,
        )  # fmt: skip
        self._written = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._taken: Callable[[], bool] = lambda: False
        self.ended = False
        """Whether `claim` found for certain that the writer before this one is dead, or has let the run go."""

    @property
    def id(self) -> str:
        """As the epoch record names it."""
        return self._record.id

    @property
    def name(self) -> str:
        """Its file."""
        return records.lease_name(self._record.epoch, self._record.id)

    def claim(
        self,
        last: EpochRecord | None,
        epoch: int,
        take_over: bool,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        """Makes sure that no other writer is alive, and writes this lease; the epoch record may follow.

        Args:
            last: The newest epoch record.
            epoch: Which epoch this writer is about to open.
            take_over: Does not ask who is alive.
            clock: Seconds of this process, for waiting.
            wait: Waits so many seconds.

        Raises:
            RunOwnedError: Another writer owns the run and is alive; nothing is left of this lease.
            StorageError: The store failed.
        """
        if self._record.epoch != epoch:
            self.withdraw()
            self._record = msgspec.structs.replace(self._record, epoch=epoch)
        try:
            held = None if take_over else self._in_doubt(last)
            if held is not None:
                self._wait_until_over(held, clock, wait)
            self._put()
        except BaseException:
            self.withdraw()
            raise

    def _in_doubt(self, last: EpochRecord | None) -> _Held | None:
        """The last owner's lease, unless it is certain that this writer may have the run."""
        self.ended = False
        if last is None or not last.lease:
            return None  # nobody, or a writer that has no lease
        held = _read(self._store, last, self._record.lease_s)
        if held is None:
            self.ended = True
            return None  # it has let the run go
        theirs, mine = held.record, self._record
        held.alive_here = liveness(Process(theirs.host, theirs.pid, theirs.started, theirs.machine), mine.machine)
        self.ended = held.alive_here == "dead"
        same = (theirs.machine, theirs.pid, theirs.started) == (mine.machine, mine.pid, mine.started)
        if theirs.machine and same and not self._beside:
            return None
        if theirs.service and theirs.service == mine.service:
            return None
        return None if held.alive_here == "dead" else held

    def _wait_until_over(self, held: _Held, clock: Callable[[], float], wait: Callable[[float], None]) -> None:
        """Returns once a lease has not been renewed for its time, by the store's clock and by this process's own."""
        theirs = held.record
        age_s = self._age_s(held)
        if age_s >= theirs.lease_s:
            return
        if held.alive_here == "alive":
            raise self._owned(theirs)
        _log.warning(
            "%s was last written to by %s, whose lease is renewed no more or not yet: waiting up to %.0f s for it to "
            "run out (take_over=True does not wait)", self._store.url, theirs.owner, theirs.lease_s - age_s,
        )  # fmt: skip
        over = clock() + theirs.lease_s - age_s
        while (left := over - clock()) > 0:
            wait(min(left, theirs.lease_s / _LOOKS))
            now = _read(self._store, held.epoch, theirs.lease_s)
            if now is None:
                return
            if now.data != held.data:
                raise self._owned(now.record)

    def _age_s(self, held: _Held) -> float:
        """For how long a lease has certainly not been renewed, by the store's own clock; 0 where it gives no times."""
        self._put()  # the store says when that was
        times = {item.name: item.modified for item in self._store.list(records.LEASES)}
        mine, theirs = times.get(self.name, 0.0), times.get(held.name, 0.0)
        return max(0.0, mine - theirs - _GRANULARITY_S)

    def _owned(self, theirs: LeaseRecord) -> RunOwnedError:
        job = f", for {theirs.job}" if theirs.job else ""
        return RunOwnedError(
            f"{self._store.url} is owned by another job that is alive: {theirs.owner}{job}, since "
            f"{moment(theirs.since)}, last seen {moment(theirs.seen)}. Only one job may write to a run: stop that one, "
            "give this one another url, or take the run over with Checkpointer(..., take_over=True), which makes the "
            "other job's next save fail. Nothing was written"
        )

    def _put(self) -> None:
        record = msgspec.structs.replace(self._record, seen=time.time(), beat=self._record.beat + 1)
        self._written = self.name  # before: whether a put that failed has landed is unknown
        self._store.put(self.name, [records.encode(record)])
        self._record = record

    def withdraw(self) -> None:
        """Deletes the lease. Where the store fails it runs out by itself, and a sweep deletes it later."""
        if self._written:
            with contextlib.suppress(CheckpointError):
                self._store.delete([self._written])
            self._written = ""

    # Renewing.

    def start(self, taken: Callable[[], bool]) -> None:
        """Renews the lease from now on, in a thread of its own, until `close` or `stop`, or a newer owner is seen.

        Args:
            taken: Asks the store whether a newer owner has the run.
        """
        self._taken = taken
        self._thread = threading.Thread(target=self._run, name="rl_ckpt-lease", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self._record.lease_s / _BEATS):
            if not self.beat():
                return

    def beat(self) -> bool:
        """Renews the lease; whether to go on. A store that fails is asked again at the next beat."""
        try:
            # Looked at first: a run that was removed from its folder must not come back as a lease, nor a lease that
            # the newer owner has swept.
            if not self._store.exists(records.RUN_FILE):
                return False
            if self._taken():
                self.withdraw()
                return False
            self._put()
        except CheckpointError:
            pass
        except ObjectMissingError:
            return False
        return True

    def stop(self) -> None:
        """Ends the thread at once or with its next beat, and leaves the lease to run out."""
        self._stop.set()

    def close(self) -> None:
        """Ends the thread and deletes the lease: the run is free."""
        self.stop()
        if self._thread is not None:
            self._thread.join(_JOIN_S)
            self._thread = None
        with contextlib.suppress(
            TimeoutError
        ):  # the store hangs: the lease runs out by itself, unless it is deleted yet
            in_thread(self.withdraw, "rl_ckpt-lease-end").result(_JOIN_S)


@dataclass(slots=True)
class _Held:
    """A lease as it was read."""

    epoch: EpochRecord
    name: str
    data: bytes
    record: LeaseRecord
    alive_here: str = "unknown"


def holder(store: Store, last: EpochRecord) -> LeaseRecord | None:
    """The lease of an epoch's owner, for people to look at; None where it has let the run go.

    Raises:
        StorageError: The store failed.
    """
    held = _read(store, last, LEASE_S)
    return None if held is None else held.record


def _read(store: Store, last: EpochRecord, lease_s: float) -> _Held | None:
    """The lease of an epoch's owner; None where there is none any more."""
    name = records.lease_name(last.epoch, last.lease)
    try:
        data = store.get(name)
    except ObjectMissingError:
        return None
    try:
        record = records.decode(store.object_url(name), data, LeaseRecord)
    except CorruptionError:  # whose it is stands in the epoch record; whether it lives is seen by its changing
        record = LeaseRecord(
            epoch=last.epoch, id=last.lease, owner=last.owner, job="", host="", pid=0, started="", machine="",
            service="", since=last.time, seen=last.time, beat=0, lease_s=lease_s,
        )  # fmt: skip
    return _Held(last, name, data, record)
