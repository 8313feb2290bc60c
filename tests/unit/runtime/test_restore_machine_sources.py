"""The coordinator's brain for restores: memory before the store, and sources that turn out to be bad."""

from __future__ import annotations

import pytest

from rl_ckpt.errors import WorkerFailuresError
from rl_ckpt.plan import sources as plan_sources
from rl_ckpt.plan.parts import Holdings
from rl_ckpt.runtime import restore_orders
from rl_ckpt.runtime import restore_steps as rm
from rl_ckpt.runtime.messages import FETCHED, HELD, STORED, Apply, Candidate, Source, Sources
from tests.unit.runtime.restore_bench import Bench, all_chunks, held_by, manifest

DEAD = WorkerFailuresError("rank 1 died", {1: "rank 1 died"})
TOTAL = sum(c.bytes for array in manifest("x").arrays for c in array.chunks)


def sources(bench: Bench, rank: int) -> Sources:
    reply = bench.reply(rank)
    assert isinstance(reply, Sources), reply
    return reply


def test_memory_of_the_node_is_read_in_place_and_a_peers_is_pulled_and_no_store_is_asked() -> None:
    bench = Bench(mappable=True, holdings=held_by("server-0"))
    bench.to_matching()
    for rank in (0, 1):
        candidate = bench.reply(rank)
        assert isinstance(candidate, Candidate)
        assert not candidate.early, "no rank begins with files that it will not need"
    bench.match(0)
    bench.match(1)
    (ask,) = bench.fetches
    assert (ask.server, ask.order.files, ask.order.peers) == ("server-1", {}, {})
    assert [(part.server, part.part) for part in ask.order.parts] == [("server-0", "part-2-new-server-0")]
    bench.fetch_all()
    assert sources(bench, 0).files == (Source(HELD, "/held/server-0"),)
    assert [file.kind for file in sources(bench, 1).files] == [FETCHED]
    for rank in (0, 1):
        bench.verify(rank)
    reply = bench.reply(0)
    assert isinstance(reply, Apply)
    assert reply.bytes_from == {"memory": TOTAL, "peers_memory": TOTAL}
    assert reply.repaired == {}


def test_ranks_of_one_node_share_the_verifying_of_held_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore_orders, "SHARE_FROM_BYTES", 0)
    bench = Bench(holdings=held_by("server-0", "server-1"))
    for rank in range(4):
        bench.open(rank, world=4)
    bench.load()
    for rank in range(4):
        bench.match(rank)
    everything = set(range(len(all_chunks())))
    for one, other in ((0, 2), (1, 3)):
        left = set(sources(bench, one).others), set(sources(bench, other).others)
        assert left[0] | left[1] == everything
        assert left[0] & left[1] == set()
        assert all(left)


def test_a_chunk_that_is_bad_in_a_mapped_file_is_taken_from_another_checkpoint_by_all_who_need_it() -> None:
    bench = Bench(mappable=True)
    chunk = manifest("x").arrays[0].chunks[0]
    bench.elsewhere[bytes.fromhex(chunk.digest)] = [("shards/older", 4096)]
    bench.to_fetching()
    bench.verify(0, damaged="a flipped bit")
    bench.verify(1)
    for rank in (0, 1):
        told = sources(bench, rank)
        assert (told.files, told.at, told.offsets, told.needs) == (
            (Source(STORED, "shards/older"),), (0,), (4096,), (0,),
        )  # fmt: skip
    bench.verify(0)
    assert isinstance(bench.reply(0), Sources), "the other one is still at it"
    bench.verify(1)
    reply = bench.reply(1)
    assert isinstance(reply, Apply)
    assert reply.repaired == {"chunk 0 of a": "shards/older"}
    assert reply.bytes_from == {"files": 2 * TOTAL}


def test_timers_of_an_earlier_round_do_not_end_a_later_one() -> None:
    bench = Bench(mappable=True)
    chunk = manifest("x").arrays[0].chunks[0]
    bench.elsewhere[bytes.fromhex(chunk.digest)] = [("shards/older", 4096)]
    bench.to_fetching()
    (early,) = [arm for arm in bench.arms if arm.state == rm.VERIFYING]
    bench.verify(0, damaged="a flipped bit")
    bench.verify(1)
    bench.do(bench.machine.timed_out(early.token, early.state, early.round))
    bench.verify(0)
    assert isinstance(bench.reply(0), Sources), "the second round has its own time, and rank 0 waits for rank 1"
    bench.time_out(rm.VERIFYING)
    assert "in time" in bench.failure(0).message


def test_only_ranks_whose_chunks_have_moved_verify_again() -> None:
    bench = Bench(holdings=held_by("server-0", "server-1"))
    bench.to_fetching()
    bench.verify(0, damaged="a flipped bit")
    bench.verify(1)
    (ask,) = bench.fetches
    assert ask.server == "server-0"
    assert [part.server for part in ask.order.parts] == ["server-1"], "the other copy"
    replies = len(bench.replies["r", 1])
    bench.fetch_all()
    assert sources(bench, 0).needs == (0,)
    bench.verify(0)
    assert all(isinstance(bench.reply(rank), Apply) for rank in (0, 1))
    assert len(bench.replies["r", 1]) == replies + 1, "rank 1 was not asked again"
    reply = bench.reply(0)
    assert isinstance(reply, Apply)
    assert reply.repaired == {"chunk 0 of a": "the memory of server-1"}
    assert "store" not in reply.bytes_from
    assert bench.damaged == [], "ranks still read other chunks of that copy"
    for rank in (0, 1):
        bench.applied(rank)
    assert bench.damaged == [
        rm.Damaged("server-0", "part-2-new-server-0", bytes.fromhex(manifest("x").arrays[0].chunks[0].digest))
    ]


def test_what_the_store_does_not_give_is_an_error_and_no_older_checkpoint() -> None:
    bench = Bench()
    bench.to_fetching()
    bench.fetch(bench.fetches[0], damaged="the store said 503", code="storage")
    bench.fetch_all()
    assert [bench.failure(rank).code for rank in (0, 1)] == ["storage", "storage"]
    assert "503" in bench.failure(0).message


@pytest.mark.parametrize("holdings", [None, held_by("server-9")], ids=["store", "memory"])
def test_peers_that_can_have_nothing_from_one_another_cost_one_more_round(
    holdings: Holdings | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_sources, "_TAKERS_A_HOLDER", 0)  # all is passed on
    bench, world = Bench(holdings=holdings, servers=4, passing=False), 4
    for rank in range(world):
        bench.open(rank, world=world)
    bench.load()
    for rank in range(world):
        bench.match(rank)
    assert all(ask.order.peers for ask in bench.fetches)
    for ask in list(bench.fetches):
        bench.fetch(ask)
    assert len(bench.fetches) == world
    assert not any(ask.order.peers for ask in bench.fetches), "each brings in the rest alone"
    bench.fetch_all()
    for rank in range(world):
        assert isinstance(bench.reply(rank), Sources)
        bench.verify(rank)
    reply = bench.reply(0)
    assert isinstance(reply, Apply)
    read = {name: size for name, size in reply.bytes_from.items() if size}
    assert (read, reply.repaired) == ({"store" if holdings is None else "peers_memory": world * TOTAL}, {})


def test_what_a_peer_failed_to_bring_is_still_passed_on_afterwards() -> None:
    bench = Bench()
    bench.elsewhere = {bytes.fromhex(c.digest): [("shards/older", 0)] for a in manifest("x").arrays for c in a.chunks}
    bench.to_fetching()
    for ask in list(bench.fetches):
        bench.fetch(ask, damaged="a flipped bit")
    assert len(bench.fetches) == 2
    assert any(ask.order.peers for ask in bench.fetches)
    bench.fetch_all()
    for rank in (0, 1):
        assert isinstance(bench.reply(rank), Sources)
        bench.verify(rank)
    reply = bench.reply(0)
    assert isinstance(reply, Apply)
    assert len(reply.repaired) == 2


def test_a_server_that_is_restarted_is_told_again_and_not_for_ever() -> None:
    bench = Bench()
    bench.to_fetching()
    for _ in range(30):
        ask = next(ask for ask in bench.fetches if ask.server == "server-1")
        bench.fetches.remove(ask)
        bench.do(bench.machine.unreachable(ask.token, ask.server, ask.order, "it is gone"))
    ask = next(ask for ask in bench.fetches if ask.server == "server-1")
    bench.do(bench.machine.unreachable(ask.token, ask.server, ask.order, "it is gone"))
    assert [bench.failure(rank).message for rank in (0, 1)] == ["it is gone"] * 2


def test_a_node_that_dies_fails_the_restore_of_its_ranks_by_name() -> None:
    bench = Bench()
    bench.to_verifying()
    bench.verify(0)
    bench.do(bench.machine.server_lost("server-1"))
    assert set(bench.failure(0).failures) == {1}
    assert "ranks [1]" in bench.failure(0).message
    bench.verify(1)
    assert set(bench.failure(1).failures) == {1}
    assert bench.memory == {}


def test_memory_of_a_node_that_died_is_no_source() -> None:
    bench = Bench(holdings=held_by("server-8", "server-9"))
    bench.do(bench.machine.server_lost("server-8"))
    bench.to_matching()
    bench.do(bench.machine.server_lost("server-9"))
    bench.match(0)
    bench.match(1)
    assert all(ask.order.parts == () for ask in bench.fetches)
    assert any(ask.order.files for ask in bench.fetches)


def test_memory_that_was_chosen_for_a_restore_that_is_over_by_then_is_let_go() -> None:
    bench = Bench(holdings=held_by("server-0"))
    bench.open(0)
    bench.open(1)
    bench.lost(1, DEAD)
    bench.load()
    assert bench.in_use == set()


def test_the_restore_that_a_rank_has_set_is_told_from_another_one_of_the_same_key() -> None:
    bench = Bench()
    bench.to_over()
    first = bench.token(0, "r")
    bench.to_over()  # all workers were started anew, and restore once more
    second = bench.token(0, "r")
    for rank in (0, 1):
        bench.do(bench.machine.applied("r", rank, second))
    assert bench.machine.states() == {first: rm.OVER}
