"""Spread: which shard server fetches which chunk from the store, so that each leaves the store once per cluster.

Owns: the choice of the fetcher and of who passes a chunk on. Source order is rotated, so that peers do not all ask the
same server for the same chunk first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rl_ckpt.format.manifest import Chunk, Manifest

ChunkId = tuple[int, int]
"""Index of the array in the manifest, and of the chunk in the array."""


@dataclass(slots=True)
class ServerFetch:
    """What one shard server brings in: chunks from the store, and chunks from peers by peer."""

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
    takers: dict[ChunkId, list[str]] = {}
    for server in sorted(needs):
        for chunk in needs[server]:
            takers.setdefault(chunk, []).append(server)
    groups: dict[tuple[str, ...], list[ChunkId]] = {}
    for chunk, servers in takers.items():
        groups.setdefault(tuple(servers), []).append(chunk)
    out = {server: ServerFetch() for server in needs}
    load = dict.fromkeys(needs, 0)
    for group in sorted(groups, key=lambda servers: (len(servers), servers)):
        for fetcher, chunk in _deal_runs(manifest, groups[group], group, load):
            out[fetcher].store.append(chunk)
            for server in group:
                if server != fetcher:
                    out[server].peers.setdefault(fetcher, []).append(chunk)
    for i, server in enumerate(sorted(out)):
        out[server].store.sort()
        order = sorted(out[server].peers)
        out[server].peers = {peer: sorted(out[server].peers[peer]) for peer in order[i:] + order[:i]}
    return out


def share(manifest: Manifest, needs: Mapping[int, Sequence[ChunkId]]) -> dict[int, set[ChunkId]]:
    """Deals out the verifying of chunks of mapped files over the ranks of one node, which share their pages.

    Args:
        manifest: For the chunks' sizes.
        needs: Chunks that each rank wants.

    Returns:
        By rank, out of its needs: what it verifies. Every chunk (by its place in a file) is one rank's.
    """
    if len(needs) == 1:
        return {rank: set(chunks) for rank, chunks in needs.items()}
    twins = canonical_chunks(manifest)
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
