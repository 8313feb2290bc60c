"""Other sources of a chunk: the same bytes in another checkpoint of the run, or in another file of the same one.

Owns: finding them. A chunk is known by digest and size, so whatever holds those bytes is as good as what a manifest
names. Promises: nothing is taken on trust; a place is where the bytes should be, and who reads there compares digests.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from rl_ckpt.errors import CorruptionError
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
