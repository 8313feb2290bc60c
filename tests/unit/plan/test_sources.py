"""Choosing sources: every chunk has one on every node, the nearest that is not known to be bad."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_ckpt.plan import sources
from rl_ckpt.plan.parts import ChunkAt, Held, Holdings, Part
from rl_ckpt.plan.sources import NOWHERE, InStore, Known, plan_sources
from rl_ckpt.plan.spread import ChunkId
from tests.unit.plan.model import save

MANIFEST = save([{str(i): np.random.default_rng(i).random(7 * (i + 1)) for i in range(4)}], ["s"]).manifest
CHUNKS = [(a, c) for a, array in enumerate(MANIFEST.arrays) for c in range(len(array.chunks))]
SERVERS = "abcdefghijkl"
chunk_sets = st.sets(st.sampled_from(CHUNKS))


def held_by(parts: dict[str, tuple[set[ChunkId], set[str]]]) -> Holdings:
    """By origin: the chunks of its part, and its holders beside the origin."""
    made, holders = [], {}
    for origin, (chunks, buddies) in parts.items():
        table = []
        for n, (a, c) in enumerate(sorted(chunks)):
            saved = MANIFEST.arrays[a].chunks[c]
            table.append(ChunkAt(bytes.fromhex(saved.digest), 64 * n, saved.bytes))
        part = Part("0-x", origin, 64 * len(table), tuple(table))
        made.append(part)
        holders[part.name] = {server: f"/shm/{server}/{part.name}" for server in sorted({origin} | buddies)}
    return Holdings(made, holders)


parts = st.dictionaries(st.sampled_from("abcd"), st.tuples(chunk_sets, st.sets(st.sampled_from(SERVERS))))


@dataclass
class World:
    """What is known, and of which nodes something is wanted."""

    known: Known
    needs: dict[str, set[ChunkId]]
    mappable: bool
    bad: set[InStore | Held] = field(default_factory=set)
    dead: set[str] = field(default_factory=set)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    known = Known(MANIFEST, draw(st.none() | parts.map(held_by)))
    world = World(known, draw(st.dictionaries(st.sampled_from(SERVERS), chunk_sets, min_size=1)), draw(st.booleans()))
    everything = [copy for chunk in CHUNKS for copy in known.held(chunk)]
    if everything:
        world.bad |= draw(st.sets(st.sampled_from(everything)))
    world.bad |= {known.named(chunk) for chunk in draw(chunk_sets)}
    for chunk in sorted(draw(chunk_sets)):
        places = [InStore(f"shards/older/{i}", 64 * i) for i in range(2)]
        known.add(chunk, places)
        if draw(st.booleans()):
            world.bad.add(places[0])
    for place in world.bad:
        known.exclude(place)
    known.alone = draw(st.dictionaries(st.sampled_from(sorted(world.needs)), chunk_sets))
    world.dead = draw(st.sets(st.sampled_from("ab")))
    for server in world.dead:
        known.lose(server)
    return world


@settings(deadline=None, max_examples=300)
@given(worlds())
def test_every_chunk_has_the_nearest_source_that_is_left(world: World) -> None:
    known, plan = world.known, plan_sources(world.known, world.needs, world.mappable)
    assert set(plan.nodes) == set(world.needs)
    for server, node in plan.nodes.items():
        found = Counter([*node.here, *node.files, *node.brought()])
        assert found == Counter(world.needs[server] - plan.lost), "exactly one place"
        for chunk, copy in [*node.here.items(), *node.pulls.items()]:
            saved = known.saved(chunk)
            assert copy in known.holdings.find(bytes.fromhex(saved.digest), saved.bytes)  # type: ignore[union-attr]
            assert copy not in world.bad
            assert copy.server not in world.dead
            assert (chunk in node.here) == (copy.server == server)
        for chunk in [*node.files, *node.store]:
            assert known.held(chunk) == [], "memory before the store"
            assert known.stored(chunk) not in {None, *world.bad}
            assert (chunk in node.files) == world.mappable
        for peer, chunks in node.peers.items():
            assert peer != server
            assert set(chunks) <= {*plan.nodes[peer].store, *plan.nodes[peer].pulls}, "no chains"
            assert not known.alone.get(server, set()) & set(chunks)
            assert not any(copy.server == server for chunk in chunks for copy in known.held(chunk))
    alone = known.alone
    read = Counter(c for name, node in plan.nodes.items() for c in node.store if c not in alone.get(name, ()))
    assert set(read.values()) <= {1}, "each chunk leaves the store once"
    for chunk in plan.lost:
        assert not known.held(chunk)
        assert known.stored(chunk) is None


@pytest.mark.parametrize(("nodes", "pulls"), [(4, 4), (5, 1)])
def test_what_many_nodes_need_is_pulled_once_and_passed_on(nodes: int, pulls: int) -> None:
    known = Known(MANIFEST, held_by({"z": (set(CHUNKS), set())}))
    plan = plan_sources(known, {server: {CHUNKS[0]} for server in SERVERS[:nodes]}, False)
    assert sum(CHUNKS[0] in node.pulls for node in plan.nodes.values()) == pulls
    assert sum(CHUNKS[0] in node.brought() for node in plan.nodes.values()) == nodes


def test_the_holders_of_a_copy_send_equally_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_LEVEL_BYTES", 0)
    manifest = save([{"w": np.arange(64.0)}], ["s"]).manifest
    table = [ChunkAt(bytes.fromhex(c.digest), 64 * n, c.bytes) for n, c in enumerate(manifest.arrays[0].chunks)]
    part = Part("0-x", "a", 512, tuple(table))
    known = Known(manifest, Holdings([part], {part.name: {"a": "/a", "b": "/b"}}))
    plan = plan_sources(known, {"c": {(0, n) for n in range(8)}}, False)
    assert Counter(copy.server for copy in plan.nodes["c"].pulls.values()) == {"a": 4, "b": 4}


def test_neighbours_come_from_one_holder() -> None:
    known = Known(MANIFEST, held_by({"a": (set(CHUNKS), {"b"})}))
    plan = plan_sources(known, {"c": set(CHUNKS)}, False)
    assert {copy.server for copy in plan.nodes["c"].pulls.values()} == {"a"}


def test_files_of_what_is_only_in_memory_are_no_source() -> None:
    import msgspec

    files = tuple(msgspec.structs.replace(file, name=f"{NOWHERE}s") for file in MANIFEST.files)
    known = Known(msgspec.structs.replace(MANIFEST, files=files), held_by({}))
    assert plan_sources(known, {"a": {CHUNKS[0]}}, True).lost == {CHUNKS[0]}
