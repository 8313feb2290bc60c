"""Saves and the memory tier, without Ray: what stays in memory, what is urgent, and whose the generations are."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from rl_ckpt.errors import StorageError, WorkerFailuresError
from rl_ckpt.options import Options
from rl_ckpt.plan.parts import memory_entries, plan_of_memory
from rl_ckpt.runtime import save_steps as sm
from rl_ckpt.runtime.messages import Failure, Restages, SaveDone
from rl_ckpt.store.committer import SaveRequest
from tests.unit.plan.model import manifest_of
from tests.unit.runtime.save_bench import Bench, join

NO_MEMORY = StorageError("1000 bytes of staging memory don't fit")


def tiered(**options: object) -> Bench:
    return Bench(Options(**options))  # type: ignore[arg-type]


def to_landing(bench: Bench, step: int) -> None:
    """All is staged; the committer was not asked what is stored, as nothing is to be written."""
    bench.join_all(step)
    bench.name()
    bench.reserve()
    for rank in range(2):
        bench.stage(step, rank)
    bench.reserve()


def urgent(bench: Bench, step: int, deadline_s: float = 5.0) -> None:
    for rank in range(2):
        bench.do(bench.machine.join(msgspec.structs.replace(join(rank, step), deadline_s=deadline_s)))
    bench.name()
    bench.reserve()
    bench.look_up()
    for rank in range(2):
        bench.stage(step, rank)
    bench.reserve()


def test_the_tier_holds_what_is_staged_and_its_generation_is_not_used_until_it_gives_it_back() -> None:
    bench = tiered()
    bench.to_writing(0)
    assert [generation for _, generation in bench.holds] == [0]
    bench.write_all()
    bench.commit()
    bench.to_writing(1)
    bench.to_writing(2)
    memory = [bench.orders(step, 0).memory for step in (0, 1, 2)]
    assert len(set(memory)) == 3
    bench.join_all(3)
    assert bench.machine.states()["save-3"] == sm.WAITING
    bench.write_all()
    bench.commit()  # of 1: the tier gives back what 0 had
    bench.name()
    assert bench.orders(3, 0).memory == memory[0]


def test_two_saves_are_under_way_at_most_with_a_third_generation_too() -> None:
    bench = tiered(when_busy="skip")
    bench.to_writing(0)
    bench.to_writing(1)
    bench.join_all(2)
    assert bench.failure(2, 0).code == "save_skipped"


def test_a_third_save_is_skipped_while_the_third_generation_is_being_made() -> None:
    bench = tiered(when_busy="skip")
    bench.to_staging(0)
    for rank in range(2):
        bench.stage(0, rank)
    making = [ask for ask in bench.reserves if ask.generation == 2]
    bench.reserves = [ask for ask in bench.reserves if ask.generation == 1]
    bench.reserve()
    bench.to_staging(1)
    assert making
    bench.join_all(2)
    assert bench.failure(2, 0).code == "save_skipped"


def test_without_the_tier_nothing_is_held() -> None:
    bench = tiered(memory_tier=False)
    for step in range(3):
        bench.save(step)
    assert bench.holds == []


def test_of_three_saves_the_first_goes_to_the_store() -> None:
    bench = tiered(persist_every=3)
    for step in range(7):
        if step % 3 == 0:
            bench.save(step)
            continue
        to_landing(bench, step)
        assert bench.machine.states() == {f"save-{step}": sm.LANDING}
        assert not bench.look_ups
        bench.copied(step)
        bench.land()
    assert bench.committed == [0, 3, 6]
    assert bench.landed == [1, 2, 4, 5]
    assert not bench.machine.busy()
    assert [done.in_store for done in bench.finished.values() if isinstance(done, SaveDone)] == [
        step % 3 == 0 for step in range(7)
    ]


def test_what_cant_land_is_written_and_so_is_what_hangs_on_its_way() -> None:
    bench = tiered(persist_every=10)
    bench.save(0)
    to_landing(bench, 1)
    bench.copied(1, well=False)
    assert bench.machine.states() == {"save-1": sm.SETTLING}
    bench.look_up()
    bench.write_all()
    bench.commit()
    to_landing(bench, 2)
    bench.time_out(sm.LANDING)
    bench.look_up()
    bench.write_all()
    bench.commit()
    assert bench.committed == [0, 1, 2]


def test_the_save_after_one_that_failed_goes_to_the_store() -> None:
    bench = tiered(persist_every=3)
    bench.to_writing(0)
    bench.fail(bench.writes[0], StorageError("the store is gone"))
    bench.writes.clear()
    bench.save(1)
    assert bench.committed == [1]


def test_a_tagged_save_goes_to_the_store() -> None:
    bench = tiered(persist_every=5)
    bench.save(0)
    for rank in range(2):
        bench.do(bench.machine.join(msgspec.structs.replace(join(rank, 1), tag="best")))
    bench.name()
    assert len(bench.look_ups) == 1


def test_memory_alone_keeps_the_order_of_the_saves_too() -> None:
    bench = tiered(persist_every=2)
    bench.to_writing(0)
    to_landing(bench, 1)
    bench.copied(1)
    assert bench.lands == [], "the one before it is still being written"
    bench.write_all()
    bench.commit()
    bench.land()
    assert (bench.committed, bench.landed) == ([0], [1])


def test_a_rank_lost_while_it_lands_loses_nothing() -> None:
    bench = tiered(persist_every=2)
    bench.save(0)
    to_landing(bench, 1)
    bench.lost(0, 1, StorageError("gone"))
    bench.copied(1)
    bench.land()
    assert bench.landed == [1]


class TestFlush:
    """What is only in memory goes to the store, under its id."""

    def flush(self, bench: Bench, key: str = "flush-1") -> str:
        """Of step 1, whose second part is with another server by now."""
        save = self.save
        manifest = manifest_of(save.plan.merged, *memory_entries(save.plan, save.found))
        held = {"server-0.x": ("server-0", "/shm/0"), "server-1.x": ("server-7", "/shm/copy")}
        plan = plan_of_memory(manifest, 4, 1 << 20, ".x")
        assert bench.finished.pop(save.checkpoint)
        bench.do(bench.machine.flush(key, save.checkpoint, SaveRequest(1), plan, held))
        return save.checkpoint

    @pytest.fixture
    def bench(self) -> Bench:
        bench = tiered(persist_every=3)
        bench.save(0)
        to_landing(bench, 1)
        bench.copied(1)
        self.save: Any = bench.lands[0].save
        bench.land()
        assert not bench.machine.busy()
        return bench

    def test_it_is_written_from_where_its_parts_are_and_committed(self, bench: Bench) -> None:
        checkpoint = self.flush(bench)
        assert bench.writes == []
        bench.look_up()
        assert [(w.lane, w.server, w.order.memory) for w in bench.writes] == [
            ("server-0.x", "server-0", "/shm/0"),
            ("server-1.x", "server-7", "/shm/copy"),
        ]
        assert bench.reserves == [], "nothing is staged any more"
        bench.write_all()
        asked = bench.commits[0].save.done()
        assert asked.checkpoint == checkpoint
        assert asked.digests == {(f"{server}.x", at): found for (server, at), found in self.save.found.items()}
        bench.commit()
        assert bench.committed == [0, 1]
        assert not bench.machine.busy()
        assert bench.machine.restages("flush-1") == Restages(checkpoint, False)

    def test_a_node_lost_meanwhile_ends_it(self, bench: Bench) -> None:
        checkpoint = self.flush(bench)
        bench.look_up()
        bench.do(bench.machine.server_lost("server-7", {checkpoint: ("server-0", "/shm/other")}))
        end = bench.machine.restages("flush-1")
        assert isinstance(end, Failure)
        assert isinstance(end.error(), WorkerFailuresError), "it is tried again then"

    def test_where_it_fails_it_says_so_and_may_be_tried_again(self, bench: Bench) -> None:
        self.flush(bench)
        bench.look_up()
        bench.fail(bench.writes[0], StorageError("the store is away"))
        end = bench.machine.restages("flush-1")
        assert isinstance(end, Failure)
        assert "the store is away" in end.message
        bench.writes.clear()
        self.flush(bench)
        bench.look_up()
        bench.write_all()
        bench.commit()
        assert bench.committed == [0, 1]


class TestUrgent:
    def test_it_lands_first_and_then_goes_to_the_store(self) -> None:
        bench = tiered()
        urgent(bench, 0)
        assert bench.machine.states() == {"save-0": sm.LANDING}
        assert bench.writes == []
        bench.copied(0)
        bench.write_all()
        bench.commit()
        assert bench.committed == [0]
        bench.time_out(sm.DEADLINE)
        assert not bench.machine.busy()

    def test_at_the_deadline_what_has_landed_is_in_memory(self) -> None:
        bench = tiered()
        bench.to_writing(0)  # slow, and before it in the line
        urgent(bench, 1)
        bench.copied(1)
        bench.time_out(sm.DEADLINE)
        bench.land()
        assert bench.landed == [1]
        bench.write_all()
        bench.commit()
        assert bench.committed == [0]
        assert not bench.machine.busy()

    @pytest.mark.parametrize("staged", [False, True])
    def test_at_the_deadline_what_has_not_landed_is_given_up(self, staged: bool) -> None:
        bench = tiered()
        if staged:
            urgent(bench, 0)
            bench.copied(0, well=False)
            assert bench.machine.states() == {"save-0": sm.WRITING}
        else:
            bench.do(bench.machine.join(msgspec.structs.replace(join(0, 0), deadline_s=5.0)))
        bench.time_out(sm.DEADLINE)
        outcome = bench.finished.popitem()[1] if staged else bench.failure(0, 0)
        assert isinstance(outcome, Failure)
        assert outcome.code == "save_timeout"
        assert "5.0 s were over before" in outcome.message
        assert bench.holds == []
        bench.writes.clear()
        bench.arms.clear()
        bench.save(1)

    @pytest.mark.parametrize("what", ["looking up", "looking up before it landed", "writing"])
    def test_a_store_that_fails_does_not_end_what_has_landed(self, what: str) -> None:
        bench, error = tiered(), StorageError("the store is away")
        for rank in range(2):
            bench.do(bench.machine.join(msgspec.structs.replace(join(rank, 0), deadline_s=5.0)))
        bench.name()
        bench.reserve()
        if what == "writing":
            bench.look_up()
        for rank in range(2):
            bench.stage(0, rank)
        bench.reserve()
        if what == "looking up before it landed":
            bench.do(bench.machine.not_looked_up(bench.look_ups.pop().token, error))
        bench.copied(0)
        if what == "looking up":
            bench.do(bench.machine.not_looked_up(bench.look_ups.pop().token, error))
        if what == "writing":
            bench.fail(bench.writes[0], error)
            bench.writes.clear()
        bench.land()
        (done,) = bench.finished.values()
        assert isinstance(done, SaveDone)
        assert not done.in_store
        assert not bench.machine.busy()

    def test_a_store_that_fails_ends_what_can_not_land_either(self) -> None:
        bench, error = tiered(), StorageError("the store is away")
        for rank in range(2):
            bench.do(bench.machine.join(msgspec.structs.replace(join(rank, 0), deadline_s=5.0)))
        bench.name()
        bench.reserve()
        for rank in range(2):
            bench.stage(0, rank)
        bench.reserve()
        bench.do(bench.machine.not_looked_up(bench.look_ups.pop().token, error))
        bench.copied(0, well=False)
        assert bench.machine.states() == {"save-0": sm.SETTLING}
        bench.do(bench.machine.not_looked_up(bench.look_ups.pop().token, error))
        (end,) = bench.finished.values()
        assert isinstance(end, Failure)

    def test_a_commit_under_way_at_the_deadline_is_waited_for(self) -> None:
        bench = tiered()
        urgent(bench, 0)
        bench.copied(0)
        bench.write_all()
        bench.time_out(sm.DEADLINE)
        assert bench.lands == []
        bench.commit()
        assert bench.committed == [0]

    def test_without_the_tier_it_is_written_at_once(self) -> None:
        bench = tiered(memory_tier=False)
        urgent(bench, 0)
        assert bench.machine.states() == {"save-0": sm.WRITING}


class TestNoMemoryToStageInto:
    def starved(self) -> Bench:
        """The tier holds step 0; step 1 is written; step 2 finds no memory for the third generation."""
        bench = tiered()
        bench.join_all(0)
        bench.name()
        bench.reserve()
        bench.look_up()
        for rank in range(2):
            bench.stage(0, rank)
        for ask in [ask for ask in bench.reserves if ask.generation == 2]:
            bench.fail(ask, NO_MEMORY)
        bench.reserve()
        bench.write_all()
        bench.commit()
        bench.join_all(1)
        bench.name()
        bench.look_up()
        for rank in range(2):
            bench.stage(1, rank)
        for ask in list(bench.reserves):
            bench.fail(ask, NO_MEMORY)
        bench.join_all(2)
        bench.name()
        assert {ask.generation for ask in bench.reserves} == {2}
        bench.fail(bench.reserves[0], NO_MEMORY)
        return bench

    def test_what_the_tier_holds_is_used(self) -> None:
        bench = self.starved()
        assert len(bench.rooms) == 1
        name, generation = bench.holds.pop(0)
        assert name.startswith("0-")
        bench.do(bench.machine.freed(generation))
        bench.reserves.clear()
        bench.look_up()
        for rank in range(2):
            bench.stage(2, rank)
        bench.write_all()
        bench.commit()
        bench.commit()
        assert bench.committed == [0, 1, 2]

    def test_where_it_holds_nothing_the_save_fails_and_the_next_may_work(self) -> None:
        bench = self.starved()
        bench.do(bench.machine.failed(bench.rooms[0].token, bench.rooms[0].error))
        assert "don't fit" in bench.failure(2, 0).message
        bench.reserves.clear()
        bench.write_all()
        bench.commit()
        bench.save(3)
        assert bench.committed == [0, 1, 3]
