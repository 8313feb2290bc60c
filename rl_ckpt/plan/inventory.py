"""What one worker has, before anything is staged.

Owns: the inventory, cut into parts (plan/shared.py) of which most are the same on all ranks that hold the same arrays.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

import msgspec

from rl_ckpt.format.digest import DIGEST_BYTES, digest
from rl_ckpt.plan.shared import Shared
from rl_ckpt.state.arrays import Host, flat_bytes, host_part
from rl_ckpt.state.boxes import Box, cut
from rl_ckpt.state.dtypes import dtype_from_name
from rl_ckpt.state.tree import AUTO, FlatTree, LocalArray, Node

_PART_NODES = 32  # on average: so few that a leaf of a rank's own costs little, so many that a hash pays


class Part(Shared):
    """A run of one rank's nodes, and what tells replicas from arrays that only look alike."""

    __slots__ = ("identities", "identity_bytes", "nodes", "objects")

    fields_type = tuple[dict[str, Node], dict[str, bytes], list[str]]

    def __init__(self, nodes: dict[str, Node], identities: Mapping[str, bytes], objects: Iterable[str]) -> None:
        """All by path.

        Args:
            nodes: In the order of the walk.
            identities: Equal for equal values: the digests of the array's chunks (as `chunk_boxes` cuts it), 16 bytes
                each, joined; for arrays in immutable objects the object's key. In the order of the walk, only for
                arrays of which nothing is declared, and only where there is more than one worker.
            objects: Which of the arrays lie in immutable objects (`FlatTree.objects`).
        """
        self.nodes = nodes
        self.identities = dict(identities)
        self.objects = frozenset(objects)
        self.identity_bytes = sum(map(len, self.identities.values()))

    def fields(self) -> tuple[object, ...]:
        """See `Shared`."""
        return self.nodes, self.identities, sorted(self.objects)


class Inventory(msgspec.Struct, frozen=True):
    """All that one rank has, in the order of the walk."""

    parts: tuple[Part, ...]


def inventory_of(
    nodes: Mapping[str, Node], identities: Mapping[str, bytes], objects: Container[str] = frozenset()
) -> Inventory:
    """Cuts a rank's nodes into parts.

    Where one ends depends on the paths near by alone: a rank that has a leaf more than the others has the same parts as
    they but for the one with that leaf.
    """

    def part(run: dict[str, Node]) -> Part:
        found = {path: identities[path] for path in run if path in identities}
        return Part(run, found, [path for path in run if path in objects])

    parts: list[Part] = []
    run: dict[str, Node] = {}
    for path, node in nodes.items():
        run[path] = node
        if digest(path.encode("utf-8", "surrogatepass"))[0] % _PART_NODES == 0:
            parts.append(part(run))
            run = {}
    if run:
        parts.append(part(run))
    return Inventory(tuple(parts))


def chunk_boxes(array: LocalArray, chunk_bytes: int) -> list[Box]:
    """How a worker's array is cut; the same on every rank that holds the same box."""
    itemsize = dtype_from_name(array.spec.dtype).itemsize
    if 0 < array.box.size * itemsize <= chunk_bytes:
        return [array.box]  # as `cut` would
    return cut(array.box, itemsize, chunk_bytes)


def box_bytes(array: LocalArray, box: Box) -> int:
    """Bytes of a box of an array."""
    return box.size * dtype_from_name(array.spec.dtype).itemsize


def chunk_host(flat: FlatTree, path: str, box: Box) -> Host:
    """The values of one chunk: a view of the worker's own memory where it is on the host."""
    array = flat.nodes[path]
    assert isinstance(array, LocalArray)
    return host_part(flat.arrays[path], array.spec.kind, box, array.box)


def chunk_digest(flat: FlatTree, path: str, box: Box) -> bytes:
    """Digest of the values of one chunk in C order."""
    host = chunk_host(flat, path, box)
    return digest(host if host.flags.c_contiguous else flat_bytes(host))


def take_inventory(flat: FlatTree, chunk_bytes: int, world_size: int) -> Inventory:
    """Hashes the arrays of a worker that may be replicas of other workers'; the rest is hashed when it is staged.

    Args:
        flat: The worker's tree.
        chunk_bytes: Upper limit of a chunk.
        world_size: Number of workers.
    """
    found = {path: identity(flat, path, array, chunk_bytes) for path, array in undeclared(flat, world_size)}
    return inventory_of(flat.nodes, found, flat.objects)


def identity(flat: FlatTree, path: str, array: LocalArray, chunk_bytes: int) -> bytes:
    """See `Part`."""
    if path in flat.objects:
        return flat.objects[path].identity
    return b"".join(chunk_digest(flat, path, box) for box in chunk_boxes(array, chunk_bytes))


def undeclared(flat: FlatTree, world_size: int) -> Iterator[tuple[str, LocalArray]]:
    """The arrays of which only their values tell whether other workers have replicas, in the order of the tree."""
    if world_size > 1:
        for path in flat.arrays:
            array = flat.nodes[path]
            assert isinstance(array, LocalArray)
            if array.declared == AUTO:
                yield path, array


def chunk_digests(identity: bytes | None, count: int) -> Sequence[bytes]:
    """Digests of an array's chunks, 16 bytes each; empty ones where they are not known before it is staged.

    Args:
        identity: The chunks' digests, joined, if they are known.
        count: Number of chunks.
    """
    if identity is None:
        return (b"",) * count
    return [identity[at : at + DIGEST_BYTES] for at in range(0, len(identity), DIGEST_BYTES)]
