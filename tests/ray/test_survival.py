"""What is left when a process dies: worker, driver, coordinator, shard server, node. And after close, nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from rl_ckpt import Checkpointer
from rl_ckpt.errors import CheckpointError
from rl_ckpt.runtime.owners_kept import dead_jobs
from rl_ckpt.runtime.spec import NAMESPACE
from tests.ray.gated_s3 import Gate
from tests.ray.holders import (
    HEALTH,
    ROOT,
    WAIT_S,
    give,
    kill_process,
    link,
    on_nodes,
    pid_of,
    same,
    servers,
    several_nodes,
    shared_memory,
    spec_of,
    states_of,
    until,
)


def state(rank: int, step: int = 0) -> dict[str, Any]:
    return {"w": np.arange(100_000) + step, "own": np.full(10, 100.0 * rank + step), "step": step}


@pytest.fixture(scope="module")
def cluster(_no_aws_settings_from_outside: None) -> Iterator[Any]:
    with several_nodes(3, HEALTH) as made:
        yield made


@pytest.fixture(scope="module")
def workers(cluster: Any) -> list[Any]:
    return on_nodes(3)


def traces(_: Any) -> tuple[int, int]:
    me = psutil.Process()
    return me.num_threads(), me.num_fds()


def test_nothing_runs_in_a_workers_process_between_saves(tmp_path: Path, workers: list[Any]) -> None:
    """Threads and open files of an actor do not grow from save to save, nor from restore to restore."""
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        for step in (0, 1):
            give(workers, [state(rank, step) for rank in range(3)])
            ckpt.save(step, workers).result(WAIT_S)
            ckpt.restore(workers)
        before = ray.get([worker.look.remote(traces) for worker in workers])
        for step in (2, 3, 4, 5):
            give(workers, [state(rank, step) for rank in range(3)])
            ckpt.save(step, workers).result(WAIT_S)
            ckpt.restore(workers)
        after = ray.get([worker.look.remote(traces) for worker in workers])
        for (threads, files), (threads_before, files_before) in zip(after, before, strict=True):
            assert threads <= threads_before + 1  # Ray's own come and go
            assert files <= files_before + 2


def own_threads(_: Any) -> list[str]:
    import threading

    return [thread.name for thread in threading.enumerate() if "rl_ckpt" in thread.name]


def test_a_worker_has_no_thread_of_ours(tmp_path: Path, workers: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        give(workers, [state(rank) for rank in range(3)])
        ckpt.save(0, workers).result(WAIT_S)
        ckpt.restore(workers)
        assert ray.get([worker.look.remote(own_threads) for worker in workers]) == [[], [], []]


def test_a_worker_killed_after_save_returned_loses_nothing(workers: list[Any], gate: Gate) -> None:
    team = [*workers[:2], on_nodes(3)[2]]
    with gate.new_run(join_timeout_s=20) as ckpt:
        give(team, [state(rank) for rank in range(3)])
        gate.close()
        pending = ckpt.save(0, team)
        assert gate.waiting.wait(WAIT_S)
        kill_process(pid_of(team[2]))
        gate.open()
        assert pending.result(WAIT_S).step == 0
        give(workers, [state(9, 9)] * 3)
        assert ckpt.restore(workers).step == 0
        for rank, found in enumerate(states_of(workers)):
            same(found, state(rank))


DRIVER = """
import sys
import ray
from rl_ckpt import Checkpointer
from tests.ray.holders import give, on_nodes
from tests.ray.test_survival import state
url, endpoint, address = sys.argv[1:]
ray.init(address=address, log_to_driver=False)
team = on_nodes(3)
give(team, [state(rank, 5) for rank in range(3)])
options = {"endpoint_url": endpoint, "key": "testing", "secret": "testing"}
ckpt = Checkpointer(url, storage_options=options)
pending = ckpt.save(5, team)
print("staged", pending.done(), flush=True)
sys.stdin.read()
"""


def test_a_driver_killed_after_save_returned_loses_nothing(cluster: Any, workers: list[Any], gate: Gate) -> None:
    url, before = gate.new_url(), dead_jobs()
    gate.close()
    command = [sys.executable, "-c", DRIVER, url, gate.server.endpoint_url, cluster.address]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline().split() == ["staged", "False"]
        driver.send_signal(signal.SIGKILL)
        driver.wait(WAIT_S)
    until(lambda: dead_jobs() - before, "Ray knows that the driver is dead")
    with Checkpointer(url, storage_options=gate.storage_options()) as ckpt, ThreadPoolExecutor(1) as aside:
        assert ckpt.checkpoints() == []
        give(workers, [state(9, 9)] * 3)
        heard = ray.get(link(ckpt).stats.remote())["messages"]
        restoring = aside.submit(ckpt.restore, workers)
        try:
            until(lambda: ray.get(link(ckpt).stats.remote())["messages"] >= heard + 3, "all ranks want to restore")
        finally:
            gate.open()
        assert restoring.result(WAIT_S).step == 5, "it waits for what is staged"
        found = ckpt.checkpoints()
        assert [info.step for info in found] == [5]
        for rank, one in enumerate(states_of(workers)):
            same(one, state(rank, 5))
        assert ckpt.save(6, workers).result(WAIT_S).lineage[0] == found[0].id


def test_the_coordinator_comes_back_and_says_what_became_of_the_save(workers: list[Any], gate: Gate) -> None:
    with gate.new_run(join_timeout_s=20) as ckpt:
        give(workers, [state(rank) for rank in range(3)])
        ckpt.save(0, workers).result(WAIT_S)
        give(workers, [state(rank, 1) for rank in range(3)])
        gate.close()
        pending = ckpt.save(1, workers)
        assert gate.waiting.wait(WAIT_S)
        ray.kill(link(ckpt), no_restart=False)
        gate.open()
        with pytest.raises(CheckpointError, match=r"not committed.*save again"):
            pending.result(WAIT_S)
        assert [info.step for info in ckpt.checkpoints()] == [0]
        until(lambda: ray.get(link(ckpt).stats.remote()), "the coordinator is back")
        assert ckpt.save(1, workers).result(WAIT_S).step == 1
        give(workers, [state(9, 9)] * 3)
        assert ckpt.restore(workers).step == 1


def test_a_shard_server_killed_between_saves_comes_back(tmp_path: Path, workers: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        give(workers, [state(rank) for rank in range(3)])
        ckpt.save(0, workers).result(WAIT_S)
        victim = next(iter(servers(ckpt).values()))
        old = pid_of(victim)
        kill_process(old)
        until(lambda: pid_of(victim) != old, "the shard server is back")
        give(workers, [state(rank, 1) for rank in range(3)])
        assert ckpt.save(1, workers).result(WAIT_S).step == 1
        give(workers, [state(9, 9)] * 3)
        assert ckpt.restore(workers).step == 1
        for rank, found in enumerate(states_of(workers)):
            same(found, state(rank, 1))


@pytest.mark.soak  # on local disk: test_deaths.py
def test_a_shard_server_killed_while_writing_comes_back_and_writes_again(workers: list[Any], gate: Gate) -> None:
    with gate.new_run(join_timeout_s=20) as ckpt:
        give(workers, [state(rank) for rank in range(3)])
        ckpt.save(0, workers).result(WAIT_S)
        give(workers, [state(rank, 1) for rank in range(3)])
        victim = next(iter(servers(ckpt).values()))
        old = pid_of(victim)
        gate.close()
        pending = ckpt.save(1, workers)
        assert gate.waiting.wait(WAIT_S)
        kill_process(old)
        gate.open()
        assert pending.result(WAIT_S).step == 1
        assert pid_of(victim) != old
        give(workers, [state(9, 9)] * 3)
        assert ckpt.restore(workers).step == 1
        for rank, found in enumerate(states_of(workers)):
            same(found, state(rank, 1))


def test_close_leaves_no_actor_and_no_shared_memory_and_the_run_opens_again(tmp_path: Path, workers: list[Any]) -> None:
    for step in range(3):
        ckpt = Checkpointer(str(tmp_path / "run"))
        give(workers, [state(rank, step) for rank in range(3)])
        ckpt.save(step, workers).result(WAIT_S)
        key, names = spec_of(ckpt).key, set(servers(ckpt))
        assert names <= shared_memory()
        ckpt.close()
        assert not names & shared_memory()
        listed = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE]
        assert [name for name in listed if key in name] == []
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        assert [info.step for info in ckpt.checkpoints()] == [0, 1, 2]


def test_close_right_after_save_waits_for_the_commit(tmp_path: Path, workers: list[Any]) -> None:
    give(workers, [state(rank) for rank in range(3)])
    ckpt = Checkpointer(str(tmp_path / "run"))
    pending = ckpt.save(0, workers)
    ckpt.close()
    assert [info.step for info in ckpt.checkpoints()] == [0]
    assert pending.result(WAIT_S).step == 0


@pytest.mark.filterwarnings("ignore:not all is in memory:UserWarning")  # a copy that was on its way to the lost node
def test_a_node_killed_is_survived_by_a_restore_onto_the_others(tmp_path: Path, cluster: Any) -> None:
    """Last of those that share the cluster, as it takes a node away."""
    with Checkpointer(str(tmp_path / "run"), join_timeout_s=20) as ckpt:
        team = on_nodes(3)
        give(team, [state(rank) for rank in range(3)])
        ckpt.save(0, team).result(WAIT_S)
        node = cluster.worker_nodes.copy().pop()
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            process.kill()
        cluster.remove_node(node, allow_graceful=False)
        until(lambda: sum(n["Alive"] for n in ray.nodes()) == 2, "the node is known to be dead")
        rest = on_nodes(2)
        give(rest, [state(9, 9)] * 2)
        report = ckpt.restore(rest)
        assert (report.step, report.world_size, report.ranks_dropped) == (0, 2, (2,))
        for rank, found in enumerate(states_of(rest)):
            same(found, state(rank))
        give(rest, [state(rank, 1) for rank in range(2)])
        assert ckpt.save(1, rest).result(WAIT_S).step == 1


KILLED = """
import ray, sys
from rl_ckpt import Checkpointer
from tests.ray.holders import Holder, give, server_names
from tests.ray.test_survival import state
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=150 << 20, log_to_driver=False)
team = [Holder.remote()]
give(team, [state(0)])
ckpt = Checkpointer(sys.argv[1])
ckpt.save(0, team).result(60)
print("left", *server_names(ckpt), flush=True)
sys.stdin.read()
"""


def test_what_a_killed_cluster_left_is_removed_by_the_next_server(tmp_path: Path, workers: list[Any]) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as driver:
        assert driver.stdout is not None
        word, *left = driver.stdout.readline().split()
        assert word == "left"
        assert len(left) == 1
        assert set(left) <= shared_memory()
        family = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
        for process in family:
            process.kill()
        psutil.wait_procs(family, WAIT_S)
    alive = on_nodes(2)
    give(alive, [state(rank) for rank in range(2)])
    with Checkpointer(str(tmp_path / "next")) as ckpt:
        ckpt.save(0, alive).result(WAIT_S)
        assert not set(left) & shared_memory()
        assert set(servers(ckpt)) <= shared_memory(), "what lives stays"
