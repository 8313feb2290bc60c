"""The coordinator's brain for restores: a pure state machine, events in, instructions out. No Ray, no I/O, no clock.

For one candidate checkpoint after the other, the newest first: every rank matches it with its own state, servers fetch
what can't be mapped, all chunks are verified, and only when all are good does any rank set a value. A mapped chunk that
several ranks of a node need is verified by one of them: they read the same pages. A damaged candidate sends everybody
to the next one; a state that doesn't fit ends the restore.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain

from rl_ckpt.errors import CheckpointError, CorruptionError, InvalidInputError, SaveTimeoutError, WorkerFailuresError
from rl_ckpt.format.manifest import Manifest
from rl_ckpt.format.shard_file import ALIGNMENT
from rl_ckpt.options import Options
from rl_ckpt.plan.spread import ChunkId, ServerFetch, canonical_chunks, share, spread
from rl_ckpt.runtime.messages import (
    Apply,
    Candidate,
    Failure,
    FetchDone,
    FetchItem,
    FetchOrder,
    Matched,
    MatchReply,
    OpenReply,
    OpenRestore,
    PassItem,
    Sources,
    TryNext,
    Verified,
    VerifyReply,
)

_FAILED_KEPT = 64  # failed restores that some ranks have not heard of yet
_SHARE_FROM_BYTES = 32 << 10  # a chunk, on average: to deal smaller ones out takes longer than to verify them

OPENING, MATCHING, FETCHING, VERIFYING, OVER, FAILED = (
    "opening", "matching", "fetching", "verifying", "over", "failed",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Load:
    """Read the next candidate: answer with `loaded`, or `failed`. `tried` are the ids that were damaged."""

    token: str
    step: int | None
    tried: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer a rank's last message."""

    key: str
    rank: int
    reply: OpenReply | MatchReply | VerifyReply


@dataclass(frozen=True, slots=True)
class Fetch:
    """Have a server bring chunks in; answer with `fetched`."""

    token: str
    server: str
    order: FetchOrder


@dataclass(frozen=True, slots=True)
class Forget:
    """Have the servers give up the restore's memory."""

    token: str
    servers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Arm:
    """Call `timed_out(token, state)` after so many seconds."""

    token: str
    state: str
    seconds: float


Instruction = Load | Answer | Fetch | Forget | Arm


@dataclass(slots=True)
class Restore:
    """One restore under way: one candidate of it."""

    key: str
    token: str
    """Of this candidate of this restore alone (its key comes again): tells late answers, and its memory, apart."""
    step: int | None
    world_size: int
    state: str = OPENING
    joined: set[int] = field(default_factory=set)
    servers: dict[int, str] = field(default_factory=dict)
    """Of each rank that joined: who is whose neighbour."""
    manifest: Manifest | None = None
    mappable: bool = False
    fell_back: dict[str, str] = field(default_factory=dict)
    matched: dict[int, Matched] = field(default_factory=dict)
    verified: dict[int, str] = field(default_factory=dict)
    twins: dict[ChunkId, ChunkId] = field(default_factory=dict)
    offsets: dict[str, dict[ChunkId, int]] = field(default_factory=dict)
    """Where each chunk goes in each server's restore memory."""
    memory: dict[str, str] = field(default_factory=dict)
    """File of each server's restore memory."""
    awaited: set[str] = field(default_factory=set)
    bytes_from: dict[str, int] = field(default_factory=dict)
    told: set[int] = field(default_factory=set)
    failure: Failure | None = None


class RestoreMachine:
    """All restores of a run. Every method is an event and returns what is to be done about it."""

    def __init__(self, options: Options, incarnation: str = "") -> None:
        """No restores yet.

        Args:
            options: The run's.
            incarnation: Of the coordinator, so that its tokens are not those of one before it: shard servers never
                bring in again what they were told to forget.
        """
        self.options = options
        self._incarnation = incarnation
        self._begun = 0
        self._restores: dict[str, Restore] = {}
        self._over: dict[str, Restore] = {}
        """By token: ranks are still copying out of its memory, and may open the next one."""

    def under_way(self, key: str) -> bool:
        """Whether all ranks of a restore have joined: from there on it is timed here, and fails here if it hangs."""
        restore = self._restores.get(key)
        timed = restore is not None and restore.failure is None and (restore.state != OPENING or restore.fell_back)
        return bool(timed) or any(other.key == key for other in self._over.values())

    def states(self) -> dict[str, str]:
        """State of every restore under way or failed, by token."""
        under_way = {r.token: FAILED if r.failure else r.state for r in self._restores.values()}
        return under_way | dict.fromkeys(self._over, OVER)

    def _begin(self, key: str, step: int | None, world_size: int, fell_back: dict[str, str] | None = None) -> Restore:
        self._begun += 1
        restore = Restore(key, f"{key}#{self._incarnation}{self._begun}", step, world_size, fell_back=fell_back or {})
        self._restores[key] = restore
        return restore

    def _current(self, token: str) -> Restore | None:
        """The restore of a token, if it has not failed and no later one has its key."""
        restore = self._restores.get(token.rpartition("#")[0])
        return restore if restore is not None and restore.token == token and restore.failure is None else None

    def open(self, message: OpenRestore) -> list[Instruction]:
        """A rank takes part, or asks for the next candidate."""
        restore = self._restores.get(message.key)
        if restore is not None and restore.failure is not None and message.rank in restore.told:
            restore = None
        out: list[Instruction] = []
        if restore is None:
            restore = self._begin(message.key, message.step, message.world_size)
            out.append(Arm(restore.token, OPENING, self.options.join_timeout_s))
        if restore.failure is not None:
            return [*out, self._tell(restore, message.rank, restore.failure)]
        if message.world_size != restore.world_size or not 0 <= message.rank < restore.world_size:
            text = f"rank {message.rank} of {message.world_size} can't join a restore of {restore.world_size} workers"
            return [*out, *self._fail(restore, InvalidInputError(text), also=message.rank)]
        if restore.state != OPENING or message.rank in restore.joined:
            text = f"rank {message.rank} began the restore anew while it was under way; start it again on all workers"
            return self._fail(restore, WorkerFailuresError(text, {message.rank: text}), also=message.rank)
        restore.joined.add(message.rank)
        restore.servers[message.rank] = message.server
        if len(restore.joined) < restore.world_size:
            return out
        return [*out, Load(restore.token, restore.step, tuple(restore.fell_back))]

    def loaded(
        self, token: str, manifest: Manifest, data: bytes, mappable: bool, damaged: dict[str, str]
    ) -> list[Instruction]:
        """The candidate's manifest; `mappable` where workers can map the store's files."""
        restore = self._current(token)
        if restore is None or restore.state != OPENING:
            return []
        restore.manifest, restore.mappable, restore.state = manifest, mappable, MATCHING
        restore.fell_back |= damaged
        answers: list[Instruction] = []
        for ranks in _neighbours(restore.servers).values():
            for i, rank in enumerate(ranks):
                candidate = Candidate(token, data, restore.fell_back, i, len(ranks))
                answers.append(Answer(restore.key, rank, candidate))
        return [*answers, Arm(token, MATCHING, self.options.join_timeout_s)]

    def match(self, message: Matched) -> list[Instruction]:
        """A rank says what it needs, or what doesn't fit."""
        restore = self._restores.get(message.key)
        if restore is None or restore.token != message.token:
            return [Answer(message.key, message.rank, _gone())]
        if restore.failure is not None:
            return [self._tell(restore, message.rank, restore.failure)]
        restore.matched[message.rank] = message
        if len(restore.matched) < restore.world_size:
            return []
        problems = {rank: m.problems for rank, m in sorted(restore.matched.items()) if m.problems}
        if problems:
            lines = [f"rank {rank}: {line}" for rank, p in problems.items() for line in p.lines()]
            text = (
                f"checkpoint {restore.manifest.id if restore.manifest else ''} does not fit the workers' states (no "
                "worker was changed):\n  "
                + "\n  ".join(lines)
                + "\nuse `select`, `rename`, or `strict=False` to restore what fits"
            )
            return self._fail(restore, InvalidInputError(text))
        return self._files(restore) if restore.mappable else self._fetch(restore)

    def _files(self, restore: Restore) -> list[Instruction]:
        restore.state = VERIFYING
        assert restore.manifest is not None
        sizes: dict[int, int] = {}  # by part: many ranks need the same
        for part in [part for m in restore.matched.values() for part in m.needs.parts]:
            if id(part) not in sizes:
                sizes[id(part)] = sum(_bytes(restore, chunk) for chunk in part.chunks)
        total = sum(sizes[id(part)] for m in restore.matched.values() for part in m.needs.parts)
        restore.bytes_from = {"files": total}
        count = sum(len(part.chunks) for m in restore.matched.values() for part in m.needs.parts)
        if total < _SHARE_FROM_BYTES * count:
            answers: list[Instruction] = [Answer(restore.key, rank, Sources()) for rank in restore.matched]
            return [*answers, Arm(restore.token, VERIFYING, self.options.write_timeout_s)]
        answers = []
        twins = canonical_chunks(restore.manifest)
        known: dict[tuple[tuple[int, ...], ...], list[Sources]] = {}  # many nodes need the same parts
        for ranks in _neighbours(restore.servers).values():
            needs = [restore.matched[rank].needs for rank in ranks]
            parts = tuple([tuple(map(id, need.parts)) for need in needs])
            if parts not in known:
                mine = share(restore.manifest, twins, dict(enumerate(map(list, needs))))
                known[parts] = [
                    Sources(others=tuple([n for n, chunk in enumerate(need) if chunk not in mine[i]]))
                    for i, need in enumerate(needs)
                ]
            answers += [Answer(restore.key, rank, found) for rank, found in zip(ranks, known[parts], strict=True)]
        return [*answers, Arm(restore.token, VERIFYING, self.options.write_timeout_s)]

    def _fetch(self, restore: Restore) -> list[Instruction]:
        assert restore.manifest is not None
        twins = restore.twins = canonical_chunks(restore.manifest)
        needs: dict[str, set[ChunkId]] = {}
        seen: set[tuple[str, int]] = set()
        for m in restore.matched.values():
            mine = needs.setdefault(m.server, set())
            for part in m.needs.parts:
                if (m.server, id(part)) not in seen:
                    seen.add((m.server, id(part)))
                    mine.update([twins[chunk] for chunk in part.chunks])
        plan = spread(restore.manifest, needs)
        restore.state = FETCHING
        sizes = {server: self._lay_out(restore, server, chunks) for server, chunks in needs.items()}
        orders = {server: self._order(restore, server, plan[server], sizes[server]) for server in plan}
        restore.awaited = set(orders)
        restore.bytes_from = {"store": 0, "peers": 0}
        out: list[Instruction] = [Fetch(restore.token, server, order) for server, order in orders.items()]
        return [*out, Arm(restore.token, FETCHING, self.options.write_timeout_s)]

    def _lay_out(self, restore: Restore, server: str, chunks: set[ChunkId]) -> int:
        offset, places = 0, {}
        for chunk in sorted(chunks):
            places[chunk] = offset
            offset += -(-_bytes(restore, chunk) // ALIGNMENT) * ALIGNMENT
        restore.offsets[server] = places
        return offset

    def _order(self, restore: Restore, server: str, fetch: ServerFetch, size: int) -> FetchOrder:
        assert restore.manifest is not None
        places = restore.offsets[server]
        files: dict[str, list[FetchItem]] = {}
        for chunk in fetch.store:
            saved = restore.manifest.arrays[chunk[0]].chunks[chunk[1]]
            item = FetchItem(saved.offset, places[chunk], saved.bytes, bytes.fromhex(saved.digest))
            files.setdefault(restore.manifest.files[saved.file].name, []).append(item)
        peers: dict[str, tuple[PassItem, ...]] = {}
        numbers: dict[int, int] = {}  # of a file in the manifest → in the order
        for peer, chunks in fetch.peers.items():
            there = restore.offsets[peer]
            saved_there = [(chunk, restore.manifest.arrays[chunk[0]].chunks[chunk[1]]) for chunk in chunks]
            peers[peer] = tuple(
                PassItem(
                    there[chunk],
                    places[chunk],
                    s.bytes,
                    bytes.fromhex(s.digest),
                    numbers.setdefault(s.file, len(numbers)),
                    s.offset,
                )
                for chunk, s in saved_there
            )
        names = tuple(restore.manifest.files[file].name for file in numbers)
        return FetchOrder(restore.token, size, {name: tuple(items) for name, items in files.items()}, peers, names)

    def fetched(self, token: str, server: str, done: FetchDone) -> list[Instruction]:
        """A server has brought in what it was told to."""
        restore = self._current(token)
        if restore is None or restore.state != FETCHING or server not in restore.awaited:
            return []
        if done.damaged:
            return self._next(restore, done.damaged)
        restore.awaited.discard(server)
        restore.memory[server] = done.memory
        for source, size in done.bytes_from.items():
            restore.bytes_from[source] = restore.bytes_from.get(source, 0) + size
        if restore.awaited:
            return []
        restore.state = VERIFYING
        known: dict[tuple[str, int], tuple[int, ...]] = {}
        answers: list[Instruction] = [
            Answer(restore.key, rank, self._sources(restore, m, known)) for rank, m in restore.matched.items()
        ]
        return [*answers, Arm(token, VERIFYING, self.options.write_timeout_s)]

    def _sources(self, restore: Restore, matched: Matched, known: dict[tuple[str, int], tuple[int, ...]]) -> Sources:
        """Where a rank finds its chunks; `known` holds the offsets of parts of needs, by server."""
        server, twins, places = matched.server, restore.twins, restore.offsets[matched.server]
        for part in matched.needs.parts:
            if (server, id(part)) not in known:
                known[server, id(part)] = tuple([places[twins[chunk]] for chunk in part.chunks])
        offsets = chain.from_iterable(known[server, id(part)] for part in matched.needs.parts)
        return Sources(restore.memory[server], tuple(offsets))

    def verify(self, message: Verified) -> list[Instruction]:
        """A rank has looked at its chunks."""
        restore = self._restores.get(message.key)
        if restore is None or restore.token != message.token:
            return [Answer(message.key, message.rank, _gone())]
        if restore.failure is not None:
            return [self._tell(restore, message.rank, restore.failure)]
        restore.verified[message.rank] = message.damaged
        if len(restore.verified) < restore.world_size:
            return []
        damaged = [text for text in restore.verified.values() if text]
        if damaged:
            return self._next(restore, damaged[0])
        restore.state = OVER
        self._over[restore.token] = self._restores.pop(restore.key)
        answers: list[Instruction] = [
            Answer(message.key, r, Apply(restore.bytes_from)) for r in range(restore.world_size)
        ]
        return [*answers, Arm(restore.token, OVER, self.options.write_timeout_s)]

    def applied(self, key: str, rank: int) -> list[Instruction]:
        """A rank has set its state, or failed to: it needs no memory any more."""
        restore = next((r for r in self._over.values() if r.key == key and rank in r.joined), None)
        if restore is None:
            return []
        restore.joined.discard(rank)
        return [] if restore.joined else self._end(restore)

    def _next(self, restore: Restore, damaged: str) -> list[Instruction]:
        """The candidate is damaged: everybody asks for the next one, unless it was asked for by step."""
        assert restore.manifest is not None
        if restore.step is not None:
            return self._fail(restore, CorruptionError(damaged))
        restore.fell_back[restore.manifest.id] = damaged
        waiting = list(restore.verified if restore.state == VERIFYING else restore.matched)
        servers = self._forget(restore)
        fresh = self._begin(restore.key, None, restore.world_size, restore.fell_back)
        answers: list[Instruction] = [Answer(restore.key, rank, TryNext()) for rank in waiting]
        return [*servers, *answers, Arm(fresh.token, OPENING, self.options.join_timeout_s)]

    def failed(self, token: str, error: CheckpointError) -> list[Instruction]:
        """The store or a server failed, or there is no (other) candidate."""
        restore = self._current(token)
        return self._fail(restore, error) if restore is not None else []

    def lost(self, key: str, rank: int, world_size: int, failure: Failure) -> list[Instruction]:
        """A rank can't go on."""
        restore = self._restores.get(key)
        # Of the same key, one that is over may still be known, as its rank died: one that this rank joined comes first.
        live = restore is not None and restore.failure is None and rank in restore.joined
        if not live and any(r.key == key and rank in r.joined for r in self._over.values()):
            return self.applied(key, rank)
        if restore is None:
            restore = self._begin(key, None, world_size)
        if restore.failure is not None:
            self._tell(restore, rank, restore.failure)
            return []
        error = failure.error()
        if not isinstance(error, InvalidInputError | WorkerFailuresError):
            error = WorkerFailuresError(f"rank {rank}: {failure.message}", {rank: failure.message})
        return self._fail(restore, error, also=rank)

    def timed_out(self, token: str, state: str) -> list[Instruction]:
        """The time for a state is over."""
        if state == OVER:
            over = self._over.get(token)
            return self._end(over) if over is not None else []
        if state == FAILED:  # ranks that have not heard of it never asked: it is forgotten
            failed = self._restores.get(token.rpartition("#")[0])
            if failed is not None and failed.token == token and failed.failure is not None:
                del self._restores[failed.key]
            return []
        restore = self._current(token)
        if restore is None or restore.state != state:
            return []
        if state == FETCHING:
            text = f"restore: {sorted(restore.awaited)} did not bring their chunks in in time; raise `write_timeout_s`"
        elif state == OPENING and len(restore.joined) == restore.world_size:
            text = "restore: the store did not give the manifest in time; look at the store, or raise `join_timeout_s`"
        else:
            done = set({OPENING: restore.joined, MATCHING: restore.matched}.get(state, restore.verified))
            missing = sorted(set(range(restore.world_size)) - done)
            option = "write_timeout_s" if state == VERIFYING else "join_timeout_s"
            text = f"restore: ranks {missing} did not get past {state!r} in time; raise `{option}` if they are busy"
        return self._fail(restore, SaveTimeoutError(text))

    def _fail(self, restore: Restore, error: CheckpointError, also: int | None = None) -> list[Instruction]:
        state_of = {OPENING: restore.joined, MATCHING: restore.matched, VERIFYING: restore.verified}
        waiting = set(state_of.get(restore.state, restore.matched))
        if also is not None:
            waiting.add(also)
        restore.failure = Failure.of(error)
        failed = [key for key, other in self._restores.items() if other.failure is not None]
        for key in failed[:-_FAILED_KEPT]:
            del self._restores[key]
        out = [*self._forget(restore), Arm(restore.token, FAILED, self.options.join_timeout_s)]
        return [*out, *(self._tell(restore, rank, restore.failure) for rank in sorted(waiting))]

    def _tell(self, restore: Restore, rank: int, failure: Failure) -> Answer:
        restore.told.add(rank)
        if len(restore.told) >= restore.world_size and self._restores.get(restore.key) is restore:
            del self._restores[restore.key]
        return Answer(restore.key, rank, failure)

    def _forget(self, restore: Restore) -> list[Instruction]:
        servers = tuple(sorted(restore.offsets))
        return [Forget(restore.token, servers)] if servers else []

    def _end(self, restore: Restore) -> list[Instruction]:
        del self._over[restore.token]
        return self._forget(restore)


def _neighbours(servers: Mapping[int, str]) -> dict[str, list[int]]:
    """Ranks by server."""
    out: dict[str, list[int]] = {}
    for rank in sorted(servers):
        out.setdefault(servers[rank], []).append(rank)
    return out


def _bytes(restore: Restore, chunk: ChunkId) -> int:
    assert restore.manifest is not None
    return restore.manifest.arrays[chunk[0]].chunks[chunk[1]].bytes


def _gone() -> Failure:
    return Failure.of(WorkerFailuresError("this restore is over already; start it again on all workers"))
