"""N → M: what N ranks saved comes to M ranks as a numpy model says, for every kind of leaf and any cut of shards."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_ckpt import PerRank, Replicated, Sharded
from rl_ckpt.state.boxes import Box, slices
from tests.unit.plan.model import load, restore, save, tilings
from tests.unit.trees import assert_same

MANY = settings(deadline=None, max_examples=60)


@st.composite
def resharding(
    draw: st.DrawFn,
) -> tuple[int, int, list[str], list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Old and new world size, servers, the states saved, the states to restore into, and what they must become."""
    old, new = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    servers = draw(st.lists(st.sampled_from("abcd"), min_size=old, max_size=old))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    saved: list[dict[str, Any]] = [{} for _ in range(old)]
    have: list[dict[str, Any]] = [{} for _ in range(new)]
    want: list[dict[str, Any]] = [{} for _ in range(new)]
    for i, kind in enumerate(
        draw(st.lists(st.sampled_from(["same", "declared", "own", "plain", "shards"]), max_size=6))
    ):
        name, shape = f"{i} {kind}", tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
        whole = rng.random(shape).astype(draw(st.sampled_from(["f4", "f8", "i2"])))
        if kind == "shards":
            cut_old, cut_new = draw(tilings(shape, old)), draw(tilings(shape, new))
            for rank in range(old):
                saved[rank][name] = _shard(whole, cut_old[rank % len(cut_old)])
            for rank in range(new):
                box = cut_new[rank % len(cut_new)]
                have[rank][name] = _shard(np.zeros_like(whole), box)
                want[rank][name] = whole[slices(box, Box.whole(shape))]
            continue
        for rank in range(old):
            own = {"own": PerRank(whole + rank), "declared": Replicated(whole), "plain": PerRank((rank, "x"))}
            saved[rank][name] = own.get(kind, whole)
        for rank in range(new):
            blank = {"own": np.full_like(whole, -9), "plain": (-9, "?")}.get(kind, np.zeros_like(whole))
            have[rank][name] = blank
            want[rank][name] = {"own": whole + rank, "plain": (rank, "x")}.get(kind, whole) if rank < old else blank
            if kind in ("same", "declared"):
                want[rank][name] = whole
    return old, new, servers, saved, have, want


def _shard(whole: Any, box: Box) -> Sharded:
    return Sharded(np.ascontiguousarray(whole[slices(box, Box.whole(whole.shape))]), whole.shape, box.offset)


@MANY
@given(resharding())
def test_every_new_rank_gets_its_part(job: Any) -> None:
    old, new, servers, saved, have, want = job
    checkpoint = save(saved, servers)
    for rank in range(new):
        found, match = restore(checkpoint, rank, have[rank])
        assert not match.problems, match.problems.lines()
        kept = {path.split("/")[0] for path in match.kept}
        assert kept == ({n for n in have[rank] if n.endswith(("own", "plain"))} if rank >= old else set())
        assert_same(found, want[rank])


@MANY
@given(resharding())
def test_a_reader_without_state_gets_whole_arrays(job: Any) -> None:
    _, _, servers, saved, _, _ = job
    found = load(save(saved, servers), 0)
    for name, value in saved[0].items():
        if not name.endswith("shards"):
            assert_same(found[name], getattr(value, "tree", value))
        else:
            whole = np.zeros(value.global_shape, value.array.dtype)
            for state in saved:
                part = state[name]
                whole[slices(Box(part.offset, part.array.shape), Box.whole(whole.shape))] = part.array
            assert_same(found[name], whole)


@MANY
@given(resharding())
def test_an_incremental_save_reads_back_the_same(job: Any) -> None:
    old, new, servers, saved, have, want = job
    first = save(saved, servers)
    second = save(saved, servers, base=first)
    for rank in range(min(old, new)):
        assert_same(restore(second, rank, have[rank])[0], want[rank])


@MANY
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 4))
def test_what_differs_between_ranks_stays_with_its_rank(old: int, new: int, groups: int) -> None:
    states = [{"a": np.full(5, rank % groups), "n": rank % groups, "s": "same"} for rank in range(old)]
    checkpoint = save(states, ["s"] * old)
    same = len({rank % groups for rank in range(old)}) == 1
    for rank in range(new):
        found, match = restore(checkpoint, rank, {"a": np.full(5, -1), "n": -1, "s": ""})
        mine = rank % groups if rank < old else 0 if same else -1
        assert_same(found, {"a": np.full(5, mine), "n": mine, "s": "same"})
        assert not match.problems


def test_what_one_rank_alone_declares_replicated_is_on_offer_to_every_reader() -> None:
    whole = np.arange(4.0)
    saved: list[dict[str, Any]] = [
        {"driver": {"iteration": 7}, "about": Replicated({"a": "b", "none": {}})},
        {"runners": {"1": Replicated({"rng": [1, 2], "w": whole, "empty": {}})}},
        {"runners": {"2": {"mine": 3, "nothing": {}}}, "driver": {}},
    ]
    checkpoint = save(saved, ["a", "b", "a"])
    on_offer: dict[str, Any] = {
        "about": {"a": "b", "none": {}},
        "runners": {"1": {"rng": [1, 2], "w": whole, "empty": {}}},
    }
    assert_same(load(checkpoint, 0), {"driver": {"iteration": 7}, **on_offer})
    assert_same(load(checkpoint, 7), {"about": on_offer["about"], "runners": on_offer["runners"]})
    last = {"runners": {"2": saved[2]["runners"]["2"], **on_offer["runners"]}, "driver": {}, "about": on_offer["about"]}
    assert_same(load(checkpoint, 2), last)
