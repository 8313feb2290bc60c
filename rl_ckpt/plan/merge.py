"""Merge: many workers' inventories into one picture of the checkpoint.

Owns: which arrays are replicas of one another, which belong to their rank, and whether shards tile their array.
Promises: every contradiction between ranks is found here, before anything is staged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.format.manifest import ArrayRef, SavedNode, Variant
from rl_ckpt.plan.inventory import Inventory, Part, box_bytes, chunk_boxes, chunk_digests
from rl_ckpt.state.arrays import ArraySpec
from rl_ckpt.state.boxes import Box, check_tiling
from rl_ckpt.state.collector import paused
from rl_ckpt.state.tree import PER_RANK, REPLICATED, SHARDED, Container, LocalArray, Node, Plain


class MergedChunk(msgspec.Struct, gc=False):
    """One chunk of one array, and who could stage it."""

    box: Box
    size_bytes: int
    digest: bytes
    """16 bytes; empty where it is hashed only when it is staged."""
    holders: tuple[int, ...]
    """Ascending. One object for all chunks that the same ranks hold: with many ranks it is what takes memory."""


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


class Held(msgspec.Struct, gc=False):
    """What some ranks hold at a path, and said in the very same part of their inventories."""

    node: Node
    identity: bytes | None
    """As in `Part.identities`."""
    in_object: bool
    ranks: tuple[int, ...]
    """Ascending."""


def merge(inventories: Sequence[Inventory], chunk_bytes: int) -> Merged:
    """Merges the inventories of ranks 0 … n - 1.

    Args:
        inventories: By rank, at least one. A part that is one object in several of them is looked at once.
        chunk_bytes: As the workers cut their arrays.

    Raises:
        InvalidInputError: Ranks contradict one another: differing declarations, shapes or dtypes of what is declared
            replicated or sharded, or shards that do not tile their array. All such paths are listed.
    """
    merged, problems = Merged(len(inventories)), []
    with paused():
        for path, held in _by_path(inventories).items():
            try:
                merged.nodes[path] = variants(path, held, merged, chunk_bytes)
            except InvalidInputError as problem:
                problems.append(str(problem))
    if problems:
        raise InvalidInputError(
            "the workers' states don't fit together (nothing was written):\n  " + "\n  ".join(problems)
        )
    return merged


def _by_path(inventories: Sequence[Inventory]) -> dict[str, list[Held]]:
    """By path, in the order in which rank 0, 1, … have them; what is held first by the lowest rank comes first."""
    holders: dict[int, tuple[Part, list[int]]] = {}
    for rank, inventory in enumerate(inventories):
        for part in inventory.parts:
            known = holders.get(id(part))
            if known is None:
                holders[id(part)] = (part, [rank])
            else:
                known[1].append(rank)
    same: dict[tuple[int, ...], tuple[int, ...]] = {}
    out: dict[str, list[Held]] = {}
    for part, found in holders.values():
        key = tuple(found)
        ranks = same.setdefault(key, key)  # one tuple for all arrays that these ranks hold
        for path, node in part.nodes.items():
            held = Held(node, part.identities.get(path), path in part.objects, ranks)
            known_here = out.get(path)
            if known_here is None:
                out[path] = [held]
            else:
                known_here.append(held)
    return out


def _by_rank(held: Sequence[Held]) -> dict[int, Node]:
    return dict(sorted((rank, h.node) for h in held for rank in h.ranks))


def variants(path: str, held: Sequence[Held], merged: Merged, chunk_bytes: int) -> tuple[Variant, ...]:
    """What the ranks have at one path, equal things once.

    Args:
        path: Of the nodes.
        held: What they have there.
        merged: Takes the arrays up.
        chunk_bytes: As the workers cut their arrays.

    Raises:
        InvalidInputError: Ranks contradict one another.
    """
    if len(held) == 1 and not _is_own(held[0].node) and not _is_sharded(held[0].node):
        return (_uncontradicted(path, held[0], merged, chunk_bytes),)
    arrays = [h for h in held if isinstance(h.node, LocalArray)]
    declared = {h.node.declared for h in held if isinstance(h.node, LocalArray)}
    if declared & {REPLICATED, SHARDED} and (len(declared) > 1 or len(arrays) < len(held)):
        kinds = {
            r: n.declared if isinstance(n, LocalArray) else type(n).__name__.lower() for r, n in _by_rank(held).items()
        }
        raise InvalidInputError(f"{path!r} is declared differently by rank: {kinds}; declare it alike on every worker")
    if declared == {SHARDED}:
        node = _add_sharded(path, held, merged, chunk_bytes)
        return (Variant(node, _ranks(held, merged)),)
    groups = _groups(held)
    single = len(groups) == 1
    if declared == {REPLICATED} and not single:
        specs = {r: (n.spec.dtype, n.spec.shape) for r, n in _by_rank(held).items() if isinstance(n, LocalArray)}
        raise InvalidInputError(
            f"{path!r} is declared replicated but differs by rank: {specs}; dtype and shape must agree"
        )
    out = []
    for group in groups:
        first, ranks = group.node, group.ranks
        own = _is_own(first)
        # A value that only some ranks have and that nobody else contradicts may go to anybody, if two or more agree on
        # it, or the one that has it says so.
        shared = single and not own and (len(ranks) > 1 or len(ranks) == merged.world_size or _is_for_all(first))
        saved = _saved(path, group, merged, chunk_bytes, single)
        out.append(Variant(saved, None if len(ranks) == merged.world_size else ranks, shared))
    return tuple(out)


def _uncontradicted(path: str, held: Held, merged: Merged, chunk_bytes: int) -> Variant:
    """As `variants` where all who have anything at a path have the very same: so it is with nearly all of them."""
    node, ranks = held.node, held.ranks
    everybody = len(ranks) == merged.world_size
    shared = everybody or len(ranks) > 1 or _is_for_all(node)
    return Variant(_saved(path, held, merged, chunk_bytes, True), None if everybody else ranks, shared)


def _is_sharded(node: Node) -> bool:
    return isinstance(node, LocalArray) and node.declared == SHARDED


def _groups(held: Sequence[Held]) -> list[Held]:
    """Puts together what is the very same on several ranks, and takes apart what belongs to its rank."""
    apart = [Held(h.node, h.identity, h.in_object, (r,)) for h in held if _is_own(h.node) for r in h.ranks]
    groups: dict[object, list[Held]] = {}
    for h in held:
        if not _is_own(h.node):
            groups.setdefault((_frozen(h.node), h.identity), []).append(h)
    together = [
        group[0]
        if len(group) == 1
        else Held(
            group[0].node, group[0].identity, group[0].in_object, tuple(sorted(rank for h in group for rank in h.ranks))
        )
        for group in groups.values()
    ]
    return sorted(apart + together, key=lambda h: h.ranks[0])


def _is_own(node: Node) -> bool:
    """Whether a node is declared to be its rank's own."""
    return node.declared == PER_RANK if isinstance(node, LocalArray) else isinstance(node, Plain) and node.per_rank


def _is_for_all(node: Node) -> bool:
    """Whether a node is declared replicated: on offer to every rank, though one alone may have it."""
    if isinstance(node, LocalArray):
        return node.declared == REPLICATED
    return isinstance(node, Plain | Container) and node.replicated


def _frozen(node: Node) -> object:
    # JSON equality is too wide for a leaf: 1 == 1.0 == True.
    return (repr(node.value), Plain) if isinstance(node, Plain) else node


def _saved(path: str, held: Held, merged: Merged, chunk_bytes: int, single: bool) -> SavedNode:
    node, ranks = held.node, held.ranks
    if not isinstance(node, LocalArray):
        if isinstance(node, Container):
            return Container(node.type, node.keys)
        return Plain(node.value) if isinstance(node, Plain) else node
    boxes, identity = chunk_boxes(node, chunk_bytes), None if held.in_object else held.identity
    if len(boxes) == 1:
        chunks = [MergedChunk(boxes[0], box_bytes(node, boxes[0]), identity or b"", ranks)]
    else:
        known = zip(boxes, chunk_digests(identity, len(boxes)), strict=True)
        chunks = [MergedChunk(box, box_bytes(node, box), hashed, ranks) for box, hashed in known]
    merged.arrays.append(MergedArray(path, node.spec, chunks, None if single else ranks[0]))
    return ArrayRef(len(merged.arrays) - 1)


def _add_sharded(path: str, held: Sequence[Held], merged: Merged, chunk_bytes: int) -> SavedNode:
    arrays = {rank: node for rank, node in _by_rank(held).items() if isinstance(node, LocalArray)}
    specs = {rank: (node.spec.kind, node.spec.dtype, node.spec.shape) for rank, node in arrays.items()}
    if len(set(specs.values())) > 1:
        raise InvalidInputError(f"{path!r} is sharded, but kind, dtype or global shape differ by rank: {specs}")
    boxes: dict[Box, list[int]] = {}
    for rank, node in arrays.items():
        boxes.setdefault(node.box, []).append(rank)
    first = next(iter(arrays.values()))
    check_tiling(path, first.spec.shape, list(boxes))
    chunks = []
    for found in boxes.values():
        ranks = tuple(found)
        pieces = chunk_boxes(arrays[ranks[0]], chunk_bytes)
        chunks += [MergedChunk(box, box_bytes(first, box), b"", ranks) for box in pieces]
    merged.arrays.append(MergedArray(path, first.spec, chunks))
    return ArrayRef(len(merged.arrays) - 1)


def _ranks(held: Sequence[Held], merged: Merged) -> tuple[int, ...] | None:
    ranks = [rank for h in held for rank in h.ranks]
    return None if len(ranks) == merged.world_size else tuple(sorted(ranks))
