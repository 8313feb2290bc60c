"""Flushing: what landed in memory alone goes to the store before the run's actors are ended.

Owns: which checkpoint that is, and what its writing needs: the memory tier has its manifest and its bytes, and nothing
more is needed, so it makes no difference whether this coordinator saved it or one before it. It goes the way of every
save from `settling` on, under the id that it has. Promises: where it can be written later and was not, its caller is
told, and does not end the servers that have it.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import msgspec

from rl_ckpt.errors import (
    CheckpointError,
    FencedError,
    RunOwnedError,
    SaveTimeoutError,
    StorageError,
    WorkerFailuresError,
)
from rl_ckpt.format.manifest import Manifest
from rl_ckpt.plan.parts import Remembered, plan_of_memory
from rl_ckpt.runtime.messages import Failure, Ok
from rl_ckpt.runtime.save_machine import SaveMachine
from rl_ckpt.runtime.save_work import SaveWork
from rl_ckpt.runtime.tier import Tier
from rl_ckpt.store.committer import SaveRequest

FLUSH = "flush-"
"""How the keys of such saves begin."""


class Flushing:
    """See the module. For the coordinator's loop."""

    def __init__(
        self,
        saves: SaveMachine,
        tier: Tier,
        work: SaveWork,
        do: Callable[[Iterable[Any]], None],
        idle: asyncio.Event,
    ) -> None:
        """Nothing is under way.

        Args:
            saves: Writes and commits.
            tier: Has the bytes.
            work: Opens the run.
            do: Carries out instructions of either.
            idle: Set while no save is under way.
        """
        self._saves = saves
        self._tier = tier
        self._work = work
        self._do = do
        self._idle = idle
        self._task: asyncio.Task[Ok | Failure] | None = None

    async def flush(self, seconds: float) -> Ok | Failure:
        """Writes the newest checkpoint, if that is only in memory.

        Args:
            seconds: How long to wait; what is not done then goes on.

        Returns:
            `Ok` where nothing more can be done for what memory has, with a notice where that is a loss; `Failure` where
            its memory must stay.
        """
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._flush())
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.shield(self._task)
        except TimeoutError:
            step = next((one.step for one in self._tier.remembered()), None)
            return Failure.of(
                SaveTimeoutError(f"step {step} is only in memory, and not in the store after {seconds} s")
            )

    async def _flush(self) -> Ok | Failure:
        alone = list(itertools.takewhile(lambda one: one.record is None, self._tier.remembered()))
        if not alone:
            return Ok()
        newest = next((one for one in alone if one.whole), None)
        if newest is None:
            text = f"step {alone[0].step} was only in memory, and is lost: no live node has all of {alone[0].id}"
            return Ok(f"{text}. Lower `persist_every`, or raise `replicas`")
        token = FLUSH + newest.id
        self._tier.use(newest.id, token)
        try:
            try:
                await self._write(newest)
            except WorkerFailuresError:  # a node was lost meanwhile; there may be copies of what it had
                await self._write(newest)
        except (FencedError, RunOwnedError) as error:  # whose line of checkpoints does not go on from this one
            return Ok(f"step {newest.step} was only in memory, and is lost: {error}")
        except CheckpointError as error:
            text = f"step {newest.step} is only in memory, and could not be written to the store: {error}"
            return msgspec.structs.replace(Failure.of(error), message=text)
        finally:
            self._do(self._tier.done(token))
        return Ok()

    async def _write(self, one: Remembered) -> None:
        loop, options = asyncio.get_running_loop(), self._saves.options
        # Its own names: a server may still be busy with what an urgent save, or the last try, wrote before it gave up.
        ending = f".{uuid.uuid4().hex[:8]}"
        key = FLUSH + one.id + ending
        manifest = await loop.run_in_executor(None, partial(msgspec.json.decode, one.manifest, type=Manifest))
        if not await self._work.attempt_landed(one, manifest):
            return  # the run is another one by now, or has a newer checkpoint
        make = partial(plan_of_memory, manifest, options.write_streams, options.file_bytes, ending)
        plan = await loop.run_in_executor(None, make)
        held = {server + ending: place for server, place in self._tier.holders(one.id).items()}
        if not held.keys() >= plan[0].files.keys():
            raise StorageError("a node that had a part of it was lost just now")
        request = SaveRequest(one.step, manifest.metrics, manifest.tag, manifest.parent)
        self._do(self._saves.flush(key, one.id, request, plan, held))
        await self._idle.wait()
        end = self._saves.restages(key)
        if isinstance(end, Failure):
            raise end.error()
