"""Prefetch: which node brings which chunks of a checkpoint from the store into its memory, before anybody restores.

Owns: the dealing, level by bytes within what each node has room for, and the parts (plan/parts.py) that come of it, one
a node. Every chunk is in one part at the most, so it leaves the store once; equal bytes, wherever they are stored, are
one chunk. Who will need what is not known yet: a restore takes from each node what its workers want. Pure; moves
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rl_ckpt.format.manifest import ArrayRef, Chunk, Manifest
from rl_ckpt.format.shard_file import ALIGNMENT
from rl_ckpt.plan.parts import ChunkAt, Part

Key = tuple[bytes, int]
"""Digest and size of a chunk, by which memory finds it."""


@dataclass(frozen=True, slots=True)
class Dealt:
    """The parts of a prefetch."""

    parts: tuple[Part, ...]
    """One for each server that brings something; its table is in ascending order of offsets."""
    bytes: int
    """Of all chunks, each once."""
    left: tuple[Key, ...] = ()
    """Chunks that there is no room for."""
    left_bytes: int = 0
    """Of those."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A place where the store has a chunk."""

    file: str
    """Name below the run's url."""
    offset: int
    """In bytes."""


def places(manifest: Manifest) -> dict[Key, Stored]:
    """Where each chunk of a checkpoint lies in the store: of equal ones, the first in the order of the files."""
    out: dict[Key, Stored] = {}
    for chunk in _chunks(manifest):
        out.setdefault(_key(chunk), Stored(manifest.files[chunk.file].name, chunk.offset))
    return out


def deal_parts(manifest: Manifest, room: Mapping[str, int], attempt: str = "") -> Dealt:
    """Deals a checkpoint's chunks out.

    Args:
        manifest: Of the checkpoint.
        room: By shard server: how many bytes it may take at the most.
        attempt: In the names of the parts: each prefetch's are others.

    Returns:
        The parts. Loads are level as far as there is room; each server gets runs of chunks that lie together in the
        store's files, so that near ranges are one read.
    """
    queue: list[Key] = list(places(manifest))
    total = sum(size for _, size in queue)
    quotas = _quotas(sum(map(_padded, queue)), room)
    tables: dict[str, list[ChunkAt]] = {}
    filled = dict.fromkeys(room, 0)
    left: list[Key] = []
    servers = sorted(room, key=lambda server: (quotas[server], server))
    current = 0
    for key in queue:
        size = _padded(key)
        # More than half of it is past the quota: it belongs to the next one.
        while current < len(servers) - 1 and filled[servers[current]] + size / 2 > quotas[servers[current]]:
            current += 1
        server = _with_room(servers[current:] + servers[:current], size, filled, room)
        if server is None:
            left.append(key)
            continue
        tables.setdefault(server, []).append(ChunkAt(key[0], filled[server], key[1]))
        filled[server] += size
    parts = [Part(manifest.id, server, filled[server], tuple(tables[server]), attempt) for server in sorted(tables)]
    return Dealt(tuple(parts), total, tuple(left), sum(size for _, size in left))


def _with_room(servers: Sequence[str], size: int, filled: Mapping[str, int], room: Mapping[str, int]) -> str | None:
    return next((server for server in servers if filled[server] + size <= room[server]), None)


def _quotas(total: int, room: Mapping[str, int]) -> dict[str, float]:
    """How much each server is to take: all the same, but for those that have no room for that."""
    quotas: dict[str, float] = {}
    left: float = total
    for done, server in enumerate(sorted(room, key=lambda server: (room[server], server))):
        quotas[server] = min(max(0, room[server]), left / (len(room) - done))
        left -= quotas[server]
    return quotas


def names_of(manifest: Manifest, wanted: Sequence[Key]) -> dict[Key, str]:
    """Chunks for people: which chunk of which leaf, the first that has those bytes."""
    keys = set(wanted)
    out: dict[Key, str] = {}
    if not keys:
        return out
    paths: dict[int, str] = {}
    for path, variants in manifest.nodes.items():
        for variant in variants:
            if isinstance(variant.node, ArrayRef):
                paths.setdefault(variant.node.index, path)
    for a, array in enumerate(manifest.arrays):
        for c, chunk in enumerate(array.chunks):
            if _key(chunk) in keys:
                out.setdefault(_key(chunk), f"chunk {c} of {paths.get(a, f'array {a}')}")
    return out


def _chunks(manifest: Manifest) -> list[Chunk]:
    found = [chunk for array in manifest.arrays for chunk in array.chunks]
    return sorted(found, key=lambda chunk: (chunk.file, chunk.offset, chunk.bytes))


def _key(chunk: Chunk) -> Key:
    return bytes.fromhex(chunk.digest), chunk.bytes


def _padded(key: Key) -> int:
    return -(-key[1] // ALIGNMENT) * ALIGNMENT
