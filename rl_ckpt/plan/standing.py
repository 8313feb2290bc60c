"""Standing plan: the plan of the last save, kept for the next one of the same shape.

Owns: what may change from save to save without a new plan (values, plain leaves), and the check that it is no more than
that. A plan says which rank stages what; it stays right as long as every rank has the same nodes at the same paths and
the same arrays are replicas of one another. Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from rl_ckpt.plan.deal import SavePlan
from rl_ckpt.plan.inventory import Inventory
from rl_ckpt.plan.merge import Merged, variants
from rl_ckpt.state.tree import Node, Plain

Plains = dict[str, Plain]
_Labels = tuple[int, ...]


@dataclass(slots=True)
class Standing:
    """A plan with what is needed to use it again. Made by `standing`."""

    id: str
    servers: tuple[str, ...]
    """Shard server of each rank's node."""
    chunk_bytes: int
    plan: SavePlan
    """Not settled."""
    _plains: list[bytes]
    """By rank, as they came."""
    _paths: list[tuple[str, ...]]
    """By rank: paths of the arrays whose identity decides who has replicas, in the order of the tree."""
    _sizes: list[tuple[int, ...]]
    """Bytes of each of these identities."""
    _kinds: dict[str, dict[int, int]]
    """Path → rank → the lowest rank that has an equal node there."""
    _labels: dict[str, _Labels]
    """Path → for each rank that has it, the lowest rank that has the very same there."""
    _all_alike: bool
    """Whether each of these arrays has a replica on every rank: then a glance is enough."""

    @property
    def world_size(self) -> int:
        """Number of workers."""
        return len(self.servers)

    def holds_for(self, found: Sequence[bytes]) -> bool:
        """Whether the same arrays are replicas of one another as when the plan was made.

        Args:
            found: Each rank's `identities` of now, by rank.
        """
        if [len(blob) for blob in found] != [sum(sizes) for sizes in self._sizes]:
            return False
        if self._all_alike and len(set(found)) == 1:
            return True
        split = [
            dict(zip(paths, _cut(blob, sizes), strict=True))
            for paths, sizes, blob in zip(self._paths, self._sizes, found, strict=True)
        ]
        return _labels(self._kinds, split) == self._labels

    def renewed(self, plains: Sequence[bytes]) -> SavePlan:
        """The plan with the plain leaves of now.

        Args:
            plains: Each rank's, from `encode_plains`, by rank.
        """
        if list(plains) == self._plains:
            return self.plan
        self._plains = list(plains)
        known: dict[bytes, Plains] = {}  # most ranks have the same ones
        decoded = [known.get(data) or known.setdefault(data, _decode(data)) for data in plains]
        merged, nodes = self.plan.merged, dict(self.plan.merged.nodes)
        for path, holders in _by_path(decoded).items():
            nodes[path] = variants(path, holders, (), Merged(merged.world_size), self.chunk_bytes)
        self.plan = dataclasses.replace(self.plan, merged=dataclasses.replace(merged, nodes=nodes))
        return self.plan


def standing(
    plan_id: str, inventories: Sequence[Inventory], servers: Sequence[str], plan: SavePlan, chunk_bytes: int
) -> Standing | None:
    """A plan made to stand.

    Args:
        plan_id: A name that no other plan has.
        inventories: Of all ranks, from which the plan was made.
        servers: Shard server of each rank's node.
        plan: From `deal`.
        chunk_bytes: As the workers cut their arrays.

    Returns:
        None where it can't stand: one rank has a plain leaf where another has an array.
    """
    plains = [_plains_of(inventory) for inventory in inventories]
    some_plain = set[str]().union(*plains)
    if any(not isinstance(inv.nodes.get(path, Plain(None)), Plain) for inv in inventories for path in some_plain):
        return None
    kinds: dict[str, dict[int, int]] = {}
    first: dict[tuple[str, Node], int] = {}
    for rank, inventory in enumerate(inventories):
        for path in inventory.identities:
            kinds.setdefault(path, {})[rank] = first.setdefault((path, inventory.nodes[path]), rank)
    split = [inventory.identities for inventory in inventories]
    paths = [tuple(found) for found in split]
    sizes = [tuple(len(identity) for identity in found.values()) for found in split]
    labels = _labels(kinds, split)
    alike = all(len(found) == len(servers) and not any(found) for found in labels.values()) and len(set(paths)) == 1
    blobs = [encode_plains(found) for found in plains]
    return Standing(plan_id, tuple(servers), chunk_bytes, plan, blobs, paths, sizes, kinds, labels, alike)


def _plains_of(inventory: Inventory) -> Plains:
    """A rank's plain leaves."""
    return {path: node for path, node in inventory.nodes.items() if isinstance(node, Plain)}


def encode_plains(plains: Plains) -> bytes:
    """Plain leaves as msgpack: equal bytes are equal leaves, in type too."""
    return msgspec.msgpack.encode(plains)


def _decode(data: bytes) -> Plains:
    return msgspec.msgpack.decode(data, type=Plains)


def _cut(blob: bytes, sizes: Sequence[int]) -> list[bytes]:
    out, at = [], 0
    for size in sizes:
        out.append(blob[at : at + size])
        at += size
    return out


def _labels(kinds: Mapping[str, Mapping[int, int]], split: Sequence[Mapping[str, bytes]]) -> dict[str, _Labels]:
    out: dict[str, _Labels] = {}
    for path, ranks in kinds.items():
        first: dict[tuple[int, bytes], int] = {}
        out[path] = tuple(first.setdefault((kind, split[rank][path]), rank) for rank, kind in ranks.items())
    return out


def _by_path(plains: Sequence[Plains]) -> dict[str, dict[int, Plain]]:
    out: dict[str, dict[int, Plain]] = {}
    for rank, mine in enumerate(plains):
        for path, node in mine.items():
            out.setdefault(path, {})[rank] = node
    return out
