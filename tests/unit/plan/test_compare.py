"""What two manifests say of each rank's leaves, and which chunks have to be read."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_ckpt.format.manifest import ArrayEntry, ArrayRef, Chunk, Manifest, SavedNode, Variant
from rl_ckpt.plan.compare import ArrayPair, compare, parts
from rl_ckpt.state.arrays import ArraySpec
from rl_ckpt.state.boxes import Box, cut, overlap
from rl_ckpt.state.tree import Container, Plain, Tie


def entry(digest: str, size: int = 4) -> ArrayEntry:
    spec = ArraySpec(dtype="uint8", shape=(size,), kind="numpy")
    return ArrayEntry(spec, (Chunk(Box((0,), (size,)), 0, 0, size, digest * 32),))


def manifest(world_size: int, arrays: str, **nodes: SavedNode | tuple[Variant, ...]) -> Manifest:
    """With an array for each letter, which is its digest."""
    variants = {path: node if isinstance(node, tuple) else (Variant(node),) for path, node in nodes.items()}
    return Manifest(
        run="r", id="1-a", step=1, world_size=world_size, time=0.0, writer="", parent=None, metrics={}, tag=None,
        files=(), arrays=tuple(map(entry, arrays)), nodes={"": (Variant(Container("dict", tuple(nodes))),), **variants},
    )  # fmt: skip


def own(*nodes: SavedNode) -> tuple[Variant, ...]:
    """What differs between ranks: one a rank."""
    return tuple(Variant(node, (rank,), shared=False) for rank, node in enumerate(nodes))


def test_leaves_of_ranks_are_compared_rank_by_rank() -> None:
    a = manifest(3, "abc", rng=own(ArrayRef(0), ArrayRef(1), ArrayRef(2)), w=ArrayRef(0))
    b = manifest(3, "abd", rng=own(ArrayRef(0), ArrayRef(1), ArrayRef(2)), w=ArrayRef(0))
    found = compare(a, b, None)
    assert found.arrays == [ArrayPair("rng", (2,), 2, 2)]
    assert found.unchanged == 3
    assert (found.added, found.removed, found.plain) == ({}, {}, [])


def test_ranks_that_only_one_checkpoint_has() -> None:
    a = manifest(2, "ab", rng=own(ArrayRef(0), ArrayRef(1)), w=Plain(1))
    b = manifest(4, "abcd", rng=own(*map(ArrayRef, range(4))), w=Plain(1))
    assert compare(a, b, None).added == {"rng": (2, 3)}
    assert compare(b, a, None).removed == {"rng": (2, 3)}
    assert compare(a, b, None).unchanged == 3


def test_what_was_everybodys_and_is_now_of_each() -> None:
    a = manifest(2, "ab", w=ArrayRef(0))
    b = manifest(2, "ab", w=own(ArrayRef(0), ArrayRef(1)))
    found = compare(a, b, None)
    assert (found.arrays, found.unchanged) == ([ArrayPair("w", (1,), 0, 1)], 1)


def test_tied_leaves_are_told_once_and_ties_that_were_cut_by_what_they_were_tied_to() -> None:
    a = manifest(1, "a", w=ArrayRef(0), v=Tie("w"))
    both = manifest(1, "b", w=ArrayRef(0), v=Tie("w"))
    cut_off = manifest(1, "ab", w=ArrayRef(0), v=ArrayRef(1))
    assert [pair.path for pair in compare(a, both, None).arrays] == ["w"]
    assert [pair.path for pair in compare(a, cut_off, None).arrays] == ["v"]
    assert compare(a, cut_off, None).unchanged == 1


def test_numbers_of_another_type_or_sign_are_others() -> None:
    for before, after in ((1, 1.0), (1, True), (0.0, -0.0), (None, False)):
        assert len(compare(manifest(1, "", n=Plain(before)), manifest(1, "", n=Plain(after)), None).plain) == 1
    assert compare(manifest(1, "", n=Plain(0.1)), manifest(1, "", n=Plain(0.1)), None).unchanged == 1


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 2**16),
)
def test_every_element_that_differs_is_in_one_part_and_equal_chunks_in_none(
    shape: list[int], first: int, second: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 2, shape).astype("u1")
    y = np.where(rng.random(shape) < 0.1, 1 - x, x).astype("u1")
    sides = []
    for values, size in ((x, first), (y, second)):
        boxes = cut(Box.whole(shape), 1, size)
        pieces = [values[tuple(slice(o, o + n) for o, n in zip(b.offset, b.shape, strict=True))] for b in boxes]
        chunks = [Chunk(b, 0, 0, p.size, p.tobytes().hex()) for b, p in zip(boxes, pieces, strict=True)]
        sides.append(ArrayEntry(ArraySpec(dtype="uint8", shape=tuple(shape), kind="numpy"), tuple(chunks)))
    seen = np.zeros(shape, int)
    for part in parts(*sides):
        for chunk in part.after:
            common = overlap(part.before.box, chunk.box)
            assert common is not None
            assert (part.before.box, part.before.digest) != (chunk.box, chunk.digest)
            seen[tuple(slice(o, o + n) for o, n in zip(common.offset, common.shape, strict=True))] += 1
    assert seen.max() <= 1
    assert (seen[x != y] == 1).all()
