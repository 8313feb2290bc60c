"""Standing plan: the plan of the last save, kept for the next one of the same shape.

Owns: what may change from save to save without a new plan (values, plain leaves), and the check that it is no more than
that. A plan says which rank stages what; it stays right as long as every rank has the same nodes at the same paths and
the same arrays are replicas of one another. Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from rl_ckpt.plan.deal import SavePlan
from rl_ckpt.plan.inventory import Inventory, Part
from rl_ckpt.plan.merge import Held, Merged, variants
from rl_ckpt.state.tree import Node, Plain

Plains = dict[str, Plain]
_Found = dict[str, dict[int, tuple[Node, bytes]]]
"""By path and rank: node and identity."""


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
    _parts: list[tuple[Part, ...]]
    """By rank."""
    _common: frozenset[int]
    """Which parts (by `id`) all ranks have: every array in them has a replica on every rank."""
    _labels: dict[str, tuple[int, ...]]
    """Of arrays in other parts: path → for each rank that has it, the lowest rank that has the very same there."""

    @property
    def world_size(self) -> int:
        """Number of workers."""
        return len(self.servers)

    def holds_for(self, found: Sequence[bytes]) -> bool:
        """Whether the same arrays are replicas of one another as when the plan was made.

        Args:
            found: By rank, the identities of its undeclared arrays (`Part`), in the order of its tree, joined.
        """
        common: dict[int, bytes] = {}
        other: _Found = {}
        for rank, (parts, blob) in enumerate(zip(self._parts, found, strict=True)):
            at = 0
            for part in parts:
                end = at + part.identity_bytes
                if id(part) not in self._common:
                    _add(other, part, rank, _cut(part, blob[at:end]))
                elif common.setdefault(id(part), blob[at:end]) != blob[at:end]:
                    return False
                at = end
            if at != len(blob):
                return False
        return _label(other) == self._labels

    def renewed(self, plains: Sequence[bytes]) -> SavePlan:
        """The plan with the plain leaves of now.

        Args:
            plains: Each rank's, from `encode_plains`, by rank.
        """
        if list(plains) == self._plains:
            return self.plan
        self._plains = list(plains)
        merged, nodes = self.plan.merged, dict(self.plan.merged.nodes)
        for path, held in _held(plains).items():
            nodes[path] = variants(path, held, Merged(merged.world_size), self.chunk_bytes)
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
        None where it can't stand: one rank has a plain leaf where another has something else.
    """
    parts = [inventory.parts for inventory in inventories]
    distinct = {id(part): part for mine in parts for part in mine}.values()
    plains = {id(part): {p: node for p, node in part.nodes.items() if isinstance(node, Plain)} for part in distinct}
    plain = set[str]().union(*plains.values())
    if any(not isinstance(part.nodes.get(path, Plain(None)), Plain) for part in distinct for path in plain):
        return None
    common = frozenset(id(part) for part in parts[0]).intersection(*({id(part) for part in mine} for mine in parts[1:]))
    other: _Found = {}
    for rank, mine in enumerate(parts):
        for part in mine:
            if id(part) not in common:
                _add(other, part, rank, part.identities.values())
    blobs = [encode_plains({p: n for part in mine for p, n in plains[id(part)].items()}) for mine in parts]
    return Standing(plan_id, tuple(servers), chunk_bytes, plan, blobs, parts, common, _label(other))


def fixed_and_plains(nodes: Mapping[str, Node]) -> tuple[dict[str, Node], bytes]:
    """Takes a rank's nodes apart.

    Returns:
        What must be the same for a plan to be used again, by path; and the plain leaves, from `encode_plains`.
    """
    fixed: dict[str, Node] = {}
    plains: Plains = {}
    for path, node in nodes.items():
        if isinstance(node, Plain):
            plains[path] = node
        else:
            fixed[path] = node
    return fixed, encode_plains(plains)


def encode_plains(plains: Plains) -> bytes:
    """Plain leaves as msgpack: equal bytes are equal leaves, in type too."""
    return msgspec.msgpack.encode(plains)


def _cut(part: Part, blob: bytes) -> list[bytes]:
    out, at = [], 0
    for identity in part.identities.values():
        out.append(blob[at : at + len(identity)])
        at += len(identity)
    return out


def _add(found: _Found, part: Part, rank: int, identities: Iterable[bytes]) -> None:
    for path, identity in zip(part.identities, identities, strict=True):
        found.setdefault(path, {})[rank] = (part.nodes[path], identity)


def _label(found: _Found) -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {}
    for path, ranks in found.items():
        first: dict[tuple[Node, bytes], int] = {}
        out[path] = tuple(first.setdefault(have, rank) for rank, have in ranks.items())
    return out


def _held(plains: Sequence[bytes]) -> Mapping[str, list[Held]]:
    """By path, what the ranks have there; ranks with the same plain leaves throughout are looked at once."""
    ranks: dict[bytes, list[int]] = {}
    for rank, data in enumerate(plains):
        ranks.setdefault(data, []).append(rank)
    out: dict[str, list[Held]] = {}
    for data, same in ranks.items():
        for path, node in msgspec.msgpack.decode(data, type=Plains).items():
            out.setdefault(path, []).append(Held(node, None, False, tuple(same)))
    return out
