"""The coordinator's brain for restores: a pure state machine, events in, instructions out. No Ray, no I/O, no clock.

For one candidate checkpoint after the other, the newest first: every rank matches it with its own state, every chunk
gets a source (plan/sources.py), servers bring in what ranks can't read in place, all chunks are verified, and only when
all are good does any rank set a value. A source that turns out to be bad is left out, and its chunks are planned anew,
those alone. When a chunk has none left, it is looked for in other checkpoints; only then does everybody go to the next
candidate. A state that doesn't fit ends the restore.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rl_ckpt.errors import (
    CheckpointError,
    CorruptionError,
    InvalidInputError,
    SaveTimeoutError,
    StorageError,
    WorkerFailuresError,
)
from rl_ckpt.format.manifest import Manifest
from rl_ckpt.options import Options
from rl_ckpt.plan.parts import Holdings
from rl_ckpt.plan.sources import InStore, Known, plan_sources
from rl_ckpt.plan.spread import ChunkId
from rl_ckpt.runtime import restore_finding, restore_orders
from rl_ckpt.runtime.messages import (
    Apply,
    Candidate,
    Failure,
    FetchDone,
    FetchOrder,
    Matched,
    OpenRestore,
    TryNext,
    Verified,
)
from rl_ckpt.runtime.restore_steps import (
    AWAITING,
    FAILED,
    FETCHING,
    MATCHING,
    OPENING,
    OVER,
    SEARCHING,
    VERIFYING,
    Answer,
    Arm,
    Await,
    Fetch,
    Forget,
    Instruction,
    Load,
    Restore,
    Search,
)
from rl_ckpt.state.collector import paused

_FAILED_KEPT = 64  # failed restores that some ranks have not heard of yet
_ROUNDS = 32  # of sources: each leaves out at least one; more is a store that answers something else every time
_TRIES = 30  # to reach a server that is being restarted


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
        self._dead: set[str] = set()
        self._over: dict[str, Restore] = {}
        """By token: ranks are still copying out of its memory, and may open the next one."""

    def under_way(self, key: str) -> bool:
        """Whether all ranks of a restore have joined: from there on it is timed here, and fails here if it hangs."""
        restore = self._restores.get(key)
        timed = restore is not None and restore.failure is None and (restore.state != OPENING or restore.fell_back)
        return bool(timed) or any(other.key == key for other in self._over.values())

    def under_way_now(self) -> list[Restore]:
        """Restores that have not failed; those of which ranks are still copying too."""
        return [r for r in [*self._restores.values(), *self._over.values()] if r.failure is None]

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
        self,
        token: str,
        manifest: Manifest,
        data: bytes,
        mappable: bool,
        damaged: dict[str, str],
        holdings: Holdings | None = None,
        notice: str = "",
        coming: bool = False,
    ) -> list[Instruction]:
        """The candidate.

        Args:
            token: Of the `Load`.
            manifest: Its manifest.
            data: The same as bytes.
            mappable: Whether workers can read the store's files.
            damaged: Newer checkpoints that can't be used: id to why.
            holdings: What memory has of it.
            notice: As in `RestoreReport`.
            coming: Whether it is being brought into memory: chunks are then chosen when that is over.
        """
        restore = self._current(token)
        if restore is None or restore.state != OPENING:
            return [Forget(token, (), ())]
        restore.manifest, restore.mappable, restore.state = manifest, mappable, MATCHING
        restore.known, restore.notice, restore.coming = Known(manifest, holdings), notice, coming
        for server in self._dead:
            restore.known.lose(server)
        restore.fell_back |= damaged
        early = mappable and holdings is None and not coming
        answers: list[Instruction] = []
        for ranks in restore.neighbours().values():
            for i, rank in enumerate(ranks):
                candidate = Candidate(token, data, restore.fell_back, i, len(ranks), early, notice)
                answers.append(Answer(restore.key, rank, candidate))
        return [*answers, Arm(token, MATCHING, self.options.join_timeout_s)]

    def match(self, message: Matched) -> list[Instruction]:
        """A rank says what it needs, or what doesn't fit."""
        restore = self._restores.get(message.key)
        if restore is None or restore.token != message.token:
            return [Answer(message.key, message.rank, _gone(message.rank))]
        if restore.failure is not None:
            return [self._tell(restore, message.rank, restore.failure)]
        restore.matched[message.rank] = message
        if len(restore.matched) < restore.world_size:
            return []
        assert restore.manifest is not None
        assert restore.known is not None
        problems = {rank: m.problems for rank, m in sorted(restore.matched.items()) if m.problems}
        if problems:
            lines = [f"rank {rank}: {line}" for rank, p in problems.items() for line in p.lines()]
            text = (
                f"checkpoint {restore.manifest.id} does not fit the workers' states (no "
                "worker was changed):\n  "
                + "\n  ".join(lines)
                + "\nuse `select`, `rename`, or `strict=False` to restore what fits"
            )
            return self._fail(restore, InvalidInputError(text))
        if restore.coming:
            restore.state = AWAITING
            return [Await(restore.token, restore.manifest.id)]
        return self._choose(restore)

    def brought(self, token: str, holdings: Holdings | None) -> list[Instruction]:
        """The candidate is in memory by now, as far as it can be.

        Args:
            token: Of the `Await`.
            holdings: What memory has of it.
        """
        restore = self._current(token)
        if restore is None or restore.state != AWAITING:
            return [Forget(token, (), ())]
        assert restore.manifest is not None
        restore.known = Known(restore.manifest, holdings)
        for server in self._dead:
            restore.known.lose(server)
        return self._choose(restore)

    def _choose(self, restore: Restore) -> list[Instruction]:
        """All ranks have said what they need, and it fits."""
        assert restore.known is not None
        with paused():  # 100,000 chunks are as many records, and none of them is garbage
            if restore.mappable and restore.known.holdings is None:
                return self._tell_sources(restore)
            return self._find_sources(restore, restore.needs())

    def _find_sources(self, restore: Restore, missing: dict[str, set[ChunkId]]) -> list[Instruction]:
        """Chooses sources of chunks, by server, and has brought in what ranks can't read in place."""
        assert restore.known is not None
        missing = {server: chunks for server, chunks in missing.items() if chunks}
        plan = plan_sources(restore.known, missing, restore.mappable)
        fresh = plan.lost - restore.searched
        if fresh:
            restore.searched |= fresh
            restore.missing, restore.state = missing, SEARCHING
            saved = [restore.known.saved(chunk) for chunk in sorted(fresh)]
            wanted = tuple({(bytes.fromhex(c.digest), c.bytes): None for c in saved})
            skip = tuple((place.file, place.offset) for place in restore.known.bad())
            arm = self._arm(restore)
            return [Search(restore.token, wanted, skip), arm]
        if plan.lost or len(restore.rounds) == _ROUNDS:
            return self._give_up(restore, min(plan.lost or set().union(*missing.values())))
        key = f"{restore.token}+{len(restore.rounds)}" if restore.rounds else restore.token
        now = restore_orders.lay_out(restore.known, plan, key)
        restore_finding.note(restore, plan, now)
        orders = restore_orders.orders(restore.known, now)
        if not orders:
            return self._tell_sources(restore)
        restore.state, restore.awaited = FETCHING, set(orders)
        out: list[Instruction] = [Fetch(restore.token, server, order) for server, order in orders.items()]
        return [*out, self._arm(restore)]

    def _arm(self, restore: Restore) -> Arm:
        """The timer of a state that comes again with every round."""
        return Arm(restore.token, restore.state, self.options.write_timeout_s, len(restore.rounds))

    def searched(self, token: str, found: Mapping[tuple[bytes, int], Sequence[tuple[str, int]]]) -> list[Instruction]:
        """Places (file and offset) where other checkpoints say that the chunks sought are."""
        restore = self._current(token)
        if restore is None or restore.state != SEARCHING:
            return []
        assert restore.known is not None
        for chunk in restore.searched:
            saved = restore.known.saved(chunk)
            places = found.get((bytes.fromhex(saved.digest), saved.bytes), ())
            restore.known.add(chunk, [InStore(file, offset) for file, offset in places])
        return self._find_sources(restore, restore.missing)

    def fetched(self, token: str, server: str, done: FetchDone) -> list[Instruction]:
        """A server has brought in what it was told to, or as much of it as it could."""
        restore = self._current(token)
        if restore is None or restore.state != FETCHING or server not in restore.awaited:
            return []
        restore.awaited.discard(server)
        now = restore.rounds[-1]
        now.memory[server] = done.memory
        for source, size in done.bytes_from.items():
            restore.bytes_from[source] = restore.bytes_from.get(source, 0) + size
        restore_finding.take_failed(restore, server, done)
        if restore.awaited:
            return []
        restore_finding.take_cut_off(restore)
        missing, restore.missing = restore.missing, {}
        return self._find_sources(restore, missing) if missing else self._tell_sources(restore)

    def unreachable(self, token: str, server: str, order: FetchOrder, why: str) -> list[Instruction]:
        """A server that has an order could not be reached: it is told again, as Ray restarts it."""
        restore = self._current(token)
        if restore is None or restore.state != FETCHING or server not in restore.awaited:
            return []
        tries = restore.tries[server] = restore.tries.get(server, 0) + 1
        if tries > _TRIES:
            return self._fail(restore, StorageError(why))
        return [Fetch(token, server, order)]

    def server_lost(self, server: str) -> list[Instruction]:
        """A node is dead: its memory is no source any more; restores of workers that are on it fail."""
        self._dead.add(server)
        out: list[Instruction] = []
        for restore in list(self._restores.values()):
            if restore.failure is not None:
                continue
            if restore.known is not None:
                restore.known.lose(server)
            ranks = [rank for rank, name in sorted(restore.servers.items()) if name == server]
            if ranks:
                text = f"ranks {ranks} are lost with their node (of shard server {server}); start them anew and restore"
                out += self._fail(restore, WorkerFailuresError(text, dict.fromkeys(ranks, text), ranks))
        return out

    def _tell_sources(self, restore: Restore) -> list[Instruction]:
        """Ranks are told where their chunks are: all, or those for whom that has changed."""
        restore.state = VERIFYING
        told = restore_orders.changes(restore) if restore.told_sources else restore_orders.sources(restore)
        restore.told_sources, restore.changed = True, {}
        for rank in told:
            restore.verified.pop(rank, None)
        answers: list[Instruction] = [Answer(restore.key, rank, found) for rank, found in told.items()]
        return [*answers, self._arm(restore)]

    def verify(self, message: Verified) -> list[Instruction]:
        """A rank has looked at its chunks."""
        restore = self._restores.get(message.key)
        if restore is None or restore.token != message.token:
            return [Answer(message.key, message.rank, _gone(message.rank))]
        if restore.failure is not None:
            return [self._tell(restore, message.rank, restore.failure)]
        restore.verified[message.rank] = message.bad
        if len(restore.verified) < restore.world_size:
            return []
        if any(restore.verified.values()):
            return self._find_sources(restore, restore_finding.take_bad(restore))
        restore.state = OVER
        for source, size in restore_orders.read_in_place(restore).items():
            restore.bytes_from[source] = restore.bytes_from.get(source, 0) + size
        self._over[restore.token] = self._restores.pop(restore.key)
        apply = Apply(restore.bytes_from, restore_finding.repaired(restore))
        answers: list[Instruction] = [Answer(message.key, r, apply) for r in range(restore.world_size)]
        return [*answers, Arm(restore.token, OVER, self.options.write_timeout_s)]

    def applied(self, key: str, rank: int, token: str = "") -> list[Instruction]:
        """A rank has set its state, or failed to: it needs no memory any more.

        Args:
            key: Of the restore.
            rank: Which.
            token: Of the candidate; empty where it is not known (the rank is dead): of the key's oldest.
        """
        over = [r for r in self._over.values() if r.key == key and rank in r.joined and token in ("", r.token)]
        if not over:
            return []
        over[0].joined.discard(rank)
        return [] if over[0].joined else self._end(over[0])

    def _give_up(self, restore: Restore, chunk: ChunkId) -> list[Instruction]:
        """A chunk has no source left."""
        assert restore.manifest is not None
        if chunk in restore.unread:  # an older checkpoint is no answer to a store that fails
            return self._fail(restore, StorageError(restore.unread[chunk]))
        nowhere = (
            f"{restore_finding.chunk_name(restore, chunk)} of checkpoint {restore.manifest.id} is nowhere to be had"
        )
        return self._next(restore, restore.damaged.get(chunk, nowhere))

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

    def timed_out(self, token: str, state: str, round: int = 0) -> list[Instruction]:
        """The time for a state is over; of an earlier round (see `Arm`) it says nothing."""
        if state == OVER:
            over = self._over.get(token)
            return self._end(over) if over is not None else []
        if state == FAILED:  # ranks that have not heard of it never asked: it is forgotten
            failed = self._restores.get(token.rpartition("#")[0])
            if failed is not None and failed.token == token and failed.failure is not None:
                del self._restores[failed.key]
            return []
        restore = self._current(token)
        if restore is None or (restore.state, len(restore.rounds)) != (state, round):
            return []
        if state == FETCHING:
            text = f"restore: {sorted(restore.awaited)} did not bring their chunks in in time; raise `write_timeout_s`"
        elif state == SEARCHING:
            text = "restore: the store did not give other checkpoints' manifests in time; raise `write_timeout_s`"
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
        if restore.manifest is None:
            return []
        servers = {server for each in restore.rounds for server in each.laid}
        forget = Forget(restore.token, tuple(sorted(servers)), tuple(each.key for each in restore.rounds))
        # Only now: whoever is told of a damaged copy gives up all of it, and ranks were reading there.
        return [forget, *restore.damaged_copies]

    def _end(self, restore: Restore) -> list[Instruction]:
        del self._over[restore.token]
        return self._forget(restore)


def _gone(rank: int) -> Failure:
    """The answer about a restore that is not known (any more): as a rule, of a coordinator that was lost."""
    text = "this restore is over already; start it again on all workers"
    return Failure.of(WorkerFailuresError(text, {rank: text}, [rank]))
