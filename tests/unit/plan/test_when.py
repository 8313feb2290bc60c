"""When to save: the rules, what a policy remembers, and the interval that `Auto` chooses."""

import math
import random
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl_ckpt.errors import InvalidInputError, StorageError
from rl_ckpt.info import CheckpointInfo, Preemption
from rl_ckpt.plan.interval import interval
from rl_ckpt.plan.save_rules import Auto, Best, EverySeconds, EverySteps, OnPreemption, OnSignal
from rl_ckpt.plan.when import SavePolicy

T = TypeVar("T")


class Clock:
    """Stands still until it is told to go."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Save:
    """A save under way, as `PendingSave`."""

    def __init__(self):
        self.outcome = None

    def peek(self):
        return self.outcome


def surely(found: T | None) -> T:
    assert found is not None
    return found


def info(step, stall_s=None, durable_s=None):
    return CheckpointInfo(
        step, f"{step}-a", "", 0, 0, 0.0, {}, None, (), 1, stall_s=stall_s, durable_s=durable_s
    )  # fmt: skip


def saved_steps(policy, steps, metrics=None):
    """The steps at which a loop saves that does what it is told."""
    out = []
    for step in steps:
        due = policy.due(step, {} if metrics is None else metrics(step))
        if due is not None:
            policy.began(due)
            out.append(step)
    return out


# --- rules ---


def test_every_steps_is_at_multiples():
    assert saved_steps(SavePolicy(EverySteps(3)), range(10)) == [3, 6, 9]
    assert saved_steps(SavePolicy(EverySteps(3)), range(1, 10)) == [3, 6, 9]
    assert saved_steps(SavePolicy(EverySteps(1)), range(1, 4)) == [1, 2, 3]
    assert saved_steps(SavePolicy(EverySteps(100)), range(5034, 5301)) == [5100, 5200, 5300], "resumed"
    assert saved_steps(SavePolicy(EverySteps(1000)), range(0, 5000, 512)) == [1024, 2048, 3072, 4096], "steps that jump"


def test_a_save_for_another_reason_does_not_move_the_multiples():
    values = {4: 1.0, 7: 2.0}
    policy = SavePolicy(EverySteps(5), Best("r"))
    assert saved_steps(policy, range(1, 11), lambda step: {"r": values.get(step, 0.0)}) == [1, 4, 5, 7, 10]


def test_after_going_back_the_steps_are_counted_from_there():
    policy = SavePolicy(EverySteps(5))
    assert saved_steps(policy, range(1, 12)) == [5, 10]
    policy.restored(5)
    assert saved_steps(policy, range(6, 12)) == [10]
    assert saved_steps(policy, range(2, 7)) == [5], "it was not told"


def test_what_was_not_saved_is_due_again():
    clock = Clock()
    policy = SavePolicy(EverySteps(5), EverySeconds(10), Best("r"), clock=clock)
    clock.now += 10
    first = surely(policy.due(5, {"r": 1.0}))
    assert len(first.reasons) == 3
    assert policy.due(5, {"r": 1.0}) == first
    assert len(surely(policy.due(6, {"r": 1.0})).reasons) == 3, "and at the next step"
    policy.began(surely(policy.due(6, {"r": 1.0})))
    assert policy.due(6, {"r": 1.0}) is None
    assert policy.due(7, {"r": 1.0}) is None


def test_a_loop_that_waits_for_its_saves_only_says_what_came_of_them():
    clock = Clock()
    policy = SavePolicy(EverySteps(5), EverySeconds(100), Best("r"), clock=clock)
    assert policy.due(5, {"r": 1.0}) is not None
    policy.saved(info(5))
    assert policy.due(5, {"r": 1.0}) is None
    clock.now += 99
    assert policy.due(6, {"r": 1.0}) is None
    clock.now += 1
    assert surely(policy.due(6, {"r": 1.0})).reasons == ("100 s since the last save: every 100 s",)


def test_seconds_count_from_the_begin_of_the_last_save():
    clock, seen = Clock(), []
    policy = SavePolicy(EverySeconds(60), clock=clock)
    for step in range(1, 300):
        clock.now += 1
        due = policy.due(step)
        if due is not None:
            seen.append(step)
            clock.now += 7  # the save itself
            policy.began(due)
    assert seen == [60, 113, 166, 219, 272]


@given(jump=st.floats(-1e9, 1e9), at=st.integers(1, 200))
def test_a_clock_that_jumps_makes_no_storm_and_no_silence(jump, at):
    clock, seen = Clock(), []
    policy = SavePolicy(EverySeconds(60), Auto(min_s=60, max_s=60), clock=clock)
    for step in range(1, 300):
        clock.now += 1 + (jump if step == at else 0)
        if (due := policy.due(step)) is not None:
            policy.began(due)
            seen.append(step)
    gaps = [b - a for a, b in zip([0, *seen], [*seen, 300], strict=True)]
    assert max(gaps) <= 62
    early = [gap for gap in gaps[:-1] if gap < 60]
    assert len(early) <= (jump > 0), "one save too early where it jumped forward"


def test_the_best_is_a_finite_number():
    policy = SavePolicy(Best("r"))
    values = [math.nan, 3.0, 2.0, math.inf, True, "9", None, np.float32(4.0), np.array(5.0), np.array([6.0]), 5.0, 5.5]
    steps = saved_steps(policy, range(len(values)), lambda step: {"r": values[step]})
    assert [values[step] for step in steps] == [3.0, 4.0, 5.0, 5.5]
    assert saved_steps(SavePolicy(Best("r", "min")), range(4), lambda step: {"r": [3, -1, 0, -2][step]}) == [0, 1, 3]
    assert saved_steps(SavePolicy(Best("r")), range(4), lambda step: {"other": step}) == []


def test_what_failed_to_be_saved_is_not_the_best():
    policy, save = SavePolicy(Best("r")), Save()
    policy.began(surely(policy.due(1, {"r": 1.0})))
    policy.began(surely(policy.due(2, {"r": 9.0})), save)
    assert policy.due(3, {"r": 5.0}) is None, "still under way"
    save.outcome = StorageError("full")
    assert surely(policy.due(4, {"r": 5.0})).reasons == ("r 5 is the best so far (before: 1)",)


def test_scalars_of_any_library_count():
    values = [torch.tensor(1.0), torch.tensor([5.0]), jnp.float32(2.0), torch.tensor(math.nan), torch.tensor(True)]
    assert saved_steps(SavePolicy(Best("r")), range(5), lambda step: {"r": values[step]}) == [0, 2]


def test_an_urgent_save_that_failed_is_due_again_while_there_is_time():
    notice = Preemption("node a is drained", 1e12, this_process=False, nodes=("a",))
    policy, save = SavePolicy(OnPreemption(lambda: notice)), Save()
    policy.began(surely(policy.due(1)), save)
    assert policy.due(1) is None
    save.outcome = StorageError("503")
    again = surely(policy.due(2))
    assert again.urgent
    policy.began(again, Save())
    assert policy.due(3) is None


def test_auto_does_not_begin_a_second_save_before_the_first_is_measured():
    clock, save = Clock(), Save()
    policy = SavePolicy(Auto(min_s=10), clock=clock)
    clock.now += 10
    policy.began(surely(policy.due(1)), save)
    clock.now += 60
    assert policy.due(2) is None, "it would wait for the first, or be skipped"
    save.outcome = info(1, stall_s=1e-9, durable_s=1.0)
    assert policy.due(3) is not None


def test_on_signal_once_for_each():
    asked = [0]
    policy = SavePolicy(OnSignal(lambda: asked[0]))
    assert saved_steps(policy, range(3)) == []
    asked[0] = 1
    assert saved_steps(policy, range(3, 6)) == [3]
    asked[0] = 3
    assert saved_steps(policy, range(6, 9)) == [6]


def test_a_preemption_is_urgent_once_and_says_who_has_to_go(monkeypatch):
    monkeypatch.setattr("rl_ckpt.info.time.time", lambda: 1000.0)
    notices: list[Preemption | None] = [None]
    policy = SavePolicy(EverySteps(1), OnPreemption(lambda: notices[0], reserve=0.5))
    assert not surely(policy.due(1)).urgent
    notices[0] = Preemption("node a is drained", 1030.0, this_process=False, nodes=("a",))
    due = surely(policy.due(1))
    assert (due.urgent, due.leave, due.deadline_s) == (True, False, 15.0)
    assert due.text == "step 1: every 1 steps; node a is drained"
    policy.began(due)
    assert policy.due(1) is None, "told once"
    notices[0] = Preemption("SIGTERM", 1000.5, this_process=True, nodes=("a",))
    due = surely(policy.due(2))
    assert (due.leave, due.deadline_s) == (True, 1.0), "however little time is left"


# --- Auto ---


def test_auto_learns_what_a_save_costs_and_says_what_it_chose():
    clock, policy = Clock(), None
    policy = SavePolicy(Auto(min_s=10, max_s=1000, mtbf_s=20_000), clock=clock)
    assert surely(policy.chosen).text == "every 10 s until a save is measured (0 failures seen)"
    clock.now += 10
    save = Save()
    policy.began(surely(policy.due(1)), save)
    save.outcome = info(1, stall_s=0.25, durable_s=4.0)
    assert policy.due(2) is None
    chosen = surely(policy.chosen)
    assert chosen.interval_s == pytest.approx(math.sqrt(2 * 0.25 * 20_010), rel=0.01)
    assert chosen.text.startswith("every 100.")
    assert "stalls training 0.25 s and is durable after 4 s, with a failure every 5.56 h" in chosen.text
    assert chosen.lost_share == pytest.approx(0.25 / 100 + (50 + 4) / 20_010, rel=0.01)
    clock.now += 99
    assert policy.due(3) is None
    clock.now += 2
    assert surely(policy.due(3)).reasons == ("101 s since the last save: every 100 s, as chosen",)
    assert SavePolicy(EverySteps(1)).chosen is None


def test_auto_keeps_its_bounds_and_never_saves_before_the_last_is_durable():
    def chosen(stall_s, durable_s, failures=0):
        policy = SavePolicy(Auto(min_s=30, max_s=300, mtbf_s=86_400), clock=Clock())
        policy.saved(info(1, stall_s, durable_s))
        policy.lost(failures)
        return surely(policy.chosen).interval_s

    assert chosen(1e-6, 1.0) == 30
    assert chosen(0.0, 0.0) == 30
    assert chosen(100.0, 1.0) == 300
    assert chosen(1e-6, 47.0) == 47
    assert chosen(100.0, 400.0) == 400, "more than max_s: else saves would wait for each other"
    assert chosen(0.1, 1.0, failures=3) == pytest.approx(chosen(0.1, 1.0) / 2, rel=0.01)
    assert chosen(math.nan, math.inf) == 30, "as if nothing had been measured"


def test_one_slow_save_is_forgotten():
    policy = SavePolicy(Auto(min_s=1, max_s=1e6), clock=Clock())
    for step, stall_s in enumerate([30.0, 0.1, 0.1, 0.1]):
        policy.saved(info(step, stall_s, 1.0))
    assert surely(policy.chosen).stall_s == 0.1


def test_what_was_learned_goes_into_a_checkpoint_and_back():
    clock = Clock()
    policy = SavePolicy(Best("r"), Best("loss", "min"), Auto(min_s=1), clock=clock)
    clock.now += 500
    policy.began(surely(policy.due(1, {"r": 2.0})))
    policy.saved(info(1, 0.5, 3.0))
    policy.lost()
    state = policy.get_state()
    assert state == {
        "best": {"max r": 2.0},
        "stalls_s": [0.5],
        "durables_s": [3.0],
        "observed_s": 500.0,
        "failures": 1,
    }
    assert policy.due(2, {"r": 7.0}) is not None
    assert policy.get_state()["best"] == {"max r": 7.0}, "of the save that is due, which holds this very state"
    assert policy.due(2, {"r": 1.0}) is None
    assert policy.get_state() == state
    again = SavePolicy(Auto(min_s=1), Best("r"), clock=clock)
    again.set_state(state)
    assert again.chosen == policy.chosen
    assert again.due(2, {"r": 1.0}) is None
    assert again.due(2, {"r": 3.0}) is not None


@pytest.mark.parametrize("cost_s", [0.001, 1.0, 60.0, 1000.0])
def test_the_interval_is_where_the_expected_time_is_least(cost_s):
    mtbf_s = 6 * 3600.0

    def slowdown(every_s):  # Daly's complete model: exponential failures, segments begun anew
        return mtbf_s * math.expm1(every_s / mtbf_s) / (every_s - cost_s)

    grid = [cost_s * 1.001 * 1.01**i for i in range(3000) if cost_s * 1.01**i < 20 * mtbf_s]
    best = min(slowdown(every_s) for every_s in grid)
    lost, least = slowdown(interval(cost_s, mtbf_s)) - 1, best - 1
    assert lost <= least * 1.01
    assert slowdown(interval(cost_s, mtbf_s) * 2) - 1 > least * 1.1, "twice as long is worse: the test can tell"


def test_what_hardly_runs_saves_about_as_often_as_it_fails():
    assert interval(10.0, 5.0) == 15.0


def time_lost(policy, clock, work_s, stall_s, durable_s, mtbf_s):
    """Trains under failures, and saves as `policy` says; what it took beyond the work, as a share of it."""
    dice = random.Random(7)
    start, done, step, committed = clock.now, 0.0, 0, 0.0
    queue: list[tuple[float, float, int]] = []  # durable when, work that it holds, step
    fails_at = clock.now + dice.expovariate(1 / mtbf_s)
    while done < work_s:
        clock.now += 1.0
        done, step = done + 1.0, step + 1
        if queue and queue[0][0] <= clock.now:
            _, committed, saved_step = queue.pop(0)
            policy.saved(info(saved_step, stall_s, durable_s))
        if clock.now >= fails_at:
            done, queue = committed, []
            policy.lost()
            policy.restored(step)
            fails_at = clock.now + dice.expovariate(1 / mtbf_s)
        elif (due := policy.due(step)) is not None:
            queue.append((clock.now + durable_s, done, step))
            clock.now += stall_s
            policy.began(due)
    return (clock.now - start - work_s) / work_s


def test_in_a_run_with_failures_auto_is_about_as_good_as_the_best_fixed_interval():
    setting = {"work_s": 200_000.0, "stall_s": 2.0, "durable_s": 20.0, "mtbf_s": 3000.0}

    def lost(rule):
        clock = Clock()
        return time_lost(SavePolicy(rule, clock=clock), clock, **setting)

    fixed = {every_s: lost(EverySeconds(every_s)) for every_s in (25, 50, 100, 200, 400, 1600)}
    auto = lost(Auto(min_s=5, max_s=10_000, mtbf_s=86_400))  # a prior that is wrong by a factor of 29
    assert auto <= 1.15 * min(fixed.values())
    assert fixed[1600] > 2 * auto, "the test can tell"


# --- bad input ---


ANY: Any = {"type": EverySteps, "number": 5, "fraction": 1.5, "text": "day"}  # of types that none takes


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SavePolicy(), "no rules"),
        (lambda: SavePolicy(ANY["type"]), "is no rule"),
        (lambda: SavePolicy(ANY["number"]), "5 is no rule"),
        (lambda: SavePolicy(Auto(), Auto()), "two Auto"),
        (lambda: EverySteps(0), "integer of at least 1"),
        (lambda: EverySteps(True), "integer of at least 1"),
        (lambda: EverySteps(ANY["fraction"]), "integer of at least 1"),
        (lambda: EverySeconds(0), "greater than 0"),
        (lambda: EverySeconds(math.nan), "greater than 0"),
        (lambda: EverySeconds(math.inf), "greater than 0"),
        (lambda: Best(""), "name of a metric"),
        (lambda: Best("r", "most"), "'max' or 'min'"),
        (lambda: OnPreemption(lambda: None, reserve=0), "reserve"),
        (lambda: Auto(min_s=-1), "min_s"),
        (lambda: Auto(min_s=10, max_s=5), "must not be the greater"),
        (lambda: Auto(mtbf_s=ANY["text"]), "mtbf_s"),
        (lambda: SavePolicy(Auto()).lost(-1), "at least 0"),
    ],
)
def test_bad_input_is_told(make, said):
    with pytest.raises(InvalidInputError, match=said):
        make()
