"""The commit log: numbered records, each created by a PUT that fails where it exists.

Owns: reading the log, taking over a run (an epoch record), and appending commits. Promises: of two writers exactly one
gets each number; a writer that was taken over from learns it at its next append; a lost reply is told from a lost race
by the record's write id. Does not know: manifests, what a checkpoint holds, which should stay.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from rl_ckpt.errors import (
    CommitConflictError,
    CommitUnknownError,
    CorruptionError,
    FencedError,
    StorageError,
)
from rl_ckpt.format import records
from rl_ckpt.format.records import CommitRecord, EpochRecord, LogRecord
from rl_ckpt.store.base import ObjectExistsError, ObjectMissingError, Store
from rl_ckpt.store.lease import Lease, moment

_READERS = 32
_READ_TRIES = 50
_APPEND_TRIES = 5
LATEST_S = 600.0
"""No request arrives at the store later than this after it was sent."""


@dataclass(frozen=True, slots=True)
class Log:
    """The commit log as it was read."""

    head: int = 0
    """Highest record number; 0 for an empty log."""
    commits: tuple[CommitRecord, ...] = ()
    """Oldest first."""
    epoch: int = 0
    """Highest epoch."""
    owner: str = ""
    """Who opened that epoch."""
    last_epoch: EpochRecord | None = None
    """The newest epoch record."""
    damaged: dict[str, str] = field(default_factory=dict)
    """Records that can't be read: name → why."""
    epochs: tuple[EpochRecord, ...] = ()
    """All epoch records, oldest first."""


class CommitLog:
    """The log of one run. Thread-safe for reading; one thread at a time may append."""

    def __init__(self, store: Store, run: str) -> None:
        """The log of the run with id `run`, on its store."""
        self._store = store
        self._run = run
        self._known: dict[str, LogRecord] = {}  # records do not change, so each is read once
        self._sizes: dict[str, int] = {}  # of the records' files, as they were listed last
        self._reading = threading.Lock()  # the known records are read and replaced by one thread at a time
        self._head = 0
        self._epoch = 0
        self._unsettled: dict[
            str, LogRecord
        ] = {}  # by write id: sent, outcome not learnt; one may yet land at head + 1
        self._late: list[CommitRecord] = []
        self._sent: dict[int, float] = {}  # numbers for which a request went unanswered → when, by this process's clock
        self.fenced_by: EpochRecord | None = None
        """The newer owner, once this writer has met its record."""

    @property
    def epoch(self) -> int:
        """The epoch that this process opened; 0 for a reader."""
        return self._epoch

    @property
    def head(self) -> int:
        """Number of the newest record that this process, as the run's owner, knows of."""
        return self._head

    def read(self) -> Log:
        """Reads all records.

        Raises:
            StorageError: The store failed.
        """
        with self._reading:
            return self._read_all()

    def _read_all(self) -> Log:
        """Reads until nothing of what was listed was swept meanwhile.

        A log of which the listed records are gone has newer ones, which that list did not show: what is left may look
        like an empty run, and whoever finds none begins from nothing.
        """
        known_gone: set[str] = set()  # a name that a stale list still has must not be waited for
        for _ in range(_READ_TRIES):
            log, gone = self._read_once()
            if gone <= known_gone:
                return log
            known_gone |= gone
        raise StorageError(
            f"{self._store.url}: in each of {_READ_TRIES} tries to read the commit log, records vanished between their "
            "listing and their reading; is something deleting checkpoints without end? Try again"
        )

    def _read_once(self) -> tuple[Log, set[str]]:
        """The log as one list shows it, and the names on that list that are not there (any more)."""
        sizes = {item.name: item.size_bytes for item in self._store.list(records.COMMITS)}
        names = {number: name for name in sizes if (number := records.commit_number(name)) is not None}
        before, self._sizes = self._sizes, sizes
        # Another size: a pull into this run put a checkpoint's record in the place of an epoch's that a sweep had left.
        same = {name for name, size in sizes.items() if before.get(name, size) == size}
        self._known = {name: record for name, record in self._known.items() if name in same}
        damaged: dict[str, str] = {}
        new = [name for name in names.values() if name not in self._known]
        with ThreadPoolExecutor(min(_READERS, len(new) or 1), "rl_ckpt-log") as pool:
            get = self._store.getter()
            for name, found in zip(new, pool.map(lambda name: self._read_one(name, get), new), strict=True):
                if isinstance(found, str):
                    damaged[name] = found
                elif found is not None:
                    self._known[name] = found
        ordered = [self._known[names[n]] for n in sorted(names) if names[n] in self._known]
        epochs = [r for r in ordered if isinstance(r, EpochRecord)]
        log = Log(
            max(names, default=0),
            tuple(r for r in ordered if isinstance(r, CommitRecord)),
            max((r.epoch for r in ordered), default=0),
            epochs[-1].owner if epochs else "",
            epochs[-1] if epochs else None,
            damaged,
            tuple(epochs),
        )
        return log, set(names.values()) - self._known.keys() - damaged.keys()

    def _read_one(self, name: str, get: Callable[[str], bytes] | None = None) -> LogRecord | str | None:
        """The record, why it can't be read, or None where a sweep took it away meanwhile."""
        try:
            record: LogRecord = records.decode(
                self._store.object_url(name),
                (get or self._store.get)(name),
                CommitRecord | EpochRecord,  # type: ignore[arg-type]
            )
        except ObjectMissingError:
            return None
        except CorruptionError as error:
            return str(error)
        if record.run != self._run or records.commit_name(record.number) != name:
            return f"{name} belongs to another place (run {record.run}, number {record.number})"
        return record

    def claim(self, owner: str, lease: Lease | None = None, take_over: bool = False) -> Log:
        """Takes the run over: appends an epoch record, which fences every older writer.

        Args:
            owner: Who takes over, for the messages that others will get.
            lease: This writer's, to be written before the epoch record; None: none, and nobody else's is looked at.
            take_over: Takes over from a writer that is alive too.

        Returns:
            The log up to the new epoch record.

        Raises:
            RunOwnedError: Another writer owns the run and is alive.
            StorageError, CommitUnknownError: The store failed.
        """
        while True:
            log = self.read()
            epoch = log.epoch + 1
            self._head = log.head
            # Before the epoch record, and looked at again whenever another writer was faster: of two that begin at
            # once, the one that loses the race for the record finds the other's lease, which is there already. A crash
            # after this line leaves a lease that no epoch record names: nobody reads it, the sweep removes it.
            if lease is not None:
                lease.claim(log.last_epoch, epoch, take_over)

            def make(number: int, write_id: str, epoch: int = epoch) -> LogRecord:
                return EpochRecord(
                    number=number,
                    run=self._run,
                    write_id=write_id,
                    epoch=epoch,
                    owner=owner,
                    time=time.time(),
                    lease=lease.id if lease is not None else "",
                )

            if self._append(make) is None:
                self._epoch = epoch
                return log

    def commit(self, make: Callable[[int, str], CommitRecord]) -> CommitRecord:
        """Appends a commit. The checkpoint exists from here on.

        Args:
            make: Builds the record from its number and write id.

        Raises:
            FencedError: A newer coordinator owns the run.
            CommitConflictError: Another writer got in without taking the run over.
            CommitUnknownError: The store's answer was lost and the record could not be read back.
            StorageError: The store failed.
        """
        made: list[CommitRecord] = []

        def keep(number: int, write_id: str) -> LogRecord:
            made.append(make(number, write_id))
            return made[-1]

        winner = self._append(keep)
        if winner is None:
            return made[-1]
        if isinstance(winner, EpochRecord):
            self.fenced_by = winner
            raise self._fenced(winner)
        raise CommitConflictError(
            f"{self._store.url}: another writer committed checkpoint {winner.id} as record {winner.number}; two jobs "
            "write to one run. Give each its own url"
        )

    def check_owner(self) -> None:
        """Asks the store nothing.

        Raises:
            FencedError: It is known that a newer coordinator owns the run.
        """
        if self.fenced_by is not None:
            raise self._fenced(self.fenced_by)

    def _fenced(self, newer: EpochRecord) -> FencedError:
        return FencedError(
            f"{self._store.url} was taken over by {newer.owner} (epoch {newer.epoch}, this is {self._epoch}) at "
            f"{moment(newer.time)}; this process may not commit any more. If that was a mistake, stop the other job "
            "and start again"
        )

    def look_for_newer(self) -> bool:
        """Whether a newer owner's epoch record stands right after the newest record that this process knows.

        Raises:
            StorageError: The store failed.
        """
        found = self._read_one(records.commit_name(self._head + 1))
        if isinstance(found, EpochRecord) and found.epoch > self._epoch:
            self.fenced_by = found
        return self.fenced_by is not None

    def take_late(self) -> list[CommitRecord]:
        """Commits of this process whose outcome was unknown and that turned out to have landed, since the last call."""
        late, self._late = self._late, []
        return late

    def in_doubt(self, number: int) -> bool:
        """Whether a request of this process to create that record may still be on its way.

        If the record were deleted now, that request could find its number free, and bring back a checkpoint whose files
        are gone.
        """
        return time.monotonic() < self._sent.get(number, -math.inf) + LATEST_S

    def overtaken(self) -> bool:
        """Whether the log holds records that this process does not know: another coordinator may own the run by now.

        Raises:
            StorageError: The store failed.
        """
        numbers = [records.commit_number(item.name) for item in self._store.list(records.COMMITS)]
        return any(number is not None and number > self._head for number in numbers)

    def _append(self, make: Callable[[int, str], LogRecord]) -> LogRecord | None:
        """Creates record head + 1; returns the record that stands there where the race was lost."""
        number, write_id = self._head + 1, uuid.uuid4().hex
        name, record = records.commit_name(number), make(number, write_id)
        data = records.encode(record)
        self._unsettled[write_id] = record  # from here on it may land, whatever this process learns of it
        for _ in range(_APPEND_TRIES):
            created, failure = self._create(number, data)
            if created:
                break
            found = self._read_back(name, failure)
            if found is None:  # it did not land, or a sweep removed another's record: try again
                continue
            if found.write_id == write_id:
                break
            if found.write_id not in self._unsettled:
                del self._unsettled[write_id]
                return found
            if isinstance(found, CommitRecord):  # an earlier one of our own, of which no answer came: go on after it
                self._late.append(found)
            self._landed(found)
            return self._append(make)
        else:
            raise CommitUnknownError(
                f"{name} could not be created in {_APPEND_TRIES} tries, nor was it there: see the store"
            )
        if number in self._sent and (winner := self._newer(number)):
            # An earlier request for this number landed unheard of, and a newer coordinator dropped that record: the
            # number was free again. A crash before this line leaves a whole checkpoint, older than the newest.
            self._store.delete([name])
            return winner
        self._landed(record)
        return None

    def _create(self, number: int, data: bytes) -> tuple[bool, StorageError | None]:
        """Sends a record; whether it is known to have been created, and why not where the store failed."""
        retries = self._store.stats.snapshot().retries
        try:
            self._store.create(records.commit_name(number), data)
        except ObjectExistsError:
            return False, None
        except StorageError as error:
            self._sent[number] = time.monotonic()
            return False, error
        finally:
            if self._store.stats.snapshot().retries > retries:
                self._sent[number] = time.monotonic()
        return True, None

    def _newer(self, number: int) -> LogRecord | None:
        """The first record after a number, where there is one."""
        self.read()
        later = [r for r in self._known.values() if r.number > number]
        return min(later, key=lambda r: r.number, default=None)

    def _landed(self, record: LogRecord) -> None:
        self._head = record.number
        self._known[records.commit_name(record.number)] = record
        self._sizes[records.commit_name(record.number)] = len(records.encode(record))
        self._unsettled.clear()  # all of them were for this number, which is taken now

    def _read_back(self, name: str, failure: StorageError | None) -> LogRecord | None:
        """What stands at `name` after a create that did not say it succeeded."""
        try:
            found = self._read_one(name)
        except StorageError as error:
            raise CommitUnknownError(
                f"{self._store.object_url(name)}: the store's answer was lost ({failure or 'it exists'}), "
                f"and reading it back failed too ({error}); list the checkpoints when the store answers again"
            ) from error
        if isinstance(found, str):
            raise CommitConflictError(f"{found}; it stands where this commit belongs: move it away and save again")
        if found is None and failure is not None:
            raise failure
        return found
