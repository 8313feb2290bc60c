"""Lost nodes in a save, without Ray: others stage or write what was there, else it ends by name, in every state."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from rl_ckpt.errors import StorageError
from rl_ckpt.runtime import save_steps as sm
from rl_ckpt.runtime.messages import Failure
from tests.unit.runtime.save_bench import Bench, repeat
from tests.unit.runtime.save_deaths_bench import SHARED, finish, joined, repeating

NO_COPIES: Mapping[str, tuple[str, str]] = {}


@pytest.mark.parametrize("when", [sm.JOINING, sm.WAITING, sm.RESERVING, sm.STAGING])
def test_a_node_that_is_lost_before_all_is_staged_is_replaced(when: str) -> None:
    bench = Bench()  # ranks 0 and 2 are on server-0, rank 1 on server-1
    if when == sm.WAITING:
        bench.to_writing(100)
        bench.to_writing(101)
    if when == sm.JOINING:
        bench.join(1, 5, world=3, state=SHARED)
        bench.do(bench.machine.server_lost("server-1", NO_COPIES))
        bench.join(0, 5, world=3, state=SHARED)
        bench.join(2, 5, world=3, state=SHARED)
    else:
        joined(bench)
    if when == sm.STAGING:
        bench.name()
        bench.reserve()
        bench.stage(5, 1)  # it is lost all the same
    if when != sm.JOINING:
        bench.do(bench.machine.server_lost("server-1", NO_COPIES))
    if when == sm.WAITING:  # those that were being written there are lost
        assert bench.committed == []
        assert isinstance(bench.finished[bench.orders(100, 0).checkpoint], Failure)
    while bench.names:
        bench.name()
    for ask in [ask for ask in bench.reserves if ask.server == "server-1"]:
        bench.do(bench.machine.failed(ask.token, StorageError("gone"), "server-1"))
        bench.reserves.remove(ask)
    bench.reserve()
    bench.look_up()
    bench.annex()
    for rank in (0, 2):
        bench.stage(5, rank)
    bench.restage(5)
    assert {write.server for write in bench.writes if "save-5#" in write.token} == {"server-0"}
    finish(bench)
    assert bench.committed == [5]


def test_a_node_that_is_lost_in_staging_with_what_only_it_had_ends_the_save() -> None:
    bench = Bench()
    bench.to_staging(5)
    bench.stage(5, 1)
    checkpoint = bench.orders(5, 0).checkpoint
    bench.do(bench.machine.server_lost("server-1", NO_COPIES))
    outcome = bench.finished[checkpoint]
    assert isinstance(outcome, Failure)
    assert outcome.failures == {1: "rank 1 died, and only it had 'own'"}


def test_a_node_that_is_lost_in_settling_ends_the_save() -> None:
    bench = Bench()
    bench.join_all(5, 2)
    bench.name()
    bench.reserve()
    bench.stage(5, 0)
    bench.stage(5, 1)
    assert bench.machine.states() == {"save-5": sm.SETTLING}
    bench.do(bench.machine.server_lost("server-1", NO_COPIES))
    outcome = bench.finished[bench.orders(5, 0).checkpoint]
    assert isinstance(outcome, Failure)
    assert set(outcome.failures) == {1}
    assert "server-1" in outcome.message
    bench.look_up()
    assert bench.writes == []


def test_a_node_that_is_lost_in_settling_is_written_from_its_copy() -> None:
    bench = Bench()
    bench.join_all(5, 2)
    bench.name()
    bench.reserve()
    bench.stage(5, 0)
    bench.stage(5, 1)
    bench.do(bench.machine.server_lost("server-1", {bench.orders(5, 0).checkpoint: ("server-9", "/copy")}))
    bench.look_up()
    again = next(write for write in bench.writes if write.lane == "server-1")
    assert (again.server, again.order.memory) == ("server-9", "/copy")


def test_a_lost_nodes_files_are_written_by_a_buddy_out_of_its_copy() -> None:
    bench = Bench()
    bench.to_writing(5)
    checkpoint = bench.orders(5, 0).checkpoint
    lost = next(write for write in bench.writes if write.server == "server-1")
    bench.do(bench.machine.server_lost("server-1", {checkpoint: ("server-9", "/copy"), "other": ("server-8", "/x")}))
    again = bench.writes[-1]
    assert (again.lane, again.server, again.order.memory) == ("server-1", "server-9", "/copy")
    assert again.order.files == lost.order.files
    bench.do(bench.machine.failed(lost.token, StorageError("gone"), "server-1"))
    bench.writes.remove(lost)
    finish(bench)
    assert bench.committed == [5]


def test_a_lost_node_whose_files_are_written_costs_nothing() -> None:
    bench = Bench()
    bench.to_writing(5)
    bench.write(next(write for write in bench.writes if write.server == "server-1"))
    bench.do(bench.machine.server_lost("server-1", NO_COPIES))
    finish(bench)
    assert bench.committed == [5]


@pytest.mark.parametrize("copies", [{}, {"other": ("server-9", "/copy")}])
def test_a_lost_node_of_whose_memory_nobody_has_a_copy_ends_the_save(copies: dict[str, tuple[str, str]]) -> None:
    bench = Bench()
    bench.to_writing(5)
    bench.do(bench.machine.server_lost("server-1", copies))
    outcome = bench.finished[bench.orders(5, 0).checkpoint]
    assert isinstance(outcome, Failure)
    assert set(outcome.failures) == {1}
    bench.writes.clear()
    bench.join_all(6, 1, state=SHARED)
    bench.name()
    assert {ask.server for ask in bench.reserves} <= {"server-0"}


def test_a_buddy_that_is_lost_too_ends_the_save() -> None:
    bench = Bench()
    bench.to_writing(5)
    checkpoint = bench.orders(5, 0).checkpoint
    bench.do(bench.machine.server_lost("server-1", {checkpoint: ("server-9", "/copy")}))
    bench.do(bench.machine.server_lost("server-9", {checkpoint: ("server-8", "/other")}))
    assert isinstance(bench.finished[checkpoint], Failure)


def test_a_node_that_is_lost_while_it_is_committed_costs_nothing() -> None:
    bench = Bench()
    bench.to_writing(5)
    bench.write_all()
    bench.do(bench.machine.server_lost("server-1", NO_COPIES))
    bench.commit()
    assert bench.committed == [5]


def test_a_spare_generation_does_not_wait_for_a_lost_node() -> None:
    bench = Bench()
    bench.to_staging(5)
    for rank in (0, 1):
        bench.stage(5, rank)
    assert {ask.server for ask in bench.reserves} == {"server-0", "server-1"}
    bench.do(bench.machine.server_lost("server-1", {bench.orders(5, 0).checkpoint: ("server-0", "/copy")}))
    bench.reserves = [ask for ask in bench.reserves if ask.server == "server-0"]
    bench.reserve()
    bench.join_all(6, 1, state=SHARED)
    assert len(bench.names) == 1, "the other generation is free"


def test_a_lost_nodes_plan_stands_no_more() -> None:
    bench = Bench()
    plan = repeating(bench)
    bench.do(bench.machine.server_lost("server-1", NO_COPIES))
    bench.do(bench.machine.repeat(repeat(0, 5, plan, 2, SHARED)))
    assert type(bench.reply(5, 0)).__name__ == "JoinAgain"
