"""Status work: what the coordinator says of itself: its saves, restores, prefetches, and what nodes hold.

Owns: since when something is in its state (the machines know no clock). Looks at the machines, changes nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import ray

from rl_ckpt.errors import CheckpointError
from rl_ckpt.runtime import restore_steps as rm
from rl_ckpt.runtime import save_steps as sm
from rl_ckpt.runtime.restore_machine import RestoreMachine
from rl_ckpt.runtime.restore_steps import Restore
from rl_ckpt.runtime.save_machine import SaveMachine
from rl_ckpt.runtime.save_steps import Save
from rl_ckpt.runtime.server_calls import Servers
from rl_ckpt.runtime.status import PrefetchStatus, RestoreStatus, SaveStatus, ServerStatus, ServiceStatus
from rl_ckpt.runtime.tier import Tier

_ANSWER_S = 3.0  # a server that does not answer within it is said not to


class StatusWork:
    """See the module. For one event loop."""

    def __init__(
        self,
        saves: SaveMachine,
        restores: RestoreMachine,
        tier: Tier,
        servers: Servers,
        prefetch: Callable[[], PrefetchStatus | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing has been seen yet."""
        self._saves = saves
        self._restores = restores
        self._tier = tier
        self._servers = servers
        self._prefetch = prefetch
        self._clock = clock
        self._since: dict[str, tuple[str, float, float]] = {}
        """By token: state, since when it is in that, and since when it is known."""

    def note(self) -> None:
        """Something has happened: looks which states are new."""
        now = self._clock()
        states = {save.token: save.state for save in self._saves.under_way_now()}
        states |= {restore.token: restore.state for restore in self._restores.under_way_now()}
        known = self._since
        self._since = {}
        for token, state in states.items():
            before = known.get(token)
            if before is None:
                self._since[token] = state, now, now
            else:
                self._since[token] = before if before[0] == state else (state, now, before[2])

    async def now(self) -> bytes:
        """A `ServiceStatus`, as msgpack."""
        found = await asyncio.gather(*(self._server(name) for name in self._servers.names()))
        servers = [server for server, _ in found]
        counts = self._tier.counts()
        status = ServiceStatus(
            tuple(_save(save, *self._ages(save.token)) for save in self._saves.under_way_now()),
            tuple(_restore(restore, *self._ages(restore.token)) for restore in self._restores.under_way_now()),
            self._with(sum(coming for _, coming in found)),
            tuple(servers),
            counts["bytes_held"],
            counts["parts_held"],
            counts["copies_missing"],
            tuple(one.id for one in self._tier.remembered()),
        )
        return msgspec.msgpack.encode(status)

    def _ages(self, token: str) -> tuple[float, float]:
        now = self._clock()
        _, state, first = self._since.get(token, ("", now, now))
        return now - state, now - first

    def _with(self, bytes_coming: int) -> PrefetchStatus | None:
        """The prefetch, with what there is of parts that are not whole yet."""
        prefetch = self._prefetch()
        if prefetch is None or not prefetch.under_way:
            return prefetch
        there = min(prefetch.bytes, prefetch.bytes_in_memory + bytes_coming)
        return dataclasses.replace(prefetch, bytes_in_memory=there)

    async def _server(self, name: str) -> tuple[ServerStatus, int]:
        try:
            async with asyncio.timeout(_ANSWER_S):
                found: Mapping[str, Any] = await self._servers.get(name).stats.remote()
        except (CheckpointError, ray.exceptions.RayError, TimeoutError):
            return ServerStatus(name, False), 0
        status = ServerStatus(
            name,
            True,
            found["parts_held"],
            found["bytes_held"],
            found["store_bytes_read"],
            found["store_bytes_written"],
            found["store_retries"],
            found["bytes_from_peers"],
        )
        return status, found["bytes_coming"]


def _save(save: Save, state_s: float, seconds: float) -> SaveStatus:
    plan = save.dealt or save.plan  # as it was dealt: a settled one has the same to stage
    stage: Mapping[int, Iterable[Any]] = plan.stage if plan is not None else {}
    sizes = {rank: sum(item.size_bytes for item in items) for rank, items in stage.items()}
    settled = save.plan is not None and save.state in (sm.WRITING, sm.COMMITTING) and save.to_store
    return SaveStatus(
        save.request.step,
        save.checkpoint,
        save.state,
        save.world_size,
        len(save.here),
        len(save.whole),
        sum(sizes.values()),
        sum(size for rank, size in sizes.items() if rank in save.whole),
        save.plan.new_bytes if settled and save.plan is not None else 0,
        sum(file.bytes for files in save.written.values() for file in files),
        state_s,
        seconds,
    )


def _restore(restore: Restore, state_s: float, seconds: float) -> RestoreStatus:
    done: dict[str, int] = {
        rm.OPENING: len(restore.joined),
        rm.MATCHING: len(restore.matched),
        rm.VERIFYING: len(restore.verified),
        rm.OVER: restore.world_size - len(restore.joined),  # those who have set their state are taken out
    }
    known = restore.manifest
    return RestoreStatus(
        restore.step if known is None else known.step,
        "" if known is None else known.id,
        restore.state,
        restore.world_size,
        done.get(restore.state, 0),
        dict(restore.bytes_from),
        state_s,
        seconds,
    )
