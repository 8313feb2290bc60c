"""Boxes: axis-aligned parts of an array in global coordinates.

Owns: what a box is, how two overlap, how one is cut into chunks, and whether some of them tile an array. Does not know:
bytes, files, workers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import msgspec

from rl_ckpt.errors import InvalidInputError


class Box(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A part of an array: `offset` and `shape` in elements, one entry an axis, in global coordinates."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements; 1 for a 0-dim box."""
        return math.prod(self.shape)

    @staticmethod
    def whole(shape: Sequence[int]) -> Box:
        """The box that covers an array of `shape`."""
        return _whole(tuple(shape))


@functools.lru_cache(4096)
def _whole(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


def overlap(saved: Box, wanted: Box) -> Box | None:
    """Part of a saved box that a reader wants.

    Args:
        saved: Box in global coordinates, `ndim` offsets and extents, in elements.
        wanted: Box of the same rank.

    Returns:
        The common box in global coordinates, or None where the two are disjoint.

    Raises:
        InvalidInputError: The ranks differ.

    Source: interval overlap per axis, as in torch DCP's resharding.
    """
    if len(saved.shape) != len(wanted.shape):
        raise InvalidInputError(f"boxes of different rank: {len(saved.shape)} and {len(wanted.shape)} axes")
    if saved == wanted and 0 not in saved.shape:
        return saved
    offset, shape = [], []
    for a, n, b, m in zip(saved.offset, saved.shape, wanted.offset, wanted.shape, strict=True):
        low, high = max(a, b), min(a + n, b + m)
        if high <= low:
            return None
        offset.append(low)
        shape.append(high - low)
    return Box(tuple(offset), tuple(shape))


def slices(inner: Box, outer: Box) -> tuple[slice, ...]:
    """Index of `inner` inside an array that holds `outer`; `inner` must lie within it."""
    return tuple(slice(i - o, i - o + n) for i, n, o in zip(inner.offset, inner.shape, outer.offset, strict=True))


def cut(box: Box, itemsize: int, chunk_bytes: int) -> list[Box]:
    """Cuts a box into chunks, each of them contiguous in a C-ordered array that holds the box.

    Args:
        box: What to cut.
        itemsize: Bytes of an element.
        chunk_bytes: Upper limit of a chunk; a single element may exceed it.

    Returns:
        Boxes in C order that tile `box`, as even as the limit allows; none of an empty box.
    """
    if not box.size:
        return []
    if not box.shape or box.size * itemsize <= chunk_bytes:
        return [box]
    inner = math.prod(box.shape[1:]) * itemsize  # bytes of one row of axis 0
    if inner > chunk_bytes and len(box.shape) > 1:
        rest = Box(box.offset[1:], box.shape[1:])
        pieces = cut(rest, itemsize, chunk_bytes)
        return [Box((box.offset[0] + row, *p.offset), (1, *p.shape)) for row in range(box.shape[0]) for p in pieces]
    rows = max(1, chunk_bytes // max(inner, 1))
    count = -(-box.shape[0] // rows)
    base, extra = divmod(box.shape[0], count)
    out, start = [], box.offset[0]
    for i in range(count):
        n = base + (i < extra)
        out.append(Box((start, *box.offset[1:]), (n, *box.shape[1:])))
        start += n
    return out


def check_tiling(path: str, shape: Sequence[int], boxes: Sequence[Box]) -> None:
    """Checks that distinct boxes cover an array of `shape` exactly once.

    Args:
        path: Of the leaf, for the message.
        shape: Global shape, in elements.
        boxes: Distinct boxes, in any order.

    Raises:
        InvalidInputError: A box leaves the array, two overlap, or together they leave holes.
    """
    for box in boxes:
        if len(box.shape) != len(shape) or any(
            o < 0 or o + n > s for o, n, s in zip(box.offset, box.shape, shape, strict=False)
        ):
            raise InvalidInputError(
                f"{path!r}: the shard at offset {box.offset} with shape {box.shape} lies outside the global shape "
                f"{tuple(shape)}; give `offset` and `global_shape` in elements of the global array"
            )
    filled = [b for b in boxes if b.size]
    if not _is_grid(shape, filled):
        _check_disjoint(path, filled)
    covered, total = sum(b.size for b in filled), math.prod(shape)
    if covered != total:
        raise InvalidInputError(
            f"{path!r}: the shards cover {covered} of {total} elements of the global shape {tuple(shape)}; "
            "every element must belong to one worker: check offsets and shapes, or that all workers took part"
        )


def _is_grid(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether distinct boxes are cells of one grid (as shards mostly are), and so disjoint."""
    for axis, extent in enumerate(shape if boxes else ()):
        starts = sorted({b.offset[axis] for b in boxes})
        cell = dict(zip(starts, [*starts[1:], extent], strict=True))
        if any(b.offset[axis] + b.shape[axis] != cell[b.offset[axis]] for b in boxes):
            return False
    return True


def _check_disjoint(path: str, boxes: Sequence[Box]) -> None:
    """Compares each box with those that begin before it ends, along the axis where that leaves the fewest.

    Raises:
        InvalidInputError: Two overlap.
    """
    axes = range(len(boxes[0].shape)) if boxes else range(0)
    axis = max(axes, key=lambda a: len({b.offset[a] for b in boxes}), default=0)
    ordered = sorted(boxes, key=lambda b: (b.offset[axis : axis + 1], b.offset))
    for i, box in enumerate(ordered):
        for k in range(i + 1, len(ordered)):
            other = ordered[k]
            if box.shape and other.offset[axis] >= box.offset[axis] + box.shape[axis]:
                break  # sorted by this axis: nothing after this one can touch `box`
            if overlap(box, other) is not None:
                raise InvalidInputError(
                    f"{path!r}: the shards at {box.offset}+{box.shape} and {other.offset}+{other.shape} overlap; "
                    "shards of one array must not share elements (equal boxes are taken as replicas)"
                )
