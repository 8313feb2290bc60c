"""Save memory: which generation of staging memory a save gets, and when.

The part of `save_machine` that deals out generations: saves wait for one in the order in which their ranks were
complete, hold it in the order in which they must commit, and give it back, or leave it to the memory tier. A generation
is made anew on a server where its file is missing or too small; the next save's while this one is written.
"""

from __future__ import annotations

from abc import abstractmethod

from rl_ckpt.errors import WorkerFailuresError
from rl_ckpt.options import Options
from rl_ckpt.runtime.generations import GENERATIONS, StagingFile
from rl_ckpt.runtime.messages import Failure, SaveOrders
from rl_ckpt.runtime.save_deaths import SaveDeaths
from rl_ckpt.runtime.save_steps import DONE, RESERVING, Arm, Finish, Instruction, Name, Open, Order, ReserveMemory, Save


class SaveMemory(SaveDeaths):
    """See the module. A part of `SaveMachine`."""

    def __init__(self, options: Options) -> None:
        """Nothing waits, all generations are free."""
        super().__init__(options)
        self._admitted = 0
        self._queue: list[str] = []  # waiting for a generation, in the order in which they were complete
        self._line: list[str] = []  # hold a generation, in the order in which they must commit
        self._since_store: int | None = None  # saves since the last that went to the store; None: the next one does

    # Of the other part.

    @abstractmethod
    def _try_commit(self) -> list[Instruction]:
        """Commits the oldest save that holds a generation, if it is written."""

    # A save's own generation.

    def _prepare(self, save: Save) -> list[Instruction]:
        assert save.plan is not None
        save.state, save.generations = RESERVING, self._generations.take_free()
        asked = [ask for generation in save.generations for ask in self._reserve(save, save.token, generation)]
        return [Open(save.token), Arm(save.token, RESERVING, self.options.write_timeout_s), *asked]

    def opened(self, token: str) -> list[Instruction]:
        """The run is open for writing."""
        save = self._current(token)
        if save is None or save.state != RESERVING:
            return []
        save.opened = True
        return self._try_prepared(save)

    def _try_prepared(self, save: Save) -> list[Instruction]:
        assert save.plan is not None
        sizes = save.plan.staged_bytes
        if not save.opened or any(self._generations.missing(g, sizes) for g in save.generations):
            return []
        for generation in save.generations:
            self._generations.give_back(generation)
        promised = self._generations.promise(save.plan_id, sizes)
        # The other generation's file is named too, so that the rank maps it and touches its pages.
        other = {s: self._generations.path(s, g) for g in save.generations for s in sizes}
        plan_id = save.plan_id if save.plan_id == self._standing_id() else ""  # another group's may stand by now
        out: list[Instruction] = []
        for rank, server in enumerate(save.servers):
            items = tuple(save.plan.stage[rank])
            reply = SaveOrders("", other.get(server, ""), items, plan_id, promised.get(server, ""))
            out.append(Order(save.key, rank, reply))
        save.state = DONE
        del self._saves[save.key]
        return [*out, *self._next_generation()]

    def _standing_id(self) -> str:
        return self._standing.id if self._standing else ""

    def _any_generation(self) -> bool:
        return len(self._line) < GENERATIONS and self._generations.any()

    def _next_generation(self) -> list[Instruction]:
        if not self._queue or not self._any_generation():
            return []
        save = self._saves[self._queue.pop(0)]
        save.to_store = self._goes_to_store(save)
        assert save.plan is not None
        save.generations = [self._generations.take(save.plan_id, save.plan.staged_bytes)]
        self._line.append(save.key)
        self._admitted += 1
        save.place, save.state = self._admitted, RESERVING
        return [Name(save.token, save.request), Arm(save.token, RESERVING, self.options.write_timeout_s)]

    def _goes_to_store(self, save: Save) -> bool:
        """The first save does and of later ones every k-th, and what has a tag, as that is to be kept for good."""
        since, every = self._since_store, self.options.persist_every
        goes = since is None or since + 1 >= every or save.request.tag is not None
        self._since_store = 0 if goes or since is None else since + 1
        return goes

    def named(self, token: str, checkpoint: str) -> list[Instruction]:
        """The committer has checked the step and named the checkpoint."""
        save = self._current(token)
        if save is None or save.state != RESERVING:
            # It failed meanwhile. If the name were not given up, the step would stay taken.
            return [Finish(token, (save and save.failure) or _over(), checkpoint)]
        save.checkpoint = checkpoint
        return [*self._reserve(save, save.token, save.generations[0])] or self._stage(save)

    def _reserve(self, save: Save, token: str, generation: int) -> list[ReserveMemory]:
        assert save.plan is not None
        sizes = save.plan.staged_bytes
        return [
            ReserveMemory(token, server, generation, self._generations.making(server, generation, sizes[server]))
            for server in self._generations.missing(generation, sizes)
        ]

    def reserved(self, token: str, server: str, generation: int, file: StagingFile) -> list[Instruction]:
        """A server has made a generation's file."""
        if token in self._making:
            self._generations.made(server, generation, file)
            self._making[token][1].discard(server)
            return [] if self._making[token][1] else self._made_spare(token)
        save = self._current(token)
        if save is None or save.plan is None or save.state != RESERVING:
            return []
        if generation not in save.generations:
            return []  # it has another by now, and somebody else may have had this one's file made anew
        self._generations.made(server, generation, file)
        if save.prepare:
            return self._try_prepared(save)
        return [] if self._generations.missing(generation, save.plan.staged_bytes) else self._stage(save)

    def _give_up_generations(self, save: Save, promise: bool = False) -> list[Instruction]:
        """Args: save: that holds them; promise: whether its ranks may be writing into what was promised to them."""
        for generation in save.generations:
            if save.dead:  # one that was given up may still write there; what was taken over goes with the file
                self._generations.drop(generation)
            if promise:
                self._generations.promise_again(generation, save.plan_id)
            else:
                self._generations.give_back(generation)
        save.generations = []
        if save.key in self._line:
            self._line.remove(save.key)
        return [*self._try_commit(), *self._next_generation()]

    # Those of others.

    def freed(self, generation: int) -> list[Instruction]:
        """The memory tier gives a generation back."""
        starved = next((s for s in self._saves.values() if s.asked_for_room and s.state == RESERVING), None)
        if starved is None or generation >= self._generations.number:
            self._generations.give_back(generation)
            return self._next_generation()
        starved.asked_for_room = False  # it takes this one instead, whose memory is there
        self._generations.give_back(starved.generations[0])
        starved.generations = [generation]
        return [*self._reserve(starved, starved.token, generation)] or self._stage(starved)

    def _make_spares(self, save: Save) -> list[Instruction]:
        """Has the other generation made while a save is written, so that the next save need not wait for it."""
        out: list[Instruction] = []
        for generation in self._generations.take_free():
            token = f"{save.token}+{generation}"
            asks = [ask for ask in self._reserve(save, token, generation) if ask.server not in self._gone]
            if asks:
                self._making[token] = (generation, {ask.server for ask in asks})
                out += asks
            else:
                self._generations.give_back(generation)
        return out

    def _made_spare(self, token: str) -> list[Instruction]:
        self._generations.give_back(self._making.pop(token)[0])
        return self._next_generation()


def _over() -> Failure:
    return Failure.of(WorkerFailuresError("this save is over already; save again"))
