"""The memory tier in the coordinator, with servers that answer as a test says: what fails there, and who is told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import msgspec
import pytest
import ray

from rl_ckpt.errors import StorageError
from rl_ckpt.options import Options
from rl_ckpt.plan.parts import ChunkAt, Part, Remembered
from rl_ckpt.runtime import tier_steps as tier
from rl_ckpt.runtime import tier_work, watch
from rl_ckpt.runtime.coordinator_work import CoordinatorWork
from rl_ckpt.runtime.messages import FoundParts, HoldDone, HoldOrder, Ok, encode
from rl_ckpt.runtime.spec import NAMESPACE, RunSpec
from rl_ckpt.runtime.tier_work import TierWork
from tests.unit.runtime.tier_bench import record

NODES = ("a" * 16, "b" * 16)
SPEC = RunSpec("file:///nowhere", {}, (), Options(), "get_state", "set_state")
SERVERS = tuple(SPEC.server(node) for node in NODES)
PART = Part("before", SERVERS[0], 8, (ChunkAt(b"d" * 16, 0, 8),))
DONE = Remembered("c", 1, b"{}", None, 0, True)


class Server:
    """A shard server's handle: answers everything, but is gone where the test says so."""

    def __init__(self, name: str, servers: Servers) -> None:
        self.name, self.calls = name, servers.calls
        self.hang, self.broken = servers.hang, servers.broken

    def __getattr__(self, method: str) -> Any:
        return Method(self, method)


class Method:
    def __init__(self, server: Server, name: str) -> None:
        self.server, self.name = server, name

    async def remote(self, _: Any) -> bytes:
        self.server.calls.append((self.name, self.server.name))
        if (self.name, self.server.name) in self.server.hang:
            await asyncio.Event().wait()
        if (self.name, self.server.name) in self.server.broken:
            raise ValueError("a bug")
        if self.name == "held":
            return encode(FoundParts((HoldOrder(PART, "/old"),), ()))
        return encode(HoldDone("/there") if self.name in ("hold", "copy") else Ok())


class Servers:
    """Stands in for `server_calls.Servers`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.gone: set[str] = set()
        self.hang: set[tuple[str, str]] = set()
        self.broken: set[tuple[str, str]] = set()

    def get(self, name: str) -> Any:
        if name in self.gone:
            raise StorageError(f"shard server {name} is gone")
        return Server(name, self)

    def note(self, name: str) -> None:
        pass

    def names(self) -> list[str]:
        return sorted(SERVERS)


class Bench:
    """A tier at work."""

    def __init__(self, options: Options) -> None:
        self.servers = Servers()
        self.others: list[Any] = []
        self.work = TierWork(SPEC, self.servers, self.tell, lambda: False, lambda *_: None)  # type: ignore[arg-type]
        self.work.brain.options = options

    def tell(self, instructions: Iterable[Any]) -> None:
        for one in instructions:
            if isinstance(one, tier.Hold | tier.Copy | tier.Remember | tier.Release):
                self.work.carry_out(one)
            else:
                self.others.append(one)

    async def quiet(self) -> None:
        """Everything that was begun is over."""
        while self.work._tasks:
            await asyncio.gather(*self.work._tasks)

    async def hold(self) -> None:
        """A checkpoint is in memory on both nodes."""
        await self.work.watch.look()
        self.work.brain.begin("c", 0, {SERVERS[0]: (8, "/here")})
        part = Part("c", SERVERS[0], 8, (ChunkAt(b"d" * 16, 0, 8),))
        self.tell(self.work.brain.tabled("c", [part]))
        await self.quiet()

    async def landed(self) -> None:
        await self.hold()
        self.tell(self.work.brain.committed(DONE))
        await self.quiet()


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Nodes as the watch sees them."""
    nodes = dict.fromkeys(NODES, False)
    monkeypatch.setattr(watch, "nodes", lambda: dict(nodes))
    return nodes


@pytest.fixture
def bench() -> Bench:
    return Bench(Options())


def test_who_holds_a_checkpoint_is_told_to_remember_it(alive: dict[str, bool], bench: Bench) -> None:
    asyncio.run(bench.landed())
    assert {call for call in bench.servers.calls if call[0] == "remember"} == {("remember", name) for name in SERVERS}
    assert (bench.work.take_notice(), bench.others) == ("", [tier.Landed("c")])


@pytest.mark.parametrize("how", ["both", "one is gone", "one hangs", "all hang"])
def test_what_is_in_memory_alone_is_written_down_before_anybody_is_told(
    alive: dict[str, bool], bench: Bench, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Else the coordinator's death in that moment would lose a checkpoint that was said to be one."""
    if how == "one is gone":
        bench.servers.gone.add(SERVERS[1])
    bench.servers.hang |= {("remember", name) for name in {"one hangs": SERVERS[1:], "all hang": SERVERS}.get(how, ())}
    monkeypatch.setattr(tier_work, "_WRITTEN_S", 0.2 if "hang" in how else 60.0)

    async def story() -> None:
        await bench.hold()
        async with asyncio.timeout(30):
            assert await bench.work.written_down(["done", *bench.work.brain.committed(DONE)]) == ["done"]
        assert all(("remember", name) in bench.servers.calls for name in set(SERVERS) - bench.servers.gone)
        for task in bench.work._tasks:
            task.cancel()

    asyncio.run(story())


def test_a_save_that_stays_in_memory_is_told_once_that_is_written_down() -> None:
    order: list[str] = []

    async def written_down(instructions: list[Any]) -> list[Any]:
        order.append("written down")
        return [*instructions, "told"]

    coordinator = MagicMock()
    coordinator._save_work.land = AsyncMock(return_value=("done", b"{}"))
    coordinator._committed = lambda *_: ["decided"]
    coordinator._tier_work.written_down = written_down
    assert asyncio.run(CoordinatorWork._land(coordinator, "key", MagicMock())) == ["decided", "told"]
    assert order == ["written down"]


def test_what_the_store_has_too_waits_for_nobody(alive: dict[str, bool], bench: Bench) -> None:
    stored = msgspec.structs.replace(DONE, record=record("1", 1))

    async def story() -> None:
        await bench.hold()
        instructions = ["done", *bench.work.brain.committed(stored)]
        assert await bench.work.written_down(instructions) == instructions
        assert not [call for call in bench.servers.calls if call[0] == "remember"]

    asyncio.run(story())


@pytest.mark.parametrize("node_too", [True, False], ids=["with its node", "alone"])
def test_a_server_that_is_gone_is_said_only_where_its_node_lives(
    alive: dict[str, bool], bench: Bench, node_too: bool
) -> None:
    """What was on a lost node is copied again elsewhere: the next save has nothing to warn of."""

    async def story() -> None:
        await bench.hold()
        bench.servers.gone.add(SERVERS[1])
        if node_too:
            del alive[NODES[1]]
        bench.tell(bench.work.brain.committed(DONE))
        await bench.quiet()

    asyncio.run(story())
    assert ("is gone" in bench.work.take_notice()) == (not node_too)
    assert bench.work.take_notice() == "", "once"


def test_what_is_forgotten_is_released_everywhere(alive: dict[str, bool], bench: Bench) -> None:
    """As where somebody removed the run's folder: nothing of it is restored any more, and its memory is free."""

    async def story() -> None:
        await bench.landed()
        assert [one.id for one in bench.work.brain.remembered()] == ["c"]
        bench.work.forget()
        await bench.quiet()

    asyncio.run(story())
    assert bench.work.brain.remembered() == []
    assert [call for call in bench.servers.calls if call[0] == "release"] == [("release", name) for name in SERVERS]
    assert bench.others[-1] == tier.GenerationFree(0)


def test_nothing_is_copied_to_a_node_that_is_going_away(
    alive: dict[str, bool], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor to one that stayed when nodes were looked at last, which was before this urgent save."""
    part = Part("c", SERVERS[0], 8, (ChunkAt(b"d" * 16, 0, 8),))
    monkeypatch.setattr(tier_work, "parts_of", lambda *_: [part])
    save: Any = SimpleNamespace(
        checkpoint="c",
        request=SimpleNamespace(deadline_s=5.0),
        generations=[0],
        place=1,
        memory={SERVERS[0]: "/here"},
        plan=SimpleNamespace(staged_bytes={SERVERS[0]: 8}),
        servers={},
        found={},
    )

    async def story() -> None:
        await bench.work.watch.look()
        monkeypatch.setattr(bench.work.watch, "start", lambda: False)  # it has looked just now
        alive[NODES[1]] = True
        bench.work.hold(save)
        await bench.quiet()

    asyncio.run(story())
    assert {name for call, name in bench.servers.calls if call in ("hold", "copy")} == {SERVERS[0]}


def test_a_server_that_never_answers_is_not_waited_for_and_what_it_may_have_is_released(
    alive: dict[str, bool], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tier_work, "_ANSWER_S", 0.05)
    bench.servers.hang.add(("copy", SERVERS[1]))
    asyncio.run(bench.landed())
    assert [type(one) for one in bench.others] == [tier.CannotLand]
    assert "did not answer" in bench.work.brain._kept["c"].pieces[f"part-c-{SERVERS[0]}"].refused[SERVERS[1]]
    assert ("release", SERVERS[1]) in bench.servers.calls


def test_a_bug_settles_what_it_hits(alive: dict[str, bool], bench: Bench) -> None:
    bench.servers.broken.add(("copy", SERVERS[1]))
    asyncio.run(bench.landed())
    (told,) = bench.others
    assert isinstance(told, tier.CannotLand)
    assert "a bug" in told.why


def test_a_table_that_cant_be_made_gives_the_generation_back_after_the_commit(
    alive: dict[str, bool], bench: Bench
) -> None:
    def fails() -> list[Part]:
        raise KeyError("no such chunk")

    async def story() -> None:
        bench.work.brain.begin("c", 0, {SERVERS[0]: (8, "/here")})
        await bench.work._table("c", fails, False)
        assert [type(one) for one in bench.others] == [tier.CannotLand]
        bench.tell(bench.work.brain.committed(DONE))

    asyncio.run(story())
    assert bench.others[-1] == tier.GenerationFree(0)
    assert not bench.work.brain.busy()


def test_servers_of_dead_nodes_are_not_asked_what_they_hold(
    alive: dict[str, bool], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray may let such a call hang, and what was on the lost node would be copied again as late."""
    actors = [{"name": name, "namespace": NAMESPACE} for name in SERVERS]
    monkeypatch.setattr(ray.util, "list_named_actors", lambda **_: actors)
    del alive[NODES[1]]
    bench.servers.hang.add(("held", SERVERS[1]))
    asyncio.run(asyncio.wait_for(bench.work.adopted(), 30))
    assert bench.servers.calls[0] == ("held", SERVERS[0])
    assert ("held", SERVERS[1]) not in bench.servers.calls


def test_the_next_saves_step_is_checked_once_the_one_before_it_is_decided() -> None:
    """Else a save that failed while its name was made would have its step still, in the way of the next try."""
    order: list[str] = []

    async def name(request: str) -> str:
        order.append(f"checks {request}")
        await asyncio.sleep(0)
        return request

    async def story() -> None:
        coordinator = MagicMock(_adopt=AsyncMock(), _naming=asyncio.Lock())
        coordinator._save_work.name = name
        coordinator._saves.named = lambda _, checkpoint: [f"decides {checkpoint}"]

        async def one(request: Any) -> None:
            order.extend(await CoordinatorWork._name(coordinator, "key", request))  # as `_do` does

        await asyncio.gather(one("first"), one("second"))

    asyncio.run(story())
    assert order == ["checks first", "decides first", "checks second", "decides second"]


def test_what_only_the_coordinator_before_knew_of_goes_after_the_first_commit(
    alive: dict[str, bool], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a copy that was done after servers had been asked what they hold."""
    actors = [{"name": name, "namespace": NAMESPACE} for name in SERVERS]
    monkeypatch.setattr(ray.util, "list_named_actors", lambda **_: actors)

    async def story() -> None:
        await bench.work.adopted()
        await bench.quiet()
        bench.servers.calls.clear()
        for _ in range(2):
            bench.work.committed()
            await bench.quiet()

    asyncio.run(story())
    assert sorted(bench.servers.calls) == [(call, name) for call in ("held", "release") for name in SERVERS], "once"
