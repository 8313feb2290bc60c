"""The coordinator: one detached actor per run, which moves metadata only.

The shell around two pure state machines: it turns messages into their events and carries out their instructions. It
keeps nothing that storage does not also tell. It opens the run for writing (and so fences older coordinators) at its
first save, so that jobs that only restore take nothing over.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Mapping
from functools import partial
from typing import Any

import msgspec
import ray

from rl_ckpt.errors import CheckpointError, CheckpointNotFoundError, SaveTimeoutError, StorageError
from rl_ckpt.runtime import restore_steps as rm
from rl_ckpt.runtime import save_steps as sm
from rl_ckpt.runtime import tier
from rl_ckpt.runtime.generations import StagingFile
from rl_ckpt.runtime.messages import (
    Failure,
    FetchDone,
    FetchOrder,
    JoinSave,
    Lost,
    Matched,
    Ok,
    OpenRestore,
    RepeatOrders,
    RepeatSave,
    Reserve,
    Reserved,
    SaveDone,
    SaveOrders,
    SaveOutcome,
    Staged,
    StagedObjects,
    Verified,
    WriteDone,
    WriteOrder,
    decode,
    encode,
)
from rl_ckpt.runtime.owners import Owners, User
from rl_ckpt.runtime.owners_kept import KeptOwners, dead_jobs
from rl_ckpt.runtime.restore_machine import RestoreMachine
from rl_ckpt.runtime.restore_work import RestoreWork
from rl_ckpt.runtime.save_machine import SaveMachine
from rl_ckpt.runtime.save_work import SaveWork
from rl_ckpt.runtime.server_calls import Servers, node_is_dead
from rl_ckpt.runtime.spec import RunSpec
from rl_ckpt.runtime.tier_work import TierWork
from rl_ckpt.store.committer import SaveRequest

_OUTCOMES_KEPT = 256
_DEATH_KNOWN_S = 5.0  # within which Ray knows that a driver was killed
_LOOK_AGAIN_S = 0.1
_NEWS_S = 1.0  # how long a driver's question waits for news of its save
_AGAIN_S = 1.0  # until a server is told again that could not be reached


class Coordinator:
    """See the module. Made by `links.start_coordinator`."""

    def __init__(self, spec: RunSpec, service: str) -> None:
        """Ready at once: the store is opened when it is first needed.

        Args:
            spec: Of whoever starts it; those who save bring theirs.
            service: Random id, the same when Ray starts it again in another process.
        """
        incarnation = f"{uuid.uuid4().hex[:8]}-"
        self._saves = SaveMachine(spec.options, incarnation)
        self._restores = RestoreMachine(spec.options, incarnation)
        self._waiting: dict[tuple[str, int], list[asyncio.Future[bytes]]] = {}
        self._outcomes: OrderedDict[str, asyncio.Future[SaveOutcome]] = OrderedDict()
        self._servers = Servers()
        self._tasks: set[asyncio.Task[None]] = set()
        self._tier_work = TierWork(spec, self._servers, self._do, self._busy, self._server_lost)
        self._tier = self._tier_work.brain
        self._restore_work = RestoreWork(spec, self._tier, self._do)
        self._save_work = SaveWork(spec, service, self._run_is_gone)
        self._opened_with = spec.storage_options
        self._loop: asyncio.AbstractEventLoop | None = None
        self._kept = KeptOwners(spec.coordinator, service)
        self._owners = self._kept.load() or Owners(spec.url)  # as they were where this is a new start of the same
        self._user = ""  # whose rules and options are in use
        self._news = asyncio.Event()  # set, and replaced, whenever something has happened
        self._idle = asyncio.Event()
        self._idle.set()
        self._counts = {"messages": 0, "bytes_in": 0, "bytes_out": 0, "largest": 0, "repeats": 0}

        context = ray.get_runtime_context()
        if (
            context.was_current_actor_reconstructed
        ):  # the one before was lost, perhaps with its node: copies are missing
            context.current_actor.take_up.remote()

    async def take_up(self) -> None:
        """Learns what servers hold, and has copied again what was lost."""
        await self._adopt()

    # What workers call. Every message in and every reply out is counted.

    async def join_save(self, data: bytes) -> bytes:
        """A rank takes part in a save; the reply says what it stages."""
        message = self._read(data, JoinSave)
        self._servers.note(message.server)
        refused = self._refused(message)
        return refused or await self._answer(message.key, message.rank, lambda: self._saves.join(message))

    async def repeat_save(self, data: bytes) -> bytes:
        """A rank takes part in a save, with a state of the shape that it had in the last one."""
        message = self._read(data, RepeatSave)
        refused = self._refused(message)
        return refused or await self._answer(message.key, message.rank, lambda: self._saves.repeat(message))

    async def staged(self, data: bytes) -> None:
        """A rank has staged."""
        self._do(self._saves.staged(self._read(data, Staged)))

    async def staged_objects(self, data: bytes) -> None:
        """A shard server has staged what a rank has in immutable objects."""
        self._do(self._saves.staged(self._read(data, StagedObjects)))

    async def lost_save(self, data: bytes) -> None:
        """A rank can't go on with a save."""
        message = self._read(data, Lost)
        self._do(self._saves.lost(message))

    async def expire_save(self, key: str, why: str, for_good: bool) -> None:
        """The caller of a save waits no longer for it; `for_good` where the key never comes again."""
        self._do(self._saves.expire(key, SaveTimeoutError(why), for_good))

    async def forsake(self) -> None:
        """Workers that saved by themselves were ended: saves for which some had still to do something end."""
        error = SaveTimeoutError("the workers of this save were ended")
        for key, state in self._saves.states().items():
            if key.startswith("save-") and state not in (sm.SETTLING, sm.WRITING, sm.COMMITTING):
                self._do(self._saves.expire(key, error, False))
                self._saves.forget(key)

    async def restages(self, key: str) -> bytes:
        """What a driver has to ask its workers for since one of them died; waits for it, but not for long."""
        deadline = time.monotonic() + _NEWS_S
        while True:
            found = self._saves.restages(key)
            left_s = deadline - time.monotonic()
            if isinstance(found, Failure) or found.orders or not found.waits or left_s <= 0:
                return self._reply(found)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), left_s)

    async def wait_save(self, checkpoint: str) -> bytes:
        """Answers once the save of `checkpoint` is decided."""
        outcome = self._outcomes.get(checkpoint)
        if outcome is None:
            text = f"nothing is known here of the save of {checkpoint}: the coordinator was restarted meanwhile"
            return encode(Failure.of(CheckpointNotFoundError(text)))
        return self._reply(await asyncio.shield(outcome))

    async def open_restore(self, data: bytes) -> bytes:
        """A rank takes part in a restore; the reply is the checkpoint to try."""
        message = self._read(data, OpenRestore)
        return await self._answer(message.key, message.rank, lambda: self._restores.open(message))

    async def match(self, data: bytes) -> bytes:
        """A rank says what it needs; the reply says where it is."""
        message = self._read(data, Matched)
        self._servers.note(message.server)
        return await self._answer(message.key, message.rank, lambda: self._restores.match(message))

    async def verified(self, data: bytes) -> bytes:
        """A rank has verified; the reply says whether all have."""
        message = self._read(data, Verified)
        return await self._answer(message.key, message.rank, lambda: self._restores.verify(message))

    async def applied(self, key: str, rank: int, token: str) -> None:
        """A rank has set its state."""
        self._do(self._restores.applied(key, rank, token))

    async def lost_restore(self, data: bytes) -> None:
        """A rank can't go on with a restore."""
        message = self._read(data, Lost)
        self._do(self._restores.lost(message.key, message.rank, message.world_size, message.failure))

    async def held_chunk(self, chunk: bytes, size_bytes: int) -> bytes | None:
        """A chunk, out of the memory of a node that holds it.

        Args:
            chunk: Its digest.
            size_bytes: Its size.

        Returns:
            Its bytes, as they were committed; None where no node has them.
        """
        return await self._servers.held_chunk(self._restore_work.held(chunk, size_bytes), chunk, size_bytes)

    async def attach(self, user: str) -> None:
        """A Checkpointer uses the run's actors."""
        self._owners.attach(user)
        self._kept.keep(self._owners)

    async def detach(self, user: str, end: bool = True) -> bool:
        """A Checkpointer is done with the run's actors; answers whether it may end them, as no live job uses them.

        Args:
            user: Its id.
            end: Whether it would.
        """
        last = self._owners.detach(user, dead_jobs()) and end
        self._kept.keep(None if last else self._owners)
        if last:
            await self._save_work.close()
        return last

    async def begin(self, spec: RunSpec, take_over: bool) -> bytes:
        """A Checkpointer is about to save for the first time; the reply says whether it may."""
        user, loop = User(spec, time.time()), asyncio.get_running_loop()
        until = loop.time() + _DEATH_KNOWN_S
        while (refused := self._owners.begin(user, take_over, dead_jobs())) is not None and loop.time() < until:
            if self._owners.owner_is_seen():
                break
            await asyncio.sleep(_LOOK_AGAIN_S)  # an owner that was killed just now is not known to be dead yet
        if refused is not None:
            return encode(Failure.of(refused))
        self._kept.keep(self._owners)
        self._save_work.begin(user.text, take_over, not self._saves.busy())
        self._follow(spec.user)
        return encode(Ok())

    def _follow(self, user: str) -> None:
        """Takes over the rules and options of the Checkpointer that saves (a coordinator may be found, not made)."""
        spec = self._owners.spec_of(user)
        if spec is None or (user == self._user and spec.storage_options == self._opened_with):
            return  # all is as it wants it; credentials that came while a save was under way are taken up later
        self._user = user
        self._saves.configure(spec.options)
        self._restores.options = spec.options
        anew = spec.storage_options != self._opened_with and not self._saves.busy()  # rotated keys, say
        if anew:
            self._opened_with = spec.storage_options
            self._servers.configure(spec)
        self._tier_work.configure(spec)
        self._save_work.configure(spec, anew)
        self._restore_work.configure(spec, anew)

    def _refused(self, message: JoinSave | RepeatSave) -> bytes | None:
        """The answer to a rank of a job that does not own the run; None where it may save."""
        refused = self._owners.refused(message.user)
        if refused is None:
            self._follow(message.user)
            return None
        if message.key in self._saves.states():  # what has begun goes on, by the rules of who saves now
            return None
        return self._reply(Failure.of(refused))

    async def under_way(self, key: str) -> bool:
        """Whether a save or restore is past the call for its workers: who waits for it need not keep the time."""
        return self._saves.under_way(key) or self._restores.under_way(key)

    async def stats(self) -> dict[str, int]:
        """Control messages so far, in number and bytes, ranks that repeated a plan, and what is held in memory."""
        return {**self._counts, **self._tier.counts()}

    async def servers(self) -> list[str]:
        """Names of the shard servers that took part so far."""
        return self._servers.names()

    async def drain(self, seconds: float | None = None) -> bytes:
        """Answers once no save is under way and the sweep is done, or after so many seconds with what is left."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
                await self._save_work.drain()
        except TimeoutError:
            left = ", ".join(f"{key}: {state}" for key, state in self._saves.states().items()) or "the sweep"
            return encode(Failure.of(SaveTimeoutError(f"not done within {seconds} s: {left}")))
        return encode(Ok())

    # The shell.

    def _read(self, data: bytes, kind: Any) -> Any:
        self._counts["messages"] += 1
        self._counts["bytes_in"] += len(data)
        self._counts["largest"] = max(self._counts["largest"], len(data))
        return decode(data, kind)

    def _reply(self, message: msgspec.Struct) -> bytes:
        data = encode(message)
        self._counts["bytes_out"] += len(data)
        self._counts["largest"] = max(self._counts["largest"], len(data))
        return data

    async def _answer(self, key: str, rank: int, event: Callable[[], Iterable[Any]]) -> bytes:
        """Feeds an event, and waits until the machine answers this rank."""
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault((key, rank), []).append(future)
        self._do(event())
        return await future

    def _do(self, instructions: Iterable[Any]) -> None:
        for instruction in instructions:
            match instruction:
                case sm.Order(key, rank, reply) | rm.Answer(key, rank, reply):
                    for future in self._waiting.pop((key, rank), []):
                        if not future.done():
                            future.set_result(self._reply(reply))
                    self._counts["repeats"] += isinstance(reply, RepeatOrders)
                    if isinstance(reply, SaveOrders | RepeatOrders) and reply.checkpoint:
                        self._outcomes.setdefault(reply.checkpoint, asyncio.get_running_loop().create_future())
                case sm.Open(key):
                    self._spawn(self._open(key), key, self._saves.failed)
                case sm.Name(key, request):
                    self._spawn(self._name(key, request), key, self._saves.failed)
                case sm.LookUp(key, checkpoint):
                    self._spawn(self._look_up(key, checkpoint), key, self._saves.not_looked_up)
                case sm.ReserveMemory(key, server, generation, size):
                    failed = partial(self._server_failed, server, generation=generation)
                    self._spawn(self._reserve(key, server, generation, size), key, failed)
                case sm.ReserveAnnex(key, lane, server, generation, size):
                    work = self._reserve_annex(key, lane, server, generation, size)
                    self._spawn(work, key, partial(self._server_failed, server))
                case sm.Write(key, lane, order, server):
                    self._spawn(self._write(key, lane, order, server), key, partial(self._server_failed, server))
                case sm.Commit(key, save):
                    self._spawn(self._commit(key, save), key, self._saves.failed)
                case sm.Land(key, save):
                    self._spawn(self._land(key, save), key, self._saves.failed)
                case sm.Hold(_, save):
                    self._tier_work.hold(save)
                case sm.MakeRoom(key, error):
                    freed = self._tier.make_room()
                    helps = any(isinstance(one, tier.GenerationFree) for one in freed)
                    self._do([*freed, *([] if helps else self._saves.failed(key, error))])
                case tier.Landed(checkpoint):
                    self._do(self._saves.landed(checkpoint, True))
                case tier.CannotLand(checkpoint, why):
                    self._tier_work.cannot_land(why)
                    self._do(self._saves.landed(checkpoint, False))
                case tier.GenerationFree(generation):
                    self._do(self._saves.freed(generation))
                case tier.Hold() | tier.Copy() | tier.Remember() | tier.Release():
                    self._tier_work.carry_out(instruction)
                case sm.Finish(_, outcome, checkpoint):
                    self._finish(outcome, checkpoint)
                case sm.Arm(key, state, seconds):
                    self._later(seconds, partial(self._saves.timed_out, key, state))
                case rm.Load(key, step, tried):
                    self._spawn(self._load(key, step, tried), key, self._restores.failed)
                case rm.Fetch(key, server, order):
                    self._spawn(self._fetch(key, server, order), key, self._restores.failed)
                case rm.Search(key, wanted, skip):
                    self._spawn(self._search(key, wanted, skip), key, self._restores.failed)
                case rm.Damaged(server, part, chunk):
                    self._restore_work.bad(server, part, chunk)
                case rm.Forget(key, servers, keys):
                    self._servers.forget(servers, keys)
                    self._restore_work.done(key)
                case rm.Arm(key, state, seconds):
                    self._later(seconds, partial(self._restores.timed_out, key, state))
                case _:
                    raise AssertionError(f"unknown instruction {instruction!r}")
        self._news.set()
        self._news = asyncio.Event()
        self._idle.clear() if self._saves.busy() else self._idle.set()

    def _busy(self) -> bool:
        """Whether it matters which nodes are alive."""
        return self._saves.busy() or bool(self._restores.states())

    def _later(self, seconds: float, event: Callable[[], Iterable[Any]]) -> None:
        asyncio.get_running_loop().call_later(seconds, lambda: self._do(event()))

    def _spawn(
        self,
        work: Coroutine[Any, Any, Iterable[Any]],
        key: str,
        failed: Callable[[str, CheckpointError], Iterable[Any]],
    ) -> None:
        async def run() -> None:
            try:
                event = await work
            except CheckpointError as error:
                event = failed(key, error)
            except ray.exceptions.RayTaskError as error:
                event = failed(key, CheckpointError(f"internal error in a shard server: {error}"))
            except ray.exceptions.RayError as error:
                self._servers.look_again()
                self._tier_work.watch.now()
                event = failed(key, StorageError(f"a shard server could not be reached: {error}"))
            except Exception as error:  # noqa: BLE001 - a bug of ours must fail this save, by name, and not hang it
                text = f"internal error in the coordinator: {type(error).__name__}: {error}"
                event = failed(key, CheckpointError(text))
            self._do(event)

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # What instructions do.

    async def _open(self, key: str) -> Iterable[Any]:
        await self._adopt()
        await self._save_work.open()
        return self._saves.opened(key)

    async def _name(self, key: str, request: SaveRequest) -> Iterable[Any]:
        await self._adopt()
        return self._saves.named(key, await self._save_work.name(request))

    async def _look_up(self, key: str, checkpoint: str) -> Iterable[Any]:
        return self._saves.looked_up(key, await self._save_work.look_up(checkpoint))

    async def _reserve(self, key: str, server: str, generation: int, size: int) -> Iterable[Any]:
        order = Reserve(generation, _generation_name(key, generation), size)
        done = await self._servers.call(server, "reserve", order, Reserved)
        return self._saves.reserved(key, server, generation, StagingFile(size, done.path))

    async def _reserve_annex(self, key: str, lane: str, server: str, generation: int, size: int) -> Iterable[Any]:
        # It begins as the generation's file does, and so goes when that is made anew.
        name = f"{_generation_name(key, generation)}-{lane.rpartition('.')[2]}-"
        done = await self._servers.call(server, "reserve", Reserve(generation, name, size, beside=True), Reserved)
        return self._saves.annexed(key, lane, done.path)

    async def _write(self, key: str, lane: str, order: WriteOrder, server: str) -> Iterable[Any]:
        done = await self._servers.call(server, "write", order, WriteDone)
        return self._saves.written(key, lane, done.written)

    def _server_failed(
        self, server: str, key: str, error: CheckpointError, generation: int | None = None
    ) -> Iterable[Any]:
        """A call of a server failed. Where its node is dead, others may do what it was to do."""
        if node_is_dead(server):
            self._tier_work.watch.now()
            lost = self._saves.server_lost(server, self._tier.copies(server))
            return [*lost, *self._saves.failed(key, error, server, generation)]
        return self._saves.failed(key, error, server, generation)

    def _run_is_gone(self) -> None:
        """From a thread: the run was removed, and another comes in its place."""
        self._restore_work.forget()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._tier_work.forget)

    async def _adopt(self) -> None:
        """What servers have held since before this coordinator is known once this is over."""
        self._loop = asyncio.get_running_loop()
        await self._tier_work.adopted()
        self._save_work.take_landed(self._tier.remembered())

    def _server_lost(self, server: str, copies: Mapping[str, tuple[str, str]]) -> None:
        """A node is dead: machines that care are told, and where there are copies of what its server had staged."""
        self._do(self._saves.server_lost(server, copies))
        self._do(self._restores.server_lost(server))

    async def _commit(self, key: str, save: sm.Save) -> Iterable[Any]:
        return self._committed(key, save, *await self._save_work.commit(save))

    async def _land(self, key: str, save: sm.Save) -> Iterable[Any]:
        return self._committed(key, save, *await self._save_work.land(save))

    def _committed(self, key: str, save: sm.Save, done: SaveDone, manifest: bytes) -> Iterable[Any]:
        remembered = self._tier_work.remembered(save, done.record, manifest, done.in_store)
        notice = "; ".join(filter(None, [done.notice, self._tier_work.take_notice()]))
        decided = list(self._saves.committed(key, msgspec.structs.replace(done, notice=notice)))
        return [*decided, *self._tier.committed(remembered)] if save.held else decided

    def _finish(self, outcome: SaveOutcome, checkpoint: str) -> None:
        if checkpoint:
            future = self._outcomes.setdefault(checkpoint, asyncio.get_running_loop().create_future())
            if not future.done():
                future.set_result(outcome)
            while len(self._outcomes) > _OUTCOMES_KEPT:
                self._outcomes.popitem(last=False)
            self._save_work.finish(outcome, checkpoint)
            if isinstance(outcome, Failure):
                self._do(self._tier.aborted(checkpoint))

    async def _load(self, key: str, step: int | None, tried: tuple[str, ...]) -> Iterable[Any]:
        await self._adopt()
        self._tier_work.watch.start()
        found = await self._restore_work.load(key, step, tried)
        return self._restores.loaded(
            key, found.manifest, found.data, found.mappable, found.damaged, found.holdings, found.notice
        )

    async def _fetch(self, key: str, server: str, order: FetchOrder) -> Iterable[Any]:
        await self._servers.forgotten(server)  # what was given up is free before something new takes its place
        try:
            done = await self._servers.call(server, "fetch", order, FetchDone)
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            self._servers.look_again()
            self._tier_work.watch.now()
            await asyncio.sleep(_AGAIN_S)
            text = f"shard server {server} could not be reached: {error}"
            return self._restores.unreachable(key, server, order, text)
        return self._restores.fetched(key, server, done)

    async def _search(
        self, key: str, wanted: tuple[tuple[bytes, int], ...], skip: tuple[tuple[str, int], ...]
    ) -> Iterable[Any]:
        return self._restores.searched(key, await self._restore_work.search(wanted, skip))


def _generation_name(token: str, generation: int) -> str:
    return f"generation-{generation}-{token.replace('#', '-').replace('/', '_')}"
