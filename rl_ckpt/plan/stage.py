"""Stage: copying a worker's chunks out of its hands, into staging memory that the caller provides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.format.digest import digest, hasher
from rl_ckpt.plan.deal import StageItem
from rl_ckpt.plan.inventory import chunk_values
from rl_ckpt.state.tree import FlatTree

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
        source = np.frombuffer(chunk_values(flat, item.path, item.box), np.uint8)
        digests.append(_copy(source, target[item.offset : item.offset + item.size_bytes]))
        if item.digest and digests[-1] != item.digest:
            changed.append(item.path)
    if changed:
        raise InvalidInputError(
            f"the arrays at {sorted(set(changed))} changed while they were being saved; don't train (in another "
            "thread, say) until `save` has returned, or let `get_state` return copies"
        )
    return digests


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
