"""Stage: copying a worker's chunks out of its hands, into staging memory that the caller provides."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.format.digest import DIGEST_BYTES, digest, hasher
from rl_ckpt.plan.deal import StageItem
from rl_ckpt.plan.inventory import chunk_boxes, chunk_host, hashed, undeclared
from rl_ckpt.state.arrays import Host, flat_bytes
from rl_ckpt.state.tree import FlatTree, LocalArray

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_BLOCK_BYTES = 256 << 10
_TINY_BYTES = 32 << 10


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
    digests = _copied(flat, items, memory)
    changed = {i.path for i, found in zip(items, digests, strict=True) if i.digest and i.digest != found}
    if changed:
        raise InvalidInputError(
            f"the arrays at {sorted(changed)} changed while they were being saved; don't train (in another "
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
    copies = _copied(flat, items, memory)
    mine = {(item.path, item.box.offset): found for item, found in zip(items, copies, strict=True)}
    found: dict[str, bytes] = {}
    for path, array in undeclared(flat, world_size):
        if path in flat.objects:
            found[path] = flat.objects[path].identity
            continue
        boxes = chunk_boxes(array, chunk_bytes)
        found[path] = b"".join(mine.get((path, box.offset)) or hashed(chunk_host(flat, path, box)) for box in boxes)
    return copies, found


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


def _copied(flat: FlatTree, items: Sequence[StageItem], memory: memoryview) -> list[bytes]:
    """Copies chunks; digests of the copies, in the order of `items`."""
    target = np.frombuffer(memory, np.uint8)
    digests: list[bytes] = []
    run = _Run(target, memory)
    for item in items:
        host = chunk_host(flat, item.path, item.box)
        if item.size_bytes > _TINY_BYTES:
            digests += run.copied()
            digests.append(_copy(np.frombuffer(flat_bytes(host), np.uint8), target[item.offset :][: item.size_bytes]))
            continue
        if host.dtype.isbuiltin != 1:  # numpy copies others field by field, without the bytes between the fields
            host = np.frombuffer(flat_bytes(host), np.uint8)
        if not run.takes(item, host):
            digests += run.copied()
        run.add(item, host)
    digests += run.copied()
    return digests


class _Run:
    """Tiny chunks of one dtype that are staged side by side: copied by one call, as the call costs more than the copy.

    They are few enough to stay in the core's cache, so that hashing the copies reads no memory again.
    """

    def __init__(self, target: Bytes, memory: memoryview) -> None:
        self._target = target
        self._memory = memory
        self._hosts: list[Host] = []
        self._bounds: list[int] = []

    def takes(self, item: StageItem, host: Host) -> bool:
        """Whether a chunk continues the run."""
        if not self._hosts:
            return True
        bounds = self._bounds
        near = item.offset == bounds[-1] and bounds[-1] - bounds[0] < _BLOCK_BYTES
        return near and host.dtype == self._hosts[0].dtype

    def add(self, item: StageItem, host: Host) -> None:
        """Puts a chunk at the end."""
        if not self._bounds:
            self._bounds.append(item.offset)
        self._hosts.append(host)
        self._bounds.append(item.offset + item.size_bytes)

    def copied(self) -> list[bytes]:
        """Copies what is there, and begins anew.

        Returns:
            Digests of the copies.
        """
        if not self._hosts:
            return []
        hosts, bounds, memory = self._hosts, self._bounds, self._memory
        self._hosts, self._bounds = [], []
        np.concatenate(hosts, axis=None, out=self._target[bounds[0] : bounds[-1]].view(hosts[0].dtype))
        return [digest(memory[low:high]) for low, high in itertools.pairwise(bounds)]


def _copy(source: Bytes, target: Bytes) -> bytes:
    """Copies in blocks that stay in the core's cache, so that hashing the copy reads no memory again."""
    running = hasher()
    for start in range(0, len(source), _BLOCK_BYTES):
        block = target[start : start + _BLOCK_BYTES]
        block[:] = source[start : start + _BLOCK_BYTES]
        running.update(block.data)
    return running.digest()
