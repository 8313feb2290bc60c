"""What one worker has, before anything is staged."""

from __future__ import annotations

import msgspec

from rl_ckpt.format.digest import digest
from rl_ckpt.state.arrays import Host, flat_bytes, host_part
from rl_ckpt.state.boxes import Box, cut
from rl_ckpt.state.dtypes import dtype_from_name
from rl_ckpt.state.tree import AUTO, FlatTree, LocalArray, Node


class Inventory(msgspec.Struct, frozen=True):
    """One rank's nodes by path, and digests of the chunks (as `chunk_boxes` cuts them) of what may be replicas."""

    nodes: dict[str, Node]
    digests: dict[str, tuple[bytes, ...]]
    """16 bytes a chunk. Only for arrays of which nothing is declared, and only where there is more than one worker."""


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


def _hashed(host: Host) -> bytes:
    """Digest of the values in C order."""
    return digest(host if host.flags.c_contiguous else flat_bytes(host))


def take_inventory(flat: FlatTree, chunk_bytes: int, world_size: int) -> Inventory:
    """Hashes the arrays of a worker that may be replicas of other workers'; the rest is hashed when it is staged.

    Args:
        flat: The worker's tree.
        chunk_bytes: Upper limit of a chunk.
        world_size: Number of workers.
    """
    digests: dict[str, tuple[bytes, ...]] = {}
    for path, leaf in flat.arrays.items() if world_size > 1 else ():
        array = flat.nodes[path]
        assert isinstance(array, LocalArray)
        if array.declared == AUTO:
            boxes = chunk_boxes(array, chunk_bytes)
            digests[path] = tuple(_hashed(host_part(leaf, array.spec.kind, box, array.box)) for box in boxes)
    return Inventory(dict(flat.nodes), digests)
