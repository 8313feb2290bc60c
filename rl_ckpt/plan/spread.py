"""Spread: which shard server fetches which chunk from the store, so that each leaves the store once per cluster.

Owns: the choice of the fetcher and of who passes a chunk on. Source order is rotated, so that peers do not all ask the
same server for the same chunk first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, groupby

import msgspec

from rl_ckpt.format.manifest import Chunk, Manifest
from rl_ckpt.plan.shared import Shared

ChunkId = tuple[int, int]
"""Index of the array in the manifest, and of the chunk in the array."""


_PART_ARRAYS = 64


class NeedsPart(Shared):
    """A run of the chunks that a rank needs."""

    __slots__ = ("chunks",)

    fields_type = tuple[tuple[ChunkId, ...]]

    def __init__(self, chunks: tuple[ChunkId, ...]) -> None:
        """In the order in which the rank asks."""
        self.chunks = chunks

    def fields(self) -> tuple[object, ...]:
        """See `Shared`."""
        return (self.chunks,)


class Needs(msgspec.Struct, frozen=True):
    """The chunks that one rank needs, in parts (plan/shared.py) of which many are the same on many ranks."""

    parts: tuple[NeedsPart, ...]

    @staticmethod
    def of(chunks: Iterable[ChunkId]) -> Needs:
        """Cuts what a rank needs into parts, by array: what only it needs does not change the parts around."""
        runs = groupby(chunks, key=lambda chunk: chunk[0] // _PART_ARRAYS)
        return Needs(tuple(NeedsPart(tuple(run)) for _, run in runs))

    def __iter__(self) -> Iterator[ChunkId]:
        """The chunks in order."""
        return chain.from_iterable(part.chunks for part in self.parts)


@dataclass(slots=True)
class ServerFetch:
    """What one shard server brings in: chunks from the store, and chunks from peers by peer. Lists may be shared."""

    store: list[ChunkId] = field(default_factory=list)
    peers: dict[str, list[ChunkId]] = field(default_factory=dict)


def spread(manifest: Manifest, needs: Mapping[str, set[ChunkId]]) -> dict[str, ServerFetch]:
    """Plans the fetches of a restore.

    Args:
        manifest: For the chunks' sizes.
        needs: Chunks that the workers on each server's node want.

    Returns:
        By server. Every chunk is read from the store by exactly one server, the least loaded of those that need it;
        chunks with the fewest takers are dealt first. Equal bytes under several ids (tied across arrays) count as one
        chunk.
    """
    out = {server: ServerFetch() for server in needs}
    load = dict.fromkeys(needs, 0)
    groups = _by_takers(needs)
    for group in sorted(groups, key=lambda servers: (len(servers), servers)):
        runs: dict[str, list[ChunkId]] = {}
        for fetcher, chunk in _deal_runs(manifest, groups[group], group, load):
            runs.setdefault(fetcher, []).append(chunk)
        for fetcher, run in runs.items():
            run.sort()
            for server in group:
                mine = out[server].store if server == fetcher else out[server].peers.get(fetcher, [])
                # Where this is all that the server takes from there, it shares the list with the others of its group.
                merged = sorted([*mine, *run]) if mine else run
                if server == fetcher:
                    out[server].store = merged
                else:
                    out[server].peers[fetcher] = merged
    for i, server in enumerate(sorted(out)):
        order = sorted(out[server].peers)
        out[server].peers = {peer: out[server].peers[peer] for peer in order[i:] + order[:i]}
    return out


def _by_takers(needs: Mapping[str, set[ChunkId]]) -> dict[tuple[str, ...], list[ChunkId]]:
    """Chunks by the servers that need them."""
    everybody = tuple(sorted(needs))
    common = set.intersection(*needs.values()) if len(needs) > 1 else set()  # weights: most chunks on most servers
    takers: dict[ChunkId, list[str]] = {}
    for server in everybody:
        for chunk in needs[server] - common:
            takers.setdefault(chunk, []).append(server)
    groups: dict[tuple[str, ...], list[ChunkId]] = {everybody: list(common)} if common else {}
    for chunk, servers in takers.items():
        groups.setdefault(tuple(servers), []).append(chunk)
    return groups


def share(
    manifest: Manifest, twins: Mapping[ChunkId, ChunkId], needs: Mapping[int, Iterable[ChunkId]]
) -> dict[int, set[ChunkId]]:
    """Deals out the verifying of chunks of mapped files over the ranks of one node, which share their pages.

    Args:
        manifest: For the chunks' sizes.
        twins: From `canonical_chunks`.
        needs: Chunks that each rank wants.

    Returns:
        By rank, out of its needs: what it verifies. Every chunk (by its place in a file) is one rank's.
    """
    if len(needs) == 1:
        return {rank: set(chunks) for rank, chunks in needs.items()}
    wanted = {f"{rank:09}": {twins[chunk] for chunk in needs[rank]} for rank in needs}
    dealt = {server: set(fetch.store) for server, fetch in spread(manifest, wanted).items()}
    return {rank: {chunk for chunk in needs[rank] if twins[chunk] in dealt[f"{rank:09}"]} for rank in needs}


def _deal_runs(
    manifest: Manifest, chunks: list[ChunkId], servers: tuple[str, ...], load: dict[str, int]
) -> Iterator[tuple[str, ChunkId]]:
    """Deals chunks that the same servers need, levelling the servers' loads.

    Each gets a run of chunks that lie together in the files: near ranges are then one read, with little between them.
    """
    ordered = sorted(chunks, key=lambda c: (_saved(manifest, c).file, _saved(manifest, c).offset, c))
    level = (sum(load[server] for server in servers) + sum(_bytes(manifest, c) for c in ordered)) / len(servers)
    queue = sorted(servers, key=lambda server: (load[server], server))
    room, done = max(0.0, level - load[queue[0]]), 0.0
    for chunk in ordered:
        size = _bytes(manifest, chunk)
        while len(queue) > 1 and done + size / 2 > room:  # more than half of it belongs to the next one
            queue.pop(0)
            room += max(0.0, level - load[queue[0]])
        load[queue[0]] += size
        done += size
        yield queue[0], chunk


def canonical_chunks(manifest: Manifest) -> dict[ChunkId, ChunkId]:
    """Every chunk's first twin: chunks that are the same bytes of the same file are one to fetch."""
    first: dict[tuple[int, int, int], ChunkId] = {}
    out: dict[ChunkId, ChunkId] = {}
    for a, array in enumerate(manifest.arrays):
        for c, chunk in enumerate(array.chunks):
            out[a, c] = first.setdefault((chunk.file, chunk.offset, chunk.bytes), (a, c))
    return out


def _saved(manifest: Manifest, chunk: ChunkId) -> Chunk:
    return manifest.arrays[chunk[0]].chunks[chunk[1]]


def _bytes(manifest: Manifest, chunk: ChunkId) -> int:
    return _saved(manifest, chunk).bytes
