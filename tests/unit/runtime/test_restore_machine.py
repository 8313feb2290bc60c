"""The coordinator's brain for restores, without Ray: every state and event, in and out of order."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rl_ckpt.errors import CorruptionError, StorageError, WorkerFailuresError
from rl_ckpt.options import Options
from rl_ckpt.plan.match import Problems
from rl_ckpt.plan.spread import Needs
from rl_ckpt.runtime import restore_orders
from rl_ckpt.runtime import restore_steps as rm
from rl_ckpt.runtime.messages import (
    Apply,
    Candidate,
    Failure,
    FetchDone,
    Matched,
    OpenRestore,
    Sources,
    TryNext,
    decode,
    encode,
)
from rl_ckpt.runtime.restore_machine import RestoreMachine
from tests.unit.runtime.restore_bench import Bench, all_chunks, manifest

DEAD = WorkerFailuresError("rank 1 died", {1: "rank 1 died"})
TOTAL = sum(c.bytes for array in manifest("x").arrays for c in array.chunks)


def test_a_restore_goes_through_its_states() -> None:
    bench = Bench()
    bench.open(0)
    assert bench.loads == []
    bench.open(1)
    bench.load()
    assert all(isinstance(bench.reply(rank), Candidate) for rank in (0, 1))
    bench.match(0)
    assert bench.fetches == []
    bench.match(1)
    assert {ask.server for ask in bench.fetches} == {"server-0", "server-1"}
    bench.fetch_all()
    assert all(isinstance(bench.reply(rank), Sources) for rank in (0, 1))
    bench.verify(0)
    assert isinstance(bench.reply(0), Sources), "nobody applies before all have verified"
    bench.verify(1)
    assert all(isinstance(bench.reply(rank), Apply) for rank in (0, 1))
    assert bench.forgotten == [], "ranks are still copying out of the memory"
    bench.applied(0)
    assert bench.forgotten == []
    bench.applied(1)
    assert bench.memory == {}
    assert bench.machine.states() == {}


def test_each_chunk_is_fetched_from_the_store_once_and_passed_on_by_peers() -> None:
    bench = Bench()
    bench.to_over()
    reply = bench.reply(0)
    assert isinstance(reply, Apply)
    assert reply.bytes_from == {"store": TOTAL, "peers": TOTAL}
    assert set(bench.memory.values()) == {TOTAL}


def test_what_peers_pass_on_is_found_in_their_memory_and_in_the_store() -> None:
    bench = Bench()
    bench.to_fetching()
    orders = {ask.server: ask.order for ask in bench.fetches}
    assert set(orders) == {"server-0", "server-1"}
    for server, order in orders.items():
        (peer,) = order.peers
        there = {(name, i.source_offset): i for name, items in orders[peer].files.items() for i in items}
        assert peer != server
        assert len(order.peers[peer]) == len(there)
        for item in order.peers[peer]:
            source = there[order.names[item.file], item.file_offset]
            assert item.source_offset == source.offset
            assert (item.size_bytes, item.digest) == (source.size_bytes, source.digest)


def test_peers_that_need_different_chunks_have_them_at_different_places() -> None:
    bench = Bench()
    bench.to_matching()
    for rank, needs in enumerate([all_chunks(), all_chunks()[1:]]):
        matched = Matched("r", bench.token(rank, "r"), rank, f"server-{rank}", Problems(), Needs.of(needs))
        bench.do(bench.machine.match(matched))
    orders = {ask.server: ask.order for ask in bench.fetches}
    assert orders["server-0"].memory_bytes > orders["server-1"].memory_bytes
    moved = 0
    for server, order in orders.items():
        for peer, items in order.peers.items():
            there = {i.digest: i.offset for file in orders[peer].files.values() for i in file}
            here = {i.digest for file in order.files.values() for i in file}
            for item in items:
                assert item.source_offset == there[item.digest]
                assert item.digest not in here
                moved += item.source_offset != item.offset
        assert server not in order.peers
    assert moved, "else this test shows nothing"


def test_bytes_by_other_ways_are_reported_too() -> None:
    bench = Bench()
    bench.to_fetching()
    for ask in bench.fetches:
        done = FetchDone({"store": 1, "peers_ray": 2}, memory="/shm/x")
        bench.do(bench.machine.fetched(ask.token, ask.server, done))
    for rank in (0, 1):
        bench.verify(rank)
    reply = bench.reply(0)
    assert isinstance(reply, Apply)
    assert reply.bytes_from == {"store": 2, "peers": 0, "peers_ray": 4}


def test_tokens_of_one_coordinator_are_not_those_of_the_next() -> None:
    tokens = set()
    for incarnation in ("a-", "b-"):
        machine = RestoreMachine(Options(), incarnation)
        machine.open(OpenRestore("r", 0, 2, None, "s0"))
        tokens |= set(machine.states())
    assert len(tokens) == 2


def test_sources_name_the_memory_of_the_ranks_own_server() -> None:
    bench = Bench()
    bench.to_verifying()
    for rank in (0, 1):
        reply = bench.reply(rank)
        assert isinstance(reply, Sources)
        assert [file.kind for file in reply.files] == ["fetched"]
        assert reply.files[0].path.startswith(f"/shm/server-{rank}/")
        assert len(set(reply.offsets)) == len(all_chunks())


def test_files_that_workers_can_map_are_not_fetched() -> None:
    bench = Bench(mappable=True)
    bench.to_fetching()
    assert bench.fetches == []
    assert bench.reply(0) == Sources(), "alone on its node: it verifies all"
    for rank in (0, 1):
        bench.verify(rank)
    reply = bench.reply(0)
    assert isinstance(reply, Apply)
    assert reply.bytes_from == {"files": 2 * TOTAL}


def test_ranks_of_one_node_verify_all_they_need_where_chunks_are_tiny() -> None:
    bench = Bench(mappable=True)
    for rank in range(2):
        bench.open(rank)
    bench.load()
    for rank in range(2):
        bench.match(rank)
    assert [bench.reply(rank) for rank in range(2)] == [Sources(), Sources()]


def test_ranks_of_one_node_share_the_verifying_of_mapped_files_and_others_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(restore_orders, "SHARE_FROM_BYTES", 0)
    bench = Bench(mappable=True)
    for rank in range(3):
        bench.open(rank, world=3)
    bench.load()
    for rank, place in enumerate([(0, 2), (0, 1), (1, 2)]):  # ranks 0 and 2 are on one node
        candidate = bench.reply(rank)
        assert isinstance(candidate, Candidate)
        assert (candidate.neighbour, candidate.neighbours) == place
    for rank in range(3):
        bench.match(rank)
    replies = [bench.reply(rank) for rank in range(3)]
    left = [set(r.others) for r in replies if isinstance(r, Sources)]
    everything = set(range(len(all_chunks())))
    assert left[1] == set()
    assert left[0] | left[2] == everything
    assert left[0] & left[2] == set(), "nothing is left out by both"
    assert left[0], "rank 2 takes a part"


@pytest.mark.parametrize("fewer", [0, 1])
def test_each_node_shares_its_own_needs_where_others_need_much_the_same(
    fewer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore_orders, "SHARE_FROM_BYTES", 0)  # these chunks are tiny
    bench = Bench(mappable=True)
    for rank in range(4):
        bench.open(rank, world=4)
    bench.load()
    needs = [all_chunks(), all_chunks(), all_chunks(), all_chunks()[fewer:]]
    for rank in range(4):  # 0 and 2 are on one node, 1 and 3 on another
        wanted = Needs.of(needs[rank])
        matched = Matched("r", bench.token(rank, "r"), rank, f"server-{rank % 2}", Problems(), wanted)
        bench.do(bench.machine.match(decode(encode(matched), Matched)))
    replies = [bench.reply(rank) for rank in range(4)]
    verified = [
        {chunk for n, chunk in enumerate(needs[rank]) if n not in reply.others}
        for rank, reply in enumerate(replies)
        if isinstance(reply, Sources)
    ]
    for one, other in ((0, 2), (1, 3)):
        assert verified[one] | verified[other] == set(all_chunks())
        assert verified[one] & verified[other] == set()


def fail_in_opening(bench: Bench) -> None:
    bench.open(0)
    bench.lost(1, DEAD)


def fail_in_loading(bench: Bench) -> None:
    bench.open(0)
    bench.open(1)
    bench.do(bench.machine.failed(bench.loads.pop().token, StorageError("gone")))


def fail_in_matching(bench: Bench) -> None:
    bench.to_matching()
    bench.match(0)
    bench.lost(1, DEAD)


def fail_in_matching_before_the_other_asks(bench: Bench) -> None:
    bench.to_matching()
    bench.lost(1, DEAD)
    bench.match(0)


def fail_in_problems(bench: Bench) -> None:
    bench.to_matching()
    bench.match(0)
    bench.match(1, Problems(missing=["x"]))


def fail_in_fetching(bench: Bench) -> None:
    bench.to_fetching()
    bench.do(bench.machine.failed(bench.fetches.pop(0).token, StorageError("gone")))
    bench.fetch_all()  # the other server's answer comes late


def fail_in_verifying(bench: Bench) -> None:
    bench.to_verifying()
    bench.verify(0)
    bench.lost(1, DEAD)


def fail_in_verifying_before_the_other_asks(bench: Bench) -> None:
    bench.to_verifying()
    bench.lost(1, DEAD)
    bench.verify(0)


FAILURES: list[Callable[[Bench], None]] = [
    fail_in_opening,
    fail_in_loading,
    fail_in_matching,
    fail_in_matching_before_the_other_asks,
    fail_in_problems,
    fail_in_fetching,
    fail_in_verifying,
    fail_in_verifying_before_the_other_asks,
]


@pytest.mark.parametrize("fail", FAILURES, ids=lambda f: f.__name__)
def test_a_failure_in_any_state_reaches_every_rank_and_gives_the_memory_back(fail: Callable[[Bench], None]) -> None:
    bench = Bench()
    fail(bench)
    assert isinstance(bench.reply(0), Failure)
    assert bench.memory == {}
    assert bench.machine.states() == {}, "all know of it, so it is forgotten"


@pytest.mark.parametrize("fail", FAILURES, ids=lambda f: f.__name__)
def test_after_a_failure_in_any_state_the_same_ranks_restore_again(fail: Callable[[Bench], None]) -> None:
    bench = Bench()
    fail(bench)
    bench.restore()


def test_a_damaged_chunk_sends_every_rank_to_the_next_checkpoint() -> None:
    bench = Bench()
    bench.to_fetching()
    bench.fetch(bench.fetches[0], damaged="a flipped bit")
    bench.fetch_all()
    assert all(isinstance(bench.reply(rank), TryNext) for rank in (0, 1))
    bench.restore()
    candidate = next(r for r in bench.replies["r", 0][::-1] if isinstance(r, Candidate))
    assert candidate.fell_back == {"2-new": "a flipped bit"}


def test_damage_that_a_rank_finds_sends_every_rank_to_the_next_checkpoint() -> None:
    bench = Bench(mappable=True)
    bench.to_fetching()
    bench.verify(0, damaged="a flipped bit")
    bench.verify(1)
    assert all(isinstance(bench.reply(rank), TryNext) for rank in (0, 1))
    bench.open(0)
    bench.open(1)
    assert bench.loads[0].tried == ("2-new",)


def test_damage_of_the_step_that_was_asked_for_is_an_error() -> None:
    bench = Bench()
    bench.to_fetching(step=2)
    bench.fetch(bench.fetches[0], damaged="a flipped bit")
    bench.fetch_all()
    assert {bench.failure(rank).code for rank in (0, 1)} == {CorruptionError.code}


def test_when_every_checkpoint_is_damaged_all_ranks_are_told() -> None:
    bench = Bench(candidates=("2-new",))
    bench.to_fetching()
    bench.fetch(bench.fetches[0], damaged="a flipped bit")
    bench.fetch_all()
    bench.to_matching()
    assert {bench.failure(rank).code for rank in (0, 1)} == {CorruptionError.code}


def test_a_late_fetch_of_a_restore_that_failed_does_not_count_for_the_next_one() -> None:
    bench = Bench()
    bench.to_fetching()
    late = bench.fetches.pop(1)
    bench.lost(1, DEAD)
    bench.fetches.clear()
    bench.to_fetching()
    bench.fetches.append(late)
    bench.fetch(late)
    bench.fetch(next(ask for ask in bench.fetches if ask.server != late.server))
    assert not any(isinstance(bench.reply(rank), Sources) for rank in (0, 1)), "one server is still at it"
    bench.fetch_all()
    for (token, _), size in bench.memory.items():
        assert token != late.token
        assert size == TOTAL


def test_all_ranks_problems_stand_in_one_error() -> None:
    bench = Bench()
    bench.to_matching()
    bench.match(0, Problems(missing=["a/x"], unexpected=["b/y"]))
    bench.match(1, Problems(mismatched={"c": "shape"}))
    text = bench.failure(0).message
    for part in ("rank 0: missing in the checkpoint: a/x", "rank 0: unexpected in the checkpoint: b/y"):
        assert part in text
    assert "rank 1: mismatched: c: shape" in text
    assert bench.failure(1).message == text


@pytest.mark.parametrize(("state", "names"), [(rm.OPENING, "[1]"), (rm.MATCHING, "[1]"), (rm.VERIFYING, "[1]")])
def test_timeouts_name_the_ranks_that_are_missing(state: str, names: str) -> None:
    bench = Bench()
    if state == rm.OPENING:
        bench.open(0)
    elif state == rm.MATCHING:
        bench.to_matching()
        bench.match(0)
    else:
        bench.to_verifying()
        bench.verify(0)
    bench.time_out(state)
    assert bench.failure(0).code == "save_timeout"
    assert f"ranks {names}" in bench.failure(0).message


def test_timeouts_of_fetching_name_the_servers() -> None:
    bench = Bench()
    bench.to_fetching()
    bench.fetch(next(ask for ask in bench.fetches if ask.server == "server-0"))
    bench.time_out(rm.FETCHING)
    for rank in (0, 1):
        assert "server-1" in bench.failure(rank).message
        assert "server-0" not in bench.failure(rank).message
    assert bench.memory == {}


def test_timers_of_an_earlier_restore_do_not_end_a_later_one() -> None:
    bench = Bench()
    bench.restore()
    old = list(bench.arms)
    bench.open(0)
    for arm in old:
        bench.do(bench.machine.timed_out(arm.token, arm.state, arm.round))
    bench.open(1)
    bench.load()
    assert isinstance(bench.reply(0), Candidate)


def test_a_rank_may_restore_again_while_others_still_apply_the_restore_before() -> None:
    bench = Bench()
    bench.to_over()
    bench.applied(0)
    bench.open(0)
    bench.applied(1)
    assert bench.memory == {}
    bench.open(1)
    bench.load()
    assert all(isinstance(bench.reply(rank), Candidate) for rank in (0, 1))


def test_a_rank_that_fails_while_applying_does_not_fail_the_others() -> None:
    bench = Bench()
    bench.to_over()
    bench.lost(1, DEAD)
    assert isinstance(bench.reply(0), Apply)
    bench.applied(0)
    assert bench.memory == {}
    assert bench.machine.states() == {}


def test_memory_is_given_back_when_a_rank_never_applies() -> None:
    bench = Bench()
    bench.to_over()
    bench.applied(0)
    bench.time_out(rm.OVER)
    assert bench.memory == {}
    assert bench.machine.states() == {}


def test_ranks_that_disagree_on_the_world_size_are_an_error_for_both() -> None:
    bench = Bench()
    bench.open(0, world=2)
    bench.open(1, world=3)
    for rank in (0, 1):
        assert "rank 1 of 3 can't join a restore of 2 workers" in bench.failure(rank).message


def test_a_question_about_a_restore_that_is_over_is_answered() -> None:
    bench = Bench()
    bench.match(0)
    assert "over already" in bench.failure(0).message
    bench.verify(1)
    assert "over already" in bench.failure(1).message
    assert bench.failure(1).lost == (1,)  # what it needed was lost: `supervise` tries again


def test_failed_restores_that_nobody_asks_about_are_forgotten_after_a_while() -> None:
    bench = Bench()
    for i in range(200):
        bench.lost(0, DEAD, key=f"key-{i}")
    assert len(bench.machine.states()) <= 64


def test_a_restore_is_under_way_from_the_last_join_until_all_have_set() -> None:
    bench = Bench()
    assert not bench.machine.under_way("r")
    bench.open(0)
    assert not bench.machine.under_way("r"), "the others may hang: who called them keeps the time"
    bench.open(1)
    bench.load()
    assert bench.machine.under_way("r")
    for rank in (0, 1):
        bench.match(rank)
    bench.fetch(bench.fetches[0], damaged="bit rot")
    bench.fetch_all()
    assert bench.machine.under_way("r"), "on to the next checkpoint"
    bench = Bench()
    bench.to_over()
    assert bench.machine.under_way("r")
    for rank in (0, 1):
        bench.applied(rank)
    assert not bench.machine.under_way("r")


def test_a_restore_whose_rank_hangs_is_not_under_way() -> None:
    bench = Bench()
    bench.to_matching()
    bench.match(0)
    bench.time_out(rm.MATCHING)
    assert not bench.machine.under_way("r")


def test_a_rank_lost_in_a_live_restore_fails_it_though_one_of_the_same_key_is_still_known() -> None:
    bench = Bench()
    bench.to_over()
    bench.applied(0)  # rank 1 dies while it copies; all workers are started anew and restore once more
    bench.to_verifying()
    bench.lost(1, StorageError("disk gone"))
    bench.verify(0)
    assert "disk gone" in bench.failure(0).message
    assert "disk gone" in bench.failure(1).message
    bench.lost(1, DEAD)  # now only the first one is left that it may mean
    assert bench.machine.states() == {}
