"""The coordinator's brain for saves, without Ray: every state and event, in and out of order."""

from __future__ import annotations

import numpy as np
import pytest

from rl_ckpt import Sharded
from rl_ckpt.errors import CommitUnknownError, StorageError, WorkerFailuresError
from rl_ckpt.options import Options
from rl_ckpt.runtime import save_steps as sm
from rl_ckpt.runtime.generations import StagingFile
from rl_ckpt.runtime.messages import Failure, SaveDone, SaveOrders, Staged
from tests.unit.runtime.save_bench import Bench

DEAD = WorkerFailuresError("rank 1 died", {1: "rank 1 died"})
STORE_GONE = StorageError("the store is gone")


def test_a_save_goes_through_its_states_to_the_commit() -> None:
    bench = Bench()
    bench.join(0, 7)
    assert bench.machine.states() == {"save-7": sm.JOINING}
    bench.join(1, 7)
    assert bench.machine.states() == {"save-7": sm.RESERVING}
    assert not bench.replies, "nobody is told before the plan is made"
    bench.name()
    bench.reserve()
    assert bench.machine.states() == {"save-7": sm.STAGING}
    bench.stage(7, 0)
    assert not bench.writes, "nothing is written before every rank has staged"
    bench.stage(7, 1)
    assert bench.machine.states() == {"save-7": sm.SETTLING}
    assert not bench.writes, "nothing is written before it is known what is stored already"
    bench.look_up()
    assert bench.machine.states() == {"save-7": sm.WRITING}
    bench.write_all()
    assert bench.machine.states() == {"save-7": sm.COMMITTING}
    bench.commit()
    done = bench.finished[bench.orders(7, 0).checkpoint]
    assert isinstance(done, SaveDone)
    assert done.stall_s == pytest.approx(0.2), "the slowest rank's"
    assert not bench.machine.busy()
    assert bench.machine.states() == {}


def test_ranks_are_told_the_memory_of_their_own_server() -> None:
    bench = Bench()
    bench.to_staging(0, world=2)
    assert bench.orders(0, 0).memory.startswith("/shm/server-0/")
    assert bench.orders(0, 1).memory.startswith("/shm/server-1/")
    items = [*bench.orders(0, 0).items, *bench.orders(0, 1).items]
    assert sorted(item.path for item in items) == ["own", "own", "w"]


def test_memory_is_reserved_once_and_used_again_by_later_saves() -> None:
    bench = Bench()
    for step in range(2):  # one for each generation
        bench.to_writing(step)
    bench.write_all()
    bench.commit()
    bench.commit()
    bench.join_all(2)
    bench.name()
    assert bench.reserves == []
    assert isinstance(bench.reply(2, 0), SaveOrders)


def test_more_bytes_than_before_reserve_anew() -> None:
    bench = Bench()
    bench.save(0)
    bench.save(1)
    bench.join_all(2, state={"big": np.zeros(100_000)})
    bench.name()
    assert [ask.bytes for ask in bench.reserves] == [1_003_520], "a quarter more: what grew will grow again"


def test_two_generations_and_the_third_save_waits_for_one() -> None:
    bench = Bench()
    bench.to_writing(0)
    bench.to_writing(1)
    bench.join_all(2)
    assert bench.machine.states()["save-2"] == sm.WAITING
    assert bench.names == []
    bench.write_all()
    bench.commit()
    assert bench.machine.states()["save-2"] == sm.RESERVING
    assert len(bench.names) == 1


def test_waiting_saves_are_served_in_order() -> None:
    bench = Bench()
    for step in (0, 1):
        bench.to_writing(step)
    for step in (2, 3, 4):
        bench.join_all(step)
    bench.write_all()
    for _ in range(2):
        bench.commit()
    assert [ask.request.step for ask in bench.names] == [2, 3]


def test_skip_answers_every_rank_when_both_generations_are_taken() -> None:
    bench = Bench(Options(when_busy="skip"))
    bench.to_writing(0)
    bench.to_writing(1)
    bench.join_all(2)
    assert {bench.failure(2, rank).code for rank in (0, 1)} == {"save_skipped"}
    bench.write_all()
    bench.commit()
    bench.commit()
    assert bench.committed == [0, 1]
    bench.save(2)


def test_commits_keep_the_order_of_the_saves_when_a_later_one_is_written_first() -> None:
    bench = Bench()
    bench.to_writing(0)
    first = list(bench.writes)
    bench.to_writing(1)
    for write in [w for w in bench.writes if w not in first]:
        bench.write(write)
    assert bench.commits == []
    assert bench.machine.states() == {"save-0": sm.WRITING, "save-1": sm.WRITING}
    bench.write_all()
    assert bench.commits[0].save.request.step == 0
    bench.commit()
    assert bench.commits[0].save.request.step == 1
    bench.commit()
    assert bench.committed == [0, 1]


def test_a_written_save_commits_when_the_one_before_it_fails() -> None:
    bench = Bench()
    bench.to_writing(0)
    first = bench.writes[0]
    bench.to_writing(1)
    bench.write_all(token=bench.writes[-1].token)
    bench.fail(first, STORE_GONE)
    bench.commit()
    assert bench.committed == [1]


def test_a_state_without_arrays_commits_with_nothing_written() -> None:
    bench = Bench()
    bench.join_all(0, state={"step": 3})
    bench.name()
    assert bench.reserves == []
    assert bench.orders(0, 0).items == ()
    for rank in (0, 1):
        bench.stage(0, rank)
    bench.look_up()
    assert bench.writes == []
    bench.commit()
    assert bench.committed == [0]


def fail_joining(bench: Bench) -> None:
    bench.join(0, 5)
    bench.lost(1, 5, DEAD)


def fail_waiting(bench: Bench) -> None:
    bench.to_writing(100)
    bench.to_writing(101)
    bench.join_all(5)
    assert bench.machine.states()["save-5"] == sm.WAITING
    bench.lost(1, 5, DEAD)
    bench.write_all()
    bench.commit()
    bench.commit()


def fail_unnamed(bench: Bench) -> None:
    bench.join_all(5)
    bench.fail(bench.names[0], STORE_GONE)


def fail_before_the_name(bench: Bench) -> None:
    bench.join_all(5)
    bench.lost(1, 5, DEAD)
    bench.name()


def fail_reserving(bench: Bench) -> None:
    bench.join_all(5)
    bench.name()
    bench.fail(bench.reserves[0], STORE_GONE)
    bench.reserve()  # the other server's answer comes late


def fail_staging(bench: Bench) -> None:
    bench.to_staging(5)
    bench.stage(5, 0)
    bench.lost(1, 5, DEAD)


def fail_writing(bench: Bench) -> None:
    bench.to_writing(5)
    bench.fail(bench.writes[0], STORE_GONE)
    bench.write_all()  # the other server's answer comes late


def fail_committing(bench: Bench) -> None:
    bench.to_writing(5)
    bench.write_all()
    bench.fail(bench.commits[0], CommitUnknownError("the reply was lost"))


FAILURES = [
    fail_joining,
    fail_waiting,
    fail_unnamed,
    fail_before_the_name,
    fail_reserving,
    fail_staging,
    fail_writing,
    fail_committing,
]


@pytest.mark.parametrize("fail", FAILURES, ids=lambda f: f.__name__)
def test_after_a_failure_in_any_state_the_same_ranks_save_the_same_step_again(fail: object) -> None:
    bench = Bench()
    fail(bench)  # type: ignore[operator]
    assert not bench.machine.busy()
    assert bench.open == {}, "a name that stays open would refuse the step for ever"
    bench.save(5)
    assert isinstance(bench.finished[bench.orders(5, 0).checkpoint], SaveDone)
    bench.to_writing(6)
    bench.to_writing(7)  # both generations are free again


@pytest.mark.parametrize("fail", FAILURES, ids=lambda f: f.__name__)
def test_a_failure_in_any_state_reaches_every_rank_once(fail: object) -> None:
    bench = Bench()
    fail(bench)  # type: ignore[operator]
    late = fail in (fail_joining,)
    if late:
        bench.join(1, 5)
    for rank in (0, 1):
        replies = bench.replies.get(("save-5", rank), [])
        checkpoints = {r.checkpoint for r in replies if isinstance(r, SaveOrders)}
        told = [r for r in replies if isinstance(r, Failure)]
        heard = [c for c in checkpoints if isinstance(bench.finished.get(c), Failure)]
        assert told or heard, f"rank {rank} was never told"
        assert len(told) <= 1


def test_a_rank_that_joins_after_the_failure_hears_of_it_at_once() -> None:
    bench = Bench()
    bench.lost(1, 3, DEAD)
    bench.join(0, 3)
    assert bench.failure(3, 0).failures == {1: "rank 1 died"}
    assert bench.machine.states() == {}, "both know: the failed save is forgotten"


def test_an_error_of_a_rank_that_is_no_input_error_is_named_by_rank() -> None:
    bench = Bench()
    bench.join(0, 3)
    bench.lost(1, 3, STORE_GONE)
    assert bench.failure(3, 0).failures == {1: "the store is gone"}


def test_a_worker_that_dies_after_all_have_staged_loses_nothing() -> None:
    bench = Bench()
    bench.to_writing(0)
    bench.lost(1, 0, DEAD)
    bench.write_all()
    bench.lost(0, 0, DEAD)
    bench.commit()
    assert bench.committed == [0]


def test_late_answers_to_a_failed_save_do_not_count_for_the_next_one_of_the_same_step() -> None:
    bench = Bench()
    bench.to_writing(5)
    old = list(bench.writes)
    bench.fail(old[0], STORE_GONE)
    bench.to_writing(5)
    for write in old[1:]:
        bench.write(write)
    assert bench.commits == [], "the first try's files would be committed with the second's offsets"
    bench.write_all()
    bench.commit()
    assert bench.committed == [5]


def test_late_names_do_not_count_for_the_next_save_of_the_same_step() -> None:
    bench = Bench()
    bench.join_all(5)
    bench.lost(1, 5, DEAD)
    bench.join_all(5)
    bench.name()
    assert bench.machine.states() == {"save-5": sm.RESERVING}
    assert bench.reserves == []
    bench.name()
    bench.reserve()
    assert bench.orders(5, 0).checkpoint in bench.open


def test_late_stagings_do_not_count_for_the_next_save_of_the_same_step() -> None:
    bench = Bench()
    bench.to_staging(5)
    first = bench.orders(5, 0)
    bench.lost(1, 5, DEAD)
    bench.to_staging(5)
    for rank in (0, 1):
        bench.do(bench.machine.staged(Staged("save-5", rank, first.checkpoint, (b"",), 0.1)))
    assert bench.machine.states() == {"save-5": sm.STAGING}


def test_timers_of_a_failed_save_do_not_end_the_next_one_of_the_same_step() -> None:
    bench = Bench()
    bench.join(0, 5)
    bench.lost(1, 5, DEAD)
    bench.join(1, 5)
    old = bench.arms[0]
    assert bench.machine.states()["save-5"] == sm.JOINING
    bench.do(bench.machine.timed_out(old.token, old.state))
    assert bench.machine.states()["save-5"] == sm.JOINING


@pytest.mark.parametrize(("state", "missing"), [(sm.JOINING, "[1]"), (sm.STAGING, "[0, 1]")])
def test_timeouts_name_the_ranks_and_the_option(state: str, missing: str) -> None:
    bench = Bench()
    bench.join(0, 4) if state == sm.JOINING else bench.to_staging(4)
    bench.time_out(state)
    # In staging, both know already what to stage, and hear of the end as the outcome of the checkpoint.
    failure = bench.failure(4, 0)
    assert failure.code == "save_timeout"
    assert f"ranks {missing}" in failure.message
    assert "join_timeout_s" in failure.message


def test_a_timeout_of_writing_names_the_servers_and_the_option() -> None:
    bench = Bench()
    bench.to_writing(4)
    bench.write(next(w for w in bench.writes if w.server == "server-0"))
    bench.time_out(sm.WRITING)
    outcome = bench.finished[bench.orders(4, 0).checkpoint]
    assert isinstance(outcome, Failure)
    assert "server-1" in outcome.message
    assert "server-0" not in outcome.message
    assert "write_timeout_s" in outcome.message


def test_a_timeout_of_reserving_fails_the_save() -> None:
    bench = Bench()
    bench.join_all(4)
    bench.time_out(sm.RESERVING)
    assert bench.failure(4, 1).code == "save_timeout"
    bench.name()
    assert bench.open == {}


def test_a_timer_whose_state_is_over_does_nothing() -> None:
    bench = Bench()
    bench.to_writing(4)
    for state in (sm.JOINING, sm.RESERVING, sm.STAGING):
        bench.time_out(state)
    bench.write_all()
    bench.time_out(sm.WRITING)
    bench.commit()
    assert bench.committed == [4]


def test_a_generation_is_not_used_again_after_its_staging_failed() -> None:
    bench = Bench()
    bench.to_staging(0)
    straggler = bench.orders(0, 0).memory
    bench.time_out(sm.STAGING)
    for step in (1, 2):
        bench.to_staging(step)
        assert bench.orders(step, 0).memory != straggler, "a slow rank may still be copying into it"


def test_late_memory_of_a_failed_save_is_not_taken_for_reserved() -> None:
    bench = Bench()
    bench.join_all(0)
    bench.name()
    ask = bench.reserves.pop(0)
    bench.lost(1, 0, DEAD)
    bench.do(bench.machine.reserved(ask.token, ask.server, ask.generation, StagingFile(ask.bytes, "/shm/late")))
    bench.reserves.clear()
    for step in (1, 2):
        bench.to_staging(step)
        assert "/shm/late" not in (bench.orders(step, 0).memory, bench.orders(step, 1).memory)


def test_two_workers_of_one_rank_are_an_error() -> None:
    bench = Bench()
    bench.join(0, 0)
    bench.join(0, 0)
    assert "two workers joined" in bench.failure(0, 0).message


def test_ranks_that_disagree_on_the_world_size_are_an_error_for_both() -> None:
    bench = Bench()
    bench.join(0, 0, world=2)
    bench.join(1, 0, world=3)
    for rank in (0, 1):
        assert "says there are 3 workers, others say 2" in bench.failure(0, rank).message


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_out_of_range_is_an_error(rank: int) -> None:
    bench = Bench()
    bench.join(rank, 0)
    assert "is not in 0 … 1" in bench.failure(0, rank).message
    assert not bench.machine.busy()


@pytest.mark.parametrize("state", [sm.STAGING, sm.WRITING, sm.COMMITTING])
def test_joining_a_save_that_is_under_way_does_not_harm_it(state: str) -> None:
    bench = Bench()
    bench.to_staging(9)
    checkpoint = bench.orders(9, 0).checkpoint
    for rank in (0, 1):
        if state != sm.STAGING:
            bench.stage(9, rank)
    if state == sm.COMMITTING:
        bench.write_all()
    assert bench.machine.states() == {"save-9": state}
    stage = [bench.orders(9, rank) for rank in (0, 1)]
    bench.join(0, 9)
    assert "being saved already" in bench.failure(9, 0).message
    if state == sm.STAGING:
        for rank, orders in enumerate(stage):
            digests = tuple(bytes(16) for _ in orders.items)
            bench.do(bench.machine.staged(Staged("save-9", rank, checkpoint, digests, 0.1)))
    if state != sm.COMMITTING:
        bench.write_all()
    bench.commit()
    assert isinstance(bench.finished[checkpoint], SaveDone)


def test_the_same_step_under_two_keys_is_an_error_of_the_second() -> None:
    bench = Bench()
    bench.to_writing(3)
    for rank in (0, 1):
        bench.join(rank, 3, key="another")
    reply = bench.replies["another", 0][-1]
    assert isinstance(reply, Failure)
    assert "step 3 is being saved already" in reply.message
    bench.write_all()
    bench.commit()


def test_states_that_do_not_fit_together_fail_before_anything_is_staged() -> None:
    bench = Bench()
    for rank in (0, 1):
        bench.join(rank, 0, state={"w": Sharded(np.zeros(4), (9,), (5 * rank,))})
    for rank in (0, 1):
        assert bench.failure(0, rank).code == "invalid_input"
    assert bench.reserves == []
    assert bench.open == {}


def test_failed_saves_that_nobody_asks_about_are_forgotten_after_a_while() -> None:
    bench = Bench()
    for step in range(200):
        bench.lost(0, step, DEAD)
    assert len(bench.machine.states()) <= 64


def test_events_of_unknown_saves_do_nothing() -> None:
    bench = Bench()
    machine = bench.machine
    assert machine.staged(Staged("nobody", 0, "c", (), 0.0)) == []
    assert machine.written("nobody#1", "server-0", ()) == []
    assert machine.reserved("nobody#1", "server-0", 0, StagingFile(1, "f")) == []
    assert machine.failed("nobody#1", STORE_GONE) == []
    assert machine.timed_out("nobody#1", sm.JOINING) == []
