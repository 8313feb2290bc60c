"""Save plans: each chunk is staged once by a holder, replicas share evenly, nothing is written twice."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_ckpt import PerRank, Replicated, Sharded
from rl_ckpt.errors import InvalidInputError
from rl_ckpt.format.shard_file import ALIGNMENT
from rl_ckpt.plan.deal import SavePlan, deal
from rl_ckpt.plan.inventory import take_inventory
from rl_ckpt.plan.merge import Merged, merge
from rl_ckpt.plan.stage import stage
from rl_ckpt.state.boxes import slices
from rl_ckpt.state.tree import flatten
from tests.unit.plan.model import flatten_all, merge_all, save, tilings

MANY = settings(deadline=None, max_examples=80)
CHUNK = 64


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[Any], list[str]]:
    """The states of 1 to 8 ranks on 1 to 4 servers: every kind of leaf, mixed at random."""
    world = draw(st.integers(1, 8))
    servers = draw(st.lists(st.sampled_from("abcd"), min_size=world, max_size=world))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    states: list[dict[str, Any]] = [{} for _ in range(world)]
    for i, kind in enumerate(
        draw(st.lists(st.sampled_from(["same", "declared", "own", "some", "shards"]), max_size=6))
    ):
        shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
        value = rng.random(shape).astype(draw(st.sampled_from(["f4", "f8", "u1"])))
        if kind == "shards":
            boxes = draw(tilings(shape, world))
            for rank in range(world):  # ranks past the number of boxes hold replicas of shards
                box = boxes[rank % len(boxes)]
                states[rank][f"{i} {kind}"] = Sharded(value[slices(box, boxes[0].whole(shape))], shape, box.offset)
        else:
            for rank in range(world):
                own: Any = {"same": value, "declared": Replicated(value), "own": PerRank(value)}.get(kind, value)
                if kind != "some" or rank in (0, world - 1):
                    states[rank][f"{i} {kind}"] = own
    return states, servers


def planned(states: list[Any], servers: list[str]) -> tuple[Merged, SavePlan]:
    merged = merge_all(flatten_all(states), CHUNK)
    return merged, deal(merged, servers, 2, 1 << 20)


@MANY
@given(jobs())
def test_every_chunk_is_staged_exactly_once_and_by_a_holder(job: tuple[list[Any], list[str]]) -> None:
    merged, plan = planned(*job)
    staged = Counter((rank, i.path, i.box) for rank, items in plan.stage.items() for i in items)
    assert not [key for key, times in staged.items() if times > 1]
    twins = Counter(c.digest for a in merged.arrays for c in a.chunks if c.digest)
    by_chunk = Counter((path, box) for _, path, box in staged)
    for array in merged.arrays:
        for chunk in array.chunks:
            who = [
                rank for rank, path, box in staged if (path, box) == (array.path, chunk.box) and rank in chunk.holders
            ]
            assert twins[chunk.digest] > 1 or len(who) == 1, (array.path, chunk)
    known = {(a.path, c.box) for a in merged.arrays for c in a.chunks}
    assert set(by_chunk) <= known


@MANY
@given(jobs())
def test_staging_ranges_are_aligned_and_apart_and_columns_say_where(job: tuple[list[Any], list[str]]) -> None:
    states, servers = job
    _, plan = planned(states, servers)
    for server, size in plan.staged_bytes.items():
        items = [
            (i.offset, i.size_bytes, i.path, i.box)
            for r, some in plan.stage.items()
            if servers[r] == server
            for i in some
        ]
        ends = 0
        for offset, size_bytes, _, _ in sorted(items, key=lambda item: item[0]):
            assert offset % ALIGNMENT == 0
            assert offset >= ends
            ends = offset + size_bytes
        assert ends <= size
        columns = [(c.offset, c.bytes, c.path, c.box) for f in plan.files[server] for c in f.columns]
        assert sorted(columns, key=repr) == sorted(items, key=repr)
    names = [f.name for files in save(states, servers, CHUNK).plan.files.values() for f in files]
    assert len(set(names)) == len(names)
    for file in itertools.chain.from_iterable(plan.files.values()):
        inside = [c.name for c in file.columns]
        assert len(set(inside)) == len(inside)


@MANY
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 40), st.booleans())
def test_replicas_stage_even_shares(world: int, nodes: int, size: int, declared: bool) -> None:
    value = np.random.default_rng(size).random((size, 8), np.float32)
    servers = [f"s{rank % nodes}" for rank in range(world)]
    _, plan = planned([{"w": Replicated(value) if declared else value} for _ in range(world)], servers)
    share = [sum(i.size_bytes for i in plan.stage[rank]) for rank in range(world)]
    assert sum(share) == value.nbytes
    assert max(share) <= math.ceil(value.nbytes / world) + CHUNK
    node = Counter[str]()
    for rank, size_bytes in enumerate(share):
        node[servers[rank]] += size_bytes
    on = Counter(servers)
    assert all(node[s] <= math.ceil(value.nbytes * on[s] / world) + on[s] * CHUNK for s in on)


@MANY
@given(jobs())
def test_what_the_newest_checkpoint_holds_is_not_written_again(job: tuple[list[Any], list[str]]) -> None:
    first = save(*job, CHUNK)
    again = save(*job, CHUNK, base=first)
    assert again.plan.new_bytes == 0
    assert again.files == first.files
    assert [a.spec for a in again.manifest.arrays] == [a.spec for a in first.manifest.arrays]


@MANY
@given(jobs())
def test_no_bytes_are_written_twice(job: tuple[list[Any], list[str]]) -> None:
    saved = save(*job, CHUNK)
    places = {(c.file, c.offset): c for a in saved.manifest.arrays for c in a.chunks}
    assert len({(c.digest, c.bytes) for c in places.values()}) == len(places)
    assert saved.plan.new_bytes == sum(c.bytes for c in places.values())
    assert {f.name for f in saved.manifest.files} == set(saved.files)  # no file without a chunk


def test_equal_chunks_of_different_arrays_are_written_once() -> None:
    value = np.arange(8.0)
    saved = save([{"a": value, "b": value.copy(), "c": value.view("u8").copy()}], ["s"], CHUNK)
    assert saved.manifest.array_bytes == 3 * value.nbytes
    assert saved.plan.new_bytes == value.nbytes


def test_files_are_split_by_size_and_by_streams() -> None:
    state = {str(i): np.random.default_rng(i).bytes(1 << 20) for i in range(8)}
    merged = merge([take_inventory(flatten(state), 1 << 20, 1)], 1 << 20)
    assert len(deal(merged, ["s"], 1, 2 << 20).files["s"]) == 4
    assert len(deal(merged, ["s"], 1, 1 << 30).files["s"]) == 1
    assert len(deal(merged, ["s"], 2, 1 << 30).files["s"]) == 8, "each may go alone"
    many = [f"s{i}" for i in range(8)]
    shared = merge([take_inventory(flatten(state), 1 << 19, 8)] * 8, 1 << 19)
    assert [len(files) for files in deal(shared, many, 2, 1 << 30).files.values()] == 8 * [2], "many servers: no more"


def test_column_names_tell_ranks_chunks_and_clashes_apart() -> None:
    small = np.arange(8.0)
    clash = {"w": np.arange(20.0), "w@7": small, "~": small + 1, "own#0": small + 2}
    flats = flatten_all([{**clash, "own": PerRank(small + 3)}, {**clash, "own": PerRank(small + 4)}])
    plan = deal(merge_all(flats, CHUNK), ["s", "s"], 1, 1 << 20)
    names = [c.name for c in plan.files["s"][0].columns]
    assert sorted(names) == sorted(["w@0", "w@7", "w@14", "w@7'", "~0", "own#0", "own#0'", "own#1"])


class TestContradictions:
    """All of them are found before anything is staged, and named."""

    def refused(self, *states: Any) -> str:
        with pytest.raises(InvalidInputError) as caught:
            merge_all(flatten_all(list(states)), CHUNK)
        return str(caught.value)

    def test_declarations_differ(self) -> None:
        said = self.refused({"w": Replicated(np.ones(3))}, {"w": np.ones(3)})
        assert "'w' is declared differently by rank: {0: 'replicated', 1: 'auto'}" in said

    def test_a_shard_beside_plain_data(self) -> None:
        assert "declared differently" in self.refused({"w": Sharded(np.ones(3), (3,), (0,))}, {"w": 1})

    def test_replicas_of_other_shapes(self) -> None:
        said = self.refused({"w": Replicated(np.ones(3))}, {"w": Replicated(np.ones(4))})
        assert "declared replicated but differs by rank" in said

    def test_shards_of_other_dtypes(self) -> None:
        said = self.refused({"w": Sharded(np.ones(3), (6,), (0,))}, {"w": Sharded(np.ones(3, "f4"), (6,), (3,))})
        assert "kind, dtype or global shape differ" in said

    def test_shards_that_leave_a_hole(self) -> None:
        said = self.refused({"w": Sharded(np.ones(3), (7,), (0,))}, {"w": Sharded(np.ones(3), (7,), (3,))})
        assert "cover 6 of 7 elements" in said

    def test_all_at_once(self) -> None:
        bad = {name: Sharded(np.ones(3), (7,), (0,)) for name in "ab"}
        said = self.refused({**bad, "c": np.ones(1)})
        assert "'a'" in said
        assert "'b'" in said


def test_arrays_that_change_while_they_are_saved_are_named() -> None:
    state = {"fine": np.arange(8.0), "in": {"w": np.arange(32.0)}}
    flat = flatten(state)
    plan = deal(merge([take_inventory(flat, CHUNK, 2)] * 2, CHUNK), ["s", "s"], 1, 1 << 20)
    state["in"]["w"][:] = -1  # type: ignore[call-overload, index]  # the training thread, between hash and copy
    with pytest.raises(InvalidInputError, match=r"the arrays at \['in/w'\] changed while they were being saved"):
        stage(flat, plan.stage[0], memoryview(bytearray(plan.staged_bytes["s"])))
