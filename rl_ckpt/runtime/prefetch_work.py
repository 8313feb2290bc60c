"""Prefetch work: the coordinator's part in bringing a checkpoint from the store into the nodes' memory.

Owns: starting a shard server on each node that is to take part, dealing the chunks out by the room that they have, and
what is told of it in the end. Who has what is the memory tier's to decide (`tier`): it asks for parts (`Bring`), has
copies made of them, and brings a lost node's part in again. Promises: each chunk leaves the store once, unless a node
is lost that had it, or the coordinator on the way; whatever fails is left to the store, and told.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
import ray

from rl_ckpt import logs
from rl_ckpt.errors import CheckpointError, CorruptionError, InvalidInputError, StorageError
from rl_ckpt.format.manifest import Manifest
from rl_ckpt.plan.parts import Part, Remembered
from rl_ckpt.plan.prefetch import Dealt, Key, Stored, deal_parts, names_of, places
from rl_ckpt.runtime.messages import Failure, FetchItem, Ok
from rl_ckpt.runtime.prefetch_messages import BringDone, BringOrder, PrefetchDone, PrefetchOrder
from rl_ckpt.runtime.server_calls import Servers
from rl_ckpt.runtime.status import PrefetchStatus
from rl_ckpt.runtime.tier_steps import Bring, Release
from rl_ckpt.runtime.tier_work import TierWork

_log = logs.logger()

_KEPT = 8  # prefetches whose report can still be asked for
_SHARE = 2  # of a node's free shared memory, one part in so many may be taken: a restore needs some too


@dataclass(slots=True)
class _Prefetch:
    """One prefetch."""

    order: PrefetchOrder
    begun: float
    brought: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once nothing more of it comes from the store."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once there is an outcome."""
    outcome: PrefetchDone | Failure | None = None
    dealt: Dealt | None = None
    where: dict[Key, Stored] | None = None
    """While it is under way: where chunks are in the store."""
    damaged: dict[Key, str] = field(default_factory=dict)
    fetched: dict[str, int] = field(default_factory=dict)
    """Bytes that each server has brought in."""
    notices: list[str] = field(default_factory=list)

    def end(self, outcome: PrefetchDone | Failure) -> None:
        """It is over."""
        self.outcome, self.where = outcome, None
        self.brought.set()
        self.done.set()


class PrefetchWork:
    """See the module. For one event loop."""

    def __init__(
        self,
        servers: Servers,
        tier: TierWork,
        tell: Callable[[Iterable[Any]], None],
        news: Callable[[], Awaitable[Any]],
    ) -> None:
        """None is under way.

        Args:
            servers: Of the run.
            tier: The run's memory tier.
            tell: Takes instructions of its brain, to have them carried out.
            news: Waits until something has happened.
        """
        self._servers = servers
        self._tier = tier
        self._tell = tell
        self._news = news
        self._all: OrderedDict[str, _Prefetch] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    # What drivers ask.

    def begin(self, order: PrefetchOrder) -> Ok | Failure:
        """A checkpoint is to be brought in; what servers held before this coordinator is known by now.

        Returns:
            `Ok` where it is on its way, or in memory: `wait` tells.
        """
        if not self._tier.spec.options.memory_tier:
            text = f"{self._tier.spec.url} is saved with memory_tier=False: its service keeps no checkpoint in memory"
            return Failure.of(InvalidInputError(text))
        known = self._all.get(order.record.id)
        if known is not None and (order.again or not known.done.is_set()):
            return Ok()
        there = self._in_memory(order)
        if there is not None and there.id != order.record.id and not order.latest:
            return Failure.of(
                InvalidInputError(
                    f"step {there.step} ({there.id}) is newer and in the nodes' memory, which keeps the newest only; "
                    f"restore(step={order.record.step}) reads that step from the store"
                )
            )
        one = self._all[order.record.id] = _Prefetch(order, time.monotonic())
        self._all.move_to_end(order.record.id)
        while len(self._all) > _KEPT and next(iter(self._all.values())).done.is_set():
            self._all.popitem(last=False)
        if there is not None:
            one.end(self._already(there))
        else:
            self._spawn(self._run(one))
        return Ok()

    def _in_memory(self, order: PrefetchOrder) -> Remembered | None:
        """What memory has of the checkpoint, or of one that is newer."""
        found = self._tier.brain.remembered()
        if any(one.run != order.record.run for one in found):  # that run was removed, and is another one by now
            self._tier.forget()
        number = order.record.number
        for one in found:
            newer = one.after > number or (one.record is None and one.after >= number)
            if one.run == order.record.run and (newer or one.id == order.record.id):
                return one
        return None

    def _already(self, there: Remembered) -> PrefetchDone:
        manifest = msgspec.json.decode(there.manifest, type=Manifest)
        total = sum(size for _, size in places(manifest))
        held = self._held_bytes(there.id)
        notice = "it is in the nodes' memory already"
        return PrefetchDone(there.step, there.id, total, 0, max(0, total - held), {}, {}, (notice,), 0.0)

    async def wait(self, checkpoint: str) -> PrefetchDone | Failure:
        """Answers once a prefetch is over: with all copies that are to be made, or why not."""
        one = self._all.get(checkpoint)
        if one is None:
            text = f"nothing is known here of a prefetch of {checkpoint}: the coordinator was restarted meanwhile"
            return Failure("not_found", text)
        await one.done.wait()
        assert one.outcome is not None
        return one.outcome

    # What restores ask.

    def coming(self, checkpoint: str) -> bool:
        """Whether more of a checkpoint comes from the store: who restores it does better to wait."""
        one = self._all.get(checkpoint)
        return one is not None and not one.brought.is_set()

    async def brought(self, checkpoint: str) -> None:
        """Returns once it is brought in as far as it can be; after `write_timeout_s` all the same."""
        one = self._all.get(checkpoint)
        if one is not None:
            try:
                await asyncio.wait_for(one.brought.wait(), self._tier.spec.options.write_timeout_s)
            except TimeoutError:
                return

    def status(self) -> PrefetchStatus | None:
        """Of the last one, while any of it is in memory or on its way."""
        one = next(reversed(self._all.values()), None)
        if one is None:
            return None
        record, coming = one.order.record, not one.brought.is_set()
        held = self._held_bytes(record.id)
        if not coming and not held:
            return None
        return PrefetchStatus(record.step, record.id, one.dealt.bytes if one.dealt else record.bytes, held, coming)

    # Doing it.

    async def _run(self, one: _Prefetch) -> None:
        try:
            outcome: PrefetchDone | Failure = await self._bring_all(one)
        except CheckpointError as error:
            outcome = Failure.of(error)
        except Exception as error:  # noqa: BLE001 - a bug of ours must end this prefetch, by name: restores wait for it
            text = f"internal error in the coordinator: {type(error).__name__}: {error}"
            outcome = Failure.of(CheckpointError(text))
        about = logs.fields(one.order.record.id)
        if isinstance(outcome, Failure):
            _log.warning("a prefetch failed (%s): %s", outcome.code, outcome.message, extra=about)
        else:
            text = "checkpoint %s is in memory after %.2f s: %d bytes read, %d left to the store"
            numbers = (outcome.seconds, outcome.bytes_fetched, outcome.bytes_left)
            _log.info(text, outcome.id, *numbers, extra=about)
        one.end(outcome)

    async def _bring_all(self, one: _Prefetch) -> PrefetchDone:
        loop, record = asyncio.get_running_loop(), one.order.record
        room = await self._rooms(one)
        make = partial(_deal, one.order.manifest, room)
        manifest, dealt, one.where = await loop.run_in_executor(None, make)
        one.dealt = dealt
        done = Remembered(
            record.id, record.step, one.order.manifest, record, record.number, not dealt.left, record.time
        )
        self._tell(self._tier.brain.prefetch(done, dealt.parts, room))
        self._tier.watch.start()
        while self._tier.brain.coming(record.id):
            await self._news()
        held, seconds = self._held_bytes(record.id), time.monotonic() - one.begun
        one.brought.set()
        while self._tier.brain.settling(record.id):
            await self._news()
        self._note(one, dealt)
        names = await loop.run_in_executor(None, names_of, manifest, list(one.damaged))
        return PrefetchDone(
            record.step,
            record.id,
            dealt.bytes,
            sum(one.fetched.values()),
            dealt.bytes - held,
            dict(sorted(one.fetched.items())),
            {names[key]: why for key, why in one.damaged.items()},
            tuple(dict.fromkeys(one.notices)),
            seconds,
        )

    def _note(self, one: _Prefetch, dealt: Dealt) -> None:
        """What is to be said of what is not as it should be."""
        if dealt.left:
            one.notices.append(
                f"{dealt.left_bytes} of {dealt.bytes} bytes have no room in the nodes' memory and are left to "
                "the store; a restore reads them there. Give more nodes, memory_bytes, or shared memory"
            )
        one.notices += self._tier.brain.refusals(one.order.record.id)
        if not self._held_bytes(one.order.record.id) and dealt.bytes:
            one.notices.append("nothing of it is in memory (any more): a save, or a newer checkpoint, needed the room")

    async def _rooms(self, one: _Prefetch) -> dict[str, int]:
        """Starts a server on each node; by server, how many bytes it may take."""
        await self._tier.watch.look()
        limit = self._tier.spec.options.memory_bytes if one.order.memory_bytes is None else one.order.memory_bytes
        names = [self._tier.spec.server(node) for node in one.order.nodes]
        found = await asyncio.gather(*(self._room(name) for name in names))
        room: dict[str, int] = {}
        for name, free in zip(names, found, strict=True):
            if isinstance(free, str):
                one.notices.append(f"{name} takes no part: {free}")
            else:
                room[name] = free // _SHARE if limit is None else min(limit, free // _SHARE)
        if not room:
            raise StorageError(f"no node can take part in a prefetch: {'; '.join(one.notices)}")
        return room

    async def _room(self, server: str) -> int | str:
        """Bytes of shared memory that a server's node has free, or why it can't take part."""
        limit_s = self._tier.spec.options.join_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._tier.ensure(server)
                return int(await self._servers.get(server).room.remote())
        except TimeoutError:
            return f"its shard server did not answer within {limit_s} s"
        except (CheckpointError, ray.exceptions.RayError) as error:
            return str(error).strip().splitlines()[0]

    def carry_out(self, instruction: Bring) -> None:
        """Does what the memory tier wants done."""
        self._spawn(self._bring(instruction.server, instruction.part))

    async def _bring(self, server: str, part: Part) -> None:
        """Has a server bring a part in, and tells the tier what came of it: also where it never answers."""
        brain, limit_s = self._tier.brain, self._tier.spec.options.write_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._tier.ensure(server)
                done: BringDone = await self._tier.ask(server, "bring", partial(self._order, part), BringDone)
        except TimeoutError:
            self._refused(server, part, f"shard server {server} did not answer within {limit_s} s")
            self._tell([Release(server, part.name)])  # it may have it by now, or later, and nobody would know
        except CheckpointError as error:
            self._refused(server, part, str(error))
        except Exception as error:  # noqa: BLE001 - a bug of ours must not keep a restore waiting
            self._refused(server, part, f"internal error in the coordinator: {type(error).__name__}: {error}")
        else:
            self._take(server, part, done)
            if done.path:
                self._tell(brain.brought(server, done.part, done.path))
            else:
                self._tell(brain.not_stored(part.checkpoint, part.name, server))

    def _refused(self, server: str, part: Part, why: str) -> None:
        """A server can't have a part: another one is asked, if there is any."""
        one = self._all.get(part.checkpoint)
        if one is not None:
            one.notices.append(why)
        self._tell(self._tier.brain.not_held(part.checkpoint, part.name, server, why))

    def _take(self, server: str, part: Part, done: BringDone) -> None:
        one = self._all.get(part.checkpoint)
        if one is None:
            return
        size = sum(chunk.size_bytes for chunk in done.part.chunks)
        one.fetched[server] = one.fetched.get(server, 0) + size
        good = {(chunk.digest, chunk.size_bytes) for chunk in done.part.chunks}
        for chunk in part.chunks:
            key = (chunk.digest, chunk.size_bytes)
            if key in good:
                continue
            flaw = done.flaws.get(chunk.offset)
            if flaw is None or flaw.code == CorruptionError.code:  # none: an earlier call was told why
                one.damaged[key] = flaw.why if flaw is not None else "it could not be had"
            else:
                one.notices.append(f"not all could be read, and what could not is left to a restore: {flaw.why}")

    def _order(self, part: Part) -> bytes:
        """In a thread."""
        one = self._all.get(part.checkpoint)
        if one is None:
            raise StorageError(f"nothing is known any more of where {part.name} is in the store")
        where = one.where or places(msgspec.json.decode(one.order.manifest, type=Manifest))
        files: dict[str, list[FetchItem]] = {}
        for chunk in part.chunks:
            if chunk.size_bytes:
                place = where[chunk.digest, chunk.size_bytes]
                item = FetchItem(place.offset, chunk.offset, chunk.size_bytes, chunk.digest)
                files.setdefault(place.file, []).append(item)
        return msgspec.msgpack.encode(BringOrder(part, {name: tuple(items) for name, items in files.items()}))

    def _held_bytes(self, checkpoint: str) -> int:
        """Of its chunks, each once, that are in some node's memory."""
        holdings = self._tier.brain.holdings(checkpoint)
        if holdings is None:
            return 0
        found = {
            (chunk.digest, chunk.size_bytes)
            for part in holdings
            for chunk in part.chunks
            if holdings.find(chunk.digest, chunk.size_bytes)
        }
        return sum(size for _, size in found)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _deal(manifest: bytes, room: dict[str, int]) -> tuple[Manifest, Dealt, dict[Key, Stored]]:
    decoded = msgspec.json.decode(manifest, type=Manifest)
    return decoded, deal_parts(decoded, room, uuid.uuid4().hex[:8]), places(decoded)
