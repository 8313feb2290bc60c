"""Saves of the same shape as the last one: the plan is used again, and ranks stage into what was promised to them."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from rl_ckpt.errors import InvalidInputError, StorageError, WorkerFailuresError
from rl_ckpt.options import Options
from rl_ckpt.runtime import save_steps as sm
from rl_ckpt.runtime import staging
from rl_ckpt.runtime.messages import Failure, JoinAgain, Lost, RepeatOrders, SaveOrders, StagedObjects
from rl_ckpt.runtime.save_machine import SaveMachine
from rl_ckpt.runtime.spec import Place, RunSpec
from rl_ckpt.state.tree import Plain
from tests.unit.runtime.save_bench import Bench, join, repeat

DEAD = WorkerFailuresError("rank 1 died", {1: "rank 1 died"})


def prepared(options: Options | None = None) -> tuple[Bench, str]:
    """Two ranks that were made ready, and their plan."""
    bench = Bench(options or Options(memory_tier=False))
    for rank in range(2):
        bench.do(bench.machine.join(msgspec.structs.replace(join(rank, 0, key="prepare"), prepare=True)))
    assert bench.names == []
    bench.reserve()
    assert bench.replies == {}, "not before the run is open"
    bench.do(bench.machine.opened(bench.opens.pop().token))
    replies: list[Any] = [bench.replies["prepare", rank][-1] for rank in range(2)]
    bench.items = {rank: len(reply.items) for rank, reply in enumerate(replies)}
    assert not bench.machine.busy()
    return bench, replies[0].plan


def promised(bench: Bench, key: str, rank: int = 0) -> str:
    reply = bench.replies[key, rank][-1]
    assert isinstance(reply, SaveOrders | RepeatOrders)
    return reply.next_memory


def finish(bench: Bench, step: int) -> None:
    for rank in range(2):
        bench.stage(step, rank)
    bench.look_up()
    bench.reserve()
    bench.write_all()
    bench.commit()


def test_a_prepared_save_stages_where_it_was_promised_with_nothing_reserved() -> None:
    bench, plan = prepared()
    files = [promised(bench, "prepare", rank) for rank in range(2)]
    assert all(files)
    first = bench.replies["prepare", 0][-1]
    assert isinstance(first, SaveOrders)
    assert first.memory not in ("", files[0]), "the other generation, to be mapped too"
    bench.repeat_all(0, plan)
    bench.name()
    assert bench.reserves == []
    for rank in range(2):
        reply = bench.reply(0, rank)
        assert isinstance(reply, RepeatOrders)
        assert reply.memory == files[rank]
        assert reply.next_memory not in ("", reply.memory)
    finish(bench, 0)
    assert bench.committed == [0]


def test_later_saves_of_the_shape_go_on_in_turn() -> None:
    bench, plan = prepared()
    used = []
    for step in range(4):
        bench.repeat_all(step, plan)
        bench.name()
        used.append(promised(bench, f"save-{step}"))
        finish(bench, step)
    assert len(set(used)) == 2
    assert used[0] == used[2] != used[1] == used[3]
    assert bench.committed == [0, 1, 2, 3]


def test_the_manifest_gets_the_plain_leaves_of_now_type_and_all() -> None:
    bench = Bench()
    states: list[Any] = [{"w": np.ones(100), "n": n, "own": rank} for rank, n in enumerate((1, 1))]
    for rank in range(2):
        bench.join(rank, 0, state=states[rank])
    bench.name()
    bench.reserve()
    for rank in range(2):
        bench.stage(0, rank)
    bench.look_up()
    bench.reserve()
    plan = bench.plan(0)
    for step, n in ((1, True), (2, 1.0), (3, 1)):
        for rank in range(2):
            bench.do(bench.machine.repeat(repeat(rank, step, plan, state={"w": np.ones(100), "n": n, "own": rank})))
        save = bench.machine._saves[f"save-{step}"]
        assert save.plan is not None
        nodes = save.plan.merged.nodes
        (shared,) = nodes["n"]
        assert isinstance(shared.node, Plain)
        assert type(shared.node.value) is type(n)
        assert [variant.node for variant in nodes["own"]] == [Plain(0), Plain(1)]
        bench.do(bench.machine.failed(save.token, StorageError("enough")))
        bench.names.clear()


class TestJoinAgain:
    """The plan does not hold any more, or not for everybody: then all ranks join with their inventories."""

    def again(self, bench: Bench, step: int, *ranks: int) -> None:
        for rank in ranks:
            assert isinstance(bench.reply(step, rank), JoinAgain)
        bench.join_all(step)
        bench.name()
        bench.reserve()
        finish(bench, step)
        assert step in bench.committed

    def test_a_plan_of_before_a_restart(self) -> None:
        bench = Bench()
        bench.do(bench.machine.repeat(repeat(0, 0, "gone")))
        self.again(bench, 0, 0)

    def test_a_rank_that_comes_with_an_inventory_before(self) -> None:
        bench, plan = prepared()
        bench.join(1, 0)
        bench.do(bench.machine.repeat(repeat(0, 0, plan)))
        assert isinstance(bench.reply(0, 0), JoinAgain)
        bench.join(0, 0)
        bench.name()
        bench.reserve()
        finish(bench, 0)

    def test_a_rank_that_comes_with_an_inventory_after(self) -> None:
        bench, plan = prepared()
        bench.do(bench.machine.repeat(repeat(0, 0, plan)))
        bench.join(1, 0)
        assert isinstance(bench.reply(0, 0), JoinAgain)
        bench.join(0, 0)
        bench.name()
        bench.reserve()
        finish(bench, 0)

    def test_replicas_that_are_none_any_more(self) -> None:
        bench, plan = prepared()
        for rank in range(2):
            state: dict[str, object] = {"w": np.full(512, float(rank)), "own": np.full(10, float(rank))}
            bench.do(bench.machine.repeat(repeat(rank, 0, plan, state=state)))
        self.again(bench, 0, 0, 1)

    def test_replicas_of_which_everything_was_alike(self) -> None:
        bench = Bench()
        bench.join_all(0, state={"w": np.zeros(512)})
        bench.name()
        bench.reserve()
        finish(bench, 0)
        for rank in range(2):
            bench.do(bench.machine.repeat(repeat(rank, 1, bench.plan(0), state={"w": np.full(512, float(rank))})))
        self.again(bench, 1, 0, 1)

    def test_arrays_of_single_ranks_that_are_equal_now(self) -> None:
        bench, plan = prepared()
        for rank in range(2):
            bench.do(bench.machine.repeat(repeat(rank, 0, plan, state={"w": np.zeros(512), "own": np.zeros(10)})))
        self.again(bench, 0, 0, 1)

    def test_another_number_of_workers(self) -> None:
        bench, plan = prepared()
        bench.do(bench.machine.repeat(repeat(0, 0, plan, world=3)))
        assert isinstance(bench.reply(0, 0), JoinAgain)


class TestWhoWritesWhere:
    """A file in which a rank may still write is never given to another save."""

    def test_no_memory_is_promised_while_the_other_generation_is_written(self) -> None:
        bench, plan = prepared()
        bench.repeat_all(0, plan)
        bench.name()
        for rank in range(2):
            bench.stage(0, rank)
        bench.look_up()
        bench.repeat_all(1, plan)
        bench.name()
        assert promised(bench, "save-1") == ""

    def test_what_a_straggler_of_a_failed_save_writes_is_never_promised(self) -> None:
        bench, plan = prepared()
        bench.repeat_all(0, plan)
        bench.name()
        reply = bench.reply(0, 0)
        assert isinstance(reply, RepeatOrders)
        bench.time_out(sm.STAGING)
        seen = []
        bench.save(1)
        seen += [bench.orders(1, 0).memory, bench.orders(1, 0).next_memory]
        for step in (2, 3):
            bench.repeat_all(step, bench.plan(1))
            bench.name()
            seen.append(promised(bench, f"save-{step}"))
            finish(bench, step)
        assert reply.memory not in seen

    def test_a_new_process_takes_the_promise_of_the_old_one_away(self) -> None:
        bench, plan = prepared()
        old = {promised(bench, "prepare", rank) for rank in range(2)}
        bench.join_all(0)  # with nothing promised to them, so not the processes of before
        bench.name()
        bench.reserve()
        bench.repeat_all(9, plan)
        assert isinstance(bench.reply(9, 0), JoinAgain)
        used = {bench.orders(0, rank).memory for rank in range(2)}
        used |= {bench.orders(0, rank).next_memory for rank in range(2)}
        assert not used & old

    def test_the_same_processes_with_another_shape_keep_the_memory(self) -> None:
        bench, _ = prepared()
        for rank in range(2):
            mine = msgspec.structs.replace(join(rank, 0), promised=promised(bench, "prepare", rank))
            bench.do(bench.machine.join(mine))
        bench.name()
        assert bench.reserves == []
        finish(bench, 0)

    def test_a_save_that_is_refused_leaves_the_promise_to_its_ranks(self) -> None:
        bench, plan = prepared()
        old = promised(bench, "prepare")
        bench.repeat_all(0, plan)
        bench.do(bench.machine.failed(bench.names.pop().token, InvalidInputError("step 0 is taken")))
        assert isinstance(bench.reply(0, 0), Failure)
        bench.join_all(1)  # other processes: nothing was promised to them
        bench.name()
        bench.reserve()
        bench.join_all(2)
        bench.name()
        bench.reserve()
        told = [bench.orders(step, 0) for step in (1, 2)]
        assert old not in {orders.memory for orders in told} | {orders.next_memory for orders in told}


def test_a_spare_generation_that_does_not_fit_fails_no_save() -> None:
    bench = Bench()
    bench.to_staging(0)
    for rank in range(2):
        bench.stage(0, rank)
    bench.look_up()
    spares = list(bench.reserves)
    assert {ask.server for ask in spares} == {"server-0", "server-1"}
    bench.fail(spares[0], StorageError("no shared memory is left"))
    bench.fail(spares[1], StorageError("no shared memory is left"))
    bench.write_all()
    bench.commit()
    assert bench.committed == [0]
    bench.save(1)


def test_a_skipping_save_waits_for_a_generation_that_is_being_made() -> None:
    bench = Bench(Options(when_busy="skip"))
    bench.to_staging(0)
    for rank in range(2):
        bench.stage(0, rank)
    bench.look_up()
    bench.join_all(1)
    assert bench.machine.states()["save-1"] == sm.WAITING
    bench.reserve()
    assert bench.machine.states()["save-1"] == sm.RESERVING


def test_a_rank_is_staged_once_its_server_has_staged_its_objects_too() -> None:
    bench = Bench()
    bench.to_staging(0)
    checkpoint, count = bench.orders(0, 0).checkpoint, len(bench.orders(0, 0).items)
    bench.do(bench.machine.staged(StagedObjects("save-0", 0, checkpoint, {0: b"\1" * 16})))
    left = sm_staged(0, checkpoint, count)
    bench.do(bench.machine.staged(left))
    bench.look_up()
    assert bench.machine.states()["save-0"] == sm.STAGING
    bench.stage(0, 1)
    assert bench.machine.states()["save-0"] == sm.WRITING
    assert (("server-0", bench.orders(0, 0).items[0].offset), b"\1" * 16) in bench.machine._saves[
        "save-0"
    ].digests().items()


def sm_staged(rank: int, checkpoint: str, count: int) -> Any:
    from rl_ckpt.runtime.messages import Staged

    return Staged("save-0", rank, checkpoint, (b"", *[bytes([i]) * 16 for i in range(1, count)]), 0.1)


def test_a_preparation_that_fails_is_told_to_every_rank_and_holds_nothing() -> None:
    bench = Bench()
    for rank in range(2):
        bench.do(bench.machine.join(msgspec.structs.replace(join(rank, 0, key="prepare"), prepare=True)))
    bench.do(bench.machine.failed(bench.opens.pop().token, StorageError("no such bucket")))
    for rank in range(2):
        reply = bench.replies["prepare", rank][-1]
        assert isinstance(reply, Failure)
        assert "no such bucket" in reply.message
    assert bench.finished == {}
    bench.reserves.clear()
    bench.save(0)
    bench.save(1)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_lost_while_the_others_repeat_fails_the_save_for_all(lost: int) -> None:
    bench, plan = prepared()
    bench.do(bench.machine.repeat(repeat(1 - lost, 0, plan)))
    bench.lost(lost, 0, DEAD)
    assert isinstance(bench.reply(0, 1 - lost), Failure)
    bench.repeat_all(1, plan)
    bench.name()
    finish(bench, 1)


class TestSeveralGroups:
    """Groups of workers that save to one run: a plan is for those who made it."""

    def test_a_plan_that_does_not_stand_any_more_is_told_to_nobody(self) -> None:
        bench = Bench()
        for rank in range(2):
            bench.do(bench.machine.join(msgspec.structs.replace(join(rank, 0, key="prepare"), prepare=True)))
        bench.join_all(5, state={"other": np.zeros(4)})  # its plan stands now
        bench.reserve()
        bench.do(bench.machine.opened(bench.opens.pop().token))
        reply = bench.replies["prepare", 0][-1]
        assert isinstance(reply, SaveOrders)
        assert reply.plan == ""

    def test_ranks_that_repeat_different_plans_all_join(self) -> None:
        bench, plan = prepared()
        bench.do(bench.machine.repeat(repeat(0, 9, plan)))
        bench.save(5)  # by others: another plan stands
        assert bench.plan(5) != plan
        bench.do(bench.machine.repeat(repeat(1, 9, bench.plan(5))))
        for rank in range(2):
            assert isinstance(bench.reply(9, rank), JoinAgain)

    def test_plans_and_files_of_one_coordinator_are_not_those_of_the_next(self) -> None:
        plans, tokens = set(), set()
        for incarnation in ("a-", "b-"):
            bench = Bench()
            bench.machine = SaveMachine(Options(), incarnation)
            bench.save(0)
            plans.add(bench.plan(0))
            tokens |= set(bench.commit_tokens)
        assert len(plans) == len(tokens) == 2

    def test_other_options_end_a_plan(self) -> None:
        bench, plan = prepared()
        bench.machine.configure(Options(memory_tier=False))
        bench.do(bench.machine.repeat(repeat(0, 0, plan)))
        assert ("save-0", 0) not in bench.replies
        bench.machine.configure(Options(memory_tier=False, write_streams=1))
        bench.do(bench.machine.repeat(repeat(1, 1, plan)))
        assert isinstance(bench.reply(1, 1), JoinAgain)


def test_what_is_said_of_an_attempt_that_is_over_fails_no_later_one() -> None:
    bench = Bench()
    bench.to_staging(0)
    late = Lost("save-0", 0, 2, Failure.of(DEAD), bench.orders(0, 0).checkpoint)
    bench.time_out(sm.STAGING)
    bench.to_staging(0)
    bench.do(bench.machine.lost(late))
    finish(bench, 0)
    assert bench.committed == [0]
    bench.do(bench.machine.lost(late))
    assert not bench.machine.busy()


def test_a_rank_remembers_for_one_save_at_a_time() -> None:
    """A thread of the same actor that saves meanwhile knows of no promise, and stages where the other does not."""
    spec = RunSpec("file:///r", {}, (), Options(), "get", "set", "service")
    place = Place("k", 0, 1)
    with staging._remembered(spec, place) as mine:
        mine.plan, mine.promised = "p", "/shm/promised"
    with staging._remembered(spec, place) as mine:
        assert mine.promised == "/shm/promised"
        with staging._remembered(spec, place) as other:
            assert (other.plan, other.promised) == ("", "")
    cut_otherwise = RunSpec("file:///r", {}, (), Options(chunk_bytes=1), "get", "set", "service")
    with staging._remembered(cut_otherwise, place) as mine:
        assert mine.plan == ""
