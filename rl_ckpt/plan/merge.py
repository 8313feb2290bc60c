"""Merge: many workers' inventories into one picture of the checkpoint.

Owns: which arrays are replicas of one another, which belong to their rank, and whether shards tile their array.
Promises: every contradiction between ranks is found here, before anything is staged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.format.manifest import ArrayRef, SavedNode, Variant
from rl_ckpt.plan.inventory import Inventory, box_bytes, chunk_boxes, chunk_digests
from rl_ckpt.state.arrays import ArraySpec
from rl_ckpt.state.boxes import Box, check_tiling
from rl_ckpt.state.tree import PER_RANK, REPLICATED, SHARDED, LocalArray, Node, Plain


# `gc=False`: 100,000 of these must not make Python's collector walk the user's heap; none of them can be in a cycle.
class MergedChunk(msgspec.Struct, gc=False):
    """One chunk of one array, and who could stage it."""

    box: Box
    size_bytes: int
    digest: bytes
    """16 bytes; empty where it is hashed only when it is staged."""
    holders: tuple[int, ...]


class MergedArray(msgspec.Struct, gc=False):
    """One array to be stored."""

    path: str
    spec: ArraySpec
    chunks: list[MergedChunk]
    rank: int | None = None
    """The rank it belongs to (the lowest of them), or None where all have it or it is sharded."""


@dataclass(slots=True)
class Merged:
    """The checkpoint as the workers have it."""

    world_size: int
    nodes: dict[str, tuple[Variant, ...]] = field(default_factory=dict)
    arrays: list[MergedArray] = field(default_factory=list)


def merge(inventories: Sequence[Inventory], chunk_bytes: int) -> Merged:
    """Merges the inventories of ranks 0 … n - 1.

    Args:
        inventories: By rank, at least one.
        chunk_bytes: As the workers cut their arrays.

    Raises:
        InvalidInputError: Ranks contradict one another: differing declarations, shapes or dtypes of what is declared
            replicated or sharded, or shards that do not tile their array. All such paths are listed.
    """
    merged, problems = Merged(len(inventories)), []
    for path, holders in _by_path(inventories).items():
        try:
            merged.nodes[path] = variants(path, holders, inventories, merged, chunk_bytes)
        except InvalidInputError as problem:
            problems.append(str(problem))
    if problems:
        raise InvalidInputError(
            "the workers' states don't fit together (nothing was written):\n  " + "\n  ".join(problems)
        )
    return merged


def _by_path(inventories: Sequence[Inventory]) -> dict[str, dict[int, Node]]:
    out: dict[str, dict[int, Node]] = {}
    for rank, inventory in enumerate(inventories):
        for path, node in inventory.nodes.items():
            out.setdefault(path, {})[rank] = node
    return out


def variants(
    path: str, holders: Mapping[int, Node], inventories: Sequence[Inventory], merged: Merged, chunk_bytes: int
) -> tuple[Variant, ...]:
    """What the ranks have at one path, equal things once.

    Args:
        path: Of the nodes.
        holders: The nodes, by rank.
        inventories: By rank; only looked at for arrays.
        merged: Takes the arrays up.
        chunk_bytes: As the workers cut their arrays.

    Raises:
        InvalidInputError: Ranks contradict one another.
    """
    arrays = {rank: node for rank, node in holders.items() if isinstance(node, LocalArray)}
    declared = {node.declared for node in arrays.values()}
    if declared & {REPLICATED, SHARDED} and (len(declared) > 1 or len(arrays) < len(holders)):
        kinds = {r: n.declared if isinstance(n, LocalArray) else type(n).__name__.lower() for r, n in holders.items()}
        raise InvalidInputError(f"{path!r} is declared differently by rank: {kinds}; declare it alike on every worker")
    if declared == {SHARDED}:
        node = _add_sharded(path, arrays, merged, chunk_bytes)
        return (Variant(node, _ranks(holders, merged)),)
    groups: dict[object, list[int]] = {}
    for rank, holder in holders.items():
        groups.setdefault(_identity(path, rank, holder, inventories), []).append(rank)
    single = len(groups) == 1
    if declared == {REPLICATED} and not single:
        specs = {rank: (n.spec.dtype, n.spec.shape) for rank, n in arrays.items()}
        raise InvalidInputError(
            f"{path!r} is declared replicated but differs by rank: {specs}; dtype and shape must agree"
        )
    out = []
    for ranks in groups.values():
        first = holders[ranks[0]]
        own = (
            (first.declared == PER_RANK)
            if isinstance(first, LocalArray)
            else isinstance(first, Plain) and first.per_rank
        )
        # A value that only some ranks have and that nobody else contradicts may go to anybody, if two or more agree on
        # it.
        shared = single and not own and (len(ranks) > 1 or len(ranks) == merged.world_size or declared == {REPLICATED})
        saved = _saved(path, first, ranks, inventories, merged, chunk_bytes, single)
        out.append(Variant(saved, None if len(ranks) == merged.world_size else tuple(ranks), shared))
    return tuple(out)


def _identity(path: str, rank: int, node: Node, inventories: Sequence[Inventory]) -> object:
    """Equal for ranks that have the very same thing at `path`."""
    if not isinstance(node, LocalArray):
        return (_frozen(node), rank) if isinstance(node, Plain) and node.per_rank else _frozen(node)
    return (node, inventories[rank].identities.get(path), rank if node.declared == PER_RANK else None)


def _frozen(node: Node) -> object:
    # JSON equality is too wide for a leaf: 1 == 1.0 == True.
    return (repr(node.value), Plain) if isinstance(node, Plain) else node


def _saved(
    path: str,
    node: Node,
    ranks: Sequence[int],
    inventories: Sequence[Inventory],
    merged: Merged,
    chunk_bytes: int,
    single: bool,
) -> SavedNode:
    if not isinstance(node, LocalArray):
        return Plain(node.value) if isinstance(node, Plain) else node
    boxes = chunk_boxes(node, chunk_bytes)
    known = chunk_digests(inventories[ranks[0]], path, len(boxes))
    chunks = [
        MergedChunk(box, box_bytes(node, box), hashed, tuple(ranks)) for box, hashed in zip(boxes, known, strict=True)
    ]
    merged.arrays.append(MergedArray(path, node.spec, chunks, None if single else ranks[0]))
    return ArrayRef(len(merged.arrays) - 1)


def _add_sharded(path: str, arrays: Mapping[int, LocalArray], merged: Merged, chunk_bytes: int) -> SavedNode:
    specs = {rank: (node.spec.kind, node.spec.dtype, node.spec.shape) for rank, node in arrays.items()}
    if len(set(specs.values())) > 1:
        raise InvalidInputError(f"{path!r} is sharded, but kind, dtype or global shape differ by rank: {specs}")
    boxes: dict[Box, list[int]] = {}
    for rank, node in arrays.items():
        boxes.setdefault(node.box, []).append(rank)
    first = next(iter(arrays.values()))
    check_tiling(path, first.spec.shape, list(boxes))
    chunks = [
        MergedChunk(box, box_bytes(first, box), b"", tuple(ranks))
        for ranks in boxes.values()
        for box in chunk_boxes(arrays[ranks[0]], chunk_bytes)
    ]
    merged.arrays.append(MergedArray(path, first.spec, chunks))
    return ArrayRef(len(merged.arrays) - 1)


def _ranks(holders: Mapping[int, Node], merged: Merged) -> tuple[int, ...] | None:
    return None if len(holders) == merged.world_size else tuple(holders)
