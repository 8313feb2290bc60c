"""Urgent saves within a deadline, and the notices that call for them: SIGTERM to a driver, nodes that Ray drains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.core.generated import autoscaler_pb2

from rl_ckpt import Checkpointer, Preemption
from rl_ckpt.errors import CommitUnknownError, InvalidInputError, SaveTimeoutError
from tests.ray.gated_s3 import Gate, run_gated
from tests.ray.holders import (
    ROOT,
    WAIT_S,
    Holder,
    give,
    memory_files,
    on_nodes,
    same,
    several_nodes,
    spec_of,
    states_of,
    until,
)
from tests.s3_servers import S3Server


def state(rank: int, step: int) -> dict[str, Any]:
    return {"w": np.arange(50_000.0) + step, "own": np.full(1000, 1000.0 * rank + step)}


@pytest.fixture(scope="module")
def cluster(_no_aws_settings_from_outside: None) -> Iterator[Any]:
    with several_nodes(2) as made:
        yield made


def new_run(gate: Gate) -> Checkpointer:
    """Without the memory tier, which would have the save though the store does not (test_tier.py)."""
    return gate.new_run(join_timeout_s=20, memory_tier=False)


# Urgent saves.


def test_a_store_that_does_not_answer_leaves_nothing_of_an_urgent_save(cluster: Any, gate: Gate) -> None:
    team = on_nodes(2)
    with new_run(gate) as ckpt:
        give(team, [state(rank, 0) for rank in range(2)])
        assert ckpt.save(0, team, deadline_s=WAIT_S).result().step == 0
        give(team, [state(rank, 1) for rank in range(2)])
        with gate.closed():
            pending = ckpt.save(1, team, deadline_s=2.0)
            with pytest.raises(SaveTimeoutError, match=r"step 1( was not committed before its deadline of|:) 2\.0 s"):
                pending.result(WAIT_S)
        assert ckpt.save(2, team).result(WAIT_S).step == 2  # and the store answers again: nothing came of step 1
        assert [info.step for info in ckpt.checkpoints()] == [0, 2]
        ckpt.restore(team, step=0)
        for rank, found in enumerate(states_of(team)):
            same(found, state(rank, 0))


def test_a_commit_that_is_under_way_at_the_deadline_is_said_to_be_unknown(cluster: Any, moto_server: S3Server) -> None:
    team = on_nodes(2)
    with run_gated(moto_server, "/commits/") as gate, new_run(gate) as ckpt:
        give(team, [state(rank, 0) for rank in range(2)])
        ckpt.save(0, team).result(WAIT_S)
        give(team, [state(rank, 1) for rank in range(2)])
        with gate.closed():
            pending = ckpt.save(1, team, deadline_s=2.0)
            with pytest.raises(CommitUnknownError, match="its commit was under way at its deadline"):
                pending.result(WAIT_S)
        until(lambda: [info.step for info in ckpt.checkpoints()] == [0, 1], "it landed after all, and whole")
        ckpt.restore(team)
        for rank, found in enumerate(states_of(team)):
            same(found, state(rank, 1))


def test_a_worker_that_is_busy_past_the_deadline_brings_nothing_about_later(cluster: Any, tmp_path: Path) -> None:
    team = on_nodes(2)
    flag = tmp_path / "go on"
    with Checkpointer(str(tmp_path / "run"), join_timeout_s=20) as ckpt:
        give(team, [state(rank, 0) for rank in range(2)])
        ckpt.save(0, team).result(WAIT_S)
        for worker in team:  # all: nobody has joined when the time is over
            worker.look.remote(_until_there, flag)
        with pytest.raises(SaveTimeoutError, match="before the save's deadline"):
            ckpt.save(1, team, deadline_s=0.5)
        flag.touch()
        ray.get([worker.take.remote() for worker in team], timeout=WAIT_S)  # after what the save asked of them
        assert ckpt.save(2, team).result(WAIT_S).step == 2
        assert [info.step for info in ckpt.checkpoints()] == [0, 2]


def _until_there(_holder: Any, flag: Path) -> None:
    until(flag.exists, str(flag))


def late(text: str) -> bool:
    """The caller's clock or the coordinator's was first."""
    return "before its deadline" in text or "s were over before" in text


def save_alone(holder: Any, handle: Any, deadline_s: float) -> str:
    try:
        handle.save(1, holder.state, deadline_s=deadline_s).result(WAIT_S)
    except SaveTimeoutError as error:
        return str(error)
    return "committed"


def test_workers_that_save_by_themselves_have_deadlines_too(cluster: Any, gate: Gate) -> None:
    team = on_nodes(2)
    with new_run(gate) as ckpt:
        handles = [ckpt.worker(rank, 2) for rank in range(2)]
        give(team, [state(rank, 1) for rank in range(2)])
        alone = ray.get(team[0].look.remote(save_alone, handles[0], 1.0), timeout=WAIT_S)  # the other never joins
        assert late(alone)
        with gate.closed():
            calls = [w.look.remote(save_alone, handle, 2.0) for w, handle in zip(team, handles, strict=True)]
            assert [late(text) for text in ray.get(calls, timeout=WAIT_S)] == [True, True]
        assert ckpt.checkpoints() == []
        calls = [w.look.remote(save_alone, handle, WAIT_S) for w, handle in zip(team, handles, strict=True)]
        assert ray.get(calls, timeout=WAIT_S) == ["committed"] * 2
        assert "rl_ckpt-deadline-1" not in ray.get(team[0].look.remote(_threads))


def _threads(_holder: Any) -> list[str]:
    return [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("deadline_s", [0, -1.0, float("nan"), float("inf"), True, "5"])
def test_deadlines_that_can_not_be(cluster: Any, tmp_path: Path, deadline_s: Any) -> None:
    with pytest.raises(InvalidInputError, match="deadline_s"):
        Checkpointer(str(tmp_path / "run")).save(0, [], deadline_s=deadline_s)


# SIGTERM.

DRIVER = """
import json, sys
import ray
from rl_ckpt import Checkpointer
from rl_ckpt.errors import CheckpointError
from tests.ray.holders import Holder, give
from tests.ray.test_preemption import state
url, options, deadline_s = sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3])
ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=150 << 20, log_to_driver=False)
team = [Holder.remote() for _ in range(2)]
ckpt = Checkpointer(url, storage_options=options, memory_tier=False)
step = 0
give(team, [state(rank, step) for rank in range(2)])
ckpt.save(step, team).result(60)
with ckpt.preemption(grace_s=30) as watch:
    print("training", flush=True)
    while True:
        step += 1
        give(team, [state(rank, step) for rank in range(2)])
        notice = watch.notice(team)
        if notice is not None:
            break
assert notice.this_process and 0 < notice.seconds_left <= 30, notice
try:
    ckpt.save(step, team, deadline_s=min(deadline_s, notice.seconds_left)).result()
    print("saved", step, flush=True)
except CheckpointError as error:
    print(error.code, step, flush=True)
"""


def run_driver(url: str, options: str, deadline_s: float) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DRIVER, url, options, str(deadline_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)


def terminated(driver: subprocess.Popen[str]) -> tuple[str, int]:
    """Sends SIGTERM to a driver that trains; its last word, the step, once it has ended well."""
    assert driver.stdout is not None
    driver.send_signal(signal.SIGTERM)
    word, step = driver.stdout.readline().split()
    assert driver.wait(WAIT_S) == 0
    return word, int(step)


def test_a_driver_that_gets_sigterm_saves_and_ends(tmp_path: Path) -> None:
    with run_driver(str(tmp_path / "run"), "{}", 20) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "training\n"
        word, step = terminated(driver)
    assert word == "saved"
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        assert [info.step for info in ckpt.checkpoints()] == [0, step]
        for rank in range(2):
            same(ckpt.load_state(rank=rank), state(rank, step))


def test_a_driver_that_gets_sigterm_ends_in_time_though_the_store_does_not_answer(gate: Gate) -> None:
    url = gate.new_url()
    options = gate.storage_options()
    with run_driver(url, json.dumps(options), 3) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "training\n"
        with gate.closed():  # until the driver and its cluster are gone
            word, _ = terminated(driver)
            assert word == "save_timeout"
            assert gate.waiting.is_set()
    with Checkpointer(url, storage_options=options) as ckpt:
        assert [info.step for info in ckpt.checkpoints()] == [0]
        for rank in range(2):
            same(ckpt.load_state(rank=rank), state(rank, 0))


def notified(watch: Any) -> Preemption:
    found: Preemption = until(watch.notice, "the signal is seen")
    return found


def test_the_handler_of_before_is_called_and_comes_back(tmp_path: Path) -> None:
    heard: list[int] = []

    def before(number: int, _frame: object) -> None:
        heard.append(number)

    outer = signal.signal(signal.SIGTERM, before)
    try:
        ckpt = Checkpointer(str(tmp_path / "run"))
        with ckpt.preemption(grace_s=5) as watch:
            assert watch.notice() is None
            os.kill(os.getpid(), signal.SIGTERM)
            first = notified(watch)
            assert (heard, first.this_process, first.nodes, first.ranks) == ([signal.SIGTERM], True, (), ())
            assert 0 < first.seconds_left <= 5
            assert str(os.getpid()) in first.reason
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: len(heard) == 2, "the second signal is heard")
            assert notified(watch).deadline == first.deadline, "a second signal gives no more time"
        assert signal.getsignal(signal.SIGTERM) is before
        with pytest.raises(KeyError), ckpt.preemption():
            raise KeyError
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, outer)


def test_a_handler_on_top_stays_and_signals_are_handed_down(tmp_path: Path) -> None:
    heard: list[int] = []
    outer = signal.signal(signal.SIGTERM, lambda number, _frame: heard.append(number))
    try:
        with Checkpointer(str(tmp_path / "run")).preemption() as watch:
            ours = signal.getsignal(signal.SIGTERM)
            assert callable(ours)
            top = signal.signal(signal.SIGTERM, lambda number, frame: ours(number, frame))
            assert top is ours
            above = signal.getsignal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is above
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: heard == [signal.SIGTERM], "the signal is handed down")
        assert watch.notice() is not None
    finally:
        signal.signal(signal.SIGTERM, outer)


def test_a_watch_in_another_thread_leaves_signals_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def run() -> None:
        with Checkpointer(str(tmp_path / "run")).preemption() as watch:
            seen.extend([signal.getsignal(signal.SIGTERM), watch.notice()])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(WAIT_S)
    assert seen == [before, None]


@pytest.mark.parametrize("what", [{"grace_s": 0}, {"grace_s": True}, {"poll_s": -1}, {"poll_s": float("inf")}])
def test_times_that_can_not_be(tmp_path: Path, what: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(what))):
        Checkpointer(str(tmp_path / "run")).preemption(**what)


# Drained nodes.


def drain(address: str, node: str, deadline_ms: int) -> None:
    reasons: Any = autoscaler_pb2  # both are made at run time
    raylet: Any = ray._raylet
    reason = reasons.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = raylet.GcsClient(address=address).drain_node(node, reason, "a test", deadline_ms)
    assert accepted, why


def test_a_node_that_is_drained_is_told_with_its_deadline_and_its_workers(cluster: Any, tmp_path: Path) -> None:
    """Last of those that share the cluster, as it takes a node away."""
    with Checkpointer(str(tmp_path / "run"), join_timeout_s=20) as ckpt:
        team = on_nodes(4)
        give(team, [state(rank, 1) for rank in range(4)])
        ckpt.prepare(team)  # a node that is drained takes no new actors: its shard server must be there
        nodes = ray.get([worker.look.remote(_node) for worker in team])
        home = ray.get_runtime_context().get_node_id()
        away = next(node for node in nodes if node != home)
        there = tuple(rank for rank, node in enumerate(nodes) if node == away)
        stay = [worker for worker, node in zip(team, nodes, strict=True) if node == home]
        with ckpt.preemption(poll_s=0.1) as watch:
            assert watch.notice(team) is None
            deadline = time.time() + 120
            drain(cluster.address, away, int(deadline * 1000))
            notice = until(lambda: watch.notice(team), "the drain is seen")
            assert (notice.nodes, notice.ranks, notice.this_process) == ((away,), there, False)
            assert notice.deadline == pytest.approx(deadline, abs=0.01)
            assert away[:12] in notice.reason
            assert watch.notice(stay) is None, "a drain that concerns none of them"
            anywhere = watch.notice()
            assert anywhere is not None
            assert (anywhere.nodes, anywhere.ranks) == ((away,), ())
            info = ckpt.save(1, team, deadline_s=notice.seconds_left / 4).result()
            assert (info.step, info.world_size) == (1, 4)
            stays, goes = (spec_of(ckpt).server(node) for node in (home, away))
            until(lambda: len(memory_files(stays, "held-*")) == 2, "memory of the node that stays has all")
            assert len(memory_files(goes, "held-*")) == 1, "nothing is copied to a node that goes away"
        assert "rl_ckpt-preemption" not in [thread.name for thread in threading.enumerate()]
        # Ray places new actors elsewhere: those that have to move are replaced and restored alone.
        movers: list[Any] = [Holder.remote() for _ in there]
        give(movers, [state(rank, 9) for rank in there])
        assert set(ray.get([worker.look.remote(_node) for worker in movers])) == {home}
        ckpt.restore(movers, ranks=there)
        for rank, found in zip(there, states_of(movers), strict=True):
            same(found, state(rank, 1))


def _node(_holder: Any) -> str:
    return str(ray.get_runtime_context().get_node_id())
