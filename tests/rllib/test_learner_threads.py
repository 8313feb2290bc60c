"""Learners that train in a thread of their own: held still for a copy, and rid of old batches by a restore."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.learner.training_data import TrainingData

from rl_ckpt import SaveTimeoutError
from rl_ckpt.rllib.learner import learner_tree, set_learner
from rl_ckpt.rllib.learner_threads import _Gate, drop_batches, held
from rl_ckpt.rllib.modules import weights_digest
from tests.rllib.learner_cases import APPO, IMPALA, PPO, Case, build, episodes, finish
from tests.rllib.test_learner import through_memory

WAIT_S = 30
CIRCULAR = Case(
    "appo-circular",
    lambda: APPO.config().training(
        use_circular_buffer=True, circular_buffer_num_batches=4, circular_buffer_iterations_per_batch=3
    ),
)
Give = Callable[..., Any]


@pytest.fixture
def built() -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def make(*args: Any, **changes: Any) -> Any:
        made.append(build(*args, **changes))
        return made[-1]

    yield make
    for learner in made:
        learner.shutdown()
        assert not learner._learner_thread.is_alive()


class Paused:
    """Keeps a learner's thread in the middle of an update until it is let go."""

    def __init__(self, learner: Any) -> None:
        self.inside, self.go = threading.Semaphore(0), threading.Semaphore(0)
        begin = learner.before_gradient_based_update

        def waiting(**given: Any) -> None:
            self.inside.release()
            assert self.go.acquire(timeout=WAIT_S)
            begin(**given)

        learner.before_gradient_based_update = waiting


def give(learner: Any, case: Case, at: int) -> None:
    """One more batch for the thread."""
    learner.update(training_data=TrainingData(episodes=episodes(learner, case, at)), timesteps={})


def test_a_copy_is_always_of_a_whole_update(built: Any) -> None:
    learner, other = built(IMPALA), built(IMPALA)
    at = {0: weights_digest(learner.module)}
    for n in range(30):
        give(learner, IMPALA, n)
        finish(learner)
        at[n + 1] = weights_digest(learner.module)

    seen = []
    for n in range(30):
        give(other, IMPALA, n)
        with held(other):
            tree = through_memory(learner_tree(other))
            number = tree["learner"]["weights_seq_no"]
            assert weights_digest(other.module) == at[number]
            steps = tree["policies"][DEFAULT_MODULE_ID]["optimizers"]["default_optimizer"]["state"].values()
            assert {int(state["step"]) for state in steps} <= {number}
            seen.append(number)
    finish(other)

    assert weights_digest(other.module) == at[30]  # no batch was lost
    assert len(set(seen)) > 1


def test_a_hold_waits_for_the_update_under_way_and_lets_no_other_begin(built: Any) -> None:
    learner = built(IMPALA)
    paused = Paused(learner)
    for n in range(3):
        give(learner, IMPALA, n)
    assert paused.inside.acquire(timeout=WAIT_S)  # inside of an update that began before there was a gate
    inside, release = threading.Event(), threading.Event()

    def hold() -> None:
        with held(learner):
            inside.set()
            release.wait(WAIT_S)

    holder = threading.Thread(target=hold)
    holder.start()
    assert not inside.wait(0.2)
    paused.go.release(3)
    assert inside.wait(WAIT_S)
    assert learner._weights_seq_no == 1
    assert not paused.inside.acquire(timeout=0.2)
    release.set()
    holder.join()
    finish(learner)

    assert learner._weights_seq_no == 3


def test_holds_are_nested(built: Any) -> None:
    learner = built(IMPALA)
    give(learner, IMPALA, 0)
    finish(learner)
    with held(learner):
        with held(learner):
            learner._weights_seq_no = 0  # as a rollback does
            give(learner, IMPALA, 1)
        while learner._learner_thread_in_queue.qsize():  # until the thread has taken it
            assert learner._learner_thread.is_alive()
        assert learner._learner_thread_in_queue.unfinished_tasks == 1
        assert learner._weights_seq_no == 0
    finish(learner)

    assert learner._weights_seq_no == 1


def test_an_update_that_takes_too_long_is_an_error_and_goes_on(built: Any) -> None:
    learner = built(IMPALA)
    paused = Paused(learner)
    give(learner, IMPALA, 0)
    give(learner, IMPALA, 1)
    assert paused.inside.acquire(timeout=WAIT_S)

    with pytest.raises(SaveTimeoutError, match="could not be held still"), held(learner, timeout_s=0.05):
        raise AssertionError

    paused.go.release(2)
    finish(learner)
    assert learner._weights_seq_no == 2


@pytest.mark.parametrize("case", [IMPALA, APPO, CIRCULAR], ids=lambda case: case.name)
def test_a_restore_drops_the_batches_of_before(case: Case, built: Any) -> None:
    learner = built(case)
    saved = through_memory(learner_tree(learner))
    paused = Paused(learner)
    for n in range(3):
        give(learner, case, n)
    assert paused.inside.acquire(timeout=WAIT_S)
    paused.go.release(99)

    set_learner(learner, saved)

    assert learner._weights_seq_no == 0
    assert learner._learner_thread_in_queue.qsize() == 0
    with held(learner):  # whatever was on its way to an update would have made it by now
        assert learner._weights_seq_no == 0
        assert weights_digest(learner.module) == weights_digest(built(case).module)
    give(learner, case, 5)
    updates, until = 3 if case is CIRCULAR else 1, time.monotonic() + WAIT_S
    while learner._learner_thread_in_queue.qsize() or learner._weights_seq_no < updates:
        assert learner._learner_thread.is_alive()
        assert time.monotonic() < until
    with held(learner):
        assert learner._weights_seq_no == updates


@pytest.mark.parametrize("before", [1, 2, 3, 4])
def test_weights_that_were_put_out_before_a_restore_are_not_given_to_env_runners(
    before: int, built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[Any] = []  # what its thread puts out after every 2 updates
    monkeypatch.setattr(ray, "put", lambda value: put.append(value) or value)  # type: ignore[func-returns-value]
    learner = built(IMPALA, broadcast_interval=2)
    saved = through_memory(learner_tree(learner))

    def update(n: int) -> Any:
        data = TrainingData(episodes=episodes(learner, IMPALA, n))
        return learner.update(training_data=data, timesteps={}, return_state=True)

    for n in range(before):
        update(n)
        finish(learner)
    with held(learner):
        set_learner(learner, saved)
    put.clear()

    results = [update(n) for n in range(7)]  # and none of these waits for updates that were dropped

    states = [r["_rl_module_state_after_update"] for r in results if "_rl_module_state_after_update" in r]
    assert states
    assert states[0]["weights_seq_no"] == 2
    assert all(any(state["rl_module"] is weights for weights in put) for state in states)
    finish(learner)
    assert learner._weights_seq_no == 7


def test_a_learner_without_a_thread_needs_nothing() -> None:
    learner = build(PPO)

    with held(learner):
        assert drop_batches(learner) == 0


def test_a_learner_whose_thread_has_ended_can_be_copied(built: Any) -> None:
    learner = built(IMPALA)
    learner.shutdown()

    with held(learner):
        assert drop_batches(learner) == 0


def test_a_thread_that_may_go_on_is_not_taken_for_parked() -> None:
    updates: list[int] = []
    gate = _Gate(SimpleNamespace(_weights_seq_no=1), lambda: updates.append(1))
    gate.open(1)
    thread = threading.Thread(target=gate)
    thread.start()
    while not gate.parked:
        gate.wait_a_little()
    with gate._changed:  # it can't wake before this block ends
        gate.open(2)
        assert not vars(gate)["parked"]
    thread.join(60)
    assert updates == [1]


def test_learners_that_train_together_are_held_after_the_same_update(tmp_path: Path) -> None:
    """Each update of theirs waits for the other's gradients: held one by one, they would wait for ever."""
    script = Path(__file__).with_name("held_together.py")
    root = str(Path(__file__).parents[2])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "group")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=root,
            env={"PYTHONPATH": root, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=500) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0, 0], said[0][1][-3000:] + said[1][1][-3000:]
    one, two = (json.loads(out.strip().splitlines()[-1]) for out, _ in said)

    assert one["holds"] == two["holds"]  # number of updates and digest, at each hold
    assert len({number for number, _ in one["holds"]}) > 1
    assert one["end"] == two["end"]
    assert one["end"][0] == 24
    assert one["untold"] == two["untold"] == "InvalidInputError"
    assert one["alone"] == "SaveTimeoutError"
