"""The planners as one would write them for a handful of ranks: every rank's every node is looked at.

What the real ones do for thousands of ranks must give the very same plans.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from rl_ckpt.format.manifest import ArrayRef, Manifest, SavedNode, Variant
from rl_ckpt.plan.inventory import Inventory, box_bytes, chunk_boxes, chunk_digests
from rl_ckpt.plan.merge import Merged, MergedArray, MergedChunk
from rl_ckpt.plan.spread import ChunkId, ServerFetch, _deal_runs
from rl_ckpt.state.boxes import Box
from rl_ckpt.state.tree import PER_RANK, REPLICATED, SHARDED, Container, LocalArray, Node, Plain

Nodes = dict[str, Node]
Digests = dict[str, bytes]


def plain_merge(inventories: Sequence[Inventory], chunk_bytes: int) -> Merged:
    """As `merge`, for states that fit together."""
    nodes: list[Nodes] = [{p: n for part in inv.parts for p, n in part.nodes.items()} for inv in inventories]
    digests: list[Digests] = [{p: d for part in inv.parts for p, d in part.identities.items()} for inv in inventories]
    by_path: dict[str, dict[int, Node]] = {}
    for rank, mine in enumerate(nodes):
        for path, node in mine.items():
            by_path.setdefault(path, {})[rank] = node
    merged = Merged(len(inventories))
    for path, holders in by_path.items():
        merged.nodes[path] = _variants(path, holders, digests, merged, chunk_bytes)
    return merged


def _variants(
    path: str, holders: Mapping[int, Node], digests: Sequence[Digests], merged: Merged, chunk_bytes: int
) -> tuple[Variant, ...]:
    world = merged.world_size
    arrays = {rank: node for rank, node in holders.items() if isinstance(node, LocalArray)}
    declared = {node.declared for node in arrays.values()}
    if declared == {SHARDED}:
        boxes: dict[Box, list[int]] = {}
        for rank, array in arrays.items():
            boxes.setdefault(array.box, []).append(rank)
        first = next(iter(arrays.values()))
        chunks = [
            MergedChunk(box, box_bytes(first, box), b"", tuple(ranks))
            for ranks in boxes.values()
            for box in chunk_boxes(arrays[ranks[0]], chunk_bytes)
        ]
        merged.arrays.append(MergedArray(path, first.spec, chunks))
        saved: SavedNode = ArrayRef(len(merged.arrays) - 1)
        return (Variant(saved, None if len(holders) == world else tuple(holders)),)
    groups: dict[object, list[int]] = {}
    for rank, node in holders.items():
        groups.setdefault(_identity(path, rank, node, digests), []).append(rank)
    single, out = len(groups) == 1, []
    for ranks in groups.values():
        node = holders[ranks[0]]
        own = node.declared == PER_RANK if isinstance(node, LocalArray) else isinstance(node, Plain) and node.per_rank
        said = declared == {REPLICATED} or (isinstance(node, Plain | Container) and node.replicated)
        shared = single and not own and (len(ranks) > 1 or len(ranks) == world or said)
        if isinstance(node, LocalArray):
            pieces = chunk_boxes(node, chunk_bytes)
            known = chunk_digests(digests[ranks[0]].get(path), len(pieces))
            chunks = [MergedChunk(b, box_bytes(node, b), d, tuple(ranks)) for b, d in zip(pieces, known, strict=True)]
            merged.arrays.append(MergedArray(path, node.spec, chunks, None if single else ranks[0]))
            saved = ArrayRef(len(merged.arrays) - 1)
        else:
            saved = (
                Plain(node.value)
                if isinstance(node, Plain)
                else Container(node.type, node.keys)
                if isinstance(node, Container)
                else node
            )
        out.append(Variant(saved, None if len(ranks) == world else tuple(ranks), shared))
    return tuple(out)


def _identity(path: str, rank: int, node: Node, digests: Sequence[Digests]) -> object:
    if isinstance(node, LocalArray):
        return (node, digests[rank].get(path), rank if node.declared == PER_RANK else None)
    if isinstance(node, Plain):
        return (repr(node.value), Plain, rank if node.per_rank else None)
    return node


def plain_balance(chunks: Sequence[MergedChunk], servers: Sequence[str]) -> list[tuple[int, MergedChunk]]:
    """Which rank stages which of some chunks: by rank, then in the order given."""
    rank_load, node_load = dict.fromkeys(range(len(servers)), 0), dict.fromkeys(servers, 0)
    groups: dict[frozenset[int], list[int]] = {}
    for number, chunk in enumerate(chunks):
        groups.setdefault(frozenset(chunk.holders), []).append(number)
    dealt: list[tuple[int, int]] = []
    for holders in sorted(groups, key=lambda h: (len(h), sorted(h))):
        heap = [(rank_load[r], node_load[servers[r]], r) for r in holders]
        heapq.heapify(heap)
        for number in sorted(groups[holders], key=lambda i: -chunks[i].size_bytes):
            _, seen, rank = heap[0]
            while seen != node_load[servers[rank]]:
                heapq.heapreplace(heap, (rank_load[rank], node_load[servers[rank]], rank))
                _, seen, rank = heap[0]
            rank_load[rank] += chunks[number].size_bytes
            node_load[servers[rank]] += chunks[number].size_bytes
            heapq.heapreplace(heap, (rank_load[rank], node_load[servers[rank]], rank))
            dealt.append((rank, number))
    return [(rank, chunks[number]) for rank, number in sorted(dealt)]


def plain_spread(manifest: Manifest, needs: Mapping[str, set[ChunkId]]) -> dict[str, ServerFetch]:
    """As `spread`: every chunk's takers are listed."""
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
