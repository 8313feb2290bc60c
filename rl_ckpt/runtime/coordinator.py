"""The coordinator: one detached actor per run, which moves metadata only.

The shell around pure state machines: it turns messages into their events, and what they answer into replies; the rest
that they want done is `coordinator_work`. It keeps nothing that storage does not also tell. It opens the run for
writing (and so fences older coordinators) at its first save, so that jobs that only restore take nothing over.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import ray

from rl_ckpt.errors import CheckpointNotFoundError, SaveTimeoutError
from rl_ckpt.runtime import save_steps as sm
from rl_ckpt.runtime.coordinator_work import CoordinatorWork
from rl_ckpt.runtime.messages import (
    Failure,
    JoinSave,
    Lost,
    Matched,
    Ok,
    OpenRestore,
    RepeatSave,
    Staged,
    StagedObjects,
    Verified,
    decode,
    encode,
)
from rl_ckpt.runtime.owners import Owners, User
from rl_ckpt.runtime.owners_kept import KeptOwners, dead_jobs
from rl_ckpt.runtime.prefetch_messages import PrefetchOrder
from rl_ckpt.runtime.spec import RunSpec

_DEATH_KNOWN_S = 5.0  # within which Ray knows that a driver was killed
_LOOK_AGAIN_S = 0.1
_LOOK_FOR_JOBS_S = 5.0  # between looks whether the jobs of those who use the run live
_NEWS_S = 1.0  # how long a driver's question waits for news of its save


class Coordinator(CoordinatorWork):
    """See the module. Made by `links.start_coordinator`."""

    def __init__(self, spec: RunSpec, service: str) -> None:
        """Ready at once: the store is opened when it is first needed.

        Args:
            spec: Of whoever starts it; those who save bring theirs.
            service: Random id, the same when Ray starts it again in another process.
        """
        self._kept = KeptOwners(spec.coordinator, service)
        self._owners = self._kept.load() or Owners(spec.url)  # as they were where this is a new start of the same
        # Who made the actor need not be who saves: by others' options, what memory alone has would not be taken up.
        self._spec = self._owners.owner_spec() or spec
        super().__init__(self._spec, service)
        self._user = ""  # whose rules and options are in use
        self._caretaker: asyncio.Task[None] | None = None
        context = ray.get_runtime_context()
        if context.was_current_actor_reconstructed:  # the one before was lost; where with its node, copies are missing
            context.current_actor.take_up.remote()

    @ray.method(max_task_retries=-1)  # called while it starts: Ray may refuse that as "the actor is restarting"
    async def take_up(self) -> None:
        """Learns what servers hold, and has copied again what was lost."""
        self._take_care()
        await self._adopt()

    def _take_care(self) -> None:
        """From now on, the run is let go where the drivers of all who use it are dead."""
        if self._caretaker is None:
            self._caretaker = asyncio.get_running_loop().create_task(self._let_go_for_the_dead())

    async def _let_go_for_the_dead(self) -> None:
        """Else the lease of a job whose driver was killed would be renewed for as long as its cluster lives.

        What is committed stays, and so do these actors and what they hold: the next save opens the run again.
        """
        while True:
            await asyncio.sleep(_LOOK_FOR_JOBS_S)
            if not self._save_work.is_open() or self._saves.busy():
                continue
            with contextlib.suppress(ray.exceptions.RayError, ConnectionError, RuntimeError):  # Ray does not answer
                dead = await asyncio.get_running_loop().run_in_executor(None, dead_jobs)
                if self._owners.are_gone(dead) and not self._saves.busy():  # somebody may have come meanwhile
                    await self._save_work.close()

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

    async def prefetch(self, data: bytes) -> bytes:
        """A checkpoint of the store is to be brought into the nodes' memory; answers once that is begun."""
        order = self._read(data, PrefetchOrder)
        await self._adopt()
        return self._reply(self._prefetches.begin(order))

    async def prefetched(self, checkpoint: str) -> bytes:
        """Answers once the prefetch of a checkpoint is over."""
        return self._reply(await self._prefetches.wait(checkpoint))

    async def attach(self, user: str) -> None:
        """A Checkpointer uses the run's actors."""
        self._take_care()
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
        self._orphaned()
        self._save_work.begin(user.text, take_over, not self._saves.busy())
        self._follow(spec.user)
        return encode(Ok())

    def _follow(self, user: str) -> None:
        """Takes over the rules and options of the Checkpointer that saves (a coordinator may be found, not made)."""
        spec = self._owners.spec_of(user)
        if spec is None or (user == self._user and spec.storage_options == self._spec.storage_options):
            return  # all is as it wants it; credentials that came while a save was under way are taken up later
        self._user = user
        self._saves.configure(spec.options)
        self._restores.options = spec.options
        anew = spec.storage_options != self._spec.storage_options and not self._saves.busy()  # rotated keys, say
        if anew:
            self._spec = spec
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

    async def status(self) -> bytes:
        """What is under way and what is held: a `ServiceStatus`, as msgpack (see `status`)."""
        return await self._status.now()

    async def spec(self) -> RunSpec:
        """What shard servers are to work with: a driver's credentials may be others than those they were made with."""
        return self._spec

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

    async def flush(self, user: str, seconds: float) -> bytes:
        """Before a Checkpointer ends the actors: what is only in memory goes to the store (see `flushing`).

        Args:
            user: Its id; nothing is to be done where it is not the last.
            seconds: How long to wait; what is not done then goes on.
        """
        if not self._owners.alone(user, dead_jobs()):
            return encode(Ok())
        await self._adopt()
        return encode(await self._flushing.flush(seconds))

    # Bytes.

    def _read(self, data: bytes, kind: Any) -> Any:
        self._counts["messages"] += 1
        self._counts["bytes_in"] += len(data)
        self._counts["largest"] = max(self._counts["largest"], len(data))
        return decode(data, kind)
