"""Compare: what two checkpoints say of each path, and which chunks must be read to tell how much they differ.

Owns: pairing leaves by path and rank, and arrays by their chunks. Pure: equal digests are equal bytes, so whatever can
be told from the manifests is told here.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.format.manifest import ArrayEntry, ArrayRef, Chunk, Manifest, SavedNode, Variant
from rl_ckpt.state.arrays import ArraySpec
from rl_ckpt.state.boxes import Box, overlap
from rl_ckpt.state.leaves import Json
from rl_ckpt.state.paths import Selector
from rl_ckpt.state.tree import Container, Plain, Tie

Ranks = tuple[int, ...] | None
"""Ranks for which something holds; None: for all."""


@dataclass(frozen=True, slots=True)
class PlainPair:
    """A leaf that is other plain data, or no longer what it was."""

    path: str
    ranks: Ranks
    before: Plain | ArraySpec | Container
    after: Plain | ArraySpec | Container


@dataclass(frozen=True, slots=True)
class ArrayPair:
    """An array of which not all is equal."""

    path: str
    ranks: Ranks
    before: int
    """Its number in the one manifest."""
    after: int
    """And in the other."""


@dataclass(slots=True)
class Compared:
    """What the manifests say."""

    added: dict[str, Ranks] = field(default_factory=dict)
    removed: dict[str, Ranks] = field(default_factory=dict)
    plain: list[PlainPair] = field(default_factory=list)
    arrays: list[ArrayPair] = field(default_factory=list)
    unchanged: int = 0
    """Leaves."""


class Part(msgspec.Struct, frozen=True, gc=False):
    """Chunks of two arrays that have elements in common and may differ there."""

    before: Chunk
    after: tuple[Chunk, ...]


def compare(a: Manifest, b: Manifest, select: str | Sequence[str] | None) -> Compared:
    """Compares what two manifests say.

    Args:
        a: The one before.
        b: The one after.
        select: Globs of paths; None: everything.

    Raises:
        InvalidInputError: `select` chooses nothing of either; "no difference" would be misread.
    """
    out, wanted = Compared(), Selector(select)
    equal: dict[tuple[int, int], bool] = {}  # arrays that stand at many paths are looked at once
    chosen = [path for path in dict.fromkeys([*a.nodes, *b.nodes]) if wanted(path)]
    if select is not None and not chosen:
        raise InvalidInputError(f"select={select!r}: neither {a.id} nor {b.id} has such a path")
    for path in chosen:
        for ranks, before, after in _by_ranks(path, a, b):
            _sort_in(out, path, ranks, (a, before), (b, after), equal)
    return out


def _by_ranks(path: str, a: Manifest, b: Manifest) -> Iterator[tuple[Ranks, SavedNode | None, SavedNode | None]]:
    """What stands at a path on either side, and for which ranks."""
    sides = a.nodes.get(path, ()), b.nodes.get(path, ())
    if all(not side or (len(side) == 1 and side[0].ranks is None and side[0].shared) for side in sides):
        first, second = (side[0].node if side else None for side in sides)
        yield None, first, second
        return
    found: dict[tuple[int | None, int | None], list[int]] = {}
    for rank in range(max(a.world_size, b.world_size)):
        key = _variant_of(sides[0], rank, a.world_size), _variant_of(sides[1], rank, b.world_size)
        found.setdefault(key, []).append(rank)
    for (i, j), ranks in found.items():
        before = sides[0][i].node if i is not None else None
        after = sides[1][j].node if j is not None else None
        yield tuple(ranks), before, after


def _variant_of(variants: Sequence[Variant], rank: int, world_size: int) -> int | None:
    """Which variant a rank had."""
    for number, variant in enumerate(variants):
        if rank < world_size and (variant.ranks is None or rank in variant.ranks):
            return number
    return None


def _sort_in(
    out: Compared,
    path: str,
    ranks: Ranks,
    first: tuple[Manifest, SavedNode | None],
    second: tuple[Manifest, SavedNode | None],
    equal: dict[tuple[int, int], bool],
) -> None:
    before, after = (_followed(manifest, node, ranks) for manifest, node in (first, second))
    if isinstance(first[1], Tie) and first[1] == second[1]:
        return  # it is told where the array itself stands
    if before is None or after is None:
        there = before if after is None else after
        if there is not None and not (isinstance(there, Container) and there.keys):  # else its children tell
            side = out.removed if after is None else out.added
            side[path] = _joined(side[path], ranks) if path in side else ranks
        return
    if isinstance(before, ArrayRef) and isinstance(after, ArrayRef):
        key = before.index, after.index
        if key not in equal:
            equal[key] = _same_arrays(first[0].arrays[key[0]], second[0].arrays[key[1]])
        if equal[key]:
            out.unchanged += 1
        else:
            out.arrays.append(ArrayPair(path, ranks, *key))
        return
    if isinstance(before, Container) and isinstance(after, Container) and before.type == after.type:
        return
    if isinstance(before, Plain) and isinstance(after, Plain) and same_plain(before.value, after.value):
        out.unchanged += 1
        return
    out.plain.append(PlainPair(path, ranks, _shown(first[0], before), _shown(second[0], after)))


def _joined(known: Ranks, more: Ranks) -> Ranks:
    return None if known is None or more is None else tuple(sorted({*known, *more}))


def _followed(manifest: Manifest, node: SavedNode | None, ranks: Ranks) -> Container | Plain | ArrayRef | None:
    """The node itself, or what it is tied to."""
    if not isinstance(node, Tie):
        return node
    variants = manifest.nodes.get(node.path, ())
    number = _variant_of(variants, ranks[0] if ranks else 0, manifest.world_size)
    target = variants[number].node if number is not None else None
    return None if isinstance(target, Tie) else target


def _shown(manifest: Manifest, node: Container | Plain | ArrayRef) -> Plain | ArraySpec | Container:
    return manifest.arrays[node.index].spec if isinstance(node, ArrayRef) else node


def same_plain(a: Json, b: Json) -> bool:
    """Whether two encoded leaves are the same, which Python's `==` does not tell: 1 is neither 1.0 nor True."""
    return a is b or msgspec.json.encode(a) == msgspec.json.encode(b)


def _same_arrays(a: ArrayEntry, b: ArrayEntry) -> bool:
    if a.spec != b.spec or len(a.chunks) != len(b.chunks):
        return False
    return {(c.box, c.digest) for c in a.chunks} == {(c.box, c.digest) for c in b.chunks}


def parts(a: ArrayEntry, b: ArrayEntry) -> list[Part]:
    """What must be read to tell how much two arrays of one shape differ: chunks that are not equal."""
    there = {chunk.box: chunk for chunk in b.chunks}
    search: _Search | None = None
    out = []
    for chunk in a.chunks:
        same = there.get(chunk.box)
        if same is not None:
            if same.digest != chunk.digest:
                out.append(Part(chunk, (same,)))
            continue
        search = search or _Search(b.chunks)
        out.append(Part(chunk, tuple(search.touching(chunk.box))))
    return out


class _Search:
    """Chunks by where they begin on the first axis."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = sorted(chunks, key=lambda chunk: chunk.box.offset[:1])
        self._starts = [_start(chunk.box) for chunk in self._chunks]
        self._longest = max((_extent(chunk.box) for chunk in chunks), default=0)

    def touching(self, box: Box) -> Iterator[Chunk]:
        """Those that have elements in common with a box."""
        low = bisect.bisect_right(self._starts, _start(box) - self._longest)
        high = bisect.bisect_left(self._starts, _start(box) + _extent(box))
        for chunk in self._chunks[low:high]:
            if overlap(chunk.box, box) is not None:
                yield chunk


def _start(box: Box) -> int:
    return box.offset[0] if box.offset else 0


def _extent(box: Box) -> int:
    return box.shape[0] if box.shape else 1
