"""Other sources of a chunk: the same bytes in another checkpoint of the run, or in another file of the same one.

Owns: finding them, and reading a checkpoint by them while nothing is written back (store/verify.py does that). A chunk
is known by digest and size, so whatever holds those bytes is as good as what a manifest names. Promises: nothing is
taken on trust; a place is where the bytes should be, and who reads there compares digests.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from rl_ckpt.errors import CorruptionError
from rl_ckpt.format.manifest import ArrayRef, Chunk, Manifest, ShardFileEntry
from rl_ckpt.plan.match import Match
from rl_ckpt.store.chunk_check import Spot, bad_spots
from rl_ckpt.store.reader import load_leaves
from rl_ckpt.store.run import Run

Wanted = tuple[bytes, int]
"""A chunk's digest (16 bytes) and size in bytes."""


class Place(NamedTuple):
    """Where a manifest says that a chunk's bytes lie."""

    file: str
    """Name of a shard file, below the run's url."""
    offset: int
    """In bytes."""
    checkpoint: str
    """Id of the newest checkpoint that names the place."""


def find_elsewhere(
    run: Run, wanted: Collection[Wanted], skip: Collection[tuple[str, int]]
) -> dict[Wanted, list[Place]]:
    """Looks for chunks in the manifests of all live checkpoints.

    Args:
        run: The run.
        wanted: The chunks.
        skip: File and offset of places that are known to be bad.

    Returns:
        By chunk, the places to try, those that the newest checkpoints name first; no entry where there is none. Nothing
        was read there yet. Manifests that can't be read are passed over.

    Raises:
        StorageError: The store failed.
    """
    by_text = {(digest.hex(), size): (digest, size) for digest, size in wanted}
    known = set(skip)
    found: dict[Wanted, list[Place]] = {}
    for commit in reversed(run.log.read().commits):
        try:
            manifest = run.manifest(commit)
        except CorruptionError:
            continue  # whoever asks for that checkpoint is told; here it is one source less
        for array in manifest.arrays:
            for chunk in array.chunks:
                key = by_text.get((chunk.digest, chunk.bytes))
                if key is None:
                    continue
                place = Place(manifest.files[chunk.file].name, chunk.offset, commit.id)
                if place[:2] not in known:
                    known.add(place[:2])
                    found.setdefault(key, []).append(place)
    return found


def spots(manifest: Manifest, arrays: Iterable[int] | None = None) -> dict[str, set[Spot]]:
    """The chunks of a checkpoint by shard file, each place once.

    Args:
        manifest: The checkpoint's.
        arrays: Indices of those whose chunks are wanted; None: all.
    """
    out: dict[str, set[Spot]] = {}
    for index in range(len(manifest.arrays)) if arrays is None else set(arrays):
        for chunk in manifest.arrays[index].chunks:
            out.setdefault(manifest.files[chunk.file].name, set()).add(_spot(chunk))
    return out


def _spot(chunk: Chunk) -> Spot:
    return Spot(chunk.offset, chunk.bytes, chunk.digest)


def good_places(run: Run, bad: Collection[tuple[str, Spot]]) -> dict[tuple[str, Spot], Place]:
    """Places in the run that hold the bytes of damaged chunks; each was read and compared.

    Args:
        run: The run.
        bad: File and place of the damaged chunks.

    Returns:
        By damaged chunk; those that no other place holds are left out.

    Raises:
        StorageError: The store failed.
    """
    wanted = {(name, spot): (bytes.fromhex(spot.digest), spot.bytes) for name, spot in bad}
    found = find_elsewhere(run, set(wanted.values()), {(name, spot.offset) for name, spot in bad})
    to_read: dict[str, set[Spot]] = {}
    for (digest, size), places in found.items():
        for place in places:
            to_read.setdefault(place.file, set()).add(Spot(place.offset, size, digest.hex()))
    damaged = bad_spots(run.store, to_read)
    out = {}
    for key, want in wanted.items():
        spot = key[1]
        for place in found.get(want, ()):
            if (place.file, Spot(place.offset, spot.bytes, spot.digest)) not in damaged:
                out[key] = place
                break
    return out


def load_repaired(
    run: Run, manifest: Manifest, match: Match, allow_pickle: bool, as_numpy: bool
) -> tuple[dict[str, Any], list[str]]:
    """As `reader.load_leaves`; damaged chunks are taken from other places that hold their bytes.

    Costs nothing where nothing is damaged.

    Returns:
        The leaves by path, and a text for each chunk that was taken from elsewhere. All of it was verified.

    Raises:
        UntrustedDataError, CorruptionError, StorageError: As `reader.load_leaves`.
    """
    try:
        return load_leaves(run.store, manifest, match, allow_pickle, as_numpy), []
    except CorruptionError:
        chosen = [node.index for node in match.fills.values() if isinstance(node, ArrayRef)]
        bad = bad_spots(run.store, spots(manifest, chosen))
        places = good_places(run, bad)
        if len(places) < len(bad):
            raise
    leaves = load_leaves(run.store, _redirected(manifest, places), match, allow_pickle, as_numpy)
    return leaves, [
        f"the chunk at {spot.offset} of {run.store.object_url(name)} ({bad[name, spot]}) was taken from "
        f"{place.offset} of {place.file} (checkpoint {place.checkpoint})"
        for (name, spot), place in places.items()
    ]


def _redirected(manifest: Manifest, places: Mapping[tuple[str, Spot], Place]) -> Manifest:
    """The manifest, with other places for some of its chunks."""
    files = list(manifest.files)
    numbers: dict[str, int] = {}

    def moved(chunk: Chunk) -> Chunk:
        place = places.get((manifest.files[chunk.file].name, _spot(chunk)))
        if place is None:
            return chunk
        if place.file not in numbers:
            numbers[place.file] = len(files)
            files.append(ShardFileEntry(place.file, 0))
        return Chunk(chunk.box, numbers[place.file], place.offset, chunk.bytes, chunk.digest)

    arrays = tuple(msgspec.structs.replace(entry, chunks=tuple(map(moved, entry.chunks))) for entry in manifest.arrays)
    return msgspec.structs.replace(manifest, files=tuple(files), arrays=arrays)
