"""What is done for thousands of ranks at once gives the plans that looking at every rank gives."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_ckpt.plan.deal import deal
from rl_ckpt.plan.inventory import Inventory, inventory_of, take_inventory
from rl_ckpt.plan.merge import merge
from rl_ckpt.plan.spread import ChunkId, spread
from rl_ckpt.runtime.messages import JoinSave, decode, encode
from rl_ckpt.state.tree import flatten
from tests.unit.plan.plain_planners import plain_balance, plain_merge, plain_spread
from tests.unit.plan.test_save_plan import CHUNK, jobs
from tests.unit.plan.test_spread import CHUNKS, SAVED

MANY = settings(deadline=None, max_examples=80)


def received(inventories: list[Inventory]) -> list[Inventory]:
    """As the coordinator gets them: what ranks say alike is one object."""
    joins = [JoinSave("k", r, len(inventories), 1, {}, None, None, "s", CHUNK, i) for r, i in enumerate(inventories)]
    return [decode(encode(join), JoinSave).inventory for join in joins]


@MANY
@given(jobs(), st.integers(0, 2))
def test_ranks_that_say_the_same_are_merged_as_one_by_one(job: tuple[list[Any], list[str]], leaves: int) -> None:
    states, _ = job
    for rank, state in enumerate(states):  # plain leaves: alike on all, different, only some ranks'
        state["plain"] = {
            "step": 7,
            "seed": rank if leaves else 1,
            **({"only": rank} if rank % 2 and leaves > 1 else {}),
        }
    sent = [take_inventory(flatten(state), CHUNK, len(states)) for state in states]
    expected = plain_merge(sent, CHUNK)
    for found in (merge(sent, CHUNK), merge(received(sent), CHUNK)):
        assert found == expected
        assert list(found.nodes) == list(expected.nodes)


@MANY
@given(jobs())
def test_chunks_are_dealt_as_one_by_one(job: tuple[list[Any], list[str]]) -> None:
    states, servers = job
    merged = merge([take_inventory(flatten(state), CHUNK, len(states)) for state in states], CHUNK)
    plan = deal(merged, servers, 2, 1 << 20)
    paths = {id(chunk): array.path for array in merged.arrays for chunk in array.chunks}
    chunks = [chunk for array in merged.arrays for chunk in array.chunks]
    expected = [(rank, paths[id(chunk)], chunk.box) for rank, chunk in plain_balance(chunks, servers)]
    assert [(rank, item.path, item.box) for rank, items in plan.stage.items() for item in items] == expected


@MANY
@given(st.dictionaries(st.sampled_from("abcdef"), st.sets(st.sampled_from(CHUNKS)), min_size=1), st.booleans())
def test_fetches_are_planned_as_chunk_by_chunk(needs: dict[str, set[ChunkId]], common: bool) -> None:
    if common:
        needs = {server: wanted | set(CHUNKS[:3]) for server, wanted in needs.items()}
    found = spread(SAVED.manifest, needs)
    assert found == plain_spread(SAVED.manifest, needs)
    assert [list(fetch.peers) for fetch in found.values()] == [
        list(fetch.peers) for fetch in plain_spread(SAVED.manifest, needs).values()
    ]


def test_a_leaf_more_leaves_the_other_parts_alone() -> None:
    tree = {f"layer {i}": np.arange(3.0) for i in range(500)}
    flat, more = flatten(tree), flatten({**tree, "layer 250": {"extra": 1}})
    ours, theirs = received([take_inventory(f, CHUNK, 2) for f in (flat, more)])
    assert len(ours.parts) > 5
    assert len({id(part) for part in [*ours.parts, *theirs.parts]}) <= len(ours.parts) + 2  # root's part and the leaf's
    nodes = [path for part in theirs.parts for path in part.nodes]
    assert nodes == list(more.nodes)
    assert inventory_of({}, {}).parts == ()
