"""Deaths in a save, without Ray: it goes on where others have what is lost, else it ends by name, in every state."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from rl_ckpt import Replicated
from rl_ckpt.errors import StorageError, WorkerFailuresError
from rl_ckpt.runtime import save_steps as sm
from rl_ckpt.runtime.generations import Generations, StagingFile
from rl_ckpt.runtime.messages import Failure, JoinSave, Lost, Restages, SaveDone, SaveOrders, Staged, StagedObjects
from rl_ckpt.runtime.spec import CALL
from tests.unit.runtime.save_bench import CHUNK_BYTES, Bench, State, join, repeat, shared_and_own
from tests.unit.runtime.save_deaths_bench import SHARED, finish, joined, paths_staged, repeating, to_staging


def test_a_rank_that_dies_before_the_others_joined_is_dealt_nothing() -> None:
    bench = Bench()
    bench.join(0, 5, world=3, state=SHARED)
    bench.join(1, 5, world=3, state=SHARED)
    bench.dead(1, 5, world=3)
    bench.join(2, 5, world=3, state=SHARED)
    bench.name()
    bench.reserve()
    bench.look_up()
    assert bench.orders(5, 1).items == ()
    assert paths_staged(bench, 0) | paths_staged(bench, 2) == {"w", "v", "u"}
    assert bench.orders(5, 0).plan == "", "a plan in which a rank has no part does not stand"
    bench.stage(5, 0)
    bench.stage(5, 2)
    finish(bench)
    assert bench.committed == [5]


def test_a_rank_that_dies_before_it_joined_ends_the_save_by_name() -> None:
    bench = Bench()
    bench.join(0, 5, state=SHARED)
    bench.dead(1, 5)
    assert bench.failure(5, 0).failures == {1: "rank 1 died"}


@pytest.mark.parametrize("when", [sm.WAITING, sm.RESERVING, sm.STAGING])
def test_a_rank_that_dies_before_it_staged_is_replaced_in_the_same_save(when: str) -> None:
    bench = Bench()
    if when == sm.WAITING:
        bench.to_writing(100)
        bench.to_writing(101)
    joined(bench)
    if when == sm.STAGING:
        bench.name()
        bench.reserve()
    assert bench.machine.states()["save-5"] == when
    bench.dead(1, 5, world=3)
    if when == sm.WAITING:
        bench.write_all()
        bench.commit()
        bench.commit()
    if when != sm.STAGING:
        bench.name()
        bench.reserve()
    bench.look_up()
    for rank in (0, 2):
        bench.stage(5, rank)
    assert bench.machine.states() == {"save-5": sm.STAGING}, "what the dead rank had is not staged yet"
    assert bench.restage(5) == [], "nobody is asked before there is memory for it"
    bench.annex()
    assert set(bench.restage(5)) <= {0, 2}
    assert bench.restage(5) == [], "each is asked once"
    lanes = {write.lane for write in bench.writes} - {"server-0", "server-1"}
    assert lanes
    assert all(write.server in ("server-0", "server-1") for write in bench.writes)
    assert all(write.order.memory for write in bench.writes)
    finish(bench)
    assert isinstance(bench.finished[bench.orders(5, 0).checkpoint], SaveDone)
    news = bench.machine.restages("save-5")
    assert news == Restages(bench.orders(5, 0).checkpoint, False), "and the driver hears how it ended"


def test_a_rank_is_asked_to_take_over_only_once_it_has_staged_its_own() -> None:
    bench = Bench()
    to_staging(bench)
    bench.dead(1, 5, world=3)
    bench.annex()
    assert bench.restage(5) == []
    bench.stage(5, 0)
    assert bench.restage(5) == [0]
    bench.stage(5, 2)
    assert bench.restage(5) in ([2], [])
    assert bench.machine.states() == {"save-5": sm.WRITING}


def test_what_is_said_late_by_the_dead_changes_nothing() -> None:
    bench = Bench()
    to_staging(bench)
    orders = bench.orders(5, 1)
    bench.dead(1, 5, world=3)
    late = Staged("save-5", 1, orders.checkpoint, tuple(bytes(16) for _ in orders.items), 9.0)
    bench.do(bench.machine.staged(late))
    bench.do(bench.machine.staged(StagedObjects("save-5", 1, orders.checkpoint, {0: bytes(16)})))
    bench.annex()
    for rank in (0, 2):
        bench.stage(5, rank)
    assert bench.machine.states() == {"save-5": sm.STAGING}
    bench.restage(5)
    finish(bench)
    done = bench.finished[orders.checkpoint]
    assert isinstance(done, SaveDone)
    assert done.stall_s < 9


def test_the_generation_to_which_a_dead_rank_may_write_is_not_used_again() -> None:
    bench = Bench()
    to_staging(bench)
    old = {bench.orders(5, rank).memory for rank in range(3)}
    bench.dead(1, 5, world=3)
    bench.annex()
    for rank in (0, 2):
        bench.stage(5, rank)
    bench.restage(5)
    finish(bench)
    for step in (6, 7, 8):
        to_staging(bench, step)
        assert not old & {bench.orders(step, rank).memory for rank in range(3)}
        for rank in range(3):
            bench.stage(step, rank)
        bench.reserve()
        finish(bench)


def test_who_takes_over_may_die_too() -> None:
    bench = Bench()
    to_staging(bench)
    bench.dead(1, 5, world=3)
    bench.annex()
    bench.stage(5, 0)
    bench.stage(5, 2)
    news = bench.machine.restages("save-5")
    assert isinstance(news, Restages)
    first = news.orders[0].rank
    bench.dead(first, 5, world=3)
    assert bench.machine.states() == {"save-5": sm.STAGING}
    bench.annex()
    last = ({0, 2} - {first}).pop()
    assert bench.restage(5) == [last]
    for order in news.orders[1:]:
        digests = tuple(bytes(16) for _ in order.items)
        bench.do(bench.machine.staged(Staged("save-5", order.rank, order.checkpoint, digests, 0.1, order.annex)))
    finish(bench)
    assert bench.committed == [5]


def test_a_rank_that_staged_and_died_is_not_replaced() -> None:
    bench = Bench()
    to_staging(bench)
    bench.stage(5, 1)
    bench.dead(1, 5, world=3)
    assert bench.annexes == []
    bench.stage(5, 0)
    bench.stage(5, 2)
    finish(bench)
    assert bench.committed == [5]


def test_a_rank_that_died_while_its_server_stages_its_objects_is_not_replaced() -> None:
    bench = Bench()
    to_staging(bench)
    orders = bench.orders(5, 1)
    left = tuple(b"" for _ in orders.items)
    bench.do(bench.machine.staged(Staged("save-5", 1, orders.checkpoint, left, 0.1)))
    bench.dead(1, 5, world=3)
    assert bench.annexes == []
    told = {i: bytes([i]) * 16 for i in range(len(left))}
    bench.do(bench.machine.staged(StagedObjects("save-5", 1, orders.checkpoint, told)))
    bench.stage(5, 0)
    bench.stage(5, 2)
    finish(bench)
    assert bench.committed == [5]


@pytest.mark.parametrize("when", [sm.JOINING, sm.RESERVING, sm.STAGING])
def test_what_only_the_dead_rank_had_ends_the_save_by_name_and_path(when: str) -> None:
    bench = Bench()
    bench.join(1, 5, world=2)
    if when == sm.JOINING:
        bench.dead(1, 5)
    bench.join(0, 5, world=2)
    if when == sm.STAGING:
        bench.name()
        bench.reserve()
    if when != sm.JOINING:
        bench.dead(1, 5)
    if when == sm.RESERVING:
        bench.name()
        bench.reserve()
    told = bench.failure(5, 0)
    assert told.failures == {1: "rank 1 died, and only it had 'own'"}
    assert told.code == WorkerFailuresError.code
    assert bench.machine.restages("save-5") == told, "the driver hears the same"
    while bench.names:
        bench.name()
    assert bench.open == {}
    bench.save(6)


def test_a_preparation_ends_when_a_rank_dies() -> None:
    bench = Bench()
    for rank in (0, 1):
        bench.do(bench.machine.join(msgspec.structs.replace(join(rank, 5, state=SHARED), prepare=True)))
    bench.dead(1, 5)
    assert bench.failure(5, 0).failures == {1: "rank 1 died"}


def test_a_rank_that_repeats_and_dies_is_replaced() -> None:
    bench = Bench()
    plan = repeating(bench)
    for rank in (0, 1):
        bench.do(bench.machine.repeat(repeat(rank, 5, plan, 2, SHARED)))
    bench.dead(1, 5)
    bench.name()
    bench.reserve()
    bench.look_up()
    bench.annex()
    bench.stage(5, 0)
    news = bench.machine.restages("save-5")
    assert isinstance(news, Restages)
    (order,) = news.orders
    assert all(item.digest == b"" for item in order.items), "those that the plan knows are of an older save"
    assert order.witness, "so the rank looks whether its state is the one that it staged"
    digests = tuple(bytes([i]) * 16 for i in range(len(order.items)))
    bench.do(bench.machine.staged(Staged("save-5", 0, order.checkpoint, digests, 0.1, order.annex)))
    finish(bench)
    assert 5 in bench.committed


def test_a_rank_that_repeats_and_dies_before_another_joins_ends_the_save() -> None:
    bench = Bench()
    plan = repeating(bench)
    bench.do(bench.machine.repeat(repeat(1, 5, plan, 2, SHARED)))
    bench.dead(1, 5)
    bench.join(0, 5, state=SHARED)
    assert "rank 1 died before it could say what it has" in bench.failure(5, 0).message
    assert not bench.machine.busy()


@pytest.mark.parametrize("chunks", [1, 2])
def test_who_takes_over_looks_at_the_same_arrays_then_at_what_others_have_too(chunks: int) -> None:
    size = chunks * CHUNK_BYTES // 8
    shared: State = {"w": Replicated(np.zeros(size)), "b": Replicated(np.zeros(900))}
    bench = Bench()
    bench.join(0, 5, state=shared)
    bench.join(1, 5, state=shared | {"own": np.zeros(1000)})
    bench.name()
    bench.reserve()
    bench.look_up()
    assert "w" in paths_staged(bench, 0)
    items = [item.path for item in bench.orders(5, 1).items]
    assert "own" in items
    bench.stage(5, 1)
    bench.dead(0, 5)
    bench.annex()
    news = bench.machine.restages("save-5")
    assert isinstance(news, Restages)
    (order,) = news.orders
    assert [items[i] for i in order.witness] == (["b"] if chunks == 1 else ["w"])


# Messages of and to a coordinator that was restarted.


def test_what_a_rank_says_of_the_coordinator_before_ends_no_save() -> None:
    bench = Bench()
    failure = Failure.of(WorkerFailuresError("the coordinator was lost", {1: "lost"}))
    unheard = Lost("save-5", 1, 2, failure, unheard=True)
    bench.do(bench.machine.lost(unheard))
    assert bench.machine.states() == {}
    bench.join(0, 5)
    bench.do(bench.machine.lost(unheard))
    assert bench.machine.states() == {"save-5": sm.JOINING}
    bench.join(1, 5)
    assert bench.machine.states() == {"save-5": sm.RESERVING}
    bench.do(bench.machine.lost(unheard))
    assert bench.failure(5, 0).failures == {1: "lost"}, "this one had heard of it"


def test_a_driver_whose_save_is_unknown_is_told_so() -> None:
    told = Bench().machine.restages("nobody's")
    assert isinstance(told, Failure)
    assert "coordinator was lost" in told.message


@pytest.mark.parametrize("promised", [True, False])
def test_memory_that_somebody_removed_costs_one_save(promised: bool) -> None:
    bench = Bench()
    bench.save(1)
    bench.save(2)
    for rank in (0, 1):  # a plan does not stand where one rank has a leaf and another an array
        unlike: State = {} if promised else {"x": 1 if rank else np.ones(3)}
        bench.join(rank, 5, state=shared_and_own(rank, 5) | unlike)
    bench.name()
    bench.reserve()
    gone = bench.orders(5, 0).memory
    bench.lost(0, 5, StorageError(f"staging memory {gone} is gone"))
    bench.join_all(6)
    bench.name()
    assert {ask.server for ask in bench.reserves} == {"server-0", "server-1"}, "the other generation's is made anew too"


def test_orders_say_where_and_what() -> None:
    bench = Bench()
    to_staging(bench)
    dealt = {rank: bench.orders(5, rank).items for rank in range(3)}
    bench.dead(1, 5, world=3)
    bench.annex()
    bench.stage(5, 0)
    bench.stage(5, 2)
    news = bench.machine.restages("save-5")
    assert isinstance(news, Restages)
    taken = {(item.path, item.box): item.digest for order in news.orders for item in order.items}
    assert taken == {(item.path, item.box): item.digest for item in dealt[1]}
    assert all(taken.values()), "hashed as it joined"
    assert all(order.witness == () for order in news.orders), "the digests tell"
    assert isinstance(bench.reply(5, 0), SaveOrders)
    assert len({order.annex for order in news.orders}) == len(news.orders)


def test_who_comes_late_to_a_drivers_save_hears_how_it_ended() -> None:
    bench = Bench()
    key = f"{CALL}1"
    bench.join(0, 5, key=key)
    bench.time_out(sm.JOINING)
    bench.time_out(sm.FAILED)
    assert bench.machine.states() == {}
    bench.join(1, 5, key=key)
    told = bench.replies[key, 1][-1]
    assert isinstance(told, Failure)
    assert "ranks [1] did not join" in told.message
    assert bench.machine.states() == {}, "else it would wait there for ranks that do not come"
    bench.join(1, 5)
    assert bench.machine.states() == {"save-5": sm.JOINING}


def test_free_generations_are_forgotten_and_those_in_use_are_not() -> None:
    generations, sizes = Generations(), {"server": 10}
    for generation in (0, 1):
        generations.made("server", generation, StagingFile(10, f"/shm/{generation}"))
    held = generations.take("plan", sizes)
    generations.drop_free()
    assert generations.missing(held, sizes) == []
    assert generations.missing(1 - held, sizes) == ["server"]


def of_job(job: str, key: str, step: int, ranks: tuple[int, ...] = (0, 1)) -> list[JoinSave]:
    """Two ranks of a driver's save."""
    return [msgspec.structs.replace(join(rank, step, 2, key=key), user=f"{job}-1") for rank in ranks]


@pytest.mark.parametrize("when", [sm.JOINING, sm.RESERVING, sm.STAGING])
def test_what_a_dead_driver_can_not_go_on_with_ends_at_once_and_nobody_waits_behind_it(when: str) -> None:
    bench, key = Bench(), f"{CALL}1"
    for message in of_job("old", key, 5, (0,) if when == sm.JOINING else (0, 1)):
        bench.do(bench.machine.join(message))
    if when == sm.STAGING:
        bench.name()
        bench.reserve()
        bench.look_up()
    assert bench.machine.states() == {key: when}
    bench.do(bench.machine.orphaned({"other"}))
    assert bench.machine.states() == {key: when}, "its driver lives"
    assert bench.machine.undecided({"old"}) == [], "not all is staged: nothing to wait for"
    bench.do(bench.machine.orphaned({"old"}))
    assert not bench.machine.busy()
    if when == sm.RESERVING:
        bench.name()  # the committer's answer comes late, and the name is given up
    for message in of_job("new", f"{CALL}2", 5):
        bench.do(bench.machine.join(message))
    bench.name()
    assert bench.machine.states()[f"{CALL}2"] == sm.RESERVING, "the same step, and no word of it being saved already"


def test_what_a_dead_driver_has_staged_goes_on_and_is_to_be_waited_for() -> None:
    bench, key = Bench(), f"{CALL}1"
    for message in of_job("old", key, 5):
        bench.do(bench.machine.join(message))
    bench.name()
    bench.reserve()
    bench.look_up()
    for rank in (0, 1):
        orders = bench.replies[key, rank][-1]
        assert isinstance(orders, SaveOrders)
        digests = tuple(bytes([i, rank]) * 8 for i in range(len(orders.items)))
        bench.do(bench.machine.staged(Staged(key, rank, orders.checkpoint, digests, 0.1)))
    bench.do(bench.machine.orphaned({"old"}))
    assert bench.machine.states() == {key: sm.WRITING}
    assert bench.machine.undecided({"old"}) == list(bench.open)
    assert bench.machine.undecided({"other"}) == []
    finish(bench)
    assert bench.committed == [5]
    assert bench.machine.undecided({"old"}) == []


def test_workers_that_save_by_themselves_outlive_a_driver() -> None:
    bench = Bench()
    bench.do(bench.machine.join(of_job("old", "save-5", 5)[0]))
    bench.do(bench.machine.orphaned({"old"}))
    assert bench.machine.states() == {"save-5": sm.JOINING}
