"""Saves in the corners where two rare things meet, without Ray: each of these was a bug once."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import ray

from rl_ckpt import logs
from rl_ckpt.errors import StorageError, WorkerFailuresError
from rl_ckpt.format.manifest import Chunk, Manifest, ShardFileEntry
from rl_ckpt.options import Options
from rl_ckpt.plan.parts import Remembered, memory_entries
from rl_ckpt.runtime import coordinator as coordinator_room
from rl_ckpt.runtime import save_steps as sm
from rl_ckpt.runtime import tier
from rl_ckpt.runtime.coordinator import Coordinator
from rl_ckpt.runtime.generations import Generations, StagingFile
from rl_ckpt.runtime.messages import Failure, Lost, Restages, SaveDone, SaveOrders, Staged, decode
from rl_ckpt.runtime.owners import Owners, User
from rl_ckpt.runtime.save_work import SaveWork
from rl_ckpt.runtime.server_calls import Servers
from rl_ckpt.runtime.spec import CALL, RunSpec
from rl_ckpt.runtime.tier_work import TierWork
from rl_ckpt.store.committer import SaveRequest
from tests.unit.runtime import tier_bench
from tests.unit.runtime.save_bench import Bench, join

NO_MEMORY = StorageError("1000 bytes of staging memory don't fit")


def tiered(**options: object) -> Bench:
    return Bench(Options(**options))  # type: ignore[arg-type]


def as_an_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a coordinator asks Ray for; and what it says of itself for all logs ends with the test."""
    context = SimpleNamespace(was_current_actor_reconstructed=False, get_node_id=lambda: "node")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(logs, "_here", {})


def fails(bench: Bench, ask: sm.ReserveMemory) -> None:
    bench.reserves.remove(ask)
    bench.do(bench.machine.failed(ask.token, NO_MEMORY, ask.server, ask.generation))


def urgent(bench: Bench, step: int) -> None:
    for rank in range(2):
        bench.do(bench.machine.join(msgspec.structs.replace(join(rank, step), deadline_s=5.0)))
    bench.name()
    bench.reserve()
    for rank in range(2):
        bench.stage(step, rank)
    bench.reserve()


@pytest.mark.parametrize("when", ["before there is room", "after there is room"])
def test_where_no_server_has_memory_the_tier_gives_room_for_all(when: str) -> None:
    bench = tiered()
    bench.save(0)
    bench.machine._generations.revoke()
    bench.machine._generations.drop_free()
    bench.join_all(1)
    bench.name()
    first, second = bench.reserves
    fails(bench, first)
    if when == "before there is room":
        fails(bench, second)
    bench.make_room(helps=True)
    assert bench.machine.states()["save-1"] == sm.STAGING
    if when == "after there is room":
        fails(bench, second)
    assert bench.machine.states()["save-1"] == sm.STAGING


def test_memory_made_for_a_generation_that_the_save_has_no_more_is_not_used() -> None:
    bench = tiered()
    bench.save(0)
    bench.machine._generations.revoke()
    bench.machine._generations.drop_free()
    bench.join_all(1)
    bench.name()
    first, second = bench.reserves
    fails(bench, first)
    bench.make_room(helps=True)
    bench.reserve()
    assert bench.machine._generations.path(second.server, second.generation) == ""


def test_a_server_that_has_no_memory_for_the_room_either_ends_the_save() -> None:
    bench = tiered()
    bench.save(0)
    bench.machine._generations.revoke()
    for generation in range(3):
        bench.machine._generations.drop(generation)  # what is held is too small as well
    bench.join_all(1)
    bench.name()
    first, second = bench.reserves
    fails(bench, first)
    fails(bench, second)
    bench.make_room(helps=True)
    fails(bench, bench.reserves[1])
    assert bench.failure(1, 0).message == NO_MEMORY.message


def test_a_spare_generation_is_not_asked_of_a_node_lost_while_the_save_settled() -> None:
    bench = tiered()
    bench.save(0)
    bench.join_all(1)
    bench.name()
    bench.reserve()
    for rank in range(2):
        bench.stage(1, rank)
    assert bench.machine.states() == {"save-1": sm.SETTLING}
    checkpoint = bench.holds[-1][0]
    bench.do(bench.machine.server_lost("server-0", {checkpoint: ("server-1", "/shm/copy")}))
    bench.look_up()
    assert {ask.server for ask in bench.reserves} <= {"server-1"}
    bench.reserve()
    bench.write_all()
    bench.commit()
    for step in (2, 3, 4):  # no generation was lost by it
        for rank in range(2):
            bench.do(bench.machine.join(msgspec.structs.replace(join(rank, step), server="server-1")))
        bench.name()
        bench.reserve()
        bench.look_up()
        for rank in range(2):
            bench.stage(step, rank)
        bench.reserve()
        bench.write_all()
        bench.commit()
    assert bench.committed == [0, 1, 2, 3, 4]


def test_a_rank_whose_join_is_heard_after_its_node_was_lost_is_dead() -> None:
    bench = Bench()
    state: dict[str, object] = {"w": [1.0]}
    bench.do(bench.machine.server_lost("server-1", {}))
    bench.join(0, 5, state=state)
    bench.join(1, 5, state=state)
    bench.name()
    bench.reserve()
    assert bench.machine._saves["save-5"].dead == {1}
    assert {ask.server for ask in bench.reserves} <= {"server-0"}


def test_what_lands_while_it_is_written_has_in_memory_what_the_store_has_too() -> None:
    bench = tiered()
    urgent(bench, 0)
    save = bench.machine._saves["save-0"]
    bench.copied(0)
    assert save.plan is not None
    (lane, offset), digest = next(iter(save.found.items()))
    column = next(c for file in save.plan.files[lane] for c in file.columns if c.offset == offset)
    old = ShardFileEntry("old", 100), Chunk(column.box, 0, 0, column.bytes, digest.hex())
    bench.do(bench.machine.looked_up(bench.look_ups.pop().token, {(digest, column.bytes): old}))
    assert save.state == sm.WRITING
    bench.time_out(sm.DEADLINE)
    plan = bench.lands[0].save.plan
    assert plan is not None
    files, arrays = memory_entries(plan, save.found)
    assert {file.name for file in files} == {"memory/server-0", "memory/server-1"}
    assert {chunk.digest for array in arrays for chunk in array.chunks} == {one.hex() for one in save.found.values()}


def test_a_store_that_does_not_say_what_it_has_does_not_end_what_has_landed() -> None:
    bench = tiered()
    urgent(bench, 0)
    bench.copied(0)
    bench.time_out(sm.DEADLINE)
    bench.do(bench.machine.not_looked_up(bench.look_ups.pop().token, StorageError("the store is gone")))
    bench.land()
    (done,) = bench.finished.values()
    assert isinstance(done, SaveDone)
    assert not done.in_store


def test_a_store_that_does_not_say_what_it_has_ends_a_save() -> None:
    bench = Bench()
    bench.join_all(0)
    bench.name()
    bench.reserve()
    bench.do(bench.machine.not_looked_up(bench.look_ups.pop().token, StorageError("the store is gone")))
    (failure,) = bench.finished.values()
    assert isinstance(failure, Failure)


def test_a_death_that_is_heard_of_after_the_commit_does_not_end_it() -> None:
    bench, key = Bench(), f"{CALL}x"
    for rank in range(2):
        bench.do(bench.machine.join(msgspec.structs.replace(join(rank, 5), key=key)))
    bench.name()
    bench.reserve()
    bench.look_up()
    for rank in range(2):
        orders = bench.replies[key, rank][-1]
        assert isinstance(orders, SaveOrders)
        digests = tuple(bytes([i, rank]) * 8 for i in range(len(orders.items)))
        bench.do(bench.machine.staged(Staged(key, rank, orders.checkpoint, digests, 0.1)))
    bench.reserve()
    bench.write_all()
    bench.commit()
    dead = Failure.of(WorkerFailuresError("rank 1 died", {1: "rank 1 died"}))
    bench.do(bench.machine.lost(Lost(key, 1, 2, dead, dead=True)))
    assert isinstance(bench.machine.restages(key), Restages)
    assert bench.machine.states() == {}


def test_a_state_of_plain_leaves_alone_goes_to_the_store() -> None:
    bench = tiered(persist_every=5)
    bench.save(0)
    bench.join_all(1, state={"n": 3})
    bench.name()
    for rank in range(2):
        bench.stage(1, rank)
    bench.look_up()
    bench.reserve()
    assert [commit.save.request.step for commit in bench.commits] == [1]


def test_a_generation_that_is_held_is_not_given_again_when_the_tier_goes_off_and_on() -> None:
    sizes = {"s": 10}
    all_of_them = Generations(3)
    held = [all_of_them.take("plan", sizes) for _ in range(3)]
    all_of_them.resize(2)
    all_of_them.resize(3)
    assert not all_of_them.any()
    all_of_them.resize(2)
    all_of_them.give_back(held[2])
    assert not all_of_them.any()
    all_of_them.resize(3)
    assert all_of_them.take("plan", sizes) == 2


def test_a_promise_of_a_generation_that_is_no_more_is_forgotten() -> None:
    sizes = {"s": 10}
    some = Generations(3)
    assert [some.take("a", sizes) for _ in range(2)] == [0, 1]
    some.made("s", 2, StagingFile(10, "/shm/2"))
    assert some.promise("plan", sizes)
    some.resize(2)
    assert not some.any()
    assert some.path("s", 2) == ""
    some.resize(3)
    assert some.take("plan", sizes) == 2


def test_an_urgent_one_that_landed_first_outlives_the_one_before_it() -> None:
    bench = tier_bench.Bench(2)
    for generation, step in enumerate("12"):
        bench.stage(step, generation, place=int(step))
    while bench.asked:
        one = bench.asked.pop(0)
        bench.servers[one.server].has[one.part.name] = one.part
        bench.do(bench.brain.held(one.part.checkpoint, one.part.name, one.server, "/shm/x"))
    bench.do(bench.brain.committed(Remembered("2", 2, b"{}", None, 0, True, 2.0)))
    bench.do(bench.brain.committed(Remembered("1", 1, b"{}", tier_bench.record("1", 1), 1, True, 3.0)))
    assert [one.id for one in bench.brain.remembered()] == ["2"]
    assert bench.freed == [0]
    found = {
        name: tier.Found([(part, "/shm/x") for part in server.has.values()], list(server.memos.values()))
        for name, server in bench.servers.items()
    }
    other = tier.Tier(Options())
    other.adopt(found)
    (taken_up,) = other.remembered()
    assert (taken_up.id, taken_up.after) == ("2", 1), "after the commit that it continues"


def test_a_run_that_was_removed_takes_the_steps_with_it_that_only_memory_had(tmp_path: Path) -> None:
    work = SaveWork(
        RunSpec(str(tmp_path / "run"), {}, (), Options(), "get_state", "set_state"), "service", lambda: None
    )

    async def save() -> None:
        await work.open()
        first = await work.name(SaveRequest(7))
        manifest = Manifest(
            run="r", id=first, step=7, world_size=1, time=0.0, writer="w", parent=None, metrics={}, tag=None,
            files=(), arrays=(), nodes={},
        )  # fmt: skip
        data = msgspec.json.encode(manifest)
        work.take_landed([Remembered(first, 7, data, None, 0, True), Remembered("5-x", 5, data, None, 0, True)])
        assert list(work._landed) == ["5-x", first], "in the order in which they landed"
        work.take_landed([Remembered(first, 7, data, None, 0, True)])
        assert list(work._landed) == [first], "what memory has no more is not remembered"
        shutil.rmtree(tmp_path / "run")
        assert (await work.name(SaveRequest(7))).startswith("7-")
        await work.close()

    asyncio.run(save())


def test_new_credentials_reach_those_servers_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[RunSpec] = []

    class Left:
        """A handle of a server."""

        class configure:
            """A method of it."""

            remote = staticmethod(told.append)

    def get_actor(name: str, namespace: str) -> type[Left]:
        if name == "a-gone":
            raise ValueError(name)
        return Left

    monkeypatch.setattr(ray, "get_actor", get_actor)
    servers = Servers()
    servers.note("a-gone")
    servers.note("b-left")
    spec = RunSpec("/run", {}, (), Options(), "get_state", "set_state")
    servers.configure(spec)
    assert told == [spec]


def test_who_may_not_save_brings_no_options_of_its_own() -> None:
    """The messages of a job that was taken over must not turn off the memory of the one that saves."""
    owners = Owners("/run")
    mine, other = (
        RunSpec("/run", {}, (), Options(memory_tier=tier_on), "get_state", "set_state", user=user)
        for user, tier_on in (("01-a", True), ("02-b", False))
    )
    assert owners.begin(User(other, 1.0), False, set()) is None
    assert owners.begin(User(mine, 2.0), True, set()) is None
    followed: list[str] = []
    coordinator = object.__new__(Coordinator)
    coordinator._owners, coordinator._saves = owners, Bench().machine
    coordinator._counts = dict.fromkeys(("bytes_out", "largest"), 0)
    coordinator._follow = followed.append  # type: ignore[method-assign,assignment]
    refused = coordinator._refused(msgspec.structs.replace(join(0, 1), user=other.user))
    assert refused is not None
    assert decode(refused, Failure).code == "fenced"
    assert followed == []
    assert coordinator._refused(msgspec.structs.replace(join(0, 1), user=mine.user)) is None
    assert followed == [mine.user]


def test_credentials_that_come_during_a_save_are_taken_up_after_it() -> None:
    told: list[Mapping[str, object]] = []
    busy = [True]
    spec = RunSpec("/run", {"key": "new"}, (), Options(), "get_state", "set_state", user="01-a")
    coordinator: Any = object.__new__(Coordinator)
    coordinator._owners, coordinator._user = Owners("/run"), ""
    coordinator._spec = dataclasses.replace(spec, storage_options={"key": "old"})
    assert coordinator._owners.begin(User(spec, 1.0), False, set()) is None
    coordinator._saves = SimpleNamespace(configure=lambda _: None, busy=lambda: busy[0])
    coordinator._servers = SimpleNamespace(configure=lambda spec: told.append(spec.storage_options))
    coordinator._restores = SimpleNamespace()
    coordinator._tier_work = coordinator._restore_work = coordinator._save_work = SimpleNamespace(
        configure=lambda *_: None
    )
    coordinator._follow(spec.user)
    assert told == []
    busy[0] = False
    coordinator._follow(spec.user)
    coordinator._follow(spec.user)
    assert told == [{"key": "new"}]


def test_a_head_that_did_not_answer_is_asked_again_what_servers_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[object] = [RuntimeError("no head"), []]

    def list_named_actors(**_: object) -> object:
        answer = answers.pop(0)
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    monkeypatch.setattr(ray.util, "list_named_actors", list_named_actors)
    spec = RunSpec("/run", {}, (), Options(), "get_state", "set_state")
    work = TierWork(spec, Servers(), lambda _: None, lambda: False, lambda _server, _copies: None)

    async def ask() -> None:
        with pytest.raises(RuntimeError, match="no head"):
            await work.adopted()
        await work.adopted()
        await work.adopted()

    asyncio.run(ask())
    assert answers == [], "asked once more, and not again once it is known"


@pytest.mark.parametrize("owned", [True, False])
def test_a_coordinator_that_comes_back_works_with_the_options_of_who_saves(
    monkeypatch: pytest.MonkeyPatch, owned: bool
) -> None:
    """Who made the actor only restored, without a memory tier: what memory alone has must be taken up all the same."""
    maker = RunSpec("/run", {}, (), Options(memory_tier=False), "get_state", "set_state", user="01-a")
    saver = RunSpec("/run", {}, (), Options(), "get_state", "set_state", user="02-b")
    owners = Owners("/run")
    if owned:
        assert owners.begin(User(saver, 1.0), False, set()) is None
    monkeypatch.setattr(coordinator_room, "KeptOwners", lambda *_: SimpleNamespace(load=lambda: owners))
    as_an_actor(monkeypatch)
    coordinator = Coordinator(maker, "service")
    spec = saver if owned else maker
    assert (coordinator._spec, coordinator._tier_work._spec) == (spec, spec)
    assert coordinator._tier.options.memory_tier is owned


@pytest.mark.parametrize("alone", [True, False])
def test_memory_that_is_short_as_it_has_the_only_copy_is_flushed(monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    """The save that finds no room fails, but not all those after it."""
    monkeypatch.setattr(coordinator_room, "KeptOwners", lambda *_: SimpleNamespace(load=lambda: None))
    as_an_actor(monkeypatch)
    flushed: list[float] = []

    async def flush(seconds: float) -> None:
        flushed.append(seconds)

    async def story() -> None:
        coordinator = Coordinator(RunSpec("/run", {}, (), Options(), "get_state", "set_state"), "service")
        monkeypatch.setattr(coordinator._flushing, "flush", flush)
        coordinator._tier.begin("1", coordinator._saves._generations.take("plan", {}), {"s": (8, "/x")})
        coordinator._tier.committed(
            Remembered("1", 1, b"{}", None if alone else tier_bench.record("1", 1), 0, True, 1.0)
        )
        coordinator._do([sm.MakeRoom("save-2#0", NO_MEMORY)])
        await asyncio.gather(*coordinator._tasks)

    asyncio.run(story())
    assert flushed == ([0.0] if alone else [])
