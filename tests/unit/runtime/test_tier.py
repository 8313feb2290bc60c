"""The memory tier's brain, without Ray: where copies go, when memory is given up, what a restart finds."""

from __future__ import annotations

import pytest

from rl_ckpt.options import Options
from rl_ckpt.runtime import tier_steps as tier
from tests.unit.runtime.tier_bench import Bench, part


def test_each_part_is_copied_to_another_node_and_each_node_gets_one() -> None:
    bench = Bench()
    bench.stage("1", 0)
    copies = {ask.part.origin: ask.server for ask in bench.asked if isinstance(ask, tier.Copy)}
    assert copies == {"s0": "s1", "s1": "s2", "s2": "s0"}
    assert bench.landed == []
    bench.answer_all()
    assert bench.landed == ["1"]
    assert bench.brain.counts() == {"parts_held": 6, "bytes_held": 6 * 192, "copies_held": 3, "copies_missing": 0}


def test_copies_go_to_the_servers_with_the_least_bytes() -> None:
    bench = Bench(4)
    bench.stage("1", 0, {"s0": 1000, "s1": 10, "s2": 500})
    copies = {ask.part.origin: ask.server for ask in bench.asked if isinstance(ask, tier.Copy)}
    assert copies == {"s0": "s1", "s1": "s2", "s2": "s0"}, "s3 has no server yet: those that run come first"
    bench = Bench(3)
    bench.stage("1", 0, {"s0": 10, "s1": 1000, "s2": 10})
    copies = {ask.part.origin: ask.server for ask in bench.asked if isinstance(ask, tier.Copy)}
    assert copies["s0"] == "s2", "the next in the ring is full"


def test_a_node_without_ranks_takes_copies_where_all_ranks_are_on_one() -> None:
    bench = Bench()
    bench.save("1", 0, {"s1": 192})
    assert bench.holders("1", "s1") == ["s1", "s2"]
    assert bench.landed == ["1"]


@pytest.mark.parametrize(("replicas", "nodes", "copies"), [(0, 3, 1), (1, 1, 1), (1, 3, 2), (2, 3, 3), (5, 3, 3)])
def test_there_are_as_many_copies_as_wanted_and_nodes_allow(replicas: int, nodes: int, copies: int) -> None:
    bench = Bench(nodes, Options(replicas=replicas))
    bench.save("1", 0)
    assert {len(bench.holders("1", origin)) for origin in bench.servers} == {copies}
    assert bench.landed == ["1"]


def test_what_is_older_is_given_up_once_the_newer_is_committed_and_has_landed() -> None:
    bench = Bench()
    bench.save("1", 0)
    bench.stage("2", 1)
    bench.commit("2")
    assert bench.freed == [], "the only checkpoint that memory has whole"
    bench.answer_all()
    assert bench.freed == [0]
    assert {name for server in bench.servers.values() for name in server.has} == {
        part("2", origin).name for origin in bench.servers
    }
    bench.stage("3", 2)
    bench.answer_all()
    assert bench.freed == [0], "landed, and no checkpoint yet"
    bench.commit("3")
    assert bench.freed == [0, 1]


def test_a_save_that_failed_is_given_up_and_its_generation_not_given_back_again() -> None:
    bench = Bench()
    bench.save("1", 0)
    bench.stage("2", 1)
    late = bench.asked[-1]
    for ask in bench.asked[:-1]:
        bench.answer(ask)
    bench.do(bench.brain.aborted("2"))
    bench.answer(late)
    assert bench.freed == []
    assert [one.id for one in bench.brain.remembered()] == ["1"]
    assert {name for server in bench.servers.values() for name in server.has} == {
        part("1", origin).name for origin in bench.servers
    }


def test_after_the_loss_of_a_node_all_parts_are_there_and_are_copied_again() -> None:
    bench = Bench()
    bench.save("1", 0)
    bench.kill("s1")
    assert bench.brain.remembered()[0].whole
    assert {origin: len(bench.holders("1", origin)) for origin in ("s0", "s1", "s2")} == {"s0": 1, "s1": 1, "s2": 2}
    bench.answer_all()
    assert all(bench.holders("1", origin) == ["s0", "s2"] for origin in ("s0", "s1", "s2"))
    holdings = bench.brain.holdings("1")
    assert holdings is not None
    chunk = part("1", "s1").chunks[0]
    assert {(held.server, held.offset) for held in holdings.find(chunk.digest, 50)} == {("s0", 0), ("s2", 0)}
    assert holdings.find(chunk.digest, 51) == []


def test_what_two_nodes_had_and_both_are_lost_is_said_not_to_be_whole() -> None:
    bench = Bench()
    bench.save("1", 0)
    del bench.servers["s1"]
    bench.kill("s0")  # both at once
    assert not bench.brain.remembered()[0].whole


def test_a_copy_that_fails_is_made_elsewhere_and_if_nowhere_it_is_said() -> None:
    bench = Bench(3)
    bench.stage("1", 0, {"s0": 192})
    bench.answer(bench.asked[0])
    bench.answer(bench.asked[0], "no room")
    assert bench.landed == []
    assert [ask.server for ask in bench.asked] == ["s2"]
    bench.answer(bench.asked[0], "no room here either")
    assert bench.stuck == {"1": "what s0 staged is on 1 of 2 nodes: no room; no room here either"}
    bench.commit("1")
    assert bench.freed == [], "what there is stays"
    assert bench.brain.remembered()[0].whole


def test_a_newer_one_that_cant_land_replaces_the_older_all_the_same() -> None:
    bench = Bench(2)
    bench.save("1", 0)
    bench.stage("2", 1)
    while bench.asked:
        bench.answer(bench.asked[0], "no room" if isinstance(bench.asked[0], tier.Copy) else "")
    bench.commit("2")
    assert bench.freed == [0]


def test_the_budget_counts_own_parts_and_copies() -> None:
    bench = Bench(3, Options(memory_bytes=300))
    bench.save("1", 0)
    assert all(len(server.has) == 1 for server in bench.servers.values())
    assert "memory_bytes=300 does not allow 192 bytes more on s1, which has 192" in bench.stuck["1"]
    assert bench.brain.remembered()[0].whole
    bench = Bench(3, Options(memory_bytes=100))
    bench.save("1", 0)
    assert bench.freed == [0], "nothing is held: nothing keeps the memory"
    assert bench.brain.remembered() == []
    bench = Bench(3, Options(memory_bytes=2 * 192))
    bench.save("1", 0)
    assert bench.landed == ["1"]


def test_a_draining_node_gets_no_copies_and_what_it_has_is_copied_away() -> None:
    bench = Bench()
    bench.draining = {"s1"}
    bench.look()
    bench.save("1", 0)
    assert bench.holders("1", "s0") == ["s0", "s2"]
    assert bench.holders("1", "s1") == ["s0", "s1", "s2"]
    assert bench.landed == ["1"]
    bench.draining = {"s1", "s0"}
    bench.look()
    assert bench.asked == [], "one node stays, and has all"
    bench = Bench(2)
    bench.draining = {"s0", "s1"}
    bench.look()
    bench.stage("1", 0)
    bench.answer_all()
    assert "1" in bench.stuck, "nowhere to put it"


def test_memory_in_use_is_not_given_up_before_the_restore_is_over() -> None:
    bench = Bench()
    bench.save("1", 0)
    bench.brain.use("1", "restore-1")
    bench.save("2", 1)
    assert bench.freed == []
    assert bench.brain.make_room() != [], "the newer one may go"
    assert bench.brain.holdings("1") is not None
    bench.do(bench.brain.done("restore-1"))
    bench.do(bench.brain.make_room())
    assert bench.brain.holdings("1") is None


def test_room_is_made_of_checkpoints_alone() -> None:
    bench = Bench()
    bench.save("1", 0)
    bench.stage("2", 1)
    bench.do(bench.brain.make_room())
    assert bench.freed == [0]
    bench.answer_all()
    assert bench.landed == ["1", "2"]


def test_a_damaged_copy_is_given_up_and_made_on_another_node() -> None:
    bench = Bench()
    bench.save("1", 0)
    name = part("1", "s0").name
    bench.do(bench.brain.bad("s1", name, b"d"))
    assert name not in bench.servers["s1"].has
    bench.answer_all()
    assert bench.holders("1", "s0") == ["s0", "s2"]
    assert bench.brain.bad("s1", name, b"d") == [], "told twice"


def test_a_damaged_copy_stays_for_as_long_as_somebody_reads_it() -> None:
    bench = Bench()
    bench.save("1", 0)
    name = part("1", "s0").name
    for token in ("one", "other"):
        bench.brain.use("1", token)
    bench.do(bench.brain.bad("s1", name, b"d"))
    holdings = bench.brain.holdings("1")
    assert holdings is not None
    assert [held.server for held in holdings.find(b"as0-1", 50)] == ["s0"], "nobody else begins to read it"
    bench.answer_all()
    assert bench.holders("1", "s0") == ["s0", "s1", "s2"], "made anew beside it"
    bench.do(bench.brain.done("one"))
    assert name in bench.servers["s1"].has
    bench.do(bench.brain.done("other"))
    assert bench.holders("1", "s0") == ["s0", "s2"]
    bench.do(bench.brain.done("other"))
    assert bench.brain.counts()["copies_missing"] == 0


def test_a_damaged_copy_goes_with_its_checkpoint() -> None:
    bench = Bench()
    bench.save("1", 0)
    bench.brain.use("1", "reads")
    bench.do(bench.brain.bad("s1", part("1", "s0").name, b"d"))
    bench.save("2", 1)
    bench.do(bench.brain.done("reads"))
    assert {name for server in bench.servers.values() for name in server.has} == {
        part("2", origin).name for origin in bench.servers
    }


def test_what_an_urgent_save_left_in_memory_is_newer_than_the_commit_of_the_save_before_it() -> None:
    bench = Bench()
    for checkpoint, generation in (("1", 0), ("2", 1)):
        bench.stage(checkpoint, generation, place=int(checkpoint))
        bench.answer_all()
    bench.commit("2", number=0, in_store=False)
    bench.commit("1", number=1)
    assert [(one.id, one.after, one.record is None) for one in bench.brain.remembered()] == [("2", 1, True)]
    assert {done.after for server in bench.servers.values() for done, _ in server.memos.values() if done.id == "2"} == {
        1
    }
    assert bench.freed == [0], "the older one's"


def test_of_each_part_one_holder_is_named_the_origin_if_it_can_be() -> None:
    bench = Bench()
    bench.save("1", 0)
    assert bench.brain.holders("1") == {name: (name, f"/shm/{name}/g") for name in ("s0", "s1", "s2")}
    bench.do(bench.brain.bad("s1", part("1", "s1").name, b"d"))
    assert bench.brain.holders("1")["s1"] == ("s2", f"/shm/s2/{part('1', 's1').name}")


def test_copies_of_what_a_lost_server_staged_are_known() -> None:
    bench = Bench()
    bench.stage("1", 0)
    assert bench.brain.copies("s0") == {}, "not complete"
    bench.answer_all()
    assert bench.brain.copies("s0") == {"1": ("s1", f"/shm/s1/{part('1', 's0').name}")}


def found(bench: Bench) -> dict[str, tier.Found]:
    return {
        name: tier.Found([(one, f"/shm/{name}/{one.name}") for one in server.has.values()], list(server.memos.values()))
        for name, server in bench.servers.items()
    }


def test_another_coordinator_takes_up_the_newest_whole_checkpoint() -> None:
    old = Bench()
    old.save("1", 0)
    old.stage("2", 1)
    old.commit("2")
    for ask in [ask for ask in old.asked if isinstance(ask, tier.Hold)][:2]:
        old.answer(ask)
    new = Bench()
    new.servers = old.servers
    new.do(new.brain.adopt(found(old)))
    assert [one.id for one in new.brain.remembered()] == ["1"]
    assert {name for server in new.servers.values() for name in server.has} == {
        part("1", origin).name for origin in new.servers
    }
    assert new.landed == ["1"]
    new.save("3", 0)
    assert new.freed == [], "its memory was no generation of this coordinator's"
    assert [one.id for one in new.brain.remembered()] == ["3"]
    assert {name for server in new.servers.values() for name in server.has} == {
        part("3", origin).name for origin in new.servers
    }


def test_what_is_only_in_memory_is_newer_than_the_commit_it_came_after() -> None:
    old = Bench()
    old.save("1", 0)
    old.stage("2", 1)
    old.brain.use("1", "so that both are there")
    old.answer_all()
    old.commit("2", number=1, in_store=False)
    new = Bench()
    new.servers = old.servers
    new.do(new.brain.adopt(found(old)))
    assert [(one.id, one.record) for one in new.brain.remembered()] == [("2", None)]


def test_a_restart_with_a_node_lost_takes_up_what_is_whole_and_copies_it_again() -> None:
    old = Bench()
    old.save("1", 0)
    del old.servers["s2"]
    new = Bench(2)
    new.servers = old.servers
    new.do(new.brain.adopt(found(old)))
    new.answer_all()
    assert all(new.holders("1", origin) == ["s0", "s1"] for origin in ("s0", "s1", "s2"))
    assert new.landed == ["1"]


def test_what_only_memory_has_makes_no_room() -> None:
    bench = Bench(2)
    bench.save("1", 0)
    bench.stage("2", 1)
    bench.answer_all()
    bench.commit("2", number=1, in_store=False)
    assert [one.id for one in bench.brain.remembered()] == ["2"]
    bench.do(bench.brain.make_room())
    assert [one.id for one in bench.brain.remembered()] == ["2"]
    bench.do(bench.brain.forget())
    assert bench.freed == [0, 1]
    assert not bench.brain.busy()


def test_a_tier_that_is_switched_off_keeps_what_only_it_has_until_the_next_commit() -> None:
    bench = Bench(2)
    bench.stage("1", 0)
    bench.answer_all()
    bench.commit("1", number=0, in_store=False)
    bench.stage("2", 1)
    bench.answer_all()
    bench.brain.options = Options(memory_tier=False)
    bench.do(bench.brain.make_room())
    assert [one.id for one in bench.brain.remembered()] == ["1"]
    bench.commit("2")
    assert bench.freed == [0, 1]
    assert not any(server.has for server in bench.servers.values())
    bench.commit("3")  # which it does not hold
    assert not bench.brain.busy()


def test_what_nobody_knows_of_is_given_up_and_nothing_else() -> None:
    bench = Bench(3)
    bench.stage("2", 0, {"s0": 192})
    bench.answer(bench.asked[0])  # the origin has it; a copy is being made
    (copying,) = bench.asked
    third = ({"s0", "s1", "s2"} - {"s0", copying.server}).pop()
    mine, old = part("2", "s0"), part("1", "s0")
    found = {name: tier.Found([(old, "/shm/old"), (mine, "/shm/x")], []) for name in bench.servers}
    told = bench.brain.unknown(found)
    assert told == [
        tier.Release(name, one) for name in sorted(bench.servers) for one in [old.name, *[mine.name] * (name == third)]
    ]
