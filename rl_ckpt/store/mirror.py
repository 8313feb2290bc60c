"""Mirror: the destination of pulls, another place with checkpoints of the same run, under the same names and numbers.

Owns: what must hold of a destination before anything is written to it, the pin that keeps its own sweeps off what is
arriving, and the order in which records are copied. Promises: the mirror's records, manifests and files are the
source's, byte by byte; a checkpoint is there once its commit record is, which is written last and never over another's
checkpoint; no epoch is opened, so that pulls fence nobody, and two of them at once do the same.

What a killed pull leaves: a manifest and files that no record commits, and a pin that ends by itself. The next pull
takes the files up. A sweep of the mirror leaves them alone while the pin holds; afterwards they are orphans as any.

A sweep of a mirror leaves an epoch record there. The source's record of that number is put in its place, once its owner
is done: it has committed nothing, so there is nothing to lose.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence

from rl_ckpt.errors import CheckpointError, CommitConflictError, CorruptionError, InvalidInputError, RunOwnedError
from rl_ckpt.format import records
from rl_ckpt.format.records import CommitRecord, EpochRecord, LeaseRecord, LogRecord, PinRecord, RunRecord
from rl_ckpt.plan.pulling import LogRecords, not_a_mirror
from rl_ckpt.store.base import ObjectExistsError, ObjectMissingError, Store
from rl_ckpt.store.based import self_contained
from rl_ckpt.store.commit_log import Log
from rl_ckpt.store.lease import Lease, moment, this_process
from rl_ckpt.store.probe import PROBE, probe_create_only
from rl_ckpt.store.run import Run, who

HOLD_S = 3600.0
"""How long the pin of a killed pull keeps what had arrived from the mirror's sweeps."""
_RENEW_S = 60.0
_JOIN_S = 5.0
OWNER_S = 60.0
"""How long a commit waits for a sweep of the mirror to end."""
_LOOK_S = 0.5


def log_records(log: Log) -> LogRecords:
    """A log as the plan takes it."""
    return LogRecords(log.head, log.commits, log.epochs)


def refuse_itself(source: Store, target: Store) -> None:
    """Compares places, without asking a store that is not a local folder.

    Raises:
        InvalidInputError: They are one place, or one lies within the other.
    """
    here, there = source.local_path(records.RUN_FILE), target.local_path(records.RUN_FILE)
    if here is not None and there is not None:
        a, b = os.path.realpath(os.path.dirname(here)), os.path.realpath(os.path.dirname(there))
        with contextlib.suppress(OSError):
            b = a if os.path.samefile(a, b) else b  # by another mount
    elif source.storage_options == target.storage_options:
        a, b = source.url, target.url
    else:
        return  # `Mirror.open` finds out by writing, where the destination has the same run
    if a == b:
        raise InvalidInputError(_itself(source, target))
    if (a + "/").startswith(b + "/") or (b + "/").startswith(a + "/"):
        raise InvalidInputError(
            f"{source.url} and {target.url} lie one within the other; give a place beside the source"
        )


class Mirror:
    """The destination of a pull."""

    def __init__(self, source: Run, target: Store, pause: Callable[[float], None] = time.sleep) -> None:
        """Nothing is read yet.

        Args:
            source: The run that is pulled.
            target: The destination's own store.
            pause: Waits so many seconds.
        """
        self._source, self._pause = source, pause
        self.store = target
        self.run: Run | None = None
        """The destination's run; None where there is none yet."""
        self._log = Log()

    def open(self) -> Log:
        """Looks at what is there; writes nothing that stays.

        Returns:
            The log, empty where there is no run yet.

        Raises:
            InvalidInputError: It is the source itself, or another run.
            CommitConflictError: It holds checkpoints that the source has not, or newer ones.
            RunOwnedError: A job that is alive owns it.
            CorruptionError: Its run.json is missing or damaged.
            StorageError: The store failed.
        """
        refuse_itself(self._source.store, self.store)
        if self.run is None:
            try:
                record = records.decode_run(self.store.url, self.store.get(records.RUN_FILE))
            except ObjectMissingError:
                if self.store.list(records.COMMITS):
                    raise CorruptionError(
                        f"{self.store.url}/{records.RUN_FILE} is missing, though there is a commit log: "
                        "`verify(repair=True)` makes it anew from that; or pull into another url"
                    ) from None
                return self._log
            self._check_run(record)
            self.run = Run(self.store, record)
        return self.look()

    def look(self) -> Log:
        """Reads the log again; raises as `open`."""
        if self.run is None:
            return self._log
        self._log = self.run.log.read()
        why = not_a_mirror(log_records(self._source.log.read()), log_records(self._log))
        if why is not None:
            raise CommitConflictError(
                f"{self.store.url} is no mirror of {self._source.store.url}: {why}. Pull into another url, or, if "
                "source and destination were mixed up, the other way round. Nothing was written"
            )
        self._refuse_owner(self._log.last_epoch, 0.0)
        return self._log

    def _check_run(self, found: RunRecord) -> None:
        theirs = self._source.record
        if found.run != theirs.run:
            raise InvalidInputError(
                f"{self.store.url} is another run ({found.run}, created {moment(found.created)} by {found.by}) than "
                f"{self._source.store.url} ({theirs.run}); pull into another url. Nothing was written"
            )
        scheme = self.store.url.partition("://")[0]
        if scheme == self._source.store.url.partition("://")[0] and self.store.local_path(records.RUN_FILE) is None:
            # The same run at the same kind of store: perhaps the same place by another name of its server.
            name = f"{PROBE}{uuid.uuid4().hex}"
            self.store.put(name, [b"is this the source?"])
            try:
                if self._source.store.exists(name):
                    raise InvalidInputError(_itself(self._source.store, self.store))
            finally:
                self.store.delete([name])

    def _refuse_owner(self, last: EpochRecord | None, wait_s: float) -> None:
        """Waits for so long for an owner that is alive to let the run go.

        Args:
            last: Its epoch record.
            wait_s: In seconds.

        Raises:
            RunOwnedError: It has not.
        """
        begun = time.monotonic()
        while last is not None and last.lease and (alive := self._alive(last)) is not None:
            if time.monotonic() - begun >= wait_s:
                raise RunOwnedError(
                    f"{self.store.url} can't be pulled into: a job that is alive owns it, {last.owner}, since "
                    f"{moment(last.time)}. Stop that job, or pull into another url"
                ) from alive
            self._pause(_LOOK_S)

    def _alive(self, last: EpochRecord) -> CheckpointError | None:
        """Why the writer of an epoch record counts as alive; None where it has let the run go, or is dead."""
        name = records.lease_name(last.epoch, last.lease)
        try:
            held = records.decode(self.store.object_url(name), self.store.get(name), LeaseRecord)
        except ObjectMissingError:
            return None
        except CorruptionError:
            held = None
        if held is not None and held.machine and held.pid == os.getpid() and held.started == this_process().started:
            return RunOwnedError("it is this very process: close its Checkpointer first")
        lease = Lease(self.store, who(), job=f"a pull from {self._source.store.url}")
        try:
            lease.claim(last, last.epoch + 1, take_over=False)  # written for a moment, to ask the store's clock
        except RunOwnedError as error:
            return error
        finally:
            lease.withdraw()
        return None

    # Writing.

    def create(self, weak_commits: bool) -> Run:
        """The destination's run, made if there is none.

        Raises:
            InvalidInputError: The store does not keep the create-only promise, or another run was made meanwhile.
            StorageError: The store failed.
        """
        if self.run is not None:
            return self.run
        if not weak_commits:  # whoever goes on with the mirror relies on it, and run.json says it of the source's store
            probe_create_only(self.store)
        data = self._source.store.get(records.RUN_FILE)
        if self._source.record.bases:  # a fork: its bases' files come along, under the names that manifests have
            data = records.encode(self_contained(self._source.record))
        try:
            self.store.create(records.RUN_FILE, data)
        except ObjectExistsError:  # by another pull, or the reply was lost
            data = self.store.get(records.RUN_FILE)
        record = records.decode_run(self.store.url, data)
        if record.run != self._source.record.run:
            raise InvalidInputError(f"{self.store.url} was made another run ({record.run}) meanwhile, by {record.by}")
        self.run = Run(self.store, record)
        return self.run

    def commit(self, commits: Sequence[CommitRecord], raw: Mapping[str, bytes]) -> None:
        """Copies commit records, and the epoch records before them. What they commit must be there.

        Args:
            commits: Oldest first.
            raw: By checkpoint: its record as it stands in the source, or stood there a moment ago.

        Raises:
            RunOwnedError, CommitConflictError: Somebody writes to the destination.
            StorageError: A store failed.
        """
        log = self.look()
        ours: dict[int, LogRecord] = {record.number: record for record in log.commits}
        ours |= {record.number: record for record in log.epochs}
        epochs = [e for e in self._source.log.read().epochs if e.number < commits[-1].number]
        theirs: list[LogRecord] = [*epochs, *commits]
        for record in sorted(theirs, key=lambda record: record.number):
            if ours.get(record.number) != record:
                name = records.commit_name(record.number)
                self._copy(name, raw[record.id] if isinstance(record, CommitRecord) else self._source.store.get(name))

    def _copy(self, name: str, data: bytes) -> None:
        for _ in range(2):
            try:
                self.store.create(name, data)
                return
            except ObjectExistsError:
                pass
            try:
                found = self.store.get(name)
            except ObjectMissingError:
                continue
            if found == data:
                return
            self._replace(name, found, data)
            return
        raise CommitConflictError(f"{self.store.object_url(name)} is written and deleted by somebody else; pull again")

    def _replace(self, name: str, found: bytes, data: bytes) -> None:
        """Puts a record in the place of an epoch record that a sweep of the mirror left."""
        there: LogRecord = records.decode(self.store.object_url(name), found, CommitRecord | EpochRecord)  # type: ignore[arg-type]
        if isinstance(there, CommitRecord):
            raise CommitConflictError(
                f"{self.store.object_url(name)} commits {there.id}, which was saved there and not in the source; pull "
                "into another url"
            )
        self._refuse_owner(there, OWNER_S)
        self.store.put(name, [data])


class Arriving:
    """Pins at the destination on checkpoints that are on their way there, renewed until `close`."""

    def __init__(self, store: Store, checkpoints: Sequence[str], by: str) -> None:
        """Writes the pins.

        Args:
            store: The destination's.
            checkpoints: Ids.
            by: For people.
        """
        self._store, self._by = store, by
        self._pins = {records.pin_name(uuid.uuid4().hex): checkpoint for checkpoint in checkpoints}
        self._write()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="rl_ckpt-arriving", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        for name, checkpoint in self._pins.items():
            record = PinRecord(checkpoint=checkpoint, by=self._by, expires=time.time() + HOLD_S, seconds=HOLD_S)
            self._store.put(name, [records.encode(record)])

    def _renew(self) -> None:
        while not self._stop.wait(_RENEW_S):
            with contextlib.suppress(CheckpointError):  # the store fails: again at the next beat
                self._write()

    def close(self) -> None:
        """Deletes the pins."""
        self._stop.set()
        self._thread.join(_JOIN_S)
        self._store.delete(list(self._pins))


def _itself(source: Store, target: Store) -> str:
    return f"{target.url} is the source itself, {source.url}; give another place. Nothing was written"
