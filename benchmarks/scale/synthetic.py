"""Synthetic jobs: what thousands of ranks would say they have, with no array behind it.

A job's checkpoint holds `chunks` chunks in total, each of 16 MiB (one array of 4 chunks a replicated path, one chunk a
rank of a sharded path, one chunk a path that is a rank's own), over `workers` ranks, 8 to a node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from rl_ckpt.format.digest import digest
from rl_ckpt.format.manifest import ArrayRef, Manifest
from rl_ckpt.plan.deal import StageItem
from rl_ckpt.plan.inventory import Inventory, inventory_of
from rl_ckpt.plan.spread import ChunkId
from rl_ckpt.plan.standing import encode_plains
from rl_ckpt.state.arrays import NUMPY, ArraySpec
from rl_ckpt.state.boxes import Box
from rl_ckpt.state.tree import AUTO, SHARDED, Container, LocalArray, Node, Plain

CHUNK_BYTES = 16 << 20
_ROWS, _COLUMNS = 4096, 1024  # of float32: one chunk
_PER_ARRAY = 4
PER_NODE = 8

SHARES: dict[str, tuple[int, int, int]] = {
    "replicated": (4, 0, 0),
    "sharded": (0, 4, 0),
    "own": (0, 0, 4),
    "mixed": (1, 2, 1),
}
"""By kind of job: quarters of the chunks that are replicated, sharded, a rank's own."""


@dataclass(frozen=True)
class Values:
    """Which values the arrays have: another number, other values."""

    own: int = 0
    """Of arrays that are a rank's own."""
    common: int = 0
    """Of the others: replicas and shards."""


FIRST = Values()


@dataclass(frozen=True)
class Job:
    """One point of the simulation."""

    kind: str
    workers: int
    chunks: int
    """In the checkpoint, in total, each counted once."""

    @property
    def _quarters(self) -> tuple[int, int, int]:
        return SHARES[self.kind]

    def server(self, rank: int) -> str:
        """Shard server of a rank's node."""
        return f"server-{rank // PER_NODE:05d}"

    @cached_property
    def replicated(self) -> int:
        """Arrays that every rank holds alike."""
        return -(-self.chunks * self._quarters[0] // 4 // _PER_ARRAY)

    @cached_property
    def sharded(self) -> tuple[int, int]:
        """Arrays that are sharded, and over how many ranks each."""
        chunks = self.chunks * self._quarters[1] // 4
        over = min(self.workers, chunks)
        return (chunks // over if over else 0), over

    @cached_property
    def own(self) -> int:
        """Arrays of each rank's own, which nobody declared so."""
        return -(-self.chunks * self._quarters[2] // 4 // self.workers)

    @cached_property
    def _weights(self) -> dict[str, Node]:
        names = tuple(f"layer-{i:06d}" for i in range(self.replicated))
        shape = (_PER_ARRAY * _ROWS, _COLUMNS)
        array = LocalArray(ArraySpec(NUMPY, "float32", shape), Box.whole(shape), AUTO)
        return {"weights": Container("dict", names), **{f"weights/{name}": array for name in names}}

    def nodes(self, rank: int) -> dict[str, Node]:
        """A rank's nodes, by path."""
        nodes: dict[str, Node] = {"": Container("dict", ("weights", "moments", "own")), **self._weights}
        arrays, over = self.sharded
        held = range(arrays) if rank < over else range(0)
        nodes["moments"] = Container("dict", tuple(f"layer-{i:06d}" for i in held))
        shard = LocalArray(
            ArraySpec(NUMPY, "float32", (over * _ROWS, _COLUMNS)), Box((rank * _ROWS, 0), (_ROWS, _COLUMNS)), SHARDED
        )
        nodes |= {f"moments/layer-{i:06d}": shard for i in held}
        nodes["own"] = Container("dict", ("seed", *(f"buffer-{i:06d}" for i in range(self.own))))
        nodes["own/seed"] = Plain(rank)
        mine = LocalArray(ArraySpec(NUMPY, "float32", (_ROWS, _COLUMNS)), Box.whole((_ROWS, _COLUMNS)), AUTO)
        nodes |= {f"own/buffer-{i:06d}": mine for i in range(self.own)}
        return nodes

    def _identities(self, values: Values) -> Iterator[dict[str, bytes]]:
        """Of each rank's undeclared arrays, by path, in the order of its tree."""
        common = {
            f"weights/layer-{i:06d}": b"".join(digest(f"{values.common} {i} {c}".encode()) for c in range(_PER_ARRAY))
            for i in range(self.replicated)
        }
        for rank in range(self.workers):
            own = {f"own/buffer-{i:06d}": digest(f"{values.own} {rank} {i}".encode()) for i in range(self.own)}
            yield {**common, **own}

    def inventories(self, values: Values) -> Iterator[Inventory]:
        """What each rank says, rank by rank."""
        for rank, identities in enumerate(self._identities(values)):
            yield inventory_of(self.nodes(rank), identities)

    def repeats(self, values: Values) -> Iterator[tuple[bytes, bytes]]:
        """What each rank says by a standing plan, rank by rank: plain leaves, and identities joined."""
        for rank, identities in enumerate(self._identities(values)):
            yield encode_plains({"own/seed": Plain(rank)}), b"".join(identities.values())

    def staged(self, items: Sequence[StageItem], rank: int, values: Values) -> tuple[bytes, ...]:
        """Digests of what a rank stages."""
        own, common = f"{values.own} {rank}", f"{values.common}"
        return tuple(
            digest(f"{own if i.path.startswith('own/') else common} {i.path} {i.box.offset}".encode()) for i in items
        )

    def needs(self, manifest: Manifest) -> Iterator[list[ChunkId]]:
        """The chunks that each rank wants back, rank by rank, in the order of the tree."""
        everybody: list[ChunkId] = []
        shards: list[list[ChunkId]] = [[] for _ in range(self.workers)]
        own: list[list[ChunkId]] = [[] for _ in range(self.workers)]
        for path, variants in manifest.nodes.items():
            for variant in variants:
                if isinstance(variant.node, ArrayRef):
                    array = variant.node.index
                    chunks = manifest.arrays[array].chunks
                    if path.startswith("weights/"):
                        everybody += [(array, c) for c in range(len(chunks))]
                    elif path.startswith("moments/"):
                        for c, chunk in enumerate(chunks):
                            shards[chunk.box.offset[0] // _ROWS].append((array, c))
                    else:
                        for rank in variant.ranks or range(self.workers):
                            own[rank] += [(array, c) for c in range(len(chunks))]
        for rank in range(self.workers):
            yield [*everybody, *shards[rank], *own[rank]]
