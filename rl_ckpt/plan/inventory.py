"""What one worker has, before anything is staged."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from rl_ckpt.format.digest import DIGEST_BYTES, digest
from rl_ckpt.state.arrays import Host, flat_bytes, host_part
from rl_ckpt.state.boxes import Box, cut
from rl_ckpt.state.dtypes import dtype_from_name
from rl_ckpt.state.tree import AUTO, FlatTree, LocalArray, Node


class Inventory(msgspec.Struct, frozen=True):
    """One rank's nodes by path, and what tells replicas from arrays that only look alike."""

    nodes: dict[str, Node]
    identities: dict[str, bytes]
    """Equal for equal values: the digests of the array's chunks (as `chunk_boxes` cuts it), 16 bytes each, joined; for
    arrays in immutable objects the object's key. Only for arrays of which nothing is declared, and only where there is
    more than one worker."""
    objects: frozenset[str] = frozenset()
    """Paths of the arrays that lie in immutable objects (`FlatTree.objects`)."""


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


def chunk_values(flat: FlatTree, path: str, box: Box) -> memoryview:
    """The values of one chunk as flat bytes: a view of the worker's own memory where it is contiguous on the host."""
    return flat_bytes(chunk_host(flat, path, box))


def hashed(host: Host) -> bytes:
    """Digest of the values in C order."""
    return digest(host if host.flags.c_contiguous else flat_bytes(host))


def take_inventory(flat: FlatTree, chunk_bytes: int, world_size: int) -> Inventory:
    """Hashes the arrays of a worker that may be replicas of other workers'; the rest is hashed when it is staged.

    Args:
        flat: The worker's tree.
        chunk_bytes: Upper limit of a chunk.
        world_size: Number of workers.
    """
    found = {path: identity(flat, path, array, chunk_bytes) for path, array in undeclared(flat, world_size)}
    return Inventory(dict(flat.nodes), found, frozenset(flat.objects))


def identity(flat: FlatTree, path: str, array: LocalArray, chunk_bytes: int) -> bytes:
    """See `Inventory.identities`."""
    if path in flat.objects:
        return flat.objects[path].identity
    return b"".join(hashed(chunk_host(flat, path, box)) for box in chunk_boxes(array, chunk_bytes))


def undeclared(flat: FlatTree, world_size: int) -> Iterator[tuple[str, LocalArray]]:
    """The arrays of which only their values tell whether other workers have replicas, in the order of the tree."""
    if world_size > 1:
        for path in flat.arrays:
            array = flat.nodes[path]
            assert isinstance(array, LocalArray)
            if array.declared == AUTO:
                yield path, array


def chunk_digests(inventory: Inventory, path: str, count: int) -> list[bytes]:
    """Digests of an array's chunks, 16 bytes each; empty ones where they are not known before it is staged."""
    joined = inventory.identities.get(path) if path not in inventory.objects else None
    if joined is None:
        return [b""] * count
    return [joined[at : at + DIGEST_BYTES] for at in range(0, len(joined), DIGEST_BYTES)]
