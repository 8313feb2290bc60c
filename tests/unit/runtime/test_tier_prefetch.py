"""The memory tier's brain in a prefetch, without Ray: who brings what, who takes over, and what it makes way for."""

from __future__ import annotations

import msgspec
import pytest

from rl_ckpt.options import Options
from rl_ckpt.runtime import tier_steps as tier
from tests.unit.runtime.tier_bench import Bench, part


def brings(bench: Bench) -> dict[str, str]:
    """Origin of each part that is being brought in, and by whom."""
    return {ask.part.origin: ask.server for ask in bench.asked if isinstance(ask, tier.Bring)}


def test_each_server_brings_its_part_and_then_copies_are_made() -> None:
    bench = Bench()
    bench.prefetch("1")
    assert brings(bench) == {"s0": "s0", "s1": "s1", "s2": "s2"}
    assert len(bench.asked) == 3, "copies are made of what is there"
    assert bench.brain.coming("1")
    assert not bench.brain.remembered()[0].whole
    for ask in list(bench.asked):
        bench.answer(ask)
    assert not bench.brain.coming("1"), "a restore need not wait for copies"
    assert bench.brain.settling("1")
    assert bench.brain.remembered()[0].whole
    bench.answer_all()
    assert not bench.brain.settling("1")
    assert bench.brain.counts() == {"parts_held": 6, "bytes_held": 6 * 192, "copies_missing": 0}
    assert all(len(bench.holders("1", origin)) == 2 for origin in bench.servers)
    assert (bench.landed, bench.stuck) == ([], {}), "no save waits for it"
    assert all("1" in server.memos for server in bench.servers.values())


def test_what_is_known_already_is_not_brought_again() -> None:
    bench = Bench()
    bench.save("1", 0)
    bench.prefetch("1")
    assert bench.asked == []
    bench.prefetch("2")
    asked = list(bench.asked)
    bench.prefetch("2")
    assert bench.asked == asked


def test_a_part_whose_server_is_lost_is_brought_by_another() -> None:
    bench = Bench()
    bench.prefetch("1")
    bench.kill("s1")
    assert set(brings(bench)) == {"s0", "s1", "s2"}
    assert brings(bench)["s1"] in ("s0", "s2")
    bench.answer_all()
    assert bench.brain.remembered()[0].whole
    assert all(len(bench.holders("1", origin)) == 2 for origin in ("s0", "s1", "s2"))


def test_a_part_of_which_no_copy_is_left_comes_from_the_store_again() -> None:
    bench = Bench(3, Options(replicas=0))
    bench.prefetch("1")
    bench.answer_all()
    assert bench.holders("1", "s1") == ["s1"]
    bench.kill("s1")
    assert list(brings(bench)) == ["s1"]
    assert bench.brain.coming("1")
    bench.answer_all()
    assert bench.brain.remembered()[0].whole


def test_a_server_without_room_leaves_its_part_to_another_and_if_there_is_none_to_the_store() -> None:
    bench = Bench(2)
    bench.prefetch("1")
    ask = next(ask for ask in bench.asked if ask.server == "s1")
    bench.answer(ask, "no room on s1")
    assert brings(bench)["s1"] == "s0"
    ask = next(ask for ask in bench.asked if ask.part.origin == "s1")
    bench.answer(ask, "no room on s0")
    assert set(brings(bench)) == {"s0"}
    bench.answer_all()
    assert not bench.brain.settling("1")
    assert bench.brain.refusals("1") == ["no room on s1", "no room on s0"]
    assert bench.holders("1", "s0") == ["s0", "s1"]
    assert not bench.brain.remembered()[0].whole


def test_chunks_that_could_not_be_had_are_not_looked_for_in_memory() -> None:
    bench = Bench(1)
    bench.prefetch("1")
    (ask,) = bench.asked
    less = msgspec.structs.replace(ask.part, chunks=ask.part.chunks[1:])
    bench.do(bench.brain.brought("s0", less, "/shm/s0/p"))
    holdings = bench.brain.holdings("1")
    assert holdings is not None
    assert not holdings.find(ask.part.chunks[0].digest, 50)
    assert holdings.find(ask.part.chunks[1].digest, 50)
    assert not bench.brain.remembered()[0].whole
    (memo,) = [done for done, _ in bench.servers["s0"].memos.values()]
    assert not memo.whole, "nor does a coordinator that comes after take it for whole"


def test_what_the_store_does_not_have_is_not_asked_for_again() -> None:
    bench = Bench(3, Options(replicas=0))
    bench.prefetch("1")
    ask = bench.asked.pop(0)
    bench.do(bench.brain.not_stored("1", ask.part.name, ask.server))
    assert ask.part.origin not in brings(bench)
    bench.answer_all()
    assert not bench.brain.coming("1")
    assert not bench.brain.settling("1")
    bench.prefetch("2")
    for ask in list(bench.asked):
        bench.asked.remove(ask)
        bench.do(bench.brain.not_stored("2", ask.part.name, ask.server))
    assert [one.id for one in bench.brain.remembered()] == ["1"], "of which nothing came is not kept"
    bench.do(bench.brain.not_stored("2", part("2", "s0").name, "s0"))  # late


def test_a_save_that_lands_takes_its_place_and_it_takes_that_of_what_is_older() -> None:
    bench = Bench()
    bench.save("1", 0)
    bench.prefetch("3")
    assert [one.id for one in bench.brain.remembered()] == ["3", "1"]
    bench.answer_all()
    assert [one.id for one in bench.brain.remembered()] == ["3"]
    assert bench.freed == [0]
    bench.stage("4", 1, place=2)
    bench.answer_all()
    bench.commit("4")
    assert [one.id for one in bench.brain.remembered()] == ["4"]
    assert {name for server in bench.servers.values() for name in server.has} == {
        part("4", origin).name for origin in bench.servers
    }


def test_an_older_one_stands_behind_what_is_newer() -> None:
    bench = Bench()
    bench.save("5", 0)
    bench.prefetch("3")
    assert [one.id for one in bench.brain.remembered()] == ["5", "3"]
    bench.answer_all()
    assert [one.id for one in bench.brain.remembered()] == ["5"]
    assert {name for server in bench.servers.values() for name in server.has} == {
        part("5", origin).name for origin in bench.servers
    }


def test_staging_that_finds_no_memory_gets_it_and_what_comes_late_is_given_up() -> None:
    bench = Bench()
    bench.prefetch("1")
    bench.answer(bench.asked[0])
    bench.do(bench.brain.make_room())
    assert bench.brain.remembered() == []
    assert not bench.brain.coming("1")
    bench.answer_all()
    assert all(not server.has for server in bench.servers.values())


def test_what_is_restored_from_is_not_given_up() -> None:
    bench = Bench()
    bench.prefetch("1")
    bench.brain.use("1", "t")
    bench.do(bench.brain.make_room())
    bench.answer_all()
    assert bench.brain.remembered()[0].whole


@pytest.mark.parametrize("limit", [192, 2 * 192])
def test_a_limit_of_its_own_counts_copies_too(limit: int) -> None:
    bench = Bench()
    bench.prefetch("1", limit=limit)
    bench.answer_all()
    assert {len(server.has) for server in bench.servers.values()} == {limit // 192}
    assert bench.brain.remembered()[0].whole
    assert bool(bench.brain.refusals("1")) == (limit == 192)


def test_a_damaged_copy_whose_like_is_nowhere_comes_from_the_store_again() -> None:
    bench = Bench(2, Options(replicas=0))
    bench.prefetch("1")
    bench.answer_all()
    name = part("1", "s0").name
    bench.do(bench.brain.bad("s0", name, b"d"))
    assert brings(bench) == {"s0": "s1"}
