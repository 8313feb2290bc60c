"""Several Checkpointers on one run share its actors: who ends them, whose rules hold, and who waits for whom."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from rl_ckpt import Checkpointer, LatestN
from rl_ckpt.info import CheckpointInfo
from rl_ckpt.runtime.spec import NAMESPACE
from tests.ray.gated_s3 import Gate
from tests.ray.holders import ROOT, WAIT_S, Holder, HolderBase, give, link, pid_of, same, shared_memory, states_of


def state(rank: int, step: int = 0) -> dict[str, Any]:
    return {"w": np.arange(1000) + step, "own": np.full(10, 100.0 * rank + step), "step": step}


@pytest.fixture(scope="module")
def workers(_no_aws_settings_from_outside: None, ray_node: None) -> list[Any]:
    return [Holder.remote() for _ in range(2)]


def save(ckpt: Checkpointer, workers: list[Any], step: int) -> CheckpointInfo:
    give(workers, [state(rank, step) for rank in range(len(workers))])
    return ckpt.save(step, workers).result(WAIT_S)


def actors() -> set[str]:
    """Names of the service's actors in the cluster."""
    return {a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE}


def test_another_checkpointer_that_restores_and_closes_ends_nothing(tmp_path: Path, workers: list[Any]) -> None:
    url = str(tmp_path / "run")
    with Checkpointer(url) as first:
        save(first, workers, 0)
        mine, process = actors(), pid_of(link(first))
        with Checkpointer(url) as second:
            give(workers, [state(9, 9)] * 2)
            assert second.restore(workers).step == 0
        assert actors() == mine
        assert save(first, workers, 1).step == 1
        assert pid_of(link(first)) == process
    assert not mine & actors(), "the last one to close ends them"


def test_the_one_that_began_may_close_first(tmp_path: Path, workers: list[Any]) -> None:
    url = str(tmp_path / "run")
    first, second = Checkpointer(url), Checkpointer(url)
    save(first, workers, 0)
    mine = actors()
    assert second.restore(workers).step == 0
    first.close()
    assert actors() == mine
    assert [info.id for info in second.checkpoints()] == list(save(second, workers, 1).lineage)
    second.close()
    assert not mine & actors()


def save_inside(holder: HolderBase, handle: Any, step: int) -> None:
    handle.save(step, holder.state).result(WAIT_S)


def saved_from_the_driver(ckpt: Checkpointer, workers: list[Any], step: int) -> None:
    save(ckpt, workers, step)


def saved_from_the_workers(ckpt: Checkpointer, workers: list[Any], step: int) -> None:
    give(workers, [state(rank, step) for rank in range(2)])
    handles = [ckpt.worker(rank, 2) for rank in range(2)]
    ray.get([w.look.remote(save_inside, h, step) for w, h in zip(workers, handles, strict=True)], timeout=WAIT_S)


@pytest.mark.parametrize("saved", [saved_from_the_driver, saved_from_the_workers])
def test_the_rules_of_the_one_that_saves_hold_whoever_came_first(
    tmp_path: Path, workers: list[Any], saved: Any
) -> None:
    url = str(tmp_path / "run")
    with Checkpointer(url) as before:
        save(before, workers, 0)
    with Checkpointer(url) as reader:
        reader.restore(workers)
        with Checkpointer(url, keep=[LatestN(2)]) as saver:
            for step in (1, 2, 3):
                saved(saver, workers, step)
        assert [info.step for info in reader.checkpoints()] == [2, 3]


def test_the_rules_of_one_that_only_restores_drop_nothing(tmp_path: Path, workers: list[Any]) -> None:
    url = str(tmp_path / "run")
    with Checkpointer(url) as before:
        save(before, workers, 0)
    with Checkpointer(url, keep=[LatestN(1)]) as reader:
        reader.restore(workers)
        with Checkpointer(url) as saver:
            save(saver, workers, 1)
            reader.restore(workers)
            save(saver, workers, 2)
        assert [info.step for info in reader.checkpoints()] == [0, 1, 2]


def test_a_save_that_waits_long_for_memory_is_not_given_up(
    workers: list[Any], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's patience with its workers runs out several times while the save waits for a slow store."""
    rounds = threading.Semaphore(0)
    wait = ray.wait

    def counted(refs: list[Any], **how: Any) -> Any:
        ready, rest = wait(refs, **how)
        if not ready:
            rounds.release()
        return ready, rest

    with gate.new_run(join_timeout_s=2.0) as ckpt, gate.closed():
        pending = []

        def third_save() -> None:
            try:
                pending.append(ckpt.save(2, workers))
            finally:
                rounds.release(2)

        for step in (0, 1):
            give(workers, [state(rank, step) for rank in range(2)])
            pending.append(ckpt.save(step, workers))
        give(workers, [state(rank, 2) for rank in range(2)])
        monkeypatch.setattr(ray, "wait", counted)
        third = threading.Thread(target=third_save)
        third.start()
        for _ in range(2):
            assert rounds.acquire(timeout=WAIT_S)
        assert third.is_alive()
        assert not any(one.done() for one in pending)
        gate.open()
        third.join(WAIT_S)
        assert [one.result(WAIT_S).step for one in pending] == [0, 1, 2]
        give(workers, [state(9, 9)] * 2)
        assert ckpt.restore(workers).step == 2
        for rank, found in enumerate(states_of(workers)):
            same(found, state(rank, 2))


DROPPING = """
import gc, sys, weakref
import ray
from rl_ckpt import Checkpointer
from tests.ray.holders import Holder, give, server_names
from tests.ray.test_sharing import state
url, endpoint, address = sys.argv[1:]
ray.init(address=address, log_to_driver=False)
team = [Holder.remote() for _ in range(2)]
give(team, [state(rank, 5) for rank in range(2)])
ckpt = Checkpointer(url, storage_options={"endpoint_url": endpoint, "key": "testing", "secret": "testing"})
pending, seen = ckpt.save(5, team), weakref.ref(ckpt)
names = server_names(ckpt)
del ckpt
gc.collect()
print("dropped", seen() is None, pending.done(), *names, flush=True)
sys.stdin.readline()
print("committed", pending.result(60).step, flush=True)
sys.stdin.readline()
"""


def test_dropping_a_checkpointer_ends_nothing_and_the_drivers_end_ends_all(workers: list[Any], gate: Gate) -> None:
    url = gate.new_url()
    others = actors()
    gate.close()
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", DROPPING, url, gate.server.endpoint_url, address]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as driver:
        assert driver.stdin is not None
        assert driver.stdout is not None
        said, collected, done, *names = driver.stdout.readline().split()
        assert (said, collected, done) == ("dropped", "True", "False")
        mine = actors() - others
        assert len(mine) == 2, "the coordinator and the node's shard server"
        assert set(names) <= shared_memory()
        gate.open()
        driver.stdin.write("\n")
        driver.stdin.flush()
        assert driver.stdout.readline().split() == ["committed", "5"]
        assert mine <= actors()
        driver.stdin.write("\n")
        driver.stdin.flush()
        assert driver.wait(WAIT_S) == 0
    assert not mine & actors()
    assert not set(names) & shared_memory()
