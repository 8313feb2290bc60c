"""The coordinator's brain for saves: a pure state machine, events in, instructions out. No Ray, no I/O, no clock.

One save goes through
    joining → waiting → reserving → staging → settling → writing → committing → done
and from each of them to failed. One that stays in memory goes from staging to landing, and from there to committing, an
urgent one to settling; so does what can't land. `waiting` is for a generation of staging memory; commits keep the order
in which saves left `waiting`. A save whose ranks all come with a state of the same shape as the last one's uses the
plan of that one again (plan/standing.py); its ranks stage while they join.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from rl_ckpt.errors import (
    CheckpointError,
    InvalidInputError,
    SaveSkippedError,
    WorkerFailuresError,
)
from rl_ckpt.options import Options
from rl_ckpt.plan.deal import SavePlan, Stored, Written, settle
from rl_ckpt.plan.merge import merge
from rl_ckpt.plan.standing import Standing, standing
from rl_ckpt.runtime.generations import GENERATIONS, generations
from rl_ckpt.runtime.messages import (
    Failure,
    JoinAgain,
    JoinSave,
    RepeatOrders,
    RepeatSave,
    Restages,
    SaveDone,
    SaveOrders,
    Staged,
    StagedObjects,
    WriteOrder,
)
from rl_ckpt.runtime.restaging import deal_out, reserve_annexes, take_over
from rl_ckpt.runtime.save_deaths import unknown_dead
from rl_ckpt.runtime.save_memory import SaveMemory
from rl_ckpt.runtime.save_steps import (
    COMMITTING,
    DEADLINE,
    DONE,
    FAILED,
    JOINING,
    LANDING,
    RESERVING,
    SETTLING,
    STAGING,
    WAITING,
    WRITING,
    Arm,
    Commit,
    Finish,
    Hold,
    Instruction,
    Land,
    LookUp,
    MakeRoom,
    Order,
    Save,
    Write,
)
from rl_ckpt.runtime.save_texts import join_problem, timeout, too_late
from rl_ckpt.store.committer import SaveRequest

_FAILED_KEPT = 64  # failed saves that some ranks have not heard of yet


class SaveMachine(SaveMemory):
    """All saves of a run. Every method is an event and returns what is to be done about it."""

    def __init__(self, options: Options, incarnation: str = "") -> None:
        """No saves yet.

        Args:
            options: Of the run.
            incarnation: Of the coordinator, so that its tokens, and what is named after them (plans, files of staging
                memory), are not those of one before it.
        """
        super().__init__(options)
        self._incarnation = incarnation
        self._begun = 0

    def configure(self, options: Options) -> None:
        """Takes a driver's options, from the next save on; what was planned by others does not stand any more."""
        if options != self.options:
            self.options, self._standing = options, None
            self._generations.resize(generations(options))

    def busy(self) -> bool:
        """Whether any save is under way."""
        return any(save.state not in (DONE, FAILED) for save in self._saves.values())

    def under_way(self, key: str) -> bool:
        """Whether all ranks of a save have joined: from there on it is timed here, and fails here if it hangs."""
        save = self._saves.get(key)
        return save is not None and save.state not in (JOINING, FAILED)

    def under_way_now(self) -> list[Save]:
        """Saves that are neither done nor failed."""
        return [save for save in self._saves.values() if save.state not in (DONE, FAILED)]

    def states(self) -> dict[str, str]:
        """State of every save under way or failed, by key."""
        return {key: save.state for key, save in self._saves.items()}

    # Joining.

    def join(self, message: JoinSave) -> list[Instruction]:
        """A rank takes part."""
        save, out = self._entered(message)
        if save is None:
            return out
        problem = join_problem(save, message)
        if problem:
            return [*out, *self._fail(save, InvalidInputError(problem), also=message.rank)]
        save.joined[message.rank] = message
        if message.server in self._gone:
            save.dead.add(message.rank)  # it said so before its node was lost
        save.prepare = message.prepare
        again = self._ask_again(save)
        if save.state == FAILED or len(save.joined) < save.world_size:
            return [*out, *again]
        return [*out, *again, *self._complete(save)]

    def repeat(self, message: RepeatSave) -> list[Instruction]:
        """A rank takes part with a state of the shape that it had in the last save."""
        save, out = self._entered(message)
        if save is None:
            return out
        plan = self._standing
        if plan is None or plan.id != message.plan or plan.world_size != message.world_size or save.joined:
            return [*out, Order(save.key, message.rank, JoinAgain())]
        problem = join_problem(save, message)
        if problem:
            return [*out, *self._fail(save, InvalidInputError(problem), also=message.rank)]
        first = next(iter(save.repeats.values()), message)
        if first.identities == message.identities:  # a thousand replicas: held once, not a thousand times
            message = msgspec.structs.replace(message, identities=first.identities)
        save.repeats[message.rank] = message
        if len(save.repeats) < save.world_size:
            return out
        return [*out, *self._complete_repeat(save, plan)]

    def _ask_again(self, save: Save) -> list[Instruction]:
        """Has the ranks that came with a state of the standing plan's shape come with an inventory."""
        if save.dead & save.repeats.keys():
            return self._fail(save, unknown_dead(save))
        again: list[Instruction] = [Order(save.key, rank, JoinAgain()) for rank in save.repeats]
        save.repeats.clear()
        return again

    def _entered(self, message: JoinSave | RepeatSave) -> tuple[Save | None, list[Instruction]]:
        """The save that a rank wants to take part in; None where it has its answer."""
        save, ended = self._saves.get(message.key), self.ended(message.key)
        if save is None and ended is not None:
            return None, [Order(message.key, message.rank, ended)]  # it was busy for so long
        if save is not None and save.state == FAILED and message.rank in save.told:
            save = None  # this rank knows of the failure and tries again
        out: list[Instruction] = []
        if save is None:
            request = SaveRequest(
                message.step, message.metrics, message.tag, message.parent, message.deadline_s, message.since
            )
            save = self._begin(message.key, request, message.world_size)
            out.append(Arm(save.token, JOINING, self.options.join_timeout_s))
            if request.deadline_s is not None:
                out.append(Arm(save.token, DEADLINE, request.deadline_s))
        if save.failure is not None:
            return None, [self._tell(save, message.rank, save.failure)]
        if save.state in (STAGING, LANDING, SETTLING, WRITING, COMMITTING):
            # It goes on without this call: what is staged must not be lost by it.
            text = f"step {message.step} is being saved already; wait for its result, or save a later step"
            return None, [Order(save.key, message.rank, Failure.of(InvalidInputError(text)))]
        return save, out

    def _begin(self, key: str, request: SaveRequest, world_size: int) -> Save:
        self._begun += 1
        save = self._saves[key] = Save(key, f"{key}#{self._incarnation}{self._begun}", request, world_size)
        return save

    def _current(self, token: str) -> Save | None:
        """The save of a token, if it is still known and no later one has its key."""
        save = self._saves.get(token.rpartition("#")[0])
        return save if save is not None and save.token == token else None

    def _complete(self, save: Save) -> list[Instruction]:
        joined, options = [save.joined[rank] for rank in range(save.world_size)], self.options
        inventories, chunk_bytes = [join.inventory for join in joined], joined[0].chunk_bytes
        try:  # before the run is touched: states that don't fit together leave no trace in it
            merged = merge(inventories, chunk_bytes)
        except InvalidInputError as error:
            return self._fail(save, error)
        save.servers = tuple(join.server for join in joined)
        plan = deal_out(save, merged, options)
        if isinstance(plan, WorkerFailuresError):
            return self._fail(save, plan)
        save.plan, save.plan_id = plan, save.token
        # The ranks to which memory was promised are all here: then none of them writes into it.
        same = self._standing is not None and self._standing.servers == save.servers
        self._generations.revoke(_agreed(joined) if same else {})
        self._standing = standing(save.plan_id, inventories, save.servers, plan, chunk_bytes)
        return self._prepare(save) if save.prepare else self._admit(save)

    def _complete_repeat(self, save: Save, plan: Standing) -> list[Instruction]:
        ranks = range(save.world_size)
        # Another group's plan may have come to stand since the first of them was heard.
        alike = all(message.plan == plan.id for message in save.repeats.values())
        if not alike or not plan.holds_for([save.repeats[rank].identities for rank in ranks]):
            return self._ask_again(save)
        save.servers, save.plan_id = plan.servers, plan.id
        save.plan = plan.renewed([save.repeats[rank].plains for rank in ranks])
        return self._admit(save)

    def _admit(self, save: Save) -> list[Instruction]:
        if any(other is not save and self._same_step(other, save) for other in self._saves.values()):
            text = f"step {save.request.step} is being saved already; wait for its result, or save a later step"
            return self._fail(save, InvalidInputError(text))
        busy = len(self._line) >= GENERATIONS or not (self._generations.any() or self._making)
        if self.options.when_busy == "skip" and busy:
            text = f"skipped: {GENERATIONS} saves are still being written; save less often, or use when_busy='wait'"
            return self._fail(save, SaveSkippedError(text))
        save.state = WAITING
        self._queue.append(save.key)
        return self._next_generation()

    def _same_step(self, other: Save, save: Save) -> bool:
        over = (JOINING, DONE, FAILED)
        return not other.prepare and other.state not in over and other.request.step == save.request.step

    # Staging, writing, committing.

    def _stage(self, save: Save) -> list[Instruction]:
        assert save.plan is not None
        problem = take_over(save, self._gone, self.options)
        if problem is not None:
            return self._fail(save, problem)
        save.state, sizes = STAGING, save.plan.staged_bytes
        save.memory = {server: self._generations.path(server, save.generations[0]) for server in sizes}
        stands = save.plan_id == self._standing_id() and not save.dead  # the dead have no part in its plan
        promised = self._generations.promise(save.plan_id, sizes) if stands else {}
        orders: list[Instruction] = []
        for rank, server in enumerate(save.servers):
            memory, later = save.memory.get(server, ""), promised.get(server, "")
            reply: SaveOrders | RepeatOrders = RepeatOrders(save.checkpoint, memory, later)
            if not save.repeats:
                plan_id = save.plan_id if stands else ""
                reply = SaveOrders(save.checkpoint, memory, tuple(save.plan.stage[rank]), plan_id, later)
            orders.append(Order(save.key, rank, reply))
        look_up: list[Instruction] = [LookUp(save.token, save.checkpoint)] if save.to_store else []
        return [
            *orders,
            Arm(save.token, STAGING, self.options.join_timeout_s),
            *look_up,
            *reserve_annexes(save),
            *self._try_settle(save),
        ]

    def looked_up(self, token: str, stored: Stored) -> list[Instruction]:
        """The committer says what need not be written again."""
        save = self._current(token)
        if save is None or save.state not in (STAGING, LANDING, SETTLING):
            return []
        save.stored = stored
        return self._settle(save) if save.state == SETTLING else []

    def not_looked_up(self, token: str, error: CheckpointError) -> list[Instruction]:
        """The committer can't say what is stored; of no interest to a save that ends in memory by now, or may yet."""
        save = self._current(token)
        if save is not None and save.state == COMMITTING:
            return []
        if save is not None and save.state == LANDING:
            save.to_store, self._since_store = False, None  # the next save goes to the store in its place
            return []
        return self.failed(token, error)

    def staged(self, message: Staged | StagedObjects) -> list[Instruction]:
        """A rank has staged its chunks, or its server those that lie in objects."""
        save = self._saves.get(message.key)
        if save is None or save.state != STAGING or save.plan is None or save.checkpoint != message.checkpoint:
            return []
        if message.rank in save.dead and message.rank not in save.staged:
            return []  # it was given up, and what it has staged is staged by others
        if isinstance(message, StagedObjects):
            save.objects.setdefault(message.rank, {}).update(message.digests)
        elif message.annex:
            for annex in save.annexes.values():
                if (annex.rank, annex.path) == (message.rank, message.annex):
                    annex.digests = message.digests
        else:
            save.staged[message.rank] = message.digests
            save.stall_s = max(save.stall_s, message.stall_s)
        save.hear(message.rank)
        return self._try_settle(save)

    def _try_settle(self, save: Save) -> list[Instruction]:
        if not save.complete():
            return []
        # What ranks took over from dead ones lies apart: such a save is held by the store alone; and so is one of plain
        # leaves alone, as no server has anything of it.
        save.found = save.digests()
        save.held = self.options.memory_tier and not save.annexes and bool(save.memory)
        hold: list[Instruction] = [Hold(save.token, save)] if save.held else []
        if save.held and (not save.to_store or save.request.deadline_s is not None):
            save.state = LANDING
            return [*hold, Arm(save.token, LANDING, self.options.write_timeout_s), *self._make_spares(save)]
        return [*hold, *self._to_store(save)]

    def landed(self, checkpoint: str, well: bool) -> list[Instruction]:
        """Memory has all copies of a save, or will not have them."""
        save = next((save for save in self._saves.values() if save.checkpoint == checkpoint), None)
        if save is None or save.state in (DONE, FAILED):
            return []
        save.landed = well
        if save.state != LANDING:
            return []
        return self._try_commit() if well and not save.to_store else self._to_store(save)

    def _to_store(self, save: Save) -> list[Instruction]:
        """Writes a save once it is known what is stored already."""
        asked, save.state, save.to_store = save.to_store, SETTLING, True
        if save.stored is not None:
            return self._settle(save)
        look_up: list[Instruction] = [] if asked else [LookUp(save.token, save.checkpoint)]
        return [Arm(save.token, SETTLING, self.options.write_timeout_s), *look_up]

    def _settle(self, save: Save) -> list[Instruction]:
        assert save.plan is not None
        assert save.stored is not None
        save.dealt, save.plan = save.plan, settle(save.plan, save.checkpoint, save.found, save.stored)
        save.state = WRITING
        out: list[Instruction] = [
            Write(save.token, lane, WriteOrder(save.memory[lane], tuple(files)), save.server(lane))
            for lane, files in save.plan.files.items()
        ]
        spares = self._make_spares(save)
        if not out:
            return [*self._try_commit(), *spares]
        return [Arm(save.token, WRITING, self.options.write_timeout_s), *out, *spares]

    def written(self, token: str, lane: str, written: Sequence[Written]) -> list[Instruction]:
        """A server has written a lane's files."""
        save = self._current(token)
        if save is None or save.state != WRITING:
            return []
        save.written[lane] = written
        return self._try_commit()

    def _try_commit(self) -> list[Instruction]:
        """Commits the oldest save that holds a generation, once it is written: commits keep the order of the saves."""
        if not self._line:
            return []
        save = self._saves[self._line[0]]
        if save.state == LANDING and save.landed and not save.to_store:
            return self._land(save)
        if save.state != WRITING or save.plan is None or set(save.written) != set(save.plan.files):
            return []
        save.state = COMMITTING
        return [Commit(save.token, save)]

    def _land(self, save: Save) -> list[Instruction]:
        save.state, save.plan = COMMITTING, save.dealt or save.plan  # memory has also what the store has already
        return [Land(save.token, save)]

    def committed(self, token: str, done: SaveDone) -> list[Instruction]:
        """The checkpoint exists, in the store or in memory."""
        save = self._current(token)
        if save is None or save.state != COMMITTING:
            return []
        save.state = DONE
        del self._saves[save.key]
        self._note_end(save.key, Restages(save.checkpoint, False))
        if save.held:
            save.generations = []  # the tier's by now: `freed`
        return [Finish(token, done, save.checkpoint), *self._give_up_generations(save)]

    # Failing.

    def flush(
        self,
        key: str,
        checkpoint: str,
        request: SaveRequest,
        plan: tuple[SavePlan, Mapping[tuple[str, int], bytes]],
        held: Mapping[str, tuple[str, str]],
    ) -> list[Instruction]:
        """Writes to the store what landed in memory alone; how that ends, `restages` tells.

        Args:
            key: Of this try.
            checkpoint: Its id, of which the committer has an attempt again.
            request: As it was saved.
            plan: From `plan_of_memory`.
            held: By lane of the plan: a shard server, and the file in which that has what was staged.
        """
        save = self._begin(key, request, plan[0].merged.world_size)
        save.checkpoint, (save.plan, save.found) = checkpoint, plan
        for lane, (server, path) in held.items():
            save.at[lane], save.memory[lane] = server, path
        self._line.append(key)
        save.to_store = False  # nobody has asked what is stored
        return self._to_store(save)

    def failed(
        self, token: str, error: CheckpointError, server: str = "", generation: int | None = None
    ) -> list[Instruction]:
        """The committer or a server failed; to make memory for a generation, where one is named."""
        if server in self._gone:
            return []  # `server_lost` has seen to it
        if token in self._making:  # a spare generation: the save that needs it will say so, if it is still so then
            return self._made_spare(token)
        save = self._current(token)
        if save is not None and generation is not None and (save.asked_for_room or generation not in save.generations):
            return []  # room is made for all servers at once: it gets another generation, or has it by now
        if save is not None and save.wants_room() and self.options.memory_tier:
            save.asked_for_room = save.roomed = True
            return [MakeRoom(token, error)]
        hurried = save is not None and save.request.deadline_s is not None
        if save is not None and hurried and save.landed and save.state in (SETTLING, WRITING):
            return self._give_up(save, error)  # the store fails, but memory has it: that is what an urgent save is for
        return self._fail(save, error) if save is not None and save.state not in (DONE, FAILED) else []

    def timed_out(self, token: str, state: str) -> list[Instruction]:
        """The time for a state is over."""
        save = self._current(token)
        if save is not None and state == DEADLINE:
            return self._give_up(save, too_late(save))
        if save is None or save.state != state:
            return []
        if state == LANDING:  # copies that hang
            return self._to_store(save)
        if state == FAILED:
            del self._saves[save.key]
            return []
        return self._fail(save, timeout(save, self.options))

    def _fail(self, save: Save, error: CheckpointError, also: int | None = None) -> list[Instruction]:
        for generation in save.generations if save.state != RESERVING else ():
            # A slow rank may still copy into this generation. The next save gets a new file, so that the straggler
            # writes where nobody looks.
            self._generations.drop(generation)
        again = save.repeats and save.state == RESERVING
        save.state, save.failure = FAILED, Failure.of(error)
        self._note_end(save.key, save.failure)
        if save.to_store:
            self._since_store = None
        save.told |= set(save.staged)  # they wait for the save's outcome, and hear it from there
        waiting = sorted(save.here - save.staged.keys())
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
        finish: list[Instruction] = [] if save.prepare else [Finish(save.token, save.failure, save.checkpoint)]
        return [*out, *finish, *self._give_up_generations(save, promise=bool(again))]

    def _tell(self, save: Save, rank: int, failure: Failure) -> Order:
        save.told.add(rank)
        self._drop_told(save)
        return Order(save.key, rank, failure)

    def _drop_told(self, save: Save) -> None:
        if len(save.told) >= save.world_size and self._current(save.token) is save:
            del self._saves[save.key]


def _agreed(joined: Sequence[JoinSave]) -> dict[str, str]:
    """The promised file by server, where all its ranks name the same."""
    named: dict[str, set[str]] = {}
    for join in joined:
        named.setdefault(join.server, set()).add(join.promised)
    return {server: files.pop() for server, files in named.items() if len(files) == 1}
