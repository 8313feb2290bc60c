"""What one worker has, before anything is staged.

Owns: the inventory, cut into parts (plan/shared.py) of which most are the same on all ranks that hold the same arrays.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from rl_ckpt.format.digest import digest
from rl_ckpt.plan.shared import Shared
from rl_ckpt.state.arrays import flat_bytes, host_part
from rl_ckpt.state.boxes import Box, cut
from rl_ckpt.state.dtypes import dtype_from_name
from rl_ckpt.state.tree import AUTO, FlatTree, LocalArray, Node

_PART_NODES = 32  # on average: so few that a leaf of a rank's own costs little, so many that a hash pays


class Part(Shared):
    """A run of one rank's nodes, and digests of the chunks (as `chunk_boxes` cuts them) of what may be replicas."""

    __slots__ = ("digests", "nodes")

    fields_type = tuple[dict[str, Node], dict[str, tuple[bytes, ...]]]

    def __init__(self, nodes: dict[str, Node], digests: dict[str, tuple[bytes, ...]]) -> None:
        """Both by path.

        Args:
            nodes: In the order of the walk.
            digests: 16 bytes a chunk. Only for arrays of which nothing is declared, and only where there is more than
                one worker.
        """
        self.nodes = nodes
        self.digests = digests

    def fields(self) -> tuple[object, ...]:
        """See `Shared`."""
        return self.nodes, self.digests


class Inventory(msgspec.Struct, frozen=True):
    """All that one rank has, in the order of the walk."""

    parts: tuple[Part, ...]


def inventory_of(nodes: Mapping[str, Node], digests: Mapping[str, tuple[bytes, ...]]) -> Inventory:
    """Cuts a rank's nodes into parts.

    Where one ends depends on the paths near by alone: a rank that has a leaf more than the others has the same parts as
    they but for the one with that leaf.
    """
    parts: list[Part] = []
    run: dict[str, Node] = {}
    for path, node in nodes.items():
        run[path] = node
        if digest(path.encode("utf-8", "surrogatepass"))[0] % _PART_NODES == 0:
            parts.append(_part(run, digests))
            run = {}
    if run:
        parts.append(_part(run, digests))
    return Inventory(tuple(parts))


def _part(nodes: dict[str, Node], digests: Mapping[str, tuple[bytes, ...]]) -> Part:
    return Part(nodes, {path: digests[path] for path in nodes if path in digests})


def chunk_boxes(array: LocalArray, chunk_bytes: int) -> list[Box]:
    """How a worker's array is cut; the same on every rank that holds the same box."""
    return cut(array.box, dtype_from_name(array.spec.dtype).itemsize, chunk_bytes)


def box_bytes(array: LocalArray, box: Box) -> int:
    """Bytes of a box of an array."""
    return box.size * dtype_from_name(array.spec.dtype).itemsize


def chunk_values(flat: FlatTree, path: str, box: Box) -> memoryview:
    """The values of one chunk as flat bytes: a view of the worker's own memory where it is contiguous on the host."""
    array = flat.nodes[path]
    assert isinstance(array, LocalArray)
    return flat_bytes(host_part(flat.arrays[path], array.spec.kind, box, array.box))


def take_inventory(flat: FlatTree, chunk_bytes: int, world_size: int) -> Inventory:
    """Hashes the arrays of a worker that may be replicas of other workers'; the rest is hashed when it is staged.

    Args:
        flat: The worker's tree.
        chunk_bytes: Upper limit of a chunk.
        world_size: Number of workers.
    """
    digests: dict[str, tuple[bytes, ...]] = {}
    for path in flat.arrays:
        array = flat.nodes[path]
        assert isinstance(array, LocalArray)
        if array.declared == AUTO and world_size > 1:
            boxes = chunk_boxes(array, chunk_bytes)
            digests[path] = tuple(digest(chunk_values(flat, path, box)) for box in boxes)
    return inventory_of(flat.nodes, digests)
