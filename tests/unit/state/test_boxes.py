"""Boxes: chunks tile exactly and are contiguous, overlaps are those of the elements, tilings are told from others."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.state.boxes import Box, check_tiling, cut, overlap, slices
from tests.unit.plan.model import tilings

MANY = settings(deadline=None, max_examples=150)
shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@st.composite
def box_pairs(draw: st.DrawFn) -> tuple[Box, Box]:
    axes = draw(st.integers(0, 3))
    numbers = st.tuples(*[st.integers(0, 5)] * axes)
    return Box(draw(numbers), draw(numbers)), Box(draw(numbers), draw(numbers))


def elements(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))))


@MANY
@given(shapes, st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 200))
def test_chunks_tile_the_box_within_the_limit_in_c_order(shape: tuple[int, ...], itemsize: int, limit: int) -> None:
    box = Box(tuple(10 * (i + 1) for i in range(len(shape))), shape)
    values = np.arange(box.size).reshape(shape)
    parts = [values[slices(chunk, box)] for chunk in cut(box, itemsize, limit)]
    assert all(part.flags.c_contiguous for part in parts)
    assert all(part.size * itemsize <= max(limit, itemsize) for part in parts)
    assert [v for part in parts for v in part.ravel()] == list(range(box.size))  # each element once, in C order


@MANY
@given(shapes.filter(lambda shape: len(shape) == 1 and shape[0] > 0), st.integers(1, 6))
def test_chunks_are_as_even_as_the_limit_allows(shape: tuple[int, ...], rows: int) -> None:
    sizes = [chunk.size for chunk in cut(Box.whole(shape), 8, 8 * rows)]
    assert max(sizes) - min(sizes) <= 1


@MANY
@given(box_pairs())
def test_overlap_is_the_common_elements(pair: tuple[Box, Box]) -> None:
    common = overlap(*pair)
    assert (elements(common) if common else set()) == elements(pair[0]) & elements(pair[1])


def test_boxes_of_different_rank_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="1 and 2 axes"):
        overlap(Box((0,), (1,)), Box((0, 0), (1, 1)))


@MANY
@given(st.data(), st.lists(st.integers(1, 6), max_size=3).map(tuple))
def test_tilings_are_accepted_and_holes_and_overlaps_refused(data: st.DataObject, shape: tuple[int, ...]) -> None:
    boxes = data.draw(tilings(shape, 8))
    check_tiling("w", shape, data.draw(st.permutations(boxes)))
    with pytest.raises(InvalidInputError, match=r"'w': the shards cover \d+ of \d+ elements"):
        check_tiling("w", shape, boxes[1:])
    grown = [axis for axis in range(len(shape)) if boxes[0].shape[axis] < shape[axis]]
    if grown:
        axis = data.draw(st.sampled_from(grown))
        low = boxes[0].offset[axis] == 0
        offset = tuple(o - (i == axis and not low) for i, o in enumerate(boxes[0].offset))
        larger = Box(offset, tuple(n + (i == axis) for i, n in enumerate(boxes[0].shape)))
        with pytest.raises(InvalidInputError, match="overlap"):
            check_tiling("w", shape, data.draw(st.permutations([larger, *boxes[1:]])))


@pytest.mark.parametrize("box", [Box((2,), (2,)), Box((-1,), (2,)), Box((0, 0), (3, 1)), Box((), ())])
def test_a_box_outside_the_array_is_refused(box: Box) -> None:
    with pytest.raises(InvalidInputError, match="lies outside the global shape"):
        check_tiling("w", (3,), [box])


def test_empty_shards_are_no_holes() -> None:
    check_tiling("w", (3,), [Box((3,), (0,)), Box((0,), (3,)), Box((0,), (0,))])
    check_tiling("w", (0, 4), [Box((0, 0), (0, 4))])
