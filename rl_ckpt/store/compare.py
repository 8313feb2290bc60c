"""Reading what differs between two checkpoints, and no more.

Owns: getting the chunks that differ, in bounded memory, and putting the report together. Promises: every chunk that is
read is compared with its digest; a chunk that both have with the same digest is not read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from rl_ckpt.errors import CheckpointNotFoundError, CorruptionError, UntrustedDataError
from rl_ckpt.format.digest import digest
from rl_ckpt.format.manifest import Chunk, Manifest
from rl_ckpt.format.records import CommitRecord
from rl_ckpt.info import ArrayChange, CheckpointInfo, Diff, LeafChange
from rl_ckpt.plan.compare import ArrayPair, Compared, Part, compare, parts
from rl_ckpt.state import leaves
from rl_ckpt.state.arrays import LONG_PLAIN, ArraySpec, Host
from rl_ckpt.state.boxes import overlap, slices
from rl_ckpt.state.differences import Difference, difference, is_numeric
from rl_ckpt.state.dtypes import dtype_from_name
from rl_ckpt.state.tree import Container, Plain
from rl_ckpt.store.base import ObjectMissingError
from rl_ckpt.store.parallel import run_all, spare_threads
from rl_ckpt.store.reader import as_values, compare_chunk
from rl_ckpt.store.run import Run

_BATCH_BYTES = 8 << 20  # of small chunks, read at once


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two checkpoints."""

    run: Run
    commit: CommitRecord
    info: CheckpointInfo


@dataclass(frozen=True, slots=True)
class _Job:
    """A part of two arrays to be read."""

    pair: ArrayPair
    part: Part

    @property
    def bytes(self) -> int:
        return self.part.before.bytes + sum(chunk.bytes for chunk in self.part.after)


def diff_of(a: Side, b: Side, select: str | Sequence[str] | None) -> Diff:
    """As `lineage.diff`, of two checkpoints that were found.

    Raises:
        CheckpointNotFoundError: One was dropped while it was being read.
        CorruptionError: A chunk or a manifest is damaged.
        StorageError: A store failed.
    """
    begun = time.monotonic()
    try:
        first, second = a.run.manifest(a.commit), b.run.manifest(b.commit)
        found = compare(first, second, select)
        reading = _Reading((a.run, first), (b.run, second))
        arrays = reading.differences(found)
    except CorruptionError as error:
        for side in (a, b):
            if side.commit.id not in {commit.id for commit in side.run.log.read().commits}:
                raise CheckpointNotFoundError(
                    f"checkpoint {side.commit.id} of {side.run.store.url} was dropped while it was being read: pin it"
                ) from error
        raise
    changes = tuple(LeafChange(p.path, p.ranks, _value(p.before), _value(p.after)) for p in found.plain)
    seconds = time.monotonic() - begun
    return Diff(
        a.info, b.info, found.added, found.removed, arrays, changes, found.unchanged, reading.bytes_read, seconds
    )


def _value(shown: Plain | ArraySpec | Container) -> object:
    """What is told of a leaf."""
    if isinstance(shown, Container):
        return f"a {shown.type}"
    if isinstance(shown, ArraySpec):
        return describe(shown)
    try:
        return leaves.decode(shown.value, as_numpy=True)
    except UntrustedDataError:
        return "pickled data"


def describe(spec: ArraySpec) -> str:
    """An array's dtype, shape and kind, for people."""
    if spec.kind in LONG_PLAIN:
        return f"{spec.kind} of {spec.shape[0]} bytes"
    return f"{spec.dtype} {tuple(spec.shape)} {spec.kind}"


class _Reading:
    """The chunks of two checkpoints that differ."""

    def __init__(self, first: tuple[Run, Manifest], second: tuple[Run, Manifest]) -> None:
        self._sides = first, second
        self.bytes_read = 0

    def differences(self, found: Compared) -> tuple[ArrayChange, ...]:
        """Reads what differs, and says how much."""
        jobs: dict[tuple[int, int], list[_Job]] = {}
        for pair in found.arrays:
            key = pair.before, pair.after
            if key not in jobs and self._comparable(pair):
                before, after = (m.arrays[n] for (_, m), n in zip(self._sides, key, strict=True))
                jobs[key] = [_Job(pair, part) for part in parts(before, after)]
        every = [job for some in jobs.values() for job in some]
        every.sort(key=lambda job: (job.part.before.file, job.part.before.offset))
        done: dict[int, Difference] = {}  # by id of the job; threads only add to it
        run_all([partial(self._run, batch, done) for batch in _batches(every)], spare_threads())
        self.bytes_read = sum(job.bytes for job in every)
        total: dict[tuple[int, int], Difference] = {}
        for key, some in jobs.items():  # in one order, whichever thread was faster: sums come out the same
            total[key] = Difference()
            for job in some:
                total[key].add(done[id(job)])
        return tuple(self._change(pair, total.get((pair.before, pair.after))) for pair in found.arrays)

    def _specs(self, pair: ArrayPair) -> tuple[ArraySpec, ArraySpec]:
        (_, first), (_, second) = self._sides
        return first.arrays[pair.before].spec, second.arrays[pair.after].spec

    def _comparable(self, pair: ArrayPair) -> bool:
        before, after = self._specs(pair)
        return (before.dtype, before.shape) == (after.dtype, after.shape)

    def _change(self, pair: ArrayPair, found: Difference | None) -> ArrayChange:
        before, after = self._specs(pair)
        numeric = is_numeric(dtype_from_name(after.dtype)) and after.kind not in LONG_PLAIN
        size = 1
        for extent in after.shape:
            size *= extent
        return ArrayChange(
            path=pair.path,
            ranks=pair.ranks,
            before=describe(before),
            after=describe(after),
            elements=size,
            changed=None if found is None else found.changed,
            norm=found.norm if found is not None and numeric else None,
            max_abs=found.most if found is not None and numeric else None,
            not_finite=0 if found is None else found.not_finite,
        )

    def _run(self, batch: Sequence[_Job], done: dict[int, Difference]) -> None:
        first = self._read(0, [job.part.before for job in batch])
        aligned = [job for job in batch if len(job.part.after) == 1]
        second = self._read(1, [job.part.after[0] for job in aligned])
        for job, data in zip(batch, first, strict=True):
            before = self._values(0, job, job.part.before, data)
            if len(job.part.after) == 1:
                done[id(job)] = self._differ(job, before, job.part.after[0], second.pop(0))
                continue
            total = Difference()
            for chunk in job.part.after:  # one after the other: there may be many
                total.add(self._differ(job, before, chunk, self._read(1, [chunk])[0]))
            done[id(job)] = total

    def _differ(self, job: _Job, before: Host, chunk: Chunk, data: memoryview) -> Difference:
        mine, common = job.part.before.box, overlap(job.part.before.box, chunk.box)
        assert common is not None
        after = self._values(1, job, chunk, data)
        return difference(before[slices(common, mine)], after[slices(common, chunk.box)])

    def _values(self, side: int, job: _Job, chunk: Chunk, data: memoryview) -> Host:
        index = job.pair.after if side else job.pair.before
        return as_values(data, self._sides[side][1].arrays[index], chunk.box)

    def _read(self, side: int, chunks: Sequence[Chunk]) -> list[memoryview]:
        """Some chunks of one checkpoint, verified."""
        run, manifest = self._sides[side]
        out = [memoryview(bytearray(chunk.bytes)) for chunk in chunks]
        by_file: dict[int, list[tuple[int, memoryview]]] = {}
        for chunk, place in zip(chunks, out, strict=True):
            by_file.setdefault(chunk.file, []).append((chunk.offset, place))
        for file, reads in by_file.items():
            name = manifest.files[file].name
            try:
                run.store.read_into(name, reads)
            except ObjectMissingError as error:
                raise CorruptionError(f"{run.store.missing(name)}, though checkpoint {manifest.id} names it") from error
        for chunk, place in zip(chunks, out, strict=True):
            compare_chunk(run.store, manifest, chunk, digest(place))
        return out


def _batches(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    batch: list[_Job] = []
    filled = 0
    for job in jobs:
        if batch and filled + job.bytes > _BATCH_BYTES:
            yield batch
            batch, filled = [], 0
        batch.append(job)
        filled += job.bytes
    if batch:
        yield batch
