"""A prefetch in the coordinator, with servers that answer as a test says: who takes part, and what is told of it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine, Iterable
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import msgspec
import numpy as np
import pytest

from rl_ckpt import logs
from rl_ckpt.errors import CheckpointError, StorageError
from rl_ckpt.format.manifest import Manifest, encode
from rl_ckpt.format.records import CommitRecord
from rl_ckpt.options import Options
from rl_ckpt.plan.parts import ChunkAt, Part, Remembered
from rl_ckpt.runtime import messages, tier_work, watch
from rl_ckpt.runtime import tier_steps as tier
from rl_ckpt.runtime.coordinator_work import CoordinatorWork
from rl_ckpt.runtime.messages import Failure, Flaw, HoldDone, Ok, decode
from rl_ckpt.runtime.prefetch_messages import BringDone, BringOrder, PrefetchDone, PrefetchOrder
from rl_ckpt.runtime.prefetch_work import PrefetchWork
from rl_ckpt.runtime.restore_work import Loaded
from rl_ckpt.runtime.spec import RunSpec
from rl_ckpt.runtime.status import PrefetchStatus
from rl_ckpt.runtime.tier_work import TierWork
from tests.unit.plan.model import save

NODES = ("a" * 16, "b" * 16)
SPEC = RunSpec("file:///nowhere", {}, (), Options(replicas=0), "get_state", "set_state")
SERVERS = tuple(SPEC.server(node) for node in NODES)
MANIFEST: Manifest = msgspec.structs.replace(
    save([{"a": np.arange(20.0), "b": np.arange(5)}] * 2, ["s0", "s1"]).manifest, id="4-new", run="r", step=4
)
TOTAL = sum(chunk.bytes for array in MANIFEST.arrays for chunk in array.chunks)


def record(checkpoint: str = "4-new", number: int = 4, run: str = "r") -> CommitRecord:
    return CommitRecord(
        number=number, run=run, write_id="w", epoch=1, id=checkpoint, step=number, manifest_bytes=1, manifest_digest="",
        bytes=TOTAL, bytes_written=1, time=1.0,
    )  # fmt: skip


def order(*, latest: bool = True, memory_bytes: int | None = None, again: bool = False) -> PrefetchOrder:
    return PrefetchOrder(record(), encode(MANIFEST), NODES, latest, memory_bytes, again)


class Servers:
    """Stands in for `server_calls.Servers`, and for the servers themselves."""

    def __init__(self) -> None:
        self.orders: list[tuple[str, BringOrder]] = []
        self.room = dict.fromkeys(SERVERS, 1 << 20)
        self.started: list[str] = []
        self.answer: Callable[[str, BringOrder], Any] = lambda server, one: BringDone(one.part, f"/shm/{server}")
        self.gate: asyncio.Event | None = None
        """What is asked waits for it."""
        self.copies: asyncio.Event | None = None
        """Copies wait for it."""

    def names(self) -> list[str]:
        return self.started

    def note(self, name: str) -> None:
        self.started.append(name)

    def look_again(self) -> None:
        """As for the real ones."""

    def get(self, name: str) -> Any:
        async def room() -> int:
            if self.room[name] < 0:
                raise StorageError("it is gone\nin two lines")
            return self.room[name]

        async def bring(data: bytes) -> bytes:
            one = decode(data, BringOrder)
            self.orders.append((name, one))
            if self.gate is not None:
                await self.gate.wait()
            answer = self.answer(name, one)
            if isinstance(answer, Exception):
                raise answer
            return messages.encode(answer)

        async def other(_: Any) -> bytes:
            return messages.encode(Ok())

        async def copy(_: Any) -> bytes:
            if self.copies is not None:
                await self.copies.wait()
            return messages.encode(HoldDone("/copy"))

        methods = {"room": room, "bring": bring, "remember": other, "release": other, "copy": copy}
        return SimpleNamespace(**{key: SimpleNamespace(remote=what) for key, what in methods.items()})


class Bench:
    """A coordinator's prefetches, its memory tier, and two nodes."""

    def __init__(self, options: Options | None = None) -> None:
        self.spec = dataclasses.replace(SPEC, options=options or SPEC.options)
        self.servers = Servers()
        self.news = asyncio.Event()
        self.tier = TierWork(self.spec, self.servers, self.tell, lambda: False, lambda *_: None)  # type: ignore[arg-type]
        self.work = PrefetchWork(self.servers, self.tier, self.tell, self.something)  # type: ignore[arg-type]
        self.released: list[str] = []

    async def something(self) -> None:
        await self.news.wait()

    def tell(self, instructions: Iterable[Any]) -> None:
        for one in instructions:
            if isinstance(one, tier.Bring):
                self.work.carry_out(one)
            elif isinstance(one, tier.Release):
                self.released.append(one.part)
            elif isinstance(one, tier.Copy | tier.Remember):
                self.tier.carry_out(one)
        self.news.set()
        self.news = asyncio.Event()

    def hold(self, checkpoint: str, number: int, in_store: bool = True, run: str = "r") -> None:
        """Memory has a checkpoint."""
        part = Part(checkpoint, SERVERS[0], 8, (ChunkAt(b"d" * 16, 0, 8),))
        self.tier.brain.servers_are(dict.fromkeys(SERVERS, False))
        self.tier.brain.begin(checkpoint, 0, {SERVERS[0]: (8, "/here")})
        self.tier.brain.tabled(checkpoint, [part])
        self.tier.brain.held(checkpoint, part.name, SERVERS[0], "/here")
        manifest = encode(msgspec.structs.replace(MANIFEST, id=checkpoint, run=run))
        found = record(checkpoint, number, run) if in_store else None
        self.tier.brain.committed(Remembered(checkpoint, number, manifest, found, number, True))

    async def prefetch(self, one: PrefetchOrder | None = None) -> PrefetchDone:
        begun = self.work.begin(one or order())
        assert isinstance(begun, Ok), begun
        async with asyncio.timeout(20):
            done = await self.work.wait((one or order()).record.id)
        assert isinstance(done, PrefetchDone), done
        return done


@pytest.fixture(autouse=True)
def alive(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Nodes as the watch sees them; servers are started by their names."""
    nodes = dict.fromkeys(NODES, False)
    monkeypatch.setattr(watch, "nodes", lambda: dict(nodes))

    async def ready() -> str:
        return ""

    handle = SimpleNamespace(ready=SimpleNamespace(remote=ready))
    monkeypatch.setattr(tier_work, "start_server", lambda spec, node: handle)
    return nodes


def run(story: Callable[[Bench], Coroutine[Any, Any, Any]], options: Options | None = None) -> Any:
    async def play() -> Any:
        return await story(Bench(options))

    return asyncio.run(play())


def test_every_server_is_started_and_brings_its_share() -> None:
    async def story(bench: Bench) -> None:
        assert bench.work.status() is None
        assert not bench.work.coming("4-new")
        done = await bench.prefetch()
        assert (done.step, done.id, done.bytes, done.bytes_fetched, done.bytes_left) == (4, "4-new", TOTAL, TOTAL, 0)
        assert (done.damaged, done.notices) == ({}, ())
        assert set(done.nodes) == set(bench.servers.started) == set(SERVERS)
        assert not bench.work.coming("4-new")
        assert bench.work.status() == PrefetchStatus(4, "4-new", TOTAL, TOTAL, False)
        ordered = [item for _, one in bench.servers.orders for items in one.files.values() for item in items]
        assert sum(item.size_bytes for item in ordered) == TOTAL
        assert len({item.digest for item in ordered}) == len(ordered)
        (memory,) = bench.tier.brain.remembered()
        assert (memory.whole, memory.record) == (True, record())

    run(story)


def test_a_second_one_joins_the_first_and_a_restore_waits_only_for_what_comes() -> None:
    async def story(bench: Bench) -> None:
        bench.servers.gate = asyncio.Event()
        assert isinstance(bench.work.begin(order()), Ok)
        assert bench.work.coming("4-new"), "from the start: a restore may begin right after"
        waits = [asyncio.create_task(bench.work.wait("4-new")), asyncio.create_task(bench.work.brought("4-new"))]
        await bench.work.brought("3-other")
        while len(bench.servers.orders) < 2:
            await asyncio.sleep(0)
        assert isinstance(bench.work.begin(order()), Ok)
        status = bench.work.status()
        assert status is not None
        assert (status.bytes_in_memory, status.under_way) == (0, True)
        assert not any(wait.done() for wait in waits)
        bench.servers.gate.set()
        await asyncio.gather(*waits)
        assert len(bench.servers.orders) == 2
        assert not bench.work.coming("4-new")

    run(story)


def test_a_restore_does_not_wait_for_copies() -> None:
    async def story(bench: Bench) -> None:
        bench.servers.copies = asyncio.Event()
        assert isinstance(bench.work.begin(order()), Ok)
        async with asyncio.timeout(20):
            await bench.work.brought("4-new")
            assert not bench.work.coming("4-new")
            over = asyncio.create_task(bench.work.wait("4-new"))
            await bench.something()
            assert not over.done()
            bench.servers.copies.set()
            assert isinstance(await over, PrefetchDone)
        assert bench.tier.brain.counts()["copies_missing"] == 0

    run(story, Options(replicas=1))


def test_what_is_damaged_or_cannot_be_read_is_said_apart() -> None:
    def answer(server: str, one: BringOrder) -> BringDone:
        flaws = {chunk.offset: Flaw("corruption", "flipped") for chunk in one.part.chunks[:1]}
        if server == SERVERS[1]:
            return BringDone(
                msgspec.structs.replace(one.part, chunks=()), "", {0: Flaw("storage", "the store is away")}
            )
        return BringDone(msgspec.structs.replace(one.part, chunks=one.part.chunks[1:]), "/there", flaws)

    async def story(bench: Bench) -> None:
        bench.servers.answer = answer
        done = await bench.prefetch()
        assert next(iter(done.damaged.values())) == "flipped"
        assert next(iter(done.damaged)).startswith("chunk 0 of ")
        assert any("the store is away" in notice for notice in done.notices)
        assert done.bytes_fetched + done.bytes_left == TOTAL
        assert 0 < done.bytes_left < TOTAL
        assert len(bench.servers.orders) == 2, "nobody is asked again for what the store does not give"
        assert bench.tier.brain.counts()["parts_held"] == 1

    run(story)


def test_nodes_that_can_take_no_part_are_said_and_without_any_it_fails(alive: dict[str, bool]) -> None:
    async def one_left(bench: Bench) -> None:
        bench.servers.room[SERVERS[0]] = -1
        done = await bench.prefetch()
        assert (set(done.nodes), done.bytes_left) == ({SERVERS[1]}, 0)
        assert done.notices == (f"{SERVERS[0]} takes no part: it is gone",)

    async def none(bench: Bench) -> None:
        del alive[NODES[0]]
        bench.servers.room[SERVERS[1]] = -1
        assert isinstance(bench.work.begin(order()), Ok)
        done = await bench.work.wait("4-new")
        assert isinstance(done, Failure)
        assert "no node can take part" in done.message
        assert "there is no live node" in done.message
        assert not bench.work.coming("4-new"), "no restore waits for it"

    run(one_left)
    run(none)


@pytest.mark.parametrize(("of_order", "of_options"), [(64, None), (None, 64), (64, 1 << 20)])
def test_not_more_than_the_limit_and_half_of_what_is_free(of_order: int | None, of_options: int | None) -> None:
    async def story(bench: Bench) -> None:
        done = await bench.prefetch(order(memory_bytes=of_order))
        assert all(one.part.bytes <= 64 for _, one in bench.servers.orders)
        assert done.bytes_left == TOTAL - done.bytes_fetched > 0
        assert "no room" in done.notices[0]
        assert not bench.tier.brain.remembered()[0].whole

    async def half(bench: Bench) -> None:
        bench.servers.room = dict.fromkeys(SERVERS, 2 * 64 + 1)
        await bench.prefetch()
        assert all(one.part.bytes <= 64 for _, one in bench.servers.orders)

    run(story, Options(memory_bytes=of_options, replicas=0))
    run(half)


def test_who_asks_again_as_an_answer_was_lost_gets_that_answer() -> None:
    async def story(bench: Bench) -> None:
        done = await bench.prefetch()
        assert isinstance(bench.work.begin(order(again=True)), Ok)
        assert await bench.work.wait("4-new") is done
        other = await bench.prefetch()
        assert (other.bytes_fetched, len(other.notices)) == (0, 1), "a prefetch of its own"

    run(story)


def test_what_memory_has_already_is_not_brought_in() -> None:
    async def same(bench: Bench) -> None:
        bench.hold("4-new", 4)
        done = await bench.prefetch()
        assert (done.id, done.bytes_fetched) == ("4-new", 0)
        assert "already" in done.notices[0]

    async def newer(bench: Bench) -> None:
        bench.hold("5-newer", 4, in_store=False)
        done = await bench.prefetch()
        assert (done.id, done.step, done.bytes_fetched) == ("5-newer", 4, 0)
        refused = bench.work.begin(order(latest=False))
        assert isinstance(refused, Failure)
        assert refused.code == "invalid_input"
        assert "is newer and in the nodes' memory" in refused.message

    async def older(bench: Bench) -> None:
        bench.hold("3-old", 3)
        done = await bench.prefetch()
        assert (done.id, done.bytes_fetched) == ("4-new", TOTAL)
        assert [one.id for one in bench.tier.brain.remembered()] == ["4-new"]

    async def of_a_run_that_was_removed(bench: Bench) -> None:
        bench.hold("9-gone", 9, run="removed")
        done = await bench.prefetch()
        assert (done.id, done.bytes_fetched) == ("4-new", TOTAL)

    for story in (same, newer, older, of_a_run_that_was_removed):
        run(story)


def test_a_service_that_keeps_nothing_in_memory_refuses() -> None:
    async def story(bench: Bench) -> None:
        refused = bench.work.begin(order())
        assert isinstance(refused, Failure)
        assert "memory_tier=False" in refused.message

    run(story, Options(memory_tier=False))


def test_a_server_that_never_answers_is_not_waited_for_for_ever() -> None:
    async def story(bench: Bench) -> None:
        bench.servers.gate = asyncio.Event()
        done = await bench.prefetch()
        assert done.bytes_left == TOTAL
        assert any("did not answer within 0.2 s" in notice for notice in done.notices)
        assert "nothing of it is in memory" in done.notices[-1]
        assert bench.released, "it may have it by now, or later"

    run(story, Options(write_timeout_s=0.2, replicas=0))


def test_a_restore_does_not_wait_longer_than_it_may() -> None:
    async def story(bench: Bench) -> None:
        bench.servers.gate = asyncio.Event()
        assert isinstance(bench.work.begin(order()), Ok)
        bench.tier.configure(dataclasses.replace(bench.spec, options=Options(write_timeout_s=0.05)))
        await bench.work.brought("4-new")
        assert bench.work.coming("4-new")
        bench.servers.gate.set()
        await bench.work.wait("4-new")

    run(story)


@pytest.mark.parametrize("error", [CheckpointError("refused"), ValueError("a bug")])
def test_whatever_goes_wrong_ends_it_by_name(error: Exception) -> None:
    async def story(bench: Bench) -> None:
        bench.servers.answer = lambda *_: error
        done = await bench.prefetch()
        assert done.bytes_left == TOTAL
        assert any(str(error) in notice for notice in done.notices)

    run(story)


def test_its_log_records_have_the_fields(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "rl_ckpt")
    run(lambda bench: bench.prefetch())
    fields = [{name: vars(record).get(name) for name in logs.FIELDS} for record in caplog.records]
    assert fields == [{"run": "", "step": 4, "attempt": "new", "node": ""}]


def test_one_that_is_not_known_is_said_so() -> None:
    async def story(bench: Bench) -> None:
        done = await bench.work.wait("7-other")
        assert isinstance(done, Failure)
        assert done.code == "not_found"

    run(story)


@pytest.mark.parametrize("came", [True, False])
def test_what_came_while_the_manifest_was_read_is_not_read_again(came: bool) -> None:
    """It was not in memory when the restore looked, and is not on its way any more."""
    told: list[bool] = []
    found = Loaded("4-new", MANIFEST, b"", False, {}, None)
    coordinator = MagicMock(_adopt=AsyncMock(), _decided=AsyncMock())
    coordinator._restore_work.load = AsyncMock(return_value=found)
    coordinator._prefetches.coming.return_value = False
    coordinator._tier.holdings.return_value = MagicMock() if came else None
    coordinator._restores.loaded.side_effect = lambda *_, coming: told.append(coming)
    asyncio.run(CoordinatorWork._load(coordinator, "key", None, ()))
    assert told == [came]
