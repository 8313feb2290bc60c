"""Restore work: what the coordinator's restores ask of the store and of the memory tier.

Owns: which checkpoint is tried next, and where its manifest comes from; memory is held for a restore from the moment
that it is chosen until the restore is done with it. Reads the store in threads of its own; the tier is asked on the
coordinator's loop. Promises: what a newer commit in the log has overtaken is not preferred because memory has it; nor
is what memory has of a run that was removed, where another stands at its url by now.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import msgspec

from rl_ckpt.errors import CheckpointNotFoundError, CorruptionError, StorageError
from rl_ckpt.format import records
from rl_ckpt.format.digest import digest
from rl_ckpt.format.manifest import Manifest
from rl_ckpt.format.records import CommitRecord
from rl_ckpt.plan.candidates import Candidate, candidates
from rl_ckpt.plan.parts import Held, Holdings, Remembered
from rl_ckpt.runtime.spec import RunSpec
from rl_ckpt.store.repair import find_elsewhere
from rl_ckpt.store.run import Run

_READS_AT_ONCE = 4


class TierView(Protocol):
    """The memory tier, as restores see it. For the coordinator's loop."""

    def remembered(self) -> Sequence[Remembered]:
        """Checkpoints that memory has, the newest first."""

    def holdings(self, checkpoint: str) -> Holdings | None:
        """Where the chunks of one of them are; None where it is not remembered (any more)."""

    def use(self, checkpoint: str, token: str) -> None:
        """From now on nothing of that checkpoint's memory is released or written, until `done`."""

    def done(self, token: str) -> Iterable[Any]:
        """That use is over; nothing happens where there is none. Gives the tier's instructions."""

    def bad(self, server: str, part: str, digest: bytes) -> Iterable[Any]:
        """A holder's copy of a chunk is damaged. Gives the tier's instructions."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A candidate."""

    id: str
    manifest: Manifest
    data: bytes
    """The manifest's file."""
    mappable: bool
    """Whether workers can read the store's files themselves."""
    damaged: dict[str, str]
    """Newer checkpoints that can't be used: id to why."""
    memory: Remembered | None
    """What the tier said of it; None: nothing."""
    holdings: Holdings | None = None
    notice: str = ""


@dataclass(slots=True)
class _Choice:
    """What there is to choose from."""

    run: Run | None
    """None: the store can't be read."""
    found: list[Candidate]
    damaged: dict[str, str] = field(default_factory=dict)
    notice: str = ""


class RestoreWork:
    """See the module. For one event loop."""

    def __init__(self, spec: RunSpec, tier: TierView, tell: Callable[[Iterable[Any]], None]) -> None:
        """Nothing is opened yet.

        Args:
            spec: The run.
            tier: Its memory tier.
            tell: Takes the tier's instructions, to have them carried out.
        """
        self._spec = spec
        self._tier = tier
        self._tell = tell
        self._reading = ThreadPoolExecutor(_READS_AT_ONCE, "rl_ckpt-read")
        self._reader: Run | None = None

    def configure(self, spec: RunSpec, anew: bool) -> None:
        """Takes a driver's options; `anew` where everything is to be opened with them."""
        self._spec = spec
        if anew:
            self.forget()

    def forget(self) -> None:
        """What was opened is out of date: the run is another one by now."""
        self._reader = None

    async def load(self, token: str, step: int | None, tried: tuple[str, ...]) -> Loaded:
        """Reads the next candidate.

        Args:
            token: Under which its memory is used from now on.
            step: Which is asked for; None: the newest.
            tried: Ids of those that were damaged.

        Raises:
            CheckpointError: There is none, all are damaged, or the store failed.
        """
        loop = asyncio.get_running_loop()
        while True:
            remembered = tuple(self._tier.remembered())
            for memory in remembered:  # until it is known which: nothing of what is read next may go meanwhile
                self._tier.use(memory.id, f"{token}:{memory.id}")
            try:
                work = partial(self._load, step, tried, remembered)
                loaded = await loop.run_in_executor(self._reading, work)
                if loaded.memory is not None:
                    self._tier.use(loaded.id, token)
            finally:
                for memory in remembered:
                    self._tell(self._tier.done(f"{token}:{memory.id}"))
            holdings = None if loaded.memory is None else self._tier.holdings(loaded.id)
            if loaded.memory is None or loaded.memory.record is not None or holdings is not None:
                return dataclasses.replace(loaded, holdings=holdings)
            self._tell(self._tier.done(token))  # it was only in memory, and is gone
            tried = (*tried, loaded.id)

    async def search(
        self, wanted: tuple[tuple[bytes, int], ...], skip: tuple[tuple[str, int], ...]
    ) -> Mapping[tuple[bytes, int], Sequence[tuple[str, int]]]:
        """Looks for chunks in all checkpoints of the run.

        Args:
            wanted: Digest and size of each.
            skip: File and offset of places that are bad.

        Returns:
            By chunk: file and offset of places; none where there is no run, or its log is damaged.

        Raises:
            StorageError: The store failed: whether they are in another checkpoint is not known.
        """
        return await asyncio.get_running_loop().run_in_executor(self._reading, self._search, wanted, skip)

    def _search(
        self, wanted: tuple[tuple[bytes, int], ...], skip: tuple[tuple[str, int], ...]
    ) -> dict[tuple[bytes, int], list[tuple[str, int]]]:
        try:
            found = find_elsewhere(self._open(), wanted, skip)
        except (CheckpointNotFoundError, CorruptionError):
            return {}  # the restore goes on without: what it lacks, it says itself
        return {chunk: [(place.file, place.offset) for place in places] for chunk, places in found.items()}

    def done(self, token: str) -> None:
        """A restore is done with a candidate."""
        self._tell(self._tier.done(token))

    def bad(self, server: str, part: str, chunk: bytes) -> None:
        """A copy of a chunk in memory is damaged."""
        self._tell(self._tier.bad(server, part, chunk))

    def held(self, chunk: bytes, size_bytes: int) -> list[Held]:
        """All copies of a chunk in memory, of any checkpoint."""
        out: list[Held] = []
        for memory in self._tier.remembered():
            holdings = self._tier.holdings(memory.id)
            out += holdings.find(chunk, size_bytes) if holdings is not None else ()
        return out

    def _open(self) -> Run:
        if self._reader is None:
            self._reader = Run.open(self._spec.url, self._spec.storage_options)
        return self._reader

    def _opened_now(self) -> Run:
        """The run that is there now: it may have been removed and created anew; then all that is known is of old."""
        known, run = self._reader, Run.open(self._spec.url, self._spec.storage_options)
        if known is not None and known.record.run == run.record.run:
            return known  # with the records that it has read
        self._reader = run
        return run

    def _load(self, step: int | None, tried: tuple[str, ...], remembered: Sequence[Remembered]) -> Loaded:
        choice = self._choose(step, remembered)
        damaged = choice.damaged
        for one in choice.found:
            if one.id in tried:
                continue
            if one.record is None and one.memory is not None and not one.memory.whole:
                damaged[one.id] = "it is only in memory, and no live node has all of it; lower `persist_every`"
                continue
            try:
                manifest, data = _manifest(choice.run, one)
            except CorruptionError as error:
                damaged[one.id] = str(error)
                continue
            mappable = choice.run is not None and choice.run.store.is_local()
            return Loaded(one.id, manifest, data, mappable, damaged, one.memory, notice=choice.notice)
        bad = [*tried, *damaged]
        raise CorruptionError(f"no good checkpoint in {self._spec.url}: tried {bad}; {damaged or ''}")

    def _choose(self, step: int | None, remembered: Sequence[Remembered]) -> _Choice:
        try:
            run = self._opened_now()
            log = run.log.read()
            remembered = [memory for memory in remembered if memory.run == run.record.run]
            lost = [memory for memory in remembered if memory.after > log.head and memory.whole]
            if lost:  # the newest record is never removed
                url, there = self._spec.url, lost[0].after
                raise StorageError(f"the commit log of {url} ends at {log.head}, though record {there} was committed")
        except (StorageError, CheckpointNotFoundError, CorruptionError) as error:
            found = candidates(None, remembered, step)
            if not found:
                raise
            return _Choice(
                None,
                found,
                notice=f"the store could not be read ({error}): this is the newest checkpoint that memory has whole; "
                "the store may hold a newer one",
            )
        found = candidates(log.commits, remembered, step)
        if not found:
            run.find(log, step)  # says what there is
        first = run.find(log, None).number if log.commits else 0
        broken = {n: why for n, why in log.damaged.items() if n > records.commit_name(first)}
        return _Choice(run, found, {} if step is not None else broken)


def _manifest(run: Run | None, one: Candidate) -> tuple[Manifest, bytes]:
    """Of a candidate: out of memory, if those bytes are the ones that were committed; else out of the store.

    Raises:
        CorruptionError: It is missing or damaged.
        StorageError: The store failed.
    """
    if one.memory is not None and _as_committed(one.memory, one.record):
        return msgspec.json.decode(one.memory.manifest, type=Manifest), one.memory.manifest
    if run is None or one.record is None:
        raise CorruptionError(f"the manifest of {one.id} is damaged in memory, and not in the store")
    return run.manifest_file(one.record)


def _as_committed(memory: Remembered, record: CommitRecord | None) -> bool:
    return record is None or digest(memory.manifest) == bytes.fromhex(record.manifest_digest)
