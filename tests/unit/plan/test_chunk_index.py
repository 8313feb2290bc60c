"""The index of stored chunks against a plain model of it: dictionaries of manifests."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings

from rl_ckpt.format.manifest import ArrayEntry, Chunk, Manifest, ShardFileEntry
from rl_ckpt.plan.chunk_index import ChunkIndex, Wanted
from rl_ckpt.plan.compaction import AIM
from rl_ckpt.state.arrays import ArraySpec
from rl_ckpt.state.boxes import Box

Placed = tuple[str, int, int]
"""File, offset, what lies there."""


def digest_of(value: int) -> bytes:
    """Those of one size differ in their second half alone, as digests hardly ever do."""
    return bytes([value % 3]) * 8 + bytes([value]) * 8


def size_of(value: int) -> int:
    return value % 3 * 100_000  # some are empty


def manifest(checkpoint: str, places: list[Placed], sizes: dict[str, int] | None = None) -> Manifest:
    names = sorted({name for name, _, _ in places})
    files = tuple(ShardFileEntry(name, (sizes or {}).get(name, 1 << 20)) for name in names)
    chunks = tuple(
        Chunk(Box((0,), (1,)), names.index(name), offset, size_of(value), digest_of(value).hex())
        for name, offset, value in places
    )
    return Manifest(
        run="r", id=checkpoint, step=0, world_size=1, time=0.0, writer="", parent=None, metrics={}, tag=None,
        files=files, arrays=(ArrayEntry(ArraySpec("numpy", "uint8", (1,)), chunks),), nodes={},
    )  # fmt: skip


def keys(values: range) -> list[Wanted]:
    return [(digest_of(value), size_of(value)) for value in values]


# A file holds one thing in one place, whoever names it.
places = st.builds(
    lambda file, slot: (f"shards/f{file}/s-0.arrow", slot * 300_000, (file * 7 + slot * 5) % 12),
    st.integers(0, 3),
    st.integers(0, 4),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(places, max_size=12)),
        st.tuples(st.just("drop"), st.integers(0, 8)),
        st.tuples(st.just("spoil"), st.integers(0, 3)),
    ),
    max_size=14,
)


@settings(deadline=None, max_examples=150)
@given(steps, st.data())
def test_found_is_what_a_usable_checkpoint_names_in_a_whole_file(steps: list[tuple[str, object]], data: object) -> None:
    index, model, spoiled, known = ChunkIndex(), dict[str, list[Placed]](), set[str](), set[tuple[str, int, bool]]()
    for number, (what, value) in enumerate(steps):
        if what == "add":
            assert isinstance(value, list)
            model[f"c{number}"] = value
            index.add(manifest(f"c{number}", value), number)
            known |= {(name, offset, size_of(lies) > 0) for name, offset, lies in value}
        elif what == "drop" and model:
            gone = sorted(model)[int(value) % len(model)]  # type: ignore[call-overload]
            del model[gone]
            index.drop([gone, "never there"])
            there = {name for places in model.values() for name, _, _ in places}  # others are forgotten
            spoiled, known = spoiled & there, {place for place in known if place[0] in there}
        elif what == "spoil":
            there = {name for places in model.values() for name, _, _ in places}
            short = f"shards/f{value}/s-0.arrow"
            index.check(dict.fromkeys(there - spoiled - {short}, 1 << 20) | {short: 7})
            spoiled |= {short} & there
        usable = {name for name in model if data.draw(st.booleans())}  # type: ignore[attr-defined]
        view = index.view(usable, model, True)  # all that is there lasts: nothing is moved
        named = {place for one in usable for place in model[one] if place[0] not in spoiled}
        found = view.find(keys(range(12)))
        assert found.keys() == {(digest_of(value), size_of(value)) for _, _, value in named}
        for (digest, size), (file, chunk) in found.items():
            assert (chunk.bytes, chunk.digest) == (size, digest.hex())
            assert (file.name, chunk.offset, next(v for v in range(12) if digest_of(v) == digest)) in named
        assert view.names == {name for name, _, _ in named}
        assert index.chunks == len(known)


def test_what_was_given_out_does_not_change() -> None:
    index = ChunkIndex()
    index.add(manifest("a", [("shards/a/s-0.arrow", 0, 1)]), 1)
    view = index.view({"a"}, {"a"}, True)
    index.drop(["a"])
    assert view.find(keys(range(3))).keys() == set(keys(range(1, 2)))
    assert not index.view({"a"}, {"a"}, True).find(keys(range(3)))
    assert not index.names()


def test_an_empty_chunk_may_lie_where_another_begins() -> None:
    index, file = ChunkIndex(), "shards/a/s-0.arrow"
    index.add(manifest("a", [(file, 64, 0), (file, 64, 1)]), 1)
    assert len(index.view({"a"}, {"a"}, True).find(keys(range(2)))) == 2


def test_a_file_of_another_size_than_was_committed_is_not_named() -> None:
    index = ChunkIndex()
    places = [("shards/a/s-0.arrow", 0, 1), ("shards/a/s-1.arrow", 0, 2)]
    index.add(manifest("a", places), 1, {"shards/a/s-0.arrow": (1 << 20) - 1, "shards/a/s-1.arrow": 1 << 20})
    index.add(manifest("b", places), 2)  # which says nothing new of them
    assert index.view({"a", "b"}, {"a"}, True).find(keys(range(3))).keys() == set(keys(range(2, 3)))


def test_chunks_of_a_poor_file_are_written_again_and_found_in_their_new_place_then() -> None:
    """Of ten chunks one is left; a checkpoint that lasts names the file: then nothing is won."""
    old, new = "shards/1-x/s-0.arrow", "shards/2-x/s-0.arrow"
    index, big = ChunkIndex(), {old: 3_000_000, new: 101_000}
    index.add(manifest("1-x", [(old, 300_000 * slot, slot * 3 + 1) for slot in range(10)], big), 1)
    wanted = keys(range(1, 2)) + [(bytes([200 + n]) * 16, 10_000) for n in range(2)]
    assert not index.view({"1-x"}, set(), False).find(wanted)
    assert not index.view({"1-x"}, set(), True).find(wanted)
    assert index.view({"1-x"}, {"1-x"}, False).find(wanted)
    index.add(manifest("2-x", [(new, 0, 1), (old, 300_000, 4)], big), 2)
    for lasting in (set[str](), {"2-x"}):
        found = index.view({"1-x", "2-x"}, lasting, False).find(keys(range(1, 2)))
        assert [file.name for file, _ in found.values()] == [new], "the newest place, from which nothing is to be moved"


def test_what_is_wanted_of_a_file_whose_writer_is_gone_counts_beside_its_size() -> None:
    index, file = ChunkIndex(), "shards/1-x/s-0.arrow"
    places = [(file, 0, 1), (file, 300_000, 4)]
    sizes = {file: int(200_000 * AIM) - 10_000}
    index.add(manifest("2-x", places, sizes), 2, sizes)
    assert len(index.view({"2-x"}, set(), False).find(keys(range(1, 5, 3)))) == 2
    large = {file: 400_000}
    index = ChunkIndex()
    index.add(manifest("2-x", places, large), 2, large)
    assert not index.view({"2-x"}, set(), False).find(keys(range(1, 5, 3)))


def test_files_of_a_base_are_never_moved() -> None:
    index, file = ChunkIndex(), "base/0/shards/1-x/s-0.arrow"
    index.add(manifest("1-x", [(file, 300_000 * slot, slot * 3 + 1) for slot in range(10)], {file: 3_000_000}), 1)
    for lasts in (False, True):
        assert index.view({"1-x"}, set(), lasts).find(keys(range(1, 2)))
