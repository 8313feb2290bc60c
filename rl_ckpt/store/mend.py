"""Mend: writing good bytes back over damaged ones.

Owns: where the good bytes of each thing may come from, and putting whole objects in the place of damaged ones.
Promises: what is written was compared with the digest that was committed; a good file is never touched; an object is
replaced as a whole, so a crash at any line leaves the damaged one or the good one; what can't be mended stays as it is.

Sources of a chunk, in order: another place in the run, `more` (the cluster's memory), and its own bytes with one bit
turned: by digest and size that is tried in no time where the chunk is small, and the records of a run have no copies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rl_ckpt.errors import CorruptionError
from rl_ckpt.format import records
from rl_ckpt.format.digest import digest
from rl_ckpt.format.manifest import ShardFileEntry
from rl_ckpt.format.records import CommitRecord, EpochRecord, LogRecord, RunRecord
from rl_ckpt.store.base import ObjectMissingError, Store
from rl_ckpt.store.based import self_contained
from rl_ckpt.store.chunk_check import Spot, bad_spots, read_ranges, read_spot
from rl_ckpt.store.layout import Leaves, arrow_problem, compose_anew, new_area
from rl_ckpt.store.repair import Place
from rl_ckpt.store.run import Run, who
from rl_ckpt.store.urls import open_store

More = Callable[[bytes, int], bytes | None]
"""A source of chunks by digest (16 bytes) and size in bytes; None where it has none."""

_ONE_BIT_BYTES = 16 << 10
_PIECE_BYTES = 1 << 20
_PAGE_BYTES = 4096  # what a disk can't read, it can't read by so many bytes
_OWN_BYTES = "its own bytes, with one bit turned back"


@dataclass(slots=True)
class DamagedFile:
    """A shard file as it was found, and what became of it."""

    name: str
    size_bytes: int
    """As manifests have it."""
    found_bytes: int | None
    """As it is; None where it is missing."""
    spots: set[Spot]
    """What the verified checkpoints have in it."""
    bad: dict[Spot, str] = field(default_factory=dict)
    """Those that are damaged: what was found there."""
    around: str | None = None
    """What is wrong beside the chunks."""
    leaves: Leaves = field(default_factory=dict)
    all_known: bool = False
    """Whether `leaves` are all of the file, by the manifest of its writer."""
    mended: dict[Spot, str] = field(default_factory=dict)
    """Where the bytes that were written back came from."""
    around_mended: str | None = None


def file(run: Run, damaged: DamagedFile, places: Mapping[Spot, Place], more: More | None) -> None:
    """Writes a shard file anew with all that is good of it and all that can be had from elsewhere.

    Args:
        run: The run.
        damaged: What was found; told in it what was mended.
        places: Good places of its bad chunks.
        more: A further source.

    Raises:
        StorageError, InvalidInputError: The store failed, or may not be written to.
    """
    try:
        area = new_area(damaged.size_bytes)
    except (OSError, OverflowError, ValueError):
        return  # no memory for it: of a size that no file of ours has
    if damaged.found_bytes is not None:
        _read_all(run.store, damaged.name, area[: min(damaged.found_bytes, damaged.size_bytes)])
    sources: dict[Spot, str] = {}
    for spot in damaged.bad:
        here = area[spot.offset : spot.offset + spot.bytes]
        found = _good_bytes(run, spot, bytes(here), places.get(spot), more)
        if found is not None:
            here[:], sources[spot] = found
    segments: list[bytes | memoryview] = [area]
    made = None
    if damaged.around is not None:
        if arrow_problem(area, damaged.leaves, damaged.all_known) is None:
            made = "its own bytes"
        elif damaged.all_known:
            composed = compose_anew(ShardFileEntry(damaged.name, damaged.size_bytes), damaged.leaves, area)
            if composed is not None:
                segments, made = list(composed.segments), "made anew by its manifest"
    if not sources and made is None:
        return  # nothing would be better for it
    if not all(_is_good(area, spot) for spot in damaged.spots - damaged.bad.keys()):
        return  # it was good a moment ago, and is not now: a failing disk; what may yet be read there must not go
    run.store.put(damaged.name, segments)
    still = bad_spots(run.store, {damaged.name: damaged.spots})
    damaged.mended = {spot: source for spot, source in sources.items() if (damaged.name, spot) not in still}
    damaged.around_mended = made


def _read_all(store: Store, name: str, area: memoryview) -> None:
    """Reads what can be read of a file; where a page can't be, zeros stay."""
    for start in range(0, len(area), _PIECE_BYTES):
        piece = area[start : start + _PIECE_BYTES]
        if read_ranges(store, name, [(start, piece)]) is not None:  # what comes after the bad page may be good
            for at in range(0, len(piece), _PAGE_BYTES):
                read_ranges(store, name, [(start + at, piece[at : at + _PAGE_BYTES])])


def _is_good(area: memoryview, spot: Spot) -> bool:
    return digest(area[spot.offset : spot.offset + spot.bytes]).hex() == spot.digest


def _good_bytes(run: Run, spot: Spot, here: bytes, place: Place | None, more: More | None) -> tuple[bytes, str] | None:
    """A chunk's bytes and where they were found."""
    if place is not None:
        found = read_spot(run.store, place.file, Spot(place.offset, spot.bytes, spot.digest))
        if found is not None:
            return found, f"{place.offset} of {place.file} (checkpoint {place.checkpoint})"
    wanted = bytes.fromhex(spot.digest)
    given = more(wanted, spot.bytes) if more is not None else None
    if given is not None and len(given) == spot.bytes and digest(given) == wanted:
        return given, "memory"
    if digest(here) == wanted:  # it was cut off or in the way of something else, and is good by now
        return here, "its own bytes"
    turned = _one_bit(here, lambda data: digest(data) == wanted)
    return None if turned is None else (turned, _OWN_BYTES)


def _one_bit(data: bytes, is_good: Callable[[bytearray], bool]) -> bytes | None:
    """The bytes with the one bit turned that makes them good, if there is one and they are few."""
    if len(data) > _ONE_BIT_BYTES:
        return None
    tried = bytearray(data)
    for at in range(len(tried)):
        for bit in range(8):
            tried[at] ^= 1 << bit
            if is_good(tried):
                return bytes(tried)
            tried[at] ^= 1 << bit
    return None


def manifest(run: Run, commit: CommitRecord, more: More | None) -> str | None:
    """Writes a damaged or missing manifest back, if its bytes can be had; where from, or None."""
    if records.problem(commit) is not None:
        return None
    name, wanted = records.manifest_name(commit.id), bytes.fromhex(commit.manifest_digest)
    here = _get(run.store, name)
    if here is not None and digest(here) == wanted:
        return None  # the bytes that were committed make no sense: there are no better ones
    found = more(wanted, commit.manifest_bytes) if more is not None else None
    source = "memory"
    if found is None or digest(found) != wanted:
        source = _OWN_BYTES
        found = None if here is None else _one_bit(here, lambda data: digest(data) == wanted)
    if found is None:
        return None
    run.store.put(name, [found])
    return source


def record(run: Run, name: str) -> str | None:
    """Writes a damaged record of the commit log back, if it can be told what it was; where from, or None."""
    here = _get(run.store, name)

    def is_good(data: bytearray) -> bool:
        found = _log_record(name, bytes(data))
        return found is not None and found.run == run.record.run and records.commit_name(found.number) == name

    found = None if here is None else _one_bit(here, is_good)
    if found is None:
        return None
    run.store.put(name, [found])
    return _OWN_BYTES


def run_by_its_log(url: str, storage_options: Mapping[str, Any]) -> Run | None:
    """A run whose run.json can't be used, by the id that all records of its commit log repeat; None without them."""
    store = open_store(url, storage_options)
    found = [
        entry
        for item in store.list(records.COMMITS)
        if records.commit_number(item.name) is not None
        and (entry := _log_record(item.name, _get(store, item.name) or b"")) is not None
        and records.commit_name(entry.number) == item.name
    ]
    if len({entry.run for entry in found}) != 1:
        return None
    created = min(entry.time for entry in found)
    by = f"{who()}, from the commit log"
    record = _fork_record(store, found[0].run) or RunRecord(records.PLAIN_VERSION, found[0].run, created, by, "weak")
    run = Run(store, record, storage_options)
    return run if record.bases or not _needs_bases(run, found) else None


def _fork_record(store: Store, run: str) -> RunRecord | None:
    """The run.json of a fork by the copy of it, or of a copied fork by the files that it has of its bases itself."""
    data = _get(store, records.FORK_FILE)
    if data is not None:
        try:
            record = records.decode_run(store.url, data)
        except CorruptionError:
            return None
        return record if record.run == run else None
    numbers = [based[0] for item in store.list(records.BASES) if (based := records.split_base(item.name)) is not None]
    if not numbers:
        return None
    bases = ("",) * (max(numbers) + 1)
    by = f"{who()}, from its files"
    return self_contained(RunRecord(records.FORMAT_VERSION, run, time.time(), by, "weak", bases, bases))


def _needs_bases(run: Run, found: Sequence[LogRecord]) -> bool:
    """Whether the newest checkpoint names files of bases."""
    newest = max((entry for entry in found if isinstance(entry, CommitRecord)), key=lambda c: c.number, default=None)
    try:
        return newest is not None and run.manifest(newest).version > records.PLAIN_VERSION
    except CorruptionError:
        return False


def write_run_record(run: Run) -> str:
    """Writes run.json anew, as `run_by_its_log` made it or as it was but for one bit; where from."""
    here = _get(run.store, records.RUN_FILE)

    def is_good(data: bytearray) -> bool:
        try:
            return records.decode_run(run.store.url, bytes(data)).run == run.record.run
        except CorruptionError:
            return False

    turned = None if here is None else _one_bit(here, is_good)
    run.store.put(records.RUN_FILE, [turned or records.encode(run.record)])
    return _OWN_BYTES if turned else "the commit log"


def _log_record(name: str, data: bytes) -> LogRecord | None:
    try:
        found: LogRecord = records.decode(name, data, CommitRecord | EpochRecord)  # type: ignore[arg-type]
    except CorruptionError:
        return None
    return found


def _get(store: Store, name: str) -> bytes | None:
    try:
        return store.get(name)
    except ObjectMissingError:
        return None
