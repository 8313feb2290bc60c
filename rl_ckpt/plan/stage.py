"""Stage: copying a worker's chunks out of its hands, into staging memory that the caller provides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.format.digest import DIGEST_BYTES, digest, hasher
from rl_ckpt.plan.deal import StageItem
from rl_ckpt.plan.inventory import chunk_boxes, chunk_values, undeclared
from rl_ckpt.state.tree import FlatTree, LocalArray

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_BLOCK_BYTES = 256 << 10


def stage(flat: FlatTree, items: Sequence[StageItem], memory: memoryview) -> list[bytes]:
    """Copies chunks and hashes the copies.

    The copy is hashed although the original was: a worker that changes its arrays between the two (a training step in
    another thread, an environment that was not paused) would otherwise have a mixture of two states committed.

    Args:
        flat: The worker's tree, as it was hashed.
        items: What to copy where.
        memory: The generation of staging memory, writable flat bytes.

    Returns:
        Digests of the copies, 16 bytes each, in the order of `items`.

    Raises:
        InvalidInputError: An array changed since it was hashed; names the paths.
    """
    target = np.frombuffer(memory, np.uint8)
    digests, changed = [], []
    for item in items:
        digests.append(_copy_item(chunk_values(flat, item.path, item.box), item, target))
        if item.digest and digests[-1] != item.digest:
            changed.append(item.path)
    if changed:
        raise InvalidInputError(
            f"the arrays at {sorted(set(changed))} changed while they were being saved; don't train (in another "
            "thread, say) until `save` has returned, or let `get_state` return copies"
        )
    return digests


def stage_repeat(
    flat: FlatTree, items: Sequence[StageItem], memory: memoryview, chunk_bytes: int, world_size: int
) -> tuple[list[bytes], dict[str, bytes]]:
    """As `stage` and `identity` of every undeclared array in one pass over the values: what is copied is hashed once.

    Args:
        flat: The worker's tree.
        items: What to copy where.
        memory: The generation of staging memory, writable flat bytes.
        chunk_bytes: Upper limit of a chunk.
        world_size: Number of workers.

    Returns:
        Digests of the copies, 16 bytes each, in the order of `items`; and the identities by path.
    """
    target = np.frombuffer(memory, np.uint8)
    mine = {(item.path, item.box.offset): item for item in items}
    copied: dict[tuple[str, tuple[int, ...]], bytes] = {}
    found: dict[str, bytes] = {}
    for path, array in undeclared(flat, world_size):
        if path in flat.objects:
            found[path] = flat.objects[path].identity
            continue
        digests = []
        for box in chunk_boxes(array, chunk_bytes):
            key, values = (path, box.offset), chunk_values(flat, path, box)
            item = mine.get(key)
            digests.append(digest(values) if item is None else _copy_item(values, item, target))
            if item is not None:
                copied[key] = digests[-1]
        found[path] = b"".join(digests)
    for key, item in mine.items():
        if key not in copied:
            copied[key] = _copy_item(chunk_values(flat, item.path, item.box), item, target)
    return [copied[item.path, item.box.offset] for item in items], found


def with_digests(
    flat: FlatTree, items: Sequence[StageItem], identities: Mapping[str, bytes], chunk_bytes: int
) -> list[StageItem]:
    """Items with the digests that their chunks had when they were hashed, for `stage` to compare.

    Args:
        flat: The worker's tree.
        items: What to copy where.
        identities: Of undeclared arrays, by path.
        chunk_bytes: Upper limit of a chunk.
    """
    out = []
    for item in items:
        array, joined = flat.nodes[item.path], identities.get(item.path)
        if joined and item.path not in flat.objects:
            assert isinstance(array, LocalArray)
            at = DIGEST_BYTES * chunk_boxes(array, chunk_bytes).index(item.box)
            item = msgspec.structs.replace(item, digest=joined[at : at + DIGEST_BYTES])  # noqa: PLW2901
        out.append(item)
    return out


def _copy_item(values: memoryview, item: StageItem, target: Bytes) -> bytes:
    return _copy(np.frombuffer(values, np.uint8), target[item.offset : item.offset + item.size_bytes])


def _copy(source: Bytes, target: Bytes) -> bytes:
    """Copies in blocks that stay in the core's cache, so that hashing the copy reads no memory again."""
    if len(source) <= _BLOCK_BYTES:
        target[:] = source
        return digest(target.data)
    running = hasher()
    for start in range(0, len(source), _BLOCK_BYTES):
        block = target[start : start + _BLOCK_BYTES]
        block[:] = source[start : start + _BLOCK_BYTES]
        running.update(block.data)
    return running.digest()
