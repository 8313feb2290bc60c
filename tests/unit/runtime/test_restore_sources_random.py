"""Whole restores where any place of any chunk may be bad: what can be had is had, and nothing bad is used."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_ckpt.format.manifest import Chunk
from rl_ckpt.options import Options
from rl_ckpt.plan import sources
from rl_ckpt.plan.match import Problems
from rl_ckpt.plan.parts import ChunkAt, Holdings, Part
from rl_ckpt.plan.spread import ChunkId, Needs
from rl_ckpt.runtime import restore_orders
from rl_ckpt.runtime import restore_steps as rm
from rl_ckpt.runtime.messages import (
    AT_PEER,
    FETCHED,
    HELD,
    IN_PART,
    IN_STORE,
    Apply,
    Candidate,
    Failure,
    FetchDone,
    FetchOrder,
    Flaw,
    Matched,
    NotFetched,
    OpenRestore,
    PassItem,
    Sources,
    TryNext,
    Verified,
    decode,
    encode,
)
from rl_ckpt.runtime.restore_machine import RestoreMachine
from tests.unit.runtime.restore_bench import all_chunks, manifest

MANIFEST = manifest("2-new")
CHUNKS = all_chunks()
SERVERS = ["s0", "s1", "s2"]
Place = tuple[str, int]
"""A file (in the store, or the path of one in memory), and an offset."""
DAMAGED, GONE = Flaw("corruption", "damaged"), Flaw("storage", "not to be had")


def saved(chunk: ChunkId) -> Chunk:
    return MANIFEST.arrays[chunk[0]].chunks[chunk[1]]


def named(chunk: ChunkId) -> Place:
    return MANIFEST.files[saved(chunk).file].name, saved(chunk).offset


@dataclass
class World:
    """What is where, and what of it is bad."""

    mappable: bool
    needs: list[list[ChunkId]]
    held: dict[str, tuple[set[ChunkId], set[str]]]
    elsewhere: set[ChunkId]
    bad: dict[Place, Flaw]
    holdings: Holdings | None = None
    table: dict[str, dict[int, ChunkId]] = field(default_factory=dict)
    """Name of the part → offset → chunk."""

    def __post_init__(self) -> None:
        parts, holders = [], {}
        for origin, (chunks, buddies) in self.held.items():
            rows = [
                ChunkAt(bytes.fromhex(saved(c).digest), 64 * n, saved(c).bytes) for n, c in enumerate(sorted(chunks))
            ]
            part = Part("2-new", origin, 64 * len(rows), tuple(rows))
            parts.append(part)
            self.table[part.name] = {64 * n: c for n, c in enumerate(sorted(chunks))}
            holders[part.name] = {server: f"/{server}/{part.name}" for server in sorted({origin} | buddies)}
        self.holders = holders
        self.holdings = Holdings(parts, holders) if parts else None

    def places(self, chunk: ChunkId) -> list[Place]:
        """All that may hold a chunk."""
        same = [c for c in CHUNKS if saved(c).digest == saved(chunk).digest]
        out = [(path, at) for part, rows in self.table.items() for at, c in rows.items() if c in same
               for path in self.holders[part].values()]  # fmt: skip
        return out + [named(chunk)] + ([("shards/older", 64 * CHUNKS.index(chunk))] if chunk in self.elsewhere else [])


@st.composite
def worlds(draw: st.DrawFn) -> World:
    some = st.sets(st.sampled_from(CHUNKS))
    needs = [sorted(draw(some | st.just(set(CHUNKS)))) for _ in range(draw(st.integers(1, 4)))]
    held = draw(st.dictionaries(st.sampled_from([*SERVERS, "s9"]), st.tuples(some, st.sets(st.sampled_from(SERVERS)))))
    world = World(draw(st.booleans()), needs, held, draw(some), {})
    everything = sorted({place for chunk in CHUNKS for place in world.places(chunk)})
    flaws = st.sampled_from([DAMAGED, DAMAGED, DAMAGED, GONE])
    world.bad = draw(st.dictionaries(st.sampled_from(everything), flaws))
    return world


class Play:
    """Plays one restore in a world, without disturbances from outside it."""

    def __init__(self, world: World, draw: st.DataObject) -> None:
        self.world = world
        self.draw = draw
        self.machine = RestoreMachine(Options())
        self.memory: dict[str, dict[int, ChunkId]] = {}
        self.places: list[dict[int, tuple[str, str, int]]] = [{} for _ in world.needs]
        """By rank, and index of what it needs: kind of file, file, offset."""
        self.asked: list[tuple[str, Place]] = []
        """Who looked where."""
        self.ends: dict[int, Apply | TryNext | Failure] = {}
        self.token = ""
        self.fetches: list[rm.Fetch] = []
        self.forgotten: list[rm.Forget] = []

    def run(self) -> None:
        world, count = self.world, len(self.world.needs)
        for rank in range(count):
            self.do(self.machine.open(OpenRestore("r", rank, count, None, SERVERS[rank % 3])))
        for rank, needs in enumerate(world.needs):
            matched = Matched("r", self.token, rank, SERVERS[rank % 3], Problems(), Needs.of(needs))
            self.do(self.machine.match(decode(encode(matched), Matched)))
        while self.fetches:
            self.bring()

    def do(self, instructions: list[rm.Instruction]) -> None:
        for i in instructions:
            match i:
                case rm.Load(token):
                    if not self.token:
                        self.token = token
                        self.do(self.machine.loaded(token, MANIFEST, b"", self.world.mappable, {}, self.world.holdings))
                case rm.Fetch():
                    self.fetches.append(i)
                case rm.Search(token, wanted):
                    found = {
                        (bytes.fromhex(saved(c).digest), saved(c).bytes): [("shards/older", 64 * CHUNKS.index(c))]
                        for c in self.world.elsewhere
                    }
                    self.do(self.machine.searched(token, {key: found[key] for key in wanted if key in found}))
                case rm.Forget():
                    self.forgotten.append(i)
                case rm.Answer(_, rank, Sources() as reply):
                    self.take(rank, decode(encode(reply), Sources))
                case rm.Answer(_, rank, Apply() | TryNext() | Failure() as reply):
                    assert rank not in self.ends
                    self.ends[rank] = reply
                case rm.Answer(_, _, Candidate() as reply):
                    assert reply.early == (self.world.mappable and self.world.holdings is None)

    def look(self, who: str, place: Place) -> Flaw | None:
        assert (who, place) not in self.asked, "a place that turned out to be bad is not asked again"
        flaw = self.world.bad.get(place)
        if flaw is not None:
            self.asked.append((who, place))
        return flaw

    def take(self, rank: int, told: Sources) -> None:
        world = self.world
        about = range(len(world.needs[rank])) if told.needs is None else told.needs
        for k, n in enumerate(about):
            at = told.at[k] if told.at else 0 if told.files else -1
            file, offset = named(world.needs[rank][n])
            self.places[rank][n] = ("stored", file, offset)
            if at >= 0:
                self.places[rank][n] = (told.files[at].kind, told.files[at].path, told.offsets[k])
        bad: dict[int, Flaw] = {}
        for n in about:
            kind, file, offset = self.places[rank][n]
            if kind == FETCHED:
                assert saved(self.memory[file][offset]).digest == saved(world.needs[rank][n]).digest
            elif n not in told.others and (flaw := self.look(f"rank {rank}", (file, offset))) is not None:
                bad[n] = flaw
            if kind == HELD:
                assert file.startswith(f"/{SERVERS[rank % 3]}/"), "only what is on the rank's own node"
        self.do(self.machine.verify(Verified("r", self.token, rank, bad)))

    def bring(self) -> None:
        """All servers' orders of a round: what they get themselves, and then what they pass on."""
        now, self.fetches = self.draw.draw(st.permutations(self.fetches)), []
        done = {ask.server: self.own(ask.server, ask.order) for ask in now}
        for ask in now:
            counts, failed = done[ask.server]
            mine = self.memory[f"/shm/{ask.server}/{ask.order.key}"]
            for peer, items in ask.order.peers.items():
                (theirs,) = [other.order for other in now if other.server == peer]
                pulled = {piece.offset for part in theirs.parts for piece in part.items}
                for item in items:
                    assert (item.file < 0) == (item.source_offset in pulled), "memory before the store, here too"
                    there = self.memory[f"/shm/{peer}/{ask.order.key}"].get(item.source_offset)
                    if there is not None:
                        mine[item.offset] = there
                        counts["peers"] = counts.get("peers", 0) + item.size_bytes
                    else:
                        failed.append(NotFetched(item.offset, AT_PEER, DAMAGED))
            path = f"/shm/{ask.server}/{ask.order.key}"
            self.do(self.machine.fetched(ask.token, ask.server, FetchDone(counts, tuple(failed), path)))

    def own(self, server: str, order: FetchOrder) -> tuple[dict[str, int], list[NotFetched]]:
        mine = self.memory.setdefault(f"/shm/{server}/{order.key}", {})
        counts, failed = dict[str, int](), list[NotFetched]()
        by_digest = {bytes.fromhex(saved(c).digest): c for c in CHUNKS}
        for name, items in order.files.items():
            for item in items:
                if (flaw := self.look("store", (name, item.source_offset))) is not None:
                    failed.append(NotFetched(item.offset, IN_STORE, flaw))
                else:
                    mine[item.offset] = by_digest[item.digest]
                    counts["store"] = counts.get("store", 0) + item.size_bytes
        for part in order.parts:
            for piece in part.items:
                assert isinstance(piece, PassItem)
                path = self.world.holders[part.part][part.server]
                if (flaw := self.look(server, (path, piece.source_offset))) is not None:
                    failed.append(NotFetched(piece.offset, IN_PART, flaw))
                else:
                    mine[piece.offset] = self.world.table[part.part][piece.source_offset]
                    counts["peers_memory"] = counts.get("peers_memory", 0) + piece.size_bytes
        return counts, failed


@pytest.mark.parametrize("shared", [False, True])
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_restore_succeeds_exactly_if_every_chunk_is_good_somewhere(shared: bool, data: st.DataObject) -> None:
    world = data.draw(worlds())
    play = Play(world, data)
    with pytest.MonkeyPatch.context() as patch:
        if shared:
            patch.setattr(restore_orders, "SHARE_FROM_BYTES", 0)  # these chunks are tiny
            patch.setattr(sources, "_TAKERS_A_HOLDER", 0)  # these nodes are few
        play.run()
    needed = {chunk for needs in world.needs for chunk in needs}
    lost = [c for c in needed if all(place in world.bad for place in world.places(c))]
    assert set(play.ends) == set(range(len(world.needs))), "every rank has an answer"
    if lost:
        assert all(isinstance(end, TryNext | Failure) for end in play.ends.values())
        unread = [place for place, flaw in world.bad.items() if flaw is GONE and not place[0].startswith("/")]
        if not unread:
            assert all(isinstance(end, TryNext) for end in play.ends.values())
        return
    for rank, end in play.ends.items():
        assert isinstance(end, Apply)
        for n, chunk in enumerate(world.needs[rank]):
            kind, file, offset = play.places[rank][n]
            assert kind == FETCHED or ((file, offset) in world.places(chunk) and (file, offset) not in world.bad)
        met = {place for _, place in play.asked if world.bad[place] is DAMAGED}
        assert len(end.repaired) <= len(met)
        assert bool(end.repaired) == bool(met), "what was not reachable is not called repaired"
        assert all(end.repaired.values())
        memory = sum(end.bytes_from.get(name, 0) for name in ("memory", "peers_memory"))
        if all(any(p not in world.bad for p in world.places(c) if p[0].startswith("/")) for c in needed):
            assert not end.bytes_from.get("store", 0) + end.bytes_from.get("files", 0), "memory has all of it"
            assert memory or not needed
    for rank in play.ends:
        play.do(play.machine.applied("r", rank, play.token))
    assert len(play.forgotten) == 1
    assert play.machine.states() == {}
