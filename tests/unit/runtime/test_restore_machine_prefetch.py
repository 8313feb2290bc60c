"""Restores that begin while their checkpoint is being brought into memory: they wait for it, and read nothing twice."""

from __future__ import annotations

import pytest

from rl_ckpt.errors import WorkerFailuresError
from rl_ckpt.plan.match import Problems
from rl_ckpt.runtime.messages import Apply, Candidate, Failure
from tests.unit.runtime.restore_bench import Bench, held_by, manifest

TOTAL = sum(c.bytes for array in manifest("x").arrays for c in array.chunks)
DEAD = WorkerFailuresError("rank 1 died", {1: "rank 1 died"})


def to_awaiting(**how: bool) -> Bench:
    bench = Bench(coming=True, **how)
    bench.to_fetching()
    assert bench.fetches == []
    (ask,) = bench.awaits
    assert ask.checkpoint == "2-new"
    return bench


@pytest.mark.parametrize("mappable", [False, True])
def test_chunks_are_chosen_when_all_is_in_memory(mappable: bool) -> None:
    bench = to_awaiting(mappable=mappable)
    assert bench.machine.states() == {bench.awaits[0].token: "awaiting"}
    assert bench.machine.under_way("r"), "its driver waits on"
    first = bench.replies["r", 0][0]
    assert isinstance(first, Candidate)
    assert not first.early, "nobody reads the store's files meanwhile"
    bench.do(bench.machine.brought(bench.awaits[0].token, held_by("server-0", "server-1")))
    assert bench.fetches == []
    for rank in (0, 1):
        bench.verify(rank)
    reply = bench.reply(0)
    assert isinstance(reply, Apply)
    assert reply.bytes_from == {"memory": 2 * TOTAL}


def test_what_did_not_come_is_fetched_as_without() -> None:
    bench = to_awaiting()
    bench.do(bench.machine.brought(bench.awaits[0].token, None))
    bench.fetch_all()
    for rank in (0, 1):
        bench.verify(rank)
    reply = bench.reply(0)
    assert isinstance(reply, Apply)
    assert reply.bytes_from == {"store": TOTAL, "peers": TOTAL}


def test_a_rank_that_fails_meanwhile_ends_it_and_no_memory_stays_in_use() -> None:
    bench = to_awaiting()
    token = bench.awaits[0].token
    bench.lost(1, DEAD)
    assert isinstance(bench.reply(0), Failure)
    bench.in_use.add(token)  # as the coordinator does when the prefetch is over
    bench.do(bench.machine.brought(token, held_by("server-0")))
    assert bench.in_use == set()
    assert bench.fetches == []


def test_a_node_that_is_lost_meanwhile_is_no_source() -> None:
    bench = to_awaiting()
    bench.do(bench.machine.server_lost("server-9"))
    bench.do(bench.machine.brought(bench.awaits[0].token, held_by("server-9", "server-0")))
    (ask,) = bench.fetches
    assert ask.server == "server-1"
    assert {part.server for part in ask.order.parts} == {"server-0"}


def test_a_state_that_does_not_fit_is_said_at_once() -> None:
    bench = Bench(coming=True)
    bench.to_matching()
    bench.match(0, Problems(missing=["w"]))
    bench.match(1)
    assert bench.awaits == []
    assert "does not fit" in bench.failure(0).message


def test_the_next_candidate_need_not_be_on_its_way() -> None:
    bench = to_awaiting()
    bench.do(bench.machine.brought(bench.awaits[0].token, held_by("server-0", "server-1")))
    bench.coming = False
    bench.verify(0, "damaged in memory")
    bench.verify(1)
    while bench.fetches:
        bench.fetch(bench.fetches[0], "damaged in the store")
    assert [type(bench.reply(rank)).__name__ for rank in (0, 1)] == ["TryNext"] * 2
    bench.to_fetching()
    assert len(bench.awaits) == 1
    assert bench.fetches
