"""What the coordinator's machines do is told once, by its end, with how long it took."""

import msgspec
import pytest

from rl_ckpt import metrics
from rl_ckpt.errors import InvalidInputError, StorageError
from rl_ckpt.options import Options
from rl_ckpt.runtime import restore_steps as rm
from rl_ckpt.runtime.observing import Observer
from tests.unit.runtime import restore_bench, save_bench
from tests.unit.test_metrics import Notes


class World:
    """A machine's bench that an observer looks at; every instruction takes a second."""

    def __init__(self, bench):
        self.now, self.bench = 0.0, bench
        self.observer = Observer("run", lambda: self.now)
        carry_out = bench.do

        def do(instructions):
            instructions = list(instructions)
            for instruction in instructions:
                self.observer.see(instruction)
            carry_out(instructions)

        bench.do = do


@pytest.fixture
def notes():
    sink = Notes()
    metrics.add_sink(sink)
    yield sink
    metrics.remove_sink(sink)


def save(bench, world, step):
    bench.join_all(step)
    world.now += 1
    if bench.opens:
        bench.do(bench.machine.opened(bench.opens.pop().token))
    bench.name()
    bench.reserve()


def test_a_save(notes, caplog):
    caplog.set_level("INFO", "rl_ckpt")
    world = World(bench := save_bench.Bench())
    save(bench, world, 7)
    assert notes.counts == {("saves_begun_total",): 1}
    assert notes.gauges == {("saves_queued",): 1}
    bench.stage(7, 0)
    bench.stage(7, 1)
    bench.look_up()
    bench.write_all()
    world.now += 4
    bench.commit()
    assert notes.counts["saves_committed_total",] == 1
    assert notes.observed == {("stall_seconds",): [pytest.approx(0.2)], ("durable_seconds",): [5.0]}
    assert (caplog.records[-1].run, caplog.records[-1].step, caplog.records[-1].attempt) == ("", 7, "1")
    assert notes.counts["bytes_staged_total",] == 4096 + 160
    assert ("bytes_deduplicated_total",) not in notes.counts
    assert notes.gauges["last_committed_step",] == 7
    assert notes.gauges["saves_queued",] == 0


def test_what_ranks_did_before_they_were_heard_of_is_part_of_the_time_to_durable(notes, monkeypatch):
    world = World(bench := save_bench.Bench())
    save(bench, world, 7)
    staged = bench.machine.staged
    monkeypatch.setattr(bench.machine, "staged", lambda message: staged(msgspec.structs.replace(message, stall_s=3.0)))
    bench.stage(7, 0)
    bench.stage(7, 1)
    bench.look_up()
    bench.write_all()
    world.now += 4
    bench.commit()
    assert notes.observed["durable_seconds",] == [7.0], "3 s until all was staged, of which 1 was seen here, and 4"


def test_a_save_that_fails_is_told_once(notes):
    world = World(bench := save_bench.Bench())
    save(bench, world, 7)
    bench.do(bench.machine.failed(bench.named_tokens[0], StorageError("gone")))
    bench.do(bench.machine.named(bench.named_tokens[0], "7-late"))
    assert notes.counts == {("saves_begun_total",): 1, ("saves_failed_total", "storage"): 1}
    assert notes.gauges["saves_queued",] == 0


def test_a_save_that_never_got_a_name_counts_as_begun(notes):
    world = World(bench := save_bench.Bench(Options(memory_tier=False, join_timeout_s=1)))
    bench.join(0, 7)
    bench.do(bench.machine.timed_out(bench.arms[0].token, bench.arms[0].state))
    assert notes.counts == {("saves_begun_total",): 1, ("saves_failed_total", "save_timeout"): 1}
    assert not world.observer._saves


def test_preparing_is_no_save(notes):
    world = World(save_bench.Bench())
    for rank in range(2):
        message = msgspec.structs.replace(save_bench.join(rank, 7), prepare=True)
        world.bench.do(world.bench.machine.join(message))
    assert world.bench.arms, "its ranks were timed, as a save's are"
    assert notes.counts == notes.gauges == {}


def test_a_restore_by_phases(notes):
    world = World(bench := restore_bench.Bench())
    bench.open(0)
    bench.open(1)
    world.now += 1
    bench.load()
    world.now += 2
    bench.match(0)
    bench.match(1)
    world.now += 3
    bench.fetch_all()
    world.now += 1
    bench.verify(0)
    bench.verify(1)
    world.now += 8
    bench.applied(0)
    assert ("restore_seconds", "total") not in notes.observed, "rank 1 still sets its state"
    bench.applied(1)
    assert {key[1]: value for key, value in notes.observed.items()} == {
        "find": [1.0],
        "match": [2.0],
        "read": [4.0],
        "set": [8.0],
        "total": [15.0],
    }
    assert notes.counts["restores_total", "ok"] == 1
    assert not world.observer._restores


def test_a_restore_that_fails_and_is_tried_again(notes):
    world = World(bench := restore_bench.Bench())
    bench.open(0)
    bench.lost(1, InvalidInputError("no"))
    assert notes.counts == {("restores_total", "invalid_input"): 1}
    bench.to_over()
    assert notes.counts["restores_total", "ok"] == 1
    assert world.observer._restores["r"].phase == "set"


def test_a_restore_that_waits_for_a_prefetch_reads(notes):
    world = World(bench := restore_bench.Bench())
    bench.to_matching()
    world.now += 2
    world.observer.see(rm.Await(bench.token(0, "r"), "2-new"))
    assert notes.observed["restore_seconds", "match"] == [2.0]
    assert world.observer._restores["r"].phase == "read"


def test_of_what_never_ends_little_is_kept():
    observer = Observer("run", lambda: 0.0)
    for i in range(1000):
        observer.see(rm.Arm(f"r{i}#1", rm.OPENING, 1.0))
    assert len(observer._restores) == 256


def test_gauges(notes, monkeypatch):
    monkeypatch.setattr("rl_ckpt.runtime.observing.time.time", lambda: 1000.0)
    observer = Observer("run")
    observer.gauges({"copies_held": 3, "copies_missing": 1})
    assert notes.gauges == {("memory_tier_replicas",): 3, ("memory_tier_missing_replicas",): 1}
