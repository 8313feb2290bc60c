"""Spreading a restore: every chunk leaves the store once, and everybody gets what it needs."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_ckpt.plan.spread import ChunkId, canonical_chunks, share, spread
from tests.unit.plan.model import save

SAVED = save([{str(i): np.random.default_rng(i).random(7 * (i + 1)) for i in range(4)}], ["s"])
CHUNKS = [(a, c) for a, array in enumerate(SAVED.manifest.arrays) for c in range(len(array.chunks))]
needs = st.dictionaries(st.sampled_from("abcdef"), st.sets(st.sampled_from(CHUNKS)), min_size=1)


@settings(deadline=None)
@given(needs)
def test_every_chunk_is_read_once_and_every_need_is_met(wanted: dict[str, set[ChunkId]]) -> None:
    plan = spread(SAVED.manifest, wanted)
    assert set(plan) == set(wanted)
    read = Counter(chunk for fetch in plan.values() for chunk in fetch.store)
    assert read == Counter(set().union(*wanted.values()))
    for server, fetch in plan.items():
        passed = [chunk for chunks in fetch.peers.values() for chunk in chunks]
        assert sorted(fetch.store + passed) == sorted(wanted[server])
        for peer, chunks in fetch.peers.items():
            assert peer != server
            assert set(chunks) <= set(plan[peer].store)  # a peer passes on what it reads itself: no chains


@settings(deadline=None)
@given(st.integers(1, 6))
def test_the_reading_is_balanced_by_bytes(servers: int) -> None:
    plan = spread(SAVED.manifest, {f"s{i}": set(CHUNKS) for i in range(servers)})
    sizes = {(a, c): SAVED.manifest.arrays[a].chunks[c].bytes for a, c in CHUNKS}
    loads = [sum(sizes[chunk] for chunk in fetch.store) for fetch in plan.values()]
    assert max(loads) - min(loads) <= 2 * max(sizes.values())  # half a chunk at each end of each run


def test_each_server_reads_runs_that_lie_together() -> None:
    plan = spread(SAVED.manifest, {f"s{i}": set(CHUNKS) for i in range(3)})
    saved = {(a, c): SAVED.manifest.arrays[a].chunks[c] for a, c in CHUNKS}
    order = sorted(CHUNKS, key=lambda chunk: (saved[chunk].file, saved[chunk].offset))
    reader = {chunk: server for server, fetch in plan.items() for chunk in fetch.store}
    changes = sum(reader[a] != reader[b] for a, b in itertools.pairwise(order))
    assert changes == 2  # three servers, three runs


def test_peers_are_not_all_asked_in_the_same_order() -> None:
    plan = spread(SAVED.manifest, {s: set(CHUNKS) for s in "abcd"})
    assert len({next(iter(fetch.peers)) for fetch in plan.values()}) > 1


def test_twins_are_one_chunk_to_fetch() -> None:
    value = np.arange(8.0)
    saved = save([{"a": value, "b": value.copy(), "c": value + 1}], ["s"])
    twins = canonical_chunks(saved.manifest)
    assert twins[1, 0] == twins[0, 0] == (0, 0)
    assert twins[2, 0] == (2, 0)


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 12), st.lists(st.sampled_from(CHUNKS), unique=True), min_size=1))
def test_neighbours_verify_every_chunk_once_and_only_what_they_need(wanted: dict[int, list[ChunkId]]) -> None:
    dealt = share(SAVED.manifest, canonical_chunks(SAVED.manifest), wanted)
    assert set(dealt) == set(wanted)
    for rank, chunks in dealt.items():
        assert chunks <= set(wanted[rank])
    assert Counter(c for chunks in dealt.values() for c in chunks) == Counter(set().union(*wanted.values()))


@pytest.mark.parametrize("named", [[(0, 0), (1, 0)], [(1, 0), (0, 0)], [(1, 0), (1, 0)]])
def test_chunks_that_are_the_same_bytes_are_verified_once_by_whatever_name(named: list[ChunkId]) -> None:
    value = np.arange(8.0)
    manifest = save([{"a": value, "b": value.copy()}], ["s"]).manifest
    dealt = share(manifest, canonical_chunks(manifest), {rank: [chunk] for rank, chunk in enumerate(named)})
    assert sorted(map(len, dealt.values())) == [0, 1]
