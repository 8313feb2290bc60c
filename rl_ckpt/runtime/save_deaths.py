"""Save deaths: what the coordinator's brain does when a worker, a node, or the way to one of them is lost.

The part of `save_machine` that hears of deaths. In each state of a save a dead worker means:
joining: who has joined keeps its place, and others stage what it has; who has not ends the save ·
waiting, reserving: the same, as soon as all are told what to stage · staging: what it has not staged goes to others ·
later: nothing, all is staged. A lost node is the death of all its workers, and of what was staged there; while it
writes, another node that has a copy of its staging memory writes in its place. Whatever nobody else has ends the save.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Mapping

from rl_ckpt.errors import CheckpointError, InvalidInputError, StorageError, WorkerFailuresError
from rl_ckpt.options import Options
from rl_ckpt.plan.standing import Standing
from rl_ckpt.runtime.generations import Generations, generations
from rl_ckpt.runtime.messages import Failure, Lost, Restages, WriteOrder
from rl_ckpt.runtime.restaging import SAVE_AGAIN, reserve_annexes, take_over, to_restage
from rl_ckpt.runtime.save_steps import (
    COMMITTING,
    DONE,
    FAILED,
    JOINING,
    LANDING,
    RESERVING,
    SETTLING,
    STAGING,
    WAITING,
    WRITING,
    Instruction,
    Save,
    Write,
)
from rl_ckpt.runtime.spec import CALL
from rl_ckpt.store.committer import SaveRequest

_ENDED_KEPT = 256


class SaveDeaths(ABC):
    """See the module. A part of `SaveMachine`."""

    def __init__(self, options: Options) -> None:
        """What this part looks at."""
        self.options = options
        self._saves: dict[str, Save] = {}
        self._generations = Generations(generations(options))
        self._making: dict[str, tuple[int, set[str]]] = {}  # token → spare generation, and servers still making it
        self._standing: Standing | None = None
        self._gone: set[str] = set()  # shard servers of lost nodes: none comes back under its name
        self._ended: OrderedDict[str, Restages | Failure] = OrderedDict()

    # Of the other parts.

    @abstractmethod
    def _begin(self, key: str, request: SaveRequest, world_size: int) -> Save:
        """A new save under a key."""

    @abstractmethod
    def _current(self, token: str) -> Save | None:
        """The save of a token, if it is still known and no later one has its key."""

    @abstractmethod
    def _fail(self, save: Save, error: CheckpointError, also: int | None = None) -> list[Instruction]:
        """Ends a save; who waits is told, and so is one rank more."""

    @abstractmethod
    def _drop_told(self, save: Save) -> None:
        """Forgets a save that failed, once all of its ranks have heard of it."""

    @abstractmethod
    def _stage(self, save: Save) -> list[Instruction]:
        """All memory is there: ranks are told to copy."""

    @abstractmethod
    def _try_settle(self, save: Save) -> list[Instruction]:
        """Goes on where all is staged."""

    @abstractmethod
    def _land(self, save: Save) -> list[Instruction]:
        """Commits in memory."""

    @abstractmethod
    def _made_spare(self, token: str) -> list[Instruction]:
        """The spare generation that a save had made is there, or is not waited for any more."""

    # Workers.

    def lost(self, message: Lost) -> list[Instruction]:
        """A rank can't go on: it died, its state can't be saved, or it changed while it was staged."""
        save, rank, failure = self._saves.get(message.key), message.rank, message.failure
        if message.checkpoint and (save is None or save.checkpoint != message.checkpoint):
            return []  # of an attempt that is over
        if message.unheard and (save is None or rank not in save.here):
            return []  # of a save that the coordinator before this one had
        if save is None and message.dead and message.key in self._ended:
            return []  # it was decided before the death was known: what this rank had is staged, or was given up
        if save is None:
            save = self._begin(message.key, SaveRequest(0), message.world_size)
        if save.state == FAILED:
            save.told.add(rank)
            self._drop_told(save)
        if save.state in (LANDING, SETTLING, WRITING, COMMITTING, DONE, FAILED):
            return []  # what it had is staged already: nothing is lost
        if message.dead and rank in save.here and not save.prepare:
            save.dead.add(rank)
            return self._take_over(save) if save.state == STAGING else []
        error = failure.error()
        if isinstance(error, StorageError):  # somebody removed staging memory: the other generations' too, very likely
            self._generations.revoke()
            self._generations.drop_free()
        if not isinstance(error, InvalidInputError | WorkerFailuresError):
            error = WorkerFailuresError(f"rank {rank}: {failure.message}", {rank: failure.message}, failure.lost)
        return self._fail(save, error, also=rank)

    def _take_over(self, save: Save) -> list[Instruction]:
        problem = take_over(save, self._gone, self.options)
        if problem is not None:
            return self._fail(save, problem)
        return [*reserve_annexes(save), *self._try_settle(save)]

    def annexed(self, token: str, lane: str, path: str) -> list[Instruction]:
        """A server has made the memory for what a rank takes over."""
        save = self._current(token)
        if save is not None and save.state == STAGING and lane in save.annexes:
            save.annexes[lane].path = save.memory[lane] = path
        return []

    def restages(self, key: str) -> Restages | Failure:
        """What a save's driver has to ask for since workers of it died; how it ended, where it has."""
        save = self._saves.get(key)
        if save is not None and save.failure is None:
            return to_restage(save)
        text = "the coordinator was lost during this save; save again"
        return self._ended.get(key) or Failure.of(WorkerFailuresError(text))

    def ended(self, key: str) -> Failure | None:
        """Why a driver's save has failed: who comes to it late finds nobody."""
        end = self._ended.get(key) if key.startswith(CALL) else None
        return end if isinstance(end, Failure) else None

    def _note_end(self, key: str, end: Restages | Failure) -> None:
        self._ended[key] = end
        while len(self._ended) > _ENDED_KEPT:
            self._ended.popitem(last=False)

    # Callers.

    def expire(self, key: str, error: CheckpointError, for_good: bool) -> list[Instruction]:
        """Its caller waits no longer: it ends, unless its commit is on the way.

        Args:
            key: Of the save.
            error: What ranks and caller are told.
            for_good: Whether the key never comes again: ranks that come to it later must not bring it about.
        """
        save = self._saves.get(key)
        if save is None and for_good:
            self._note_end(key, Failure.of(error))
        return [] if save is None else self._give_up(save, error)

    def _give_up(self, save: Save, error: CheckpointError) -> list[Instruction]:
        """Nobody waits for it any more: it is in memory by now, or it fails."""
        if save.state in (COMMITTING, DONE, FAILED):
            return []  # decided, or about to be
        if save.landed:
            save.to_store = False
            return self._land(save)  # before earlier saves that are still written: there is no time to wait for them
        return self._fail(save, error)

    def orphaned(self, dead: Collection[str]) -> list[Instruction]:
        """Drivers are gone, and their workers with them: what these have not staged ends, and is not waited for.

        Args:
            dead: Ray jobs that are over.
        """
        out: list[Instruction] = []
        for save in self._of_jobs(dead):
            if save.state in (JOINING, WAITING, RESERVING, STAGING):
                text = f"step {save.request.step}: the driver of this save was lost before all was staged"
                out += self._fail(save, WorkerFailuresError(text))
        return out

    def undecided(self, dead: Collection[str]) -> list[str]:
        """Checkpoints that jobs that are over have staged, and that are not committed yet."""
        staged = (LANDING, SETTLING, WRITING, COMMITTING)
        return [save.checkpoint for save in self._of_jobs(dead) if save.state in staged]

    def _of_jobs(self, jobs: Collection[str]) -> list[Save]:
        """Saves that drivers of these jobs began (their workers may live on, and save by themselves)."""
        return [save for save in self._saves.values() if save.key.startswith(CALL) and save.job in jobs]

    def forget(self, key: str) -> None:
        """Nobody is left who could ask why a save failed."""
        if key in self._saves and self._saves[key].state == FAILED:
            del self._saves[key]

    # Nodes.

    def server_lost(self, server: str, copies: Mapping[str, tuple[str, str]]) -> list[Instruction]:
        """A shard server's node is dead, with its workers and what was staged there.

        Args:
            server: Its name; nothing comes back under it.
            copies: By checkpoint, another shard server and the file in which it has a whole copy of what this one had
                staged.
        """
        if server in self._gone:
            return []
        self._gone.add(server)
        out: list[Instruction] = []
        for save in list(self._saves.values()):
            out += self._lose(save, server, copies.get(save.checkpoint))
        self._generations.lose(server)
        if self._standing is not None and server in self._standing.servers:
            self._standing = None  # its ranks come with an inventory next, or others in their place
            self._generations.revoke()
        for token in [token for token, (_, asked) in self._making.items() if server in asked]:
            asked = self._making[token][1]
            asked.discard(server)
            out += [] if asked else self._made_spare(token)
        return out

    def _lose(self, save: Save, server: str, copy: tuple[str, str] | None) -> list[Instruction]:
        if save.state in (COMMITTING, DONE, FAILED):
            return []  # all is written
        dead = {rank for rank in save.here if self._server(save, rank) == server}
        if save.state in (LANDING, SETTLING, WRITING):
            return self._lose_staged(save, server, dead, copy)
        if save.prepare and dead:
            return self._fail(save, _lost(save, server, dead))
        save.dead |= dead
        if save.state == STAGING:
            return self._take_over(save)
        if save.state in (WAITING, RESERVING) and dead:
            problem = take_over(save, self._gone, self.options)  # now, so that its memory is not waited for
            if problem is not None:
                return self._fail(save, problem)
            assert save.plan is not None
            waits = not save.checkpoint or self._generations.missing(save.generations[0], save.plan.staged_bytes)
            return [] if waits else self._stage(save)
        return []

    def _lose_staged(self, save: Save, server: str, dead: set[int], copy: tuple[str, str] | None) -> list[Instruction]:
        assert save.plan is not None
        lanes = [lane for lane in save.plan.files if save.server(lane) == server and lane not in save.written]
        if not lanes:
            return []
        if copy is None or copy[0] in self._gone or lanes != [server]:
            return self._fail(save, _lost(save, server, dead))
        save.at[server], save.memory[server] = copy
        if save.state != WRITING:
            return []  # once it is written, it is from there
        return [Write(save.token, server, WriteOrder(copy[1], tuple(save.plan.files[server])), copy[0])]

    def _server(self, save: Save, rank: int) -> str:
        if rank in save.joined:
            return save.joined[rank].server
        if save.servers:
            return save.servers[rank]
        return self._standing.servers[rank] if self._standing is not None else ""


def _lost(save: Save, server: str, dead: set[int]) -> WorkerFailuresError:
    text = f"its node was lost before what it had staged was stored (shard server {server})"
    return WorkerFailuresError(
        f"step {save.request.step}: {server} was lost with its node before what ranks {sorted(dead)} had staged there "
        f"was stored, and no other node has a copy; {SAVE_AGAIN}",
        {rank: f"rank {rank}: {text}" for rank in sorted(dead)},
        dead,
    )


def unknown_dead(save: Save) -> WorkerFailuresError:
    """The error of a save whose plan does not hold any more, so that every rank must say anew what it has."""
    dead = sorted(save.dead & save.repeats.keys())
    said = {rank: f"rank {rank} died before it could say what it has" for rank in dead}
    return WorkerFailuresError(f"step {save.request.step}: {'; '.join(said.values())}; {SAVE_AGAIN}", said, said)
