"""The coordinator's brain for saves: a pure state machine, events in, instructions out. No Ray, no I/O, no clock.

One save goes through
    joining → waiting → reserving → staging → writing → committing → done
and from each of them to failed. `waiting` is for one of two generations of staging memory; commits keep the order in
which saves left `waiting`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rl_ckpt.errors import (
    CheckpointError,
    InvalidInputError,
    SaveSkippedError,
    SaveTimeoutError,
    WorkerFailuresError,
)
from rl_ckpt.options import Options
from rl_ckpt.plan.deal import SavePlan, Stored, Written, deal, settle
from rl_ckpt.plan.merge import Merged, merge
from rl_ckpt.runtime.messages import Failure, JoinSave, SaveDone, SaveOrders, Staged, WriteOrder
from rl_ckpt.store.committer import SaveRequest

GENERATIONS = 2
_FAILED_KEPT = 64  # failed saves that some ranks have not heard of yet

JOINING, WAITING, RESERVING, STAGING, WRITING, COMMITTING, DONE, FAILED = (
    "joining", "waiting", "reserving", "staging", "writing", "committing", "done", "failed",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Name:
    """Ask the committer for the checkpoint's id and what is stored already; answer with `named`."""

    token: str
    request: SaveRequest


@dataclass(frozen=True, slots=True)
class ReserveMemory:
    """Have a server size a generation of its staging memory; answer with `reserved`."""

    token: str
    server: str
    generation: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Order:
    """Answer a rank that joined."""

    key: str
    rank: int
    reply: SaveOrders | Failure


@dataclass(frozen=True, slots=True)
class Write:
    """Have a server write its files; answer with `written`."""

    token: str
    server: str
    order: WriteOrder


@dataclass(frozen=True, slots=True)
class Commit:
    """Have the committer commit; answer with `committed`."""

    token: str
    save: Save


@dataclass(frozen=True, slots=True)
class Finish:
    """Tell whoever waits for the save; where it failed, its attempt is abandoned."""

    token: str
    outcome: SaveDone | Failure
    checkpoint: str


@dataclass(frozen=True, slots=True)
class Arm:
    """Call `timed_out(token, state)` after so many seconds."""

    token: str
    state: str
    seconds: float


Instruction = Name | ReserveMemory | Order | Write | Commit | Finish | Arm


@dataclass(slots=True)
class Save:
    """One save under way."""

    key: str
    token: str
    """Of this save alone (its key comes again where ranks try again after a failure): tells late answers apart."""
    request: SaveRequest
    world_size: int
    state: str = JOINING
    joined: dict[int, JoinSave] = field(default_factory=dict)
    told: set[int] = field(default_factory=set)
    """Ranks that know that the save failed."""
    checkpoint: str = ""
    generation: int = -1
    merged: Merged | None = None
    plan: SavePlan | None = None
    stored: Stored = field(default_factory=dict)
    memory: dict[str, str] = field(default_factory=dict)
    """File of the generation, by server."""
    staged: dict[int, tuple[bytes, ...]] = field(default_factory=dict)
    written: dict[str, Sequence[Written]] = field(default_factory=dict)
    stall_s: float = 0.0
    failure: Failure | None = None

    def digests(self) -> dict[tuple[str, int], bytes]:
        """Of what was staged, by server and offset."""
        assert self.plan is not None
        return {
            (self.joined[rank].server, item.offset): digest
            for rank, digests in self.staged.items()
            for item, digest in zip(self.plan.stage[rank], digests, strict=True)
        }


class SaveMachine:
    """All saves of a run. Every method is an event and returns what is to be done about it."""

    def __init__(self, options: Options) -> None:
        """No saves yet."""
        self.options = options
        self._saves: dict[str, Save] = {}
        self._begun = 0
        self._free = list(range(GENERATIONS))
        self._queue: list[str] = []  # waiting for a generation, in the order in which they were complete
        self._line: list[str] = []  # hold a generation, in the order in which they must commit
        self._reserved: dict[tuple[str, int], tuple[int, str]] = {}  # server, generation → bytes, file

    def busy(self) -> bool:
        """Whether any save is under way."""
        return any(save.state not in (DONE, FAILED) for save in self._saves.values())

    def under_way(self, key: str) -> bool:
        """Whether all ranks of a save have joined: from there on it is timed here, and fails here if it hangs."""
        save = self._saves.get(key)
        return save is not None and save.state not in (JOINING, FAILED)

    def states(self) -> dict[str, str]:
        """State of every save under way or failed, by key."""
        return {key: save.state for key, save in self._saves.items()}

    def join(self, message: JoinSave) -> list[Instruction]:
        """A rank takes part."""
        save = self._saves.get(message.key)
        if save is not None and save.state == FAILED and message.rank in save.told:
            save = None  # this rank knows of the failure and tries again
        out: list[Instruction] = []
        if save is None:
            request = SaveRequest(message.step, message.metrics, message.tag, message.parent)
            save = self._begin(message.key, request, message.world_size)
            out.append(Arm(save.token, JOINING, self.options.join_timeout_s))
        if save.failure is not None:
            return [self._tell(save, message.rank, save.failure)]
        if save.state in (STAGING, WRITING, COMMITTING):
            # It goes on without this call: what is staged must not be lost by it.
            text = f"step {message.step} is being saved already; wait for its result, or save a later step"
            return [Order(save.key, message.rank, Failure.of(InvalidInputError(text)))]
        problem = _join_problem(save, message)
        if problem:
            return [*out, *self._fail(save, InvalidInputError(problem), also=message.rank)]
        save.joined[message.rank] = message
        if len(save.joined) < save.world_size:
            return out
        return out + self._complete(save)

    def _begin(self, key: str, request: SaveRequest, world_size: int) -> Save:
        self._begun += 1
        save = self._saves[key] = Save(key, f"{key}#{self._begun}", request, world_size)
        return save

    def _current(self, token: str) -> Save | None:
        """The save of a token, if it is still known and no later one has its key."""
        save = self._saves.get(token.rpartition("#")[0])
        return save if save is not None and save.token == token else None

    def _complete(self, save: Save) -> list[Instruction]:
        twin = next((s for s in self._saves.values() if s is not save and self._same_step(s, save)), None)
        if twin is not None:
            text = f"step {save.request.step} is being saved already; wait for its result, or save a later step"
            return self._fail(save, InvalidInputError(text))
        try:  # before the run is touched: states that don't fit together leave no trace in it
            inventories = [save.joined[rank].inventory for rank in range(save.world_size)]
            save.merged = merge(inventories, save.joined[0].chunk_bytes)
        except InvalidInputError as error:
            return self._fail(save, error)
        if not self._free and self.options.when_busy == "skip":
            text = f"skipped: {GENERATIONS} saves are still being written; save less often, or use when_busy='wait'"
            return self._fail(save, SaveSkippedError(text))
        save.state = WAITING
        self._queue.append(save.key)
        return self._next_generation()

    def _same_step(self, other: Save, save: Save) -> bool:
        return other.state not in (JOINING, DONE, FAILED) and other.request.step == save.request.step

    def _next_generation(self) -> list[Instruction]:
        if not self._free or not self._queue:
            return []
        save = self._saves[self._queue.pop(0)]
        save.generation = self._free.pop(0)
        self._line.append(save.key)
        save.state = RESERVING
        return [Name(save.token, save.request), Arm(save.token, RESERVING, self.options.write_timeout_s)]

    def named(self, token: str, checkpoint: str, stored: Stored) -> list[Instruction]:
        """The committer has checked the step and named the checkpoint."""
        save = self._current(token)
        if save is None or save.state != RESERVING:
            # It failed meanwhile. If the name were not given up, the step would stay taken.
            return [Finish(token, (save and save.failure) or _over(), checkpoint)]
        save.checkpoint = checkpoint
        assert save.merged is not None
        save.stored = stored
        servers = [save.joined[rank].server for rank in range(save.world_size)]
        save.plan = deal(save.merged, servers, checkpoint, stored, self.options.write_streams, self.options.file_bytes)
        out: list[Instruction] = []
        for server, size in save.plan.staged_bytes.items():
            have, file = self._reserved.get((server, save.generation), (0, ""))
            if have < size:
                out.append(ReserveMemory(token, server, save.generation, size))
            else:
                save.memory[server] = file
        return out or self._stage(save)

    def reserved(self, token: str, server: str, file: str) -> list[Instruction]:
        """A server has sized its generation; `file` is where workers find it."""
        save = self._current(token)
        if save is None or save.plan is None or save.state != RESERVING:
            return []
        save.memory[server] = file
        self._reserved[server, save.generation] = (save.plan.staged_bytes[server], file)
        if set(save.memory) != set(save.plan.staged_bytes):
            return []
        return self._stage(save)

    def _stage(self, save: Save) -> list[Instruction]:
        assert save.plan is not None
        save.state = STAGING
        orders: list[Instruction] = [Arm(save.token, STAGING, self.options.join_timeout_s)]
        for rank, join in save.joined.items():
            items = tuple(save.plan.stage[rank])
            orders.append(Order(save.key, rank, SaveOrders(save.checkpoint, save.memory.get(join.server, ""), items)))
        return orders

    def staged(self, message: Staged) -> list[Instruction]:
        """A rank has staged its chunks."""
        save = self._saves.get(message.key)
        if save is None or save.state != STAGING or save.plan is None or save.checkpoint != message.checkpoint:
            return []
        save.staged[message.rank] = message.digests
        save.stall_s = max(save.stall_s, message.stall_s)
        if len(save.staged) < save.world_size:
            return []
        settle(save.plan, save.digests(), save.stored)
        save.state = WRITING
        out: list[Instruction] = [
            Write(save.token, server, WriteOrder(save.memory[server], tuple(files)))
            for server, files in save.plan.files.items()
        ]
        return [Arm(save.token, WRITING, self.options.write_timeout_s), *out] if out else self._try_commit()

    def written(self, token: str, server: str, written: Sequence[Written]) -> list[Instruction]:
        """A server has written its files."""
        save = self._current(token)
        if save is None or save.state != WRITING:
            return []
        save.written[server] = written
        return self._try_commit()

    def _try_commit(self) -> list[Instruction]:
        """Commits the oldest save that holds a generation, once it is written: commits keep the order of the saves."""
        if not self._line:
            return []
        save = self._saves[self._line[0]]
        if save.state != WRITING or save.plan is None or set(save.written) != set(save.plan.files):
            return []
        save.state = COMMITTING
        return [Commit(save.token, save)]

    def committed(self, token: str, done: SaveDone) -> list[Instruction]:
        """The checkpoint exists."""
        save = self._current(token)
        if save is None or save.state != COMMITTING:
            return []
        save.state = DONE
        del self._saves[save.key]
        return [Finish(token, done, save.checkpoint), *self._give_up_generation(save)]

    def failed(self, token: str, error: CheckpointError) -> list[Instruction]:
        """The committer or a server failed."""
        save = self._current(token)
        return self._fail(save, error) if save is not None and save.state not in (DONE, FAILED) else []

    def lost(self, key: str, rank: int, world_size: int, failure: Failure) -> list[Instruction]:
        """A rank can't go on: it died, its state can't be saved, or it changed while it was staged."""
        save = self._saves.get(key)
        if save is None:
            save = self._begin(key, SaveRequest(0), world_size)
        if save.state == FAILED:
            save.told.add(rank)
            self._drop_told(save)
        if save.state in (WRITING, COMMITTING, DONE, FAILED):
            return []  # what it had is staged already: nothing is lost
        error = failure.error()
        if not isinstance(error, InvalidInputError | WorkerFailuresError):
            error = WorkerFailuresError(f"rank {rank}: {failure.message}", {rank: failure.message})
        return self._fail(save, error, also=rank)

    def timed_out(self, token: str, state: str) -> list[Instruction]:
        """The time for a state is over."""
        save = self._current(token)
        if save is None or save.state != state:
            return []
        if state == FAILED:
            del self._saves[save.key]
            return []
        return self._fail(save, SaveTimeoutError(_timeout_text(save, self.options)))

    def _fail(self, save: Save, error: CheckpointError, also: int | None = None) -> list[Instruction]:
        if save.plan is not None:
            # A slow rank may still copy into this generation. The next save gets a new file, so that the straggler
            # writes where nobody looks.
            for server in save.plan.staged_bytes:
                self._reserved.pop((server, save.generation), None)
        save.state, save.failure = FAILED, Failure.of(error)
        save.told |= set(save.staged)  # they wait for the save's outcome, and hear it from there
        waiting = [rank for rank in save.joined if rank not in save.staged]
        out: list[Instruction] = [self._tell(save, rank, save.failure) for rank in waiting]
        if also is not None and also not in waiting:
            out.append(self._tell(save, also, save.failure))
        if save.key in self._queue:
            self._queue.remove(save.key)
        failed = [key for key, other in self._saves.items() if other.state == FAILED]
        for key in failed[:-_FAILED_KEPT]:
            del self._saves[key]
        if save.key in self._saves:  # ranks that have not heard of it: if they never ask, it is forgotten
            out.append(Arm(save.token, FAILED, self.options.join_timeout_s))
        self._drop_told(save)
        return [*out, Finish(save.token, save.failure, save.checkpoint), *self._give_up_generation(save)]

    def _tell(self, save: Save, rank: int, failure: Failure) -> Order:
        save.told.add(rank)
        self._drop_told(save)
        return Order(save.key, rank, failure)

    def _drop_told(self, save: Save) -> None:
        if len(save.told) >= save.world_size and self._current(save.token) is save:
            del self._saves[save.key]

    def _give_up_generation(self, save: Save) -> list[Instruction]:
        if save.key not in self._line:
            return []
        self._line.remove(save.key)
        self._free.append(save.generation)
        return [*self._try_commit(), *self._next_generation()]


def _over() -> Failure:
    return Failure.of(WorkerFailuresError("this save is over already; save again"))


def _join_problem(save: Save, message: JoinSave) -> str | None:
    if not 0 <= message.rank < message.world_size:
        return f"rank {message.rank} is not in 0 … {message.world_size - 1}"
    if message.world_size != save.world_size:
        return f"rank {message.rank} says there are {message.world_size} workers, others say {save.world_size}"
    if message.rank in save.joined:
        return f"two workers joined the save of step {message.step} as rank {message.rank}; give each its own rank"
    if any(other.chunk_bytes != message.chunk_bytes for other in save.joined.values()):
        return "the ranks cut their arrays by different `chunk_bytes`; give all Checkpointers of a run the same options"
    if message.step != save.request.step:
        return f"rank {message.rank} saves step {message.step}, others step {save.request.step}"
    return None


def _timeout_text(save: Save, options: Options) -> str:
    step, limit_s = save.request.step, options.join_timeout_s
    if save.state == JOINING:
        missing = sorted(set(range(save.world_size)) - set(save.joined))
        return f"step {step}: ranks {missing} did not join within {limit_s} s; raise `join_timeout_s` if they are busy"
    if save.state == STAGING:
        missing = sorted(set(range(save.world_size)) - set(save.staged))
        return f"step {step}: ranks {missing} did not stage within {limit_s} s; raise `join_timeout_s` if they are busy"
    if save.state == RESERVING:
        limit_s = options.write_timeout_s
        return f"step {step}: no answer from the store or no staging memory after {limit_s} s; look at both"
    files: Mapping[str, object] = save.plan.files if save.plan else {}
    late = sorted(set(files) - set(save.written)) or "an earlier save, which this one waits for,"
    limit_s = options.write_timeout_s
    return f"step {step}: {late} did not finish writing within {limit_s} s; raise `write_timeout_s`, look at the store"
