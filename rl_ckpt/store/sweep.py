"""Sweep: deleting what no checkpoint names.

Owns: the order of deletion (commit record, manifest, files) and the grace that readers get. Promises: nothing that a
live manifest names is touched, nor a checkpoint with a valid pin or with a tag that came before its record went, nor
the newest, nor an epoch record: those keep a coordinator that was fenced long ago from finding its next record number
free.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from rl_ckpt.errors import CheckpointError, CorruptionError
from rl_ckpt.format import manifest as manifests
from rl_ckpt.format import records
from rl_ckpt.format.digest import digest
from rl_ckpt.format.manifest import Manifest
from rl_ckpt.format.records import CommitRecord
from rl_ckpt.info import Verdict
from rl_ckpt.plan.retention import KeepRule, Said, decide
from rl_ckpt.store import forks
from rl_ckpt.store.base import ObjectMissingError
from rl_ckpt.store.labels import LabelReader, Labels, leftovers, missing, put_back
from rl_ckpt.store.orphans import base_of, checkpoint_of, is_base, is_part, list_parts, unnamed
from rl_ckpt.store.pins import holders, read_pins
from rl_ckpt.store.probe import PROBE
from rl_ckpt.store.run import Run

_SMALL_AGE_S = 60.0  # records and pins, which others may be writing, are written in less
_LOOK_EVERY_S = 3600.0  # for what shard servers that were killed leave of saves that were committed all the same


class SteadyClock:
    """This machine's clock, but never ahead of what this process has seen go by.

    So one that jumps forward makes no checkpoint old, and ends nobody's pin.
    """

    def __init__(self) -> None:
        """Takes the time as it is now."""
        self._since = time.time() - time.monotonic()

    def now(self) -> float:
        """Unix seconds."""
        return min(time.time(), self._since + time.monotonic())


@dataclass(slots=True)
class Swept:
    """What sweeps have done, since it was last taken."""

    deleted: list[str] = field(default_factory=list)
    """Checkpoints whose records went."""
    pinned: dict[str, str] = field(default_factory=dict)
    """Those that were to go, and that somebody holds: id → who."""
    put_back: list[CommitRecord] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    partial: int = 0
    """Half-written objects that were removed."""
    uncleaned: str = ""
    """What the last sweep, which failed, has not done; empty also where it had not come so far."""


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
        self._labels = LabelReader(run)
        self.said = Said()  # by labels, as the last `judge` has read them
        self.clock = SteadyClock()
        self.done = Swept()
        self.grace_s = grace_s
        self._files: dict[str, frozenset[str]] = {}  # by checkpoint: the shard files that its manifest names
        self._in_flight: dict[str, Set[str]] = {}  # by checkpoint: files of older ones that it will name
        self._lock = threading.Lock()  # attempts begin in another thread than the one that sweeps
        self._leaving: dict[str, CommitRecord] = {}  # by id: dropped, and not all of their files are deleted
        self._recorded: set[str] = set()  # those of them whose records may still be there
        self._gone: set[str] = set()  # see take_gone
        self._orphans: dict[str, float] = {}  # name → when it was first seen as one, by this process's clock
        self._sizes: dict[str, int] = {}  # of orphans
        self._let_go: set[str] = set()  # bases whose pins were removed
        self._clean_at = 0.0  # when to look for half-written objects next, by this process's clock
        self._look = True  # whether there may be orphans that nobody has seen: at first, what a killed writer left

    def protect(self, checkpoint: str, files: Set[str]) -> None:
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

    def sweep(self, dropped: Sequence[CommitRecord], live: Sequence[CommitRecord]) -> None:
        """Deletes dropped checkpoints' records, and orphans past their grace.

        Nothing where another coordinator owns the run: what may go is its decision.

        Args:
            dropped: Checkpoints that retention let go; those that a pin holds stay.
            live: All others, oldest first.

        Raises:
            StorageError: The store failed; nothing live is harmed, and the next sweep goes on.
        """
        due_to_clean = time.monotonic() >= self._clean_at
        if not dropped and not self._orphans and not self._recorded and not self._look and not due_to_clean:
            return
        with self._lock:  # another thread may set it while this one looks
            looking, self._look = self._look, False
        try:
            self._sweep(dropped, live, looking)
        except CheckpointError:
            self._look = looking or self._look
            raise

    def judge(
        self, commits: Sequence[CommitRecord], rules: Sequence[KeepRule]
    ) -> tuple[Sequence[CommitRecord], Sequence[Verdict]]:
        """What the rules and the labels say of each checkpoint.

        Args:
            commits: All of the run, oldest first.
            rules: Retention rules.

        Returns:
            Commits that are in the log again, as a sweep had begun to drop them when they were tagged; and a verdict
            per commit with those.

        Raises:
            StorageError: The store failed.
        """
        labels = self._labels.read()
        back = self._heal(labels, commits)
        commits = sorted([*commits, *back], key=lambda commit: commit.number)
        doubt = {commit.id for commit in commits if self._run.log.in_doubt(commit.number)}
        self.said = labels.said(commits)
        found = decide(commits, rules, self.clock.now(), self.said)
        still = "its record may still be on its way"
        return back, [Verdict(v.id, v.step, True, still) if not v.keep and v.id in doubt else v for v in found]

    def _heal(self, labels: Labels, commits: Sequence[CommitRecord]) -> list[CommitRecord]:
        """Puts back records of tagged checkpoints that a sweep deleted which was killed before it saw the tag.

        Args:
            labels: As they are now.
            commits: All of the run, as far as its owner knows.

        Returns:
            The records that are in the log again.
        """
        gone = missing(labels, self._known(commits), self._run.log.head)
        if self._hold or not gone or self._run.log.overtaken():
            return []
        back = put_back(self._run, labels, gone)
        self.done.put_back += back
        return back

    def know(self, files: Mapping[str, frozenset[str]]) -> None:
        """Says which shard files checkpoints name, by id, so that their manifests need not be read."""
        self._files |= files

    def seen(self, orphans: Mapping[str, float]) -> None:
        """Says for how many seconds another sweep has known some orphans: name → seconds."""
        now = time.monotonic()
        self._orphans |= {name: now - max(0.0, age_s) for name, age_s in orphans.items()}

    def waiting(self) -> dict[str, tuple[float, int]]:
        """Orphans whose grace is not over: name → seconds since they were first seen, and size in bytes."""
        now = time.monotonic()
        return {name: (now - since, self._sizes.get(name, 0)) for name, since in self._orphans.items()}

    def store_now(self) -> float | None:
        """Unix seconds by the store's clock, or a little earlier; None where it does not tell."""
        leases = self._run.store.list(records.LEASES)
        return next((item.modified for item in leases if item.name == self._lease), None) or None

    def take_gone(self) -> set[str]:
        """Checkpoints dropped since the last call, by sweeps that failed too: deletes of theirs may be on their way.

        From then on no save may name their files.
        """
        gone, self._gone = self._gone, set()
        return gone

    def _sweep(self, dropped: Sequence[CommitRecord], live: Sequence[CommitRecord], looking: bool) -> None:
        store, pinned = self._run.store, self._pinned()
        self.done.pinned = {commit.id: pinned[commit.id] for commit in dropped if commit.id in pinned}
        now = time.monotonic()
        kept = [*live, *(commit for commit in [*dropped, *self._leaving.values()] if commit.id in pinned)]
        found = [*self._find_orphans(kept), *(self._names(PROBE) if looking else ())]
        orphans = {name: self._orphans.get(name, now) for name in found}
        # After the listing: a newer coordinator's files look like orphans here, but its epoch record came before them.
        if self._run.log.overtaken():
            return
        going = {commit.id: commit for commit in dropped if commit.id not in pinned}
        self._leaving |= going
        self._recorded |= going.keys()
        self._gone |= going.keys()
        if looking:
            store.delete(self._stale_leases())
        back = self._delete_records(kept, looking)
        kept += back
        due = {name for name, since in orphans.items() if now - since >= self.grace_s}
        for commit in back:
            named = self._named_by(commit) or frozenset()
            bases = {base_of(name) for name in named}
            due -= {name for name in due if name in named | bases or checkpoint_of(name) == commit.id}
        if due:  # pins that came before the records went: whoever set them has found the record there
            due -= self._held(due)
        # Once more: a process that was stopped meanwhile, for long, must not delete what a newer owner's saves name.
        if due and self._run.log.overtaken():
            return
        bases = {name for name in due if is_base(name)}
        # Manifests first.
        store.delete(sorted(due - bases, key=lambda name: (not name.startswith(records.MANIFESTS), name)))
        self.done.files += len(due - bases)
        self.done.bytes += sum(self._sizes.get(name, 0) for name in due)
        self._orphans = {name: since for name, since in orphans.items() if name not in due}
        left = {checkpoint_of(name) for name in self._orphans} | pinned.keys()
        self._leaving = {name: commit for name, commit in self._leaving.items() if name in left}
        known = {commit.id for commit in kept} | self._leaving.keys()
        self._files = {name: files for name, files in self._files.items() if name in known}
        # What needs rights that all else does without comes last: all else is done where it fails.
        try:
            self._leave(bases)
        finally:
            if looking or now >= self._clean_at:
                before, self.done.uncleaned = self.done.uncleaned, "half-written objects were not looked for"
                self._clean_partial(now, again_s=self.grace_s if looking else max(self.grace_s, _LOOK_EVERY_S))
                self.done.uncleaned = before

    def _leave(self, bases: set[str]) -> None:
        """Removes the pins in bases of which nothing is named any more."""
        for base in sorted(bases):  # a crash before it: the next writer finds the pin, and removes it
            self._let_go.add(base)  # also where that fails: of a source that is gone, nobody is to hear at every save
            self.done.uncleaned = "the pin in a run that this one was forked from was not removed"
            forks.let_go(self._run, base)
            self.done.uncleaned = ""

    def _delete_records(self, kept: Sequence[CommitRecord], looking: bool) -> list[CommitRecord]:
        """Deletes the records of what goes, then looks at the labels once more.

        Returns:
            What was tagged meanwhile, and is in the log again.
        """
        store = self._run.store
        # Record first: a crash after this line leaves a manifest and files that no commit names, never the reverse. A
        # tag that its writer was told of as done is seen below, or by the next sweep where this one is killed.
        store.delete([records.commit_name(self._leaving[checkpoint].number) for checkpoint in sorted(self._recorded)])
        if not self._recorded and not looking:
            return []
        labels = self._labels.read()
        back = put_back(self._run, labels, sorted(self._recorded))
        for commit in back:
            del self._leaving[commit.id]
        self._gone -= {commit.id for commit in back}
        self.done.put_back += back
        self.done.deleted += sorted(self._recorded - {commit.id for commit in back})
        self._recorded.clear()
        if not self._hold:
            store.delete(leftovers(labels, self._known([*kept, *back]), self._run.log.head))
        return back

    def _known(self, commits: Sequence[CommitRecord]) -> set[str]:
        """Ids of commits, and of attempts that may be some without our having heard of it."""
        with self._lock:
            return {commit.id for commit in commits} | self._in_flight.keys()

    def _held(self, due: set[str]) -> set[str]:
        """Those of some orphans that are of checkpoints which were dropped, by whomever, and which a pin holds by now.

        A writer before this one may have dropped it: then no record is known any more, and only its files tell.
        """
        pinned = self._pinned()
        names = {name for name in due if checkpoint_of(name) in pinned}
        for checkpoint in pinned:
            if checkpoint in self._leaving:
                names |= self._named_by(self._leaving[checkpoint]) or frozenset()
            else:  # dropped, or not committed yet: on its way here by a pull
                names |= self._named_in(records.manifest_name(checkpoint))
        # After the pins: a pull deletes its pin when it has committed, which this process would not know of.
        for commit in self._run.log.read().commits:
            if commit.id not in self._files:
                names |= {name for name in due if checkpoint_of(name) == commit.id}
                names |= self._named_by(commit) or due
        return (names | {base_of(name) for name in names}) & due

    def _named_in(self, manifest: str) -> set[str]:
        """Files that a manifest names which no record vouches for; none where it can't be read."""
        store = self._run.store
        try:
            data = store.get(manifest)
            found = manifests.decode(store.object_url(manifest), data, digest(data))
        except (ObjectMissingError, CorruptionError):
            return set()
        return {file.name for file in found.files}

    def _clean_partial(self, now: float, again_s: float) -> None:
        """Removes what killed writers left half-written; what is too young for that goes the next time.

        Only the run's owner may: what no attempt of its own writes was begun by one that is fenced, and can't be
        committed. Last in a sweep, as it needs a right on S3 that all else does without.
        """
        store = self._run.store
        with self._lock:
            mine = frozenset(self._in_flight)
        pinned = self._pinned().keys() - self._files.keys()  # on their way here by a pull
        mine |= pinned
        mine |= {checkpoint_of(name) for one in pinned for name in self._named_in(records.manifest_name(one))}
        small = self.grace_s >= _SMALL_AGE_S
        self.done.partial += store.clean_partial(
            self.grace_s, lambda name: checkpoint_of(name) in mine if is_part(name) else not small
        )
        if not small:
            self.done.partial += store.clean_partial(_SMALL_AGE_S, is_part)
        self._clean_at = now + again_s

    def _find_orphans(self, live: Sequence[CommitRecord]) -> list[str]:
        if self._hold:
            return []
        named: set[str] = set()
        for commit in live:
            known = self._named_by(commit)
            if known is None:
                return []  # an unreadable manifest may name any file: better to keep too much
            named |= known
        listed = list_parts(self._run)
        with self._lock:  # after the listing: whoever wrote a listed file was in flight before it
            checkpoints = {commit.id for commit in live} | self._in_flight.keys()
            spared = set[str]().union(*self._in_flight.values()) - named
            # Attempts hold more than they will name: what they let go is looked for again.
            in_bases = any(name.startswith(records.BASES) for name in spared)
            self._look |= in_bases or any(item.name in spared for item in listed)
        found = unnamed(self._run, listed, named | spared, checkpoints)
        self._sizes = {item.name: item.size_bytes for item in found}
        return [item.name for item in found if item.name not in self._let_go]

    def _names(self, prefix: str) -> list[str]:
        return [item.name for item in self._run.store.list(prefix)]

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

    def _pinned(self) -> Mapping[str, str]:
        """Checkpoints that somebody holds: id → who."""
        pins, over = read_pins(self._run.store, self.clock.now(), self.store_now)
        self._run.store.delete(over)
        return holders(pins)
