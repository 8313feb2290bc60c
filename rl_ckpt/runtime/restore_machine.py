"""The coordinator's brain for restores: a pure state machine, events in, instructions out. No Ray, no I/O, no clock.

For one candidate checkpoint after the other, the newest first: every rank matches it with its own state, servers fetch what can't
be mapped, every rank verifies, and only when all have done so does any rank set a value. A damaged candidate sends everybody to
the next one; a state that doesn't fit ends the restore.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rl_ckpt.errors import CheckpointError, CorruptionError, InvalidInputError, SaveTimeoutError, WorkerFailuresError
from rl_ckpt.format.manifest import Manifest
from rl_ckpt.format.shard_file import ALIGNMENT
from rl_ckpt.options import Options
from rl_ckpt.plan.spread import ChunkId, ServerFetch, canonical_chunks, spread
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
    Sources,
    TryNext,
    Verified,
    VerifyReply,
)

OPENING, MATCHING, FETCHING, PASSING, VERIFYING, OVER = (
    "opening", "matching", "fetching", "passing", "verifying", "over",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Load:
    """Read the next candidate: answer with `loaded`, or `failed`. `tried` are the ids that were damaged."""

    key: str
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

    key: str
    server: str
    order: FetchOrder


@dataclass(frozen=True, slots=True)
class Forget:
    """Have the servers give up the restore's memory."""

    key: str
    servers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Arm:
    """Call `timed_out(key, attempt, state)` after so many seconds."""

    key: str
    attempt: int
    state: str
    seconds: float


Instruction = Load | Answer | Fetch | Forget | Arm


@dataclass(slots=True)
class Restore:
    """One restore under way."""

    key: str
    step: int | None
    world_size: int
    state: str = OPENING
    attempt: int = 0
    joined: set[int] = field(default_factory=set)
    manifest: Manifest | None = None
    mappable: bool = False
    fell_back: dict[str, str] = field(default_factory=dict)
    matched: dict[int, Matched] = field(default_factory=dict)
    verified: dict[int, str] = field(default_factory=dict)
    offsets: dict[str, dict[ChunkId, int]] = field(default_factory=dict)
    """Where each chunk goes in each server's restore memory."""
    memory: dict[str, str] = field(default_factory=dict)
    """File of each server's restore memory."""
    passes: dict[str, FetchOrder] = field(default_factory=dict)
    """Second round: what servers take from peers."""
    awaited: set[str] = field(default_factory=set)
    bytes_from: dict[str, int] = field(default_factory=dict)
    told: set[int] = field(default_factory=set)
    failure: Failure | None = None


class RestoreMachine:
    """All restores of a run. Every method is an event and returns what is to be done about it."""

    def __init__(self, options: Options) -> None:
        """No restores yet."""
        self._options = options
        self._restores: dict[str, Restore] = {}

    def open(self, message: OpenRestore) -> list[Instruction]:
        """A rank takes part, or asks for the next candidate."""
        restore = self._restores.get(message.key)
        if restore is not None and restore.failure is not None and message.rank in restore.told:
            restore = None
        out: list[Instruction] = []
        if restore is None:
            restore = Restore(message.key, message.step, message.world_size)
            self._restores[message.key] = restore
            out.append(Arm(restore.key, 0, OPENING, self._options.join_timeout_s))
        if restore.failure is not None:
            return [*out, self._tell(restore, message.rank, restore.failure)]
        if message.world_size != restore.world_size or not 0 <= message.rank < restore.world_size:
            text = f"rank {message.rank} of {message.world_size} can't join a restore of {restore.world_size} workers"
            return [*out, *self._fail(restore, InvalidInputError(text), also=message.rank)]
        restore.joined.add(message.rank)
        if len(restore.joined) < restore.world_size:
            return out
        return [*out, Load(restore.key, restore.step, tuple(restore.fell_back))]

    def loaded(self, key: str, manifest: Manifest, data: bytes, mappable: bool, damaged: dict[str, str]) -> list[Instruction]:
        """The candidate's manifest; `mappable` where workers can map the store's files."""
        restore = self._restores.get(key)
        if restore is None or restore.state != OPENING:
            return []
        restore.manifest, restore.mappable, restore.state = manifest, mappable, MATCHING
        restore.fell_back |= damaged
        candidate = Candidate(data, restore.fell_back)
        answers: list[Instruction] = [Answer(key, rank, candidate) for rank in range(restore.world_size)]
        return [*answers, Arm(key, restore.attempt, MATCHING, self._options.join_timeout_s)]

    def match(self, message: Matched) -> list[Instruction]:
        """A rank says what it needs, or what doesn't fit."""
        restore = self._restores.get(message.key)
        if restore is None or restore.failure is not None:
            failure = restore.failure if restore else None
            return [Answer(message.key, message.rank, failure or _gone())]
        restore.matched[message.rank] = message
        if len(restore.matched) < restore.world_size:
            return []
        problems = {rank: m.problems for rank, m in sorted(restore.matched.items()) if m.problems}
        if problems:
            lines = [f"rank {rank}: {line}" for rank, p in problems.items() for line in p.lines()]
            text = (
                f"checkpoint {restore.manifest.id if restore.manifest else ''} does not fit the workers' states (no worker was "
                "changed):\n  " + "\n  ".join(lines) + "\nuse `select`, `rename`, or `strict=False` to restore what fits"
            )
            return self._fail(restore, InvalidInputError(text))
        return self._files(restore) if restore.mappable else self._fetch(restore)

    def _files(self, restore: Restore) -> list[Instruction]:
        restore.state = VERIFYING
        chunks = [chunk for m in restore.matched.values() for chunk in m.needs]
        restore.bytes_from = {"files": sum(_bytes(restore, chunk) for chunk in chunks)}
        answers: list[Instruction] = [Answer(restore.key, rank, Sources()) for rank in restore.matched]
        return [*answers, Arm(restore.key, restore.attempt, VERIFYING, self._options.write_timeout_s)]

    def _fetch(self, restore: Restore) -> list[Instruction]:
        assert restore.manifest is not None
        twins = canonical_chunks(restore.manifest)
        needs: dict[str, set[ChunkId]] = {}
        for m in restore.matched.values():
            needs.setdefault(m.server, set()).update(twins[chunk] for chunk in m.needs)
        plan = spread(restore.manifest, needs)
        restore.state = FETCHING
        sizes = {server: self._lay_out(restore, server, chunks) for server, chunks in needs.items()}
        orders = {server: self._store_order(restore, server, plan[server], sizes[server]) for server in plan}
        restore.passes = {
            server: FetchOrder(restore.key, sizes[server], peers=self._peer_items(restore, server, plan[server]))
            for server in plan
            if plan[server].peers
        }
        restore.awaited = set(orders)
        restore.bytes_from = {"store": 0, "peers": 0}
        out: list[Instruction] = [Fetch(restore.key, server, order) for server, order in orders.items()]
        return [*out, Arm(restore.key, restore.attempt, FETCHING, self._options.write_timeout_s)]

    def _lay_out(self, restore: Restore, server: str, chunks: set[ChunkId]) -> int:
        offset, places = 0, {}
        for chunk in sorted(chunks):
            places[chunk] = offset
            offset += -(-_bytes(restore, chunk) // ALIGNMENT) * ALIGNMENT
        restore.offsets[server] = places
        return offset

    def _store_order(self, restore: Restore, server: str, fetch: ServerFetch, size: int) -> FetchOrder:
        assert restore.manifest is not None
        files: dict[str, list[FetchItem]] = {}
        for chunk in fetch.store:
            saved = restore.manifest.arrays[chunk[0]].chunks[chunk[1]]
            item = FetchItem(saved.offset, restore.offsets[server][chunk], saved.bytes, bytes.fromhex(saved.digest))
            files.setdefault(restore.manifest.files[saved.file].name, []).append(item)
        return FetchOrder(restore.key, size, files={name: tuple(items) for name, items in files.items()})

    def _peer_items(self, restore: Restore, server: str, fetch: ServerFetch) -> dict[str, tuple[FetchItem, ...]]:
        assert restore.manifest is not None
        out = {}
        for peer, chunks in fetch.peers.items():
            saved = [(chunk, restore.manifest.arrays[chunk[0]].chunks[chunk[1]]) for chunk in chunks]
            out[peer] = tuple(
                FetchItem(restore.offsets[peer][chunk], restore.offsets[server][chunk], s.bytes, bytes.fromhex(s.digest))
                for chunk, s in saved
            )
        return out

    def fetched(self, key: str, server: str, done: FetchDone) -> list[Instruction]:
        """A server has brought in what it was told to."""
        restore = self._restores.get(key)
        if restore is None or restore.state not in (FETCHING, PASSING) or server not in restore.awaited:
            return []
        if done.damaged:
            return self._next(restore, done.damaged)
        restore.awaited.discard(server)
        restore.memory[server] = done.memory
        source = "store" if restore.state == FETCHING else "peers"
        restore.bytes_from[source] += done.bytes
        if restore.awaited:
            return []
        if restore.state == FETCHING and restore.passes:
            restore.state, restore.awaited = PASSING, set(restore.passes)
            return [Fetch(key, to, order) for to, order in restore.passes.items()]
        restore.state = VERIFYING
        return [Answer(key, rank, self._sources(restore, m)) for rank, m in restore.matched.items()]

    def _sources(self, restore: Restore, matched: Matched) -> Sources:
        assert restore.manifest is not None
        twins = canonical_chunks(restore.manifest)
        places = restore.offsets[matched.server]
        return Sources(restore.memory[matched.server], tuple(places[twins[chunk]] for chunk in matched.needs))

    def verify(self, message: Verified) -> list[Instruction]:
        """A rank has looked at its chunks."""
        restore = self._restores.get(message.key)
        if restore is None or restore.failure is not None:
            failure = restore.failure if restore else None
            return [Answer(message.key, message.rank, failure or _gone())]
        restore.verified[message.rank] = message.damaged
        if len(restore.verified) < restore.world_size:
            return []
        damaged = [text for text in restore.verified.values() if text]
        if damaged:
            return self._next(restore, damaged[0])
        restore.state = OVER
        answers: list[Instruction] = [Answer(message.key, r, Apply(restore.bytes_from)) for r in range(restore.world_size)]
        return [*answers, Arm(message.key, restore.attempt, OVER, self._options.write_timeout_s)]

    def applied(self, key: str, rank: int) -> list[Instruction]:
        """A rank has set its state, or failed to: it needs no memory any more."""
        restore = self._restores.get(key)
        if restore is None or restore.state != OVER:
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
        fresh = Restore(restore.key, None, restore.world_size, attempt=restore.attempt + 1, fell_back=restore.fell_back)
        self._restores[restore.key] = fresh
        answers: list[Instruction] = [Answer(restore.key, rank, TryNext()) for rank in waiting]
        return [*servers, *answers, Arm(fresh.key, fresh.attempt, OPENING, self._options.join_timeout_s)]

    def failed(self, key: str, error: CheckpointError) -> list[Instruction]:
        """The store or a server failed, or there is no (other) candidate."""
        restore = self._restores.get(key)
        return self._fail(restore, error) if restore is not None and restore.failure is None else []

    def lost(self, key: str, rank: int, world_size: int, failure: Failure) -> list[Instruction]:
        """A rank can't go on."""
        restore = self._restores.get(key)
        if restore is None:
            restore = self._restores[key] = Restore(key, None, world_size)
        if restore.failure is not None:
            restore.told.add(rank)
            return []
        if restore.state == OVER:
            return self.applied(key, rank)
        error = failure.error()
        if not isinstance(error, InvalidInputError | WorkerFailuresError):
            error = WorkerFailuresError(f"rank {rank}: {failure.message}", {rank: failure.message})
        return self._fail(restore, error, also=rank)

    def timed_out(self, key: str, attempt: int, state: str) -> list[Instruction]:
        """The time for a state is over."""
        restore = self._restores.get(key)
        if restore is None or restore.attempt != attempt or restore.state != state or restore.failure is not None:
            return []
        if state == OVER:
            return self._end(restore)
        done: Sequence[int] = {OPENING: restore.joined, MATCHING: restore.matched}.get(state, restore.verified)  # type: ignore[assignment]
        missing = sorted(set(range(restore.world_size)) - set(done))
        text = f"restore: ranks {missing} did not get past {state!r} in time; raise `join_timeout_s` or `write_timeout_s`"
        return self._fail(restore, SaveTimeoutError(text))

    def _fail(self, restore: Restore, error: CheckpointError, also: int | None = None) -> list[Instruction]:
        state_of = {OPENING: restore.joined, MATCHING: restore.matched, VERIFYING: restore.verified}
        waiting = set(state_of.get(restore.state, restore.matched))
        if also is not None:
            waiting.add(also)
        restore.failure = Failure.of(error)
        out = [*self._forget(restore)]
        for rank in sorted(waiting):
            out.append(self._tell(restore, rank, restore.failure))
        return out

    def _tell(self, restore: Restore, rank: int, failure: Failure) -> Answer:
        restore.told.add(rank)
        if len(restore.told) == restore.world_size:
            self._restores.pop(restore.key, None)
        return Answer(restore.key, rank, failure)

    def _forget(self, restore: Restore) -> list[Instruction]:
        servers = tuple(sorted(restore.offsets))
        return [Forget(restore.key, servers)] if servers else []

    def _end(self, restore: Restore) -> list[Instruction]:
        self._restores.pop(restore.key, None)
        return self._forget(restore)


def _bytes(restore: Restore, chunk: ChunkId) -> int:
    assert restore.manifest is not None
    return restore.manifest.arrays[chunk[0]].chunks[chunk[1]].bytes


def _gone() -> Failure:
    return Failure.of(WorkerFailuresError("this restore is over already; start it again on all workers"))
