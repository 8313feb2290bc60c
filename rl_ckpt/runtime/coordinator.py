"""The coordinator: one detached actor per run, which moves metadata only.

The shell around two pure state machines: it turns messages into their events and carries out their instructions. It
keeps nothing that storage does not also tell. It opens the run for writing (and so fences older coordinators) at its
first save, so that jobs that only restore take nothing over.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import msgspec
import ray

from rl_ckpt.errors import CheckpointError, CheckpointNotFoundError, CorruptionError, SaveTimeoutError, StorageError
from rl_ckpt.format import records
from rl_ckpt.format.manifest import Manifest
from rl_ckpt.runtime import restore_machine as rm
from rl_ckpt.runtime import save_steps as sm
from rl_ckpt.runtime.generations import StagingFile
from rl_ckpt.runtime.messages import (
    Failure,
    FetchDone,
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
    decode,
    encode,
)
from rl_ckpt.runtime.save_machine import SaveMachine
from rl_ckpt.runtime.spec import NAMESPACE, RunSpec
from rl_ckpt.store.committer import Committer
from rl_ckpt.store.run import Run, lineage

_OUTCOMES_KEPT = 256


class Coordinator:
    """See the module. Made by `links.start_coordinator`."""

    def __init__(self, spec: RunSpec) -> None:
        """Ready at once: the store is opened when it is first needed."""
        self._spec = spec
        incarnation = f"{uuid.uuid4().hex[:8]}-"
        self._saves = SaveMachine(spec.options, incarnation)
        self._restores = rm.RestoreMachine(spec.options, incarnation)
        self._waiting: dict[tuple[str, int], list[asyncio.Future[bytes]]] = {}
        self._outcomes: OrderedDict[str, asyncio.Future[SaveOutcome]] = OrderedDict()
        self._expired: OrderedDict[str, Failure] = OrderedDict()  # saves that their callers have given up
        self._servers: dict[str, Any] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._committing = ThreadPoolExecutor(1, "rl_ckpt-commit")  # the committer is for one thread
        self._naming = ThreadPoolExecutor(1, "rl_ckpt-name")
        self._reading = ThreadPoolExecutor(4, "rl_ckpt-read")
        self._committer: Committer | None = None
        self._reader: Run | None = None
        self._notice = ""
        self._opened_with = spec.storage_options
        self._users: dict[str, str] = {}  # drivers that use these actors → their Ray job
        self._idle = asyncio.Event()
        self._idle.set()
        self._counts = {"messages": 0, "bytes_in": 0, "bytes_out": 0, "largest": 0, "repeats": 0}

    # What workers call. Every message in and every reply out is counted.

    async def join_save(self, data: bytes) -> bytes:
        """A rank takes part in a save; the reply says what it stages."""
        message = self._read(data, JoinSave)
        if message.key in self._expired:
            return self._reply(self._expired[message.key])
        self._servers.setdefault(message.server, None)
        return await self._answer(message.key, message.rank, lambda: self._saves.join(message))

    async def repeat_save(self, data: bytes) -> bytes:
        """A rank takes part in a save, with a state of the shape that it had in the last one."""
        message = self._read(data, RepeatSave)
        if message.key in self._expired:
            return self._reply(self._expired[message.key])
        return await self._answer(message.key, message.rank, lambda: self._saves.repeat(message))

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
        failure = SaveTimeoutError(why)
        if for_good:  # ranks that come to it later must not bring it about all the same
            self._expired[key] = Failure.of(failure)
            while len(self._expired) > _OUTCOMES_KEPT:
                self._expired.popitem(last=False)
        self._do(self._saves.expire(key, failure))

    async def forsake(self) -> None:
        """Workers that saved by themselves were ended: saves for which some had still to do something end."""
        error = SaveTimeoutError("the workers of this save were ended")
        for key, state in self._saves.states().items():
            if key.startswith("save-") and state not in (sm.SETTLING, sm.WRITING, sm.COMMITTING):
                self._do(self._saves.expire(key, error))
                self._saves.forget(key)

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
        self._servers.setdefault(message.server, None)
        return await self._answer(message.key, message.rank, lambda: self._restores.match(message))

    async def verified(self, data: bytes) -> bytes:
        """A rank has verified; the reply says whether all have."""
        message = self._read(data, Verified)
        return await self._answer(message.key, message.rank, lambda: self._restores.verify(message))

    async def applied(self, key: str, rank: int) -> None:
        """A rank has set its state."""
        self._do(self._restores.applied(key, rank))

    async def lost_restore(self, data: bytes) -> None:
        """A rank can't go on with a restore."""
        message = self._read(data, Lost)
        self._do(self._restores.lost(message.key, message.rank, message.world_size, message.failure))

    async def attach(self, user: str, job: str) -> None:
        """A driver (of the Ray job `job`) uses the run's actors."""
        self._users[user] = job

    async def detach(self, user: str) -> bool:
        """A driver is done with the run's actors; answers whether it may end them, as no live driver uses them."""
        self._users.pop(user, None)
        dead = {job["JobID"] for job in ray._private.state.jobs() if job["IsDead"]}
        return not [other for other, job in self._users.items() if job not in dead]

    async def configure(self, spec: RunSpec) -> None:
        """Takes over the rules and options of the driver that saves (a coordinator may be found, not made)."""
        self._spec = spec
        self._saves.configure(spec.options)
        self._restores.options = spec.options
        if spec.storage_options != self._opened_with and not self._saves.busy():
            # Rotated keys, say: everything is opened anew.
            self._opened_with = spec.storage_options
            self._committer = self._reader = None
            for name in self._servers:
                self._server(name).configure.remote(spec)
        if self._committer is not None:
            self._committer.configure(spec.keep, spec.options.grace_s)

    async def under_way(self, key: str) -> bool:
        """Whether a save or restore is past the call for its workers: who waits for it need not keep the time."""
        return self._saves.under_way(key) or self._restores.under_way(key)

    async def stats(self) -> dict[str, int]:
        """Control messages so far, in number and bytes, and ranks that repeated a plan, for tests and metrics."""
        return dict(self._counts)

    async def servers(self) -> list[str]:
        """Names of the shard servers that took part so far."""
        return sorted(name for name in self._servers if name)

    async def drain(self) -> bytes:
        """Answers once no save is under way and the sweep is done."""
        await self._idle.wait()
        await asyncio.get_running_loop().run_in_executor(self._committing, lambda: None)
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
                    self._spawn(self._look_up(key, checkpoint), key, self._saves.failed)
                case sm.ReserveMemory(key, server, generation, size):
                    self._spawn(self._reserve(key, server, generation, size), key, self._saves.failed)
                case sm.Write(key, server, order):
                    self._spawn(self._write(key, server, encode(order)), key, self._saves.failed)
                case sm.Commit(key, save):
                    self._spawn(self._commit(key, save), key, self._saves.failed)
                case sm.Finish(_, outcome, checkpoint):
                    self._finish(outcome, checkpoint)
                case sm.Arm(key, state, seconds):
                    self._later(seconds, partial(self._saves.timed_out, key, state))
                case rm.Load(key, step, tried):
                    self._spawn(self._load(key, step, tried), key, self._restores.failed)
                case rm.Fetch(key, server, order):
                    self._spawn(self._fetch(key, server, encode(order)), key, self._restores.failed)
                case rm.Forget(key, servers):
                    for server in servers:
                        with contextlib.suppress(StorageError):  # gone, and its memory with it
                            self._server(server).forget.remote(key)
                case rm.Arm(key, state, seconds):
                    self._later(seconds, partial(self._restores.timed_out, key, state))
                case _:
                    raise AssertionError(f"unknown instruction {instruction!r}")
        self._idle.clear() if self._saves.busy() else self._idle.set()

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
                self._servers = dict.fromkeys(self._servers)  # a server may come back under its name, as another actor
                event = failed(key, StorageError(f"a shard server could not be reached: {error}"))
            except Exception as error:  # noqa: BLE001 - a bug of ours must fail this save, by name, and not hang it
                text = f"internal error in the coordinator: {type(error).__name__}: {error}"
                event = failed(key, CheckpointError(text))
            self._do(event)

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _server(self, name: str) -> Any:
        if self._servers.get(name) is None:
            try:
                self._servers[name] = ray.get_actor(name, namespace=NAMESPACE)
            except ValueError as error:
                raise StorageError(f"shard server {name} is gone, with its node or because it was ended") from error
        return self._servers[name]

    async def _call(self, reply: Awaitable[bytes], kind: Any) -> Any:
        answer = decode(await reply, kind)
        if isinstance(answer, Failure):
            raise answer.error()
        return answer

    def _in_thread(self, pool: ThreadPoolExecutor, work: Callable[[], Any]) -> Awaitable[Any]:
        return asyncio.get_running_loop().run_in_executor(pool, work)

    # Instructions of saves.

    async def _name(self, key: str, request: Any) -> Iterable[Any]:
        # In a thread of its own: an earlier save's commit and sweep are not waited for.
        committer = self._committer
        if committer is None or await self._in_thread(self._naming, committer.is_gone):
            committer = await self._opened()
        return self._saves.named(key, await self._in_thread(self._naming, partial(committer.attempt, request)))

    async def _open(self, key: str) -> Iterable[Any]:
        await self._opened()
        return self._saves.opened(key)

    async def _opened(self) -> Committer:
        def work() -> Committer:
            if self._committer is not None and self._committer.is_gone():
                self._committer = self._reader = None  # its folder was removed: this is a new run
            if self._committer is None:
                spec = self._spec
                run = Run.create(spec.url, spec.storage_options, spec.options.weak_commits)
                self._committer = Committer(run, spec.keep, spec.options.grace_s)
            return self._committer

        opened: Committer = await self._in_thread(self._committing, work)
        return opened

    async def _look_up(self, key: str, checkpoint: str) -> Iterable[Any]:
        def work() -> Any:
            assert self._committer is not None
            return self._committer.stored(checkpoint)

        return self._saves.looked_up(key, await self._in_thread(self._committing, work))

    async def _reserve(self, key: str, server: str, generation: int, size: int) -> Iterable[Any]:
        name = f"generation-{generation}-{key.replace('#', '-').replace('/', '_')}"
        order = encode(Reserve(generation, name, size))
        done = await self._call(self._server(server).reserve.remote(order), Reserved | Failure)
        return self._saves.reserved(key, server, generation, StagingFile(size, done.path))

    async def _write(self, key: str, server: str, order: bytes) -> Iterable[Any]:
        done = await self._call(self._server(server).write.remote(order), WriteDone | Failure)
        return self._saves.written(key, server, done.written)

    async def _commit(self, key: str, save: sm.Save) -> Iterable[Any]:
        def work() -> SaveDone:
            assert self._committer is not None
            committer = self._committer
            self._check_visible(committer.run, save)
            record = committer.commit(save.done())
            notice, self._notice = self._notice, ""
            url = committer.run.store.object_url(records.manifest_name(record.id))
            return SaveDone(record, url, lineage(record, committer.commits), save.stall_s, notice)

        return self._saves.committed(key, await self._in_thread(self._committing, work))

    def _check_visible(self, run: Run, save: sm.Save) -> None:
        """On a local disk, files must be there for the coordinator too: nodes with disks of their own make no run."""
        assert save.plan is not None
        for server, files in save.plan.files.items():
            for file in files:
                if run.store.local_path(file.name) is not None and not run.store.exists(file.name):
                    raise StorageError(
                        f"{run.store.object_url(file.name)}, which {server} wrote, is not there on the coordinator's "
                        "node: the nodes don't share this folder. Give a shared file system or an object store "
                        "(s3://...) as url"
                    )

    def _finish(self, outcome: SaveOutcome, checkpoint: str) -> None:
        if checkpoint:
            future = self._outcomes.setdefault(checkpoint, asyncio.get_running_loop().create_future())
            if not future.done():
                future.set_result(outcome)
            while len(self._outcomes) > _OUTCOMES_KEPT:
                self._outcomes.popitem(last=False)
            if self._committer is not None:
                if isinstance(outcome, Failure):
                    self._committer.abandon(checkpoint)
                self._committing.submit(self._tidy)

    def _tidy(self) -> None:
        assert self._committer is not None
        try:
            self._committer.tidy()
        except CheckpointError as error:  # the checkpoint is committed all the same; the next save's caller is told
            self._notice = f"old checkpoints could not be swept: {error}"

    # Instructions of restores.

    async def _load(self, key: str, step: int | None, tried: tuple[str, ...]) -> Iterable[Any]:
        def work() -> tuple[Manifest, bytes, bool, dict[str, str]]:
            if self._reader is None:
                self._reader = Run.open(self._spec.url, self._spec.storage_options)
            run = self._reader
            candidates, damaged = run.candidates(step)
            for commit in candidates:
                if commit.id in tried:
                    continue
                try:
                    manifest, data = run.manifest_file(commit)
                except CorruptionError as error:
                    damaged[commit.id] = str(error)
                    continue
                mappable = run.store.local_path(records.RUN_FILE) is not None
                return manifest, data, mappable, damaged
            bad = [*tried, *damaged]
            raise CorruptionError(f"no good checkpoint in {self._spec.url}: tried {bad}; {damaged or ''}")

        return self._restores.loaded(key, *await self._in_thread(self._reading, work))

    async def _fetch(self, key: str, server: str, order: bytes) -> Iterable[Any]:
        done = await self._call(self._server(server).fetch.remote(order), FetchDone | Failure)
        return self._restores.fetched(key, server, done)
