"""Coordinator work: carries out what the coordinator's machines want done, and feeds them what came of it.

The part of `coordinator` below its messages: calls of shard servers, of the store (`save_work`, `restore_work`) and of
the memory tier (`tier_work`), timers, and who waits for which answer. Promises: whatever fails here reaches its machine
as an event, by name, and no save or restore hangs for it.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Mapping
from functools import partial
from typing import Any

import msgspec
import ray

from rl_ckpt import logs
from rl_ckpt.errors import CheckpointError, StorageError
from rl_ckpt.runtime import restore_steps as rm
from rl_ckpt.runtime import save_steps as sm
from rl_ckpt.runtime import tier_steps as tier
from rl_ckpt.runtime.flushing import Flushing
from rl_ckpt.runtime.generations import StagingFile
from rl_ckpt.runtime.messages import (
    Failure,
    FetchDone,
    FetchOrder,
    RepeatOrders,
    Reserve,
    Reserved,
    SaveDone,
    SaveOrders,
    SaveOutcome,
    WriteDone,
    WriteOrder,
    encode,
)
from rl_ckpt.runtime.observing import GAUGES_S, Observer
from rl_ckpt.runtime.owners_kept import dead_jobs
from rl_ckpt.runtime.prefetch_work import PrefetchWork
from rl_ckpt.runtime.ray_metrics import tell_ray
from rl_ckpt.runtime.restore_machine import RestoreMachine
from rl_ckpt.runtime.restore_work import RestoreWork
from rl_ckpt.runtime.save_machine import SaveMachine
from rl_ckpt.runtime.save_work import SaveWork
from rl_ckpt.runtime.server_calls import Servers, node_is_dead
from rl_ckpt.runtime.spec import RunSpec
from rl_ckpt.runtime.status_work import StatusWork
from rl_ckpt.runtime.tier_work import TierWork
from rl_ckpt.store.committer import SaveRequest

_OUTCOMES_KEPT = 256
_STAGED_S = 30.0  # how long a restore waits for what a driver that is gone has staged
_AGAIN_S = 1.0  # until a server is told again that could not be reached


class CoordinatorWork:
    """See the module. A part of `Coordinator`; for one event loop."""

    def __init__(self, spec: RunSpec, service: str) -> None:
        """Nothing is under way.

        Args:
            spec: Of the run.
            service: Id of the coordinator, the same when it comes back in another process.
        """
        tell_ray()
        logs.here(spec.url, ray.get_runtime_context().get_node_id())
        self._observer = Observer(spec.url)
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
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news = asyncio.Event()  # set, and replaced, whenever something has happened
        self._idle = asyncio.Event()
        self._idle.set()
        self._naming = asyncio.Lock()  # what came of one name is known before the next save's step is checked
        self._flushing = Flushing(self._saves, self._tier, self._save_work, self._do, self._idle)
        self._prefetches = PrefetchWork(self._servers, self._tier_work, self._do, self._something)
        self._status = StatusWork(self._saves, self._restores, self._tier, self._servers, self._prefetches.status)
        self._counts = {"messages": 0, "bytes_in": 0, "bytes_out": 0, "largest": 0, "repeats": 0}

    async def _answer(self, key: str, rank: int, event: Callable[[], Iterable[Any]]) -> bytes:
        """Feeds an event, and waits until the machine answers this rank."""
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault((key, rank), []).append(future)
        self._do(event())
        return await future

    def _reply(self, message: msgspec.Struct) -> bytes:
        data = encode(message)
        self._counts["bytes_out"] += len(data)
        self._counts["largest"] = max(self._counts["largest"], len(data))
        return data

    def _do(self, instructions: Iterable[Any]) -> None:
        """Carries out what a machine wants done; the events that come of it are fed to it later."""
        for instruction in instructions:
            self._observer.see(instruction)
            match instruction:
                case sm.Order(key, rank, reply) | rm.Answer(key, rank, reply):
                    self._reply_to(key, rank, reply)
                case sm.Arm(key, state, seconds):
                    self._later(seconds, partial(self._saves.timed_out, key, state))
                case rm.Arm(key, state, seconds, number):
                    self._later(seconds, partial(self._restores.timed_out, key, state, number))
                case _ if isinstance(instruction, sm.Instruction):
                    self._do_save(instruction)
                case _ if isinstance(instruction, rm.Instruction):
                    self._do_restore(instruction)
                case _:
                    self._do_tier(instruction)
        self._status.note()
        self._news.set()
        self._news = asyncio.Event()
        self._idle.clear() if self._saves.busy() else self._idle.set()

    def _reply_to(self, key: str, rank: int, reply: msgspec.Struct) -> None:
        for future in self._waiting.pop((key, rank), []):
            if not future.done():
                future.set_result(self._reply(reply))
        self._counts["repeats"] += isinstance(reply, RepeatOrders)
        if isinstance(reply, SaveOrders | RepeatOrders) and reply.checkpoint:
            self._outcomes.setdefault(reply.checkpoint, asyncio.get_running_loop().create_future())

    def _do_save(self, instruction: sm.Instruction) -> None:
        match instruction:
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
                if not helps and any(one.record is None for one in self._tier.remembered()):
                    self._flush_soon()
            case sm.Finish(_, outcome, checkpoint):
                self._finish(outcome, checkpoint)
            case _:
                raise AssertionError(f"unknown instruction {instruction!r}")

    def _do_tier(self, instruction: tier.Instruction) -> None:
        match instruction:
            case tier.Landed(checkpoint):
                self._do(self._saves.landed(checkpoint, True))
            case tier.CannotLand(checkpoint, why):
                self._tier_work.cannot_land(why)
                self._do(self._saves.landed(checkpoint, False))
            case tier.GenerationFree(generation):
                self._do(self._saves.freed(generation))
            case tier.Bring():
                self._prefetches.carry_out(instruction)
            case _:
                self._tier_work.carry_out(instruction)

    def _do_restore(self, instruction: rm.Instruction) -> None:
        match instruction:
            case rm.Load(key, step, tried):
                self._spawn(self._load(key, step, tried), key, self._restores.failed)
            case rm.Fetch(key, server, order):
                self._spawn(self._fetch(key, server, order), key, self._restores.failed)
            case rm.Search(key, wanted, skip):
                self._spawn(self._search(key, wanted, skip), key, self._restores.failed)
            case rm.Await(key, checkpoint):
                self._spawn(self._await(key, checkpoint), key, self._restores.failed)
            case rm.Damaged(server, part, chunk):
                self._restore_work.bad(server, part, chunk)
            case rm.Forget(key, servers, keys):
                self._servers.forget(servers, keys)
                self._restore_work.done(key)
            case _:
                raise AssertionError(f"unknown instruction {instruction!r}")

    def _flush_soon(self) -> None:
        """Memory is short as it has a checkpoint that nobody else has; once it is in the store too, it makes room."""

        async def begin() -> None:
            await self._flushing.flush(0.0)  # goes on by itself; where it fails, the next save that finds no room asks

        task = asyncio.get_running_loop().create_task(begin())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _something(self) -> None:
        """Returns once something has happened."""
        await self._news.wait()

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
        committer = await self._save_work.open()
        self._observer.newest(next(reversed(committer.commits), None))
        return self._saves.opened(key)

    async def _name(self, key: str, request: SaveRequest) -> Iterable[Any]:
        await self._adopt()
        async with self._naming:  # else a save that failed meanwhile would have its step still, in the next one's way
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
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._tell_gauges(self._loop)
        await self._tier_work.adopted()
        self._save_work.take_landed(self._tier.remembered())

    def _tell_gauges(self, loop: asyncio.AbstractEventLoop) -> None:
        self._observer.gauges(self._tier.counts())
        loop.call_later(GAUGES_S, self._tell_gauges, loop)

    def _server_lost(self, server: str, copies: Mapping[str, tuple[str, str]]) -> None:
        """A node is dead: machines that care are told, and where there are copies of what its server had staged."""
        self._do(self._saves.server_lost(server, copies))
        self._do(self._restores.server_lost(server))

    async def _commit(self, key: str, save: sm.Save) -> Iterable[Any]:
        return self._committed(key, save, *await self._save_work.commit(save))

    async def _land(self, key: str, save: sm.Save) -> Iterable[Any]:
        decided = self._committed(key, save, *await self._save_work.land(save))
        return await self._tier_work.written_down(decided)

    def _committed(self, key: str, save: sm.Save, done: SaveDone, manifest: bytes) -> list[Any]:
        remembered = self._tier_work.remembered(save, done.record, manifest, done.in_store)
        notice = "; ".join(filter(None, [done.notice, self._tier_work.take_notice()]))
        decided = list(self._saves.committed(key, msgspec.structs.replace(done, notice=notice)))
        self._tier_work.committed()
        return [*decided, *self._tier.committed(remembered)]

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
        if not tried:
            await self._decided()
        found = await self._restore_work.load(key, step, tried)
        self._observer.found(key, found.manifest.id)
        # Or it came while the manifest was read, before which nothing of it was in memory.
        came = found.holdings is None and self._tier.holdings(found.id) is not None
        return self._restores.loaded(
            key, found.manifest, found.data, found.mappable, found.damaged, found.holdings, found.notice,
            coming=came or self._prefetches.coming(found.id),
        )  # fmt: skip

    async def _await(self, key: str, checkpoint: str) -> Iterable[Any]:
        await self._prefetches.brought(checkpoint)
        self._tier.use(checkpoint, key)  # where the restore is over by now, its `Forget` follows at once
        return self._restores.brought(key, self._tier.holdings(checkpoint))

    def _orphaned(self) -> set[str]:
        """Ends what drivers that are gone can't go on with; the Ray jobs that are over."""
        dead = dead_jobs() if self._saves.busy() else set()
        self._do(self._saves.orphaned(dead))
        return dead

    async def _decided(self) -> None:
        """What a driver that is gone has staged is the newest checkpoint in a moment: it is waited for, for a while."""
        staged = self._saves.undecided(self._orphaned())
        outcomes = [self._outcomes[checkpoint] for checkpoint in staged if checkpoint in self._outcomes]
        if outcomes:
            await asyncio.wait(outcomes, timeout=_STAGED_S)

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
