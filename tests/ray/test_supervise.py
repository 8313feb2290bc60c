"""A supervised training loop: real processes are killed under it, and it goes on from its newest checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from rl_ckpt import Checkpointer, RestoreReport
from tests.ray.gated_s3 import Gate
from tests.ray.holders import (
    HEALTH,
    WAIT_S,
    kill_process,
    link,
    on_nodes,
    pid_of,
    servers,
    several_nodes,
    until,
)
from tests.ray.jobs import STEPS, WORKERS, Job, advance, ended, kill_rank, with_state
from tests.ray.stops import state_of_saves


@pytest.fixture(scope="module")
def cluster(_no_aws_settings_from_outside: None) -> Iterator[Any]:
    with several_nodes(2, HEALTH) as made:
        yield made


@pytest.fixture
def ckpt(tmp_path: Path, cluster: Any) -> Iterator[Checkpointer]:
    with Checkpointer(str(tmp_path / "run"), join_timeout_s=20) as made:
        yield made


def test_a_job_that_loses_a_worker_ends_as_if_it_had_not(ckpt: Checkpointer) -> None:
    job = Job(ckpt, {3: kill_rank(1)})
    report = ckpt.supervise(job.make, job.train)
    assert (report.result, report.restored) == ("done", None)
    (recovery,) = report.recoveries
    assert (recovery.lost, recovery.attempts, recovery.failed_saves) == ((1,), 1, ())
    assert recovery.restored is not None
    assert (recovery.restored.step, recovery.restored.world_size) == (3, WORKERS)
    assert "ActorDiedError" in recovery.error or "ActorUnavailableError" in recovery.error
    assert job.starts == [0, 3]
    assert [ended(worker) for worker in job.teams[0]] == [True] * WORKERS, "those that were left are ended too"
    job.is_whole()


def test_a_job_that_is_started_again_goes_on_from_its_newest_checkpoint(ckpt: Checkpointer) -> None:
    ckpt.supervise(Job(ckpt).make, Job(ckpt).train)
    job = Job(ckpt)
    report = ckpt.supervise(job.make, job.train)
    assert report.restored is not None
    assert (report.restored.step, job.starts) == (STEPS, [STEPS])
    job.is_whole()


def test_a_loss_before_the_first_checkpoint_begins_anew(ckpt: Checkpointer) -> None:
    job = Job(ckpt, {0: kill_rank(0)})
    (recovery,) = ckpt.supervise(job.make, job.train).recoveries
    assert (recovery.restored, job.starts) == (None, [0, 0])
    job.is_whole()


def test_a_worker_that_dies_in_a_save(ckpt: Checkpointer) -> None:
    def doom(team: list[Any]) -> None:
        ray.get(team[2].look.remote(lambda holder: setattr(holder, "get_state", lambda: os._exit(1))))

    job = Job(ckpt, {2: doom})
    (recovery,) = ckpt.supervise(job.make, job.train).recoveries
    assert (recovery.lost, job.starts) == ((2,), [0, 2])
    assert "WorkerFailuresError" in recovery.error
    job.is_whole()


def test_a_worker_that_dies_in_the_restore(ckpt: Checkpointer) -> None:
    job = Job(ckpt, {2: kill_rank(0)})
    make = job.make

    def make_and_doom() -> list[Any]:
        team = make()
        if len(job.teams) == 2:
            ray.get(team[1].look.remote(lambda holder: setattr(holder, "set_state", lambda _: os._exit(1))))
        return team

    (recovery,) = ckpt.supervise(make_and_doom, job.train).recoveries
    assert (recovery.attempts, job.starts, len(job.teams)) == (2, [0, 2], 3)
    assert all(ended(worker) for worker in job.teams[1])
    job.is_whole()


def test_a_new_checkpoint_resets_the_limit(ckpt: Checkpointer) -> None:
    job = Job(ckpt, {step: kill_rank(step % WORKERS) for step in range(1, STEPS)})
    report = ckpt.supervise(job.make, job.train, max_failures=1)
    assert len(report.recoveries) == STEPS - 1
    job.is_whole()


def test_the_coordinator_may_die_together_with_a_worker(ckpt: Checkpointer) -> None:
    def kill_both(team: list[Any]) -> None:
        kill_process(pid_of(link(ckpt)))
        kill_process(pid_of(team[0]))

    job = Job(ckpt, {2: kill_both})
    (recovery,) = ckpt.supervise(job.make, job.train).recoveries
    assert (recovery.lost, job.starts) == ((0,), [0, 2])
    job.is_whole()


def save_alone(holder: Any, handle: Any, step: int) -> int:
    return int(handle.save(step, holder.state).result(WAIT_S).step)


def test_workers_that_save_by_themselves(ckpt: Checkpointer) -> None:
    job = Job(ckpt)
    accidents = [2]

    def train(workers: Sequence[Any], restored: RestoreReport | None) -> None:
        handles = [ckpt.worker(rank, WORKERS) for rank in range(WORKERS)]
        step = 0 if restored is None else restored.step
        job.starts.append(step)
        while step < STEPS:
            step = ray.get([worker.look.remote(advance) for worker in workers], timeout=WAIT_S)[0]
            saving = list(zip(workers, handles, strict=True))
            if accidents == [step]:  # rank 0 has joined the save, and waits for one that dies before it does
                accidents.clear()
                waiting = workers[0].look.remote(save_alone, handles[0], step)
                until(lambda: "joining" in state_of_saves(link(ckpt)), "rank 0 has joined")
                kill_process(pid_of(workers[1]))
                ray.get([waiting, workers[1].take.remote()])
            ray.get([w.look.remote(save_alone, handle, step) for w, handle in saving], timeout=WAIT_S)

    (recovery,) = ckpt.supervise(job.make, train).recoveries
    assert (recovery.lost, job.starts) == ((1,), [0, 1])
    job.is_whole()


def test_saves_that_fail_with_a_loss_are_told_in_the_report(cluster: Any, gate: Gate) -> None:
    """And not by the next save, which has nothing to do with them."""
    with gate.new_run(join_timeout_s=20) as ckpt:

        def lose_the_save(team: list[Any]) -> None:
            ray.get([worker.look.remote(advance) for worker in team])
            gate.close()
            ckpt.save(99, team)
            assert gate.waiting.wait(WAIT_S)
            ray.kill(link(ckpt), no_restart=False)
            for server in servers_of_gate:
                kill_process(pid_of(server))
            gate.open()
            kill_process(pid_of(team[0]))

        servers_of_gate: list[Any] = []

        def train(workers: Sequence[Any], restored: RestoreReport | None) -> str:
            servers_of_gate[:] = servers(ckpt).values()
            return job.train(workers, restored)

        job = Job(ckpt, {2: lose_the_save})
        (recovery,) = ckpt.supervise(job.make, train).recoveries
        assert len(recovery.failed_saves) == 1
        assert recovery.failed_saves[0].startswith("step 99: ")
        job.is_whole()


def test_a_node_is_killed_and_the_job_goes_on_with_fewer_workers(ckpt: Checkpointer, cluster: Any) -> None:
    """Last, as it takes a node away. `make_workers` looks at the cluster, which may not know of the death yet."""

    def kill_node(_team: list[Any]) -> None:
        node = cluster.worker_nodes.copy().pop()
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            process.kill()
        cluster.remove_node(node, allow_graceful=False)

    job = Job(ckpt, {3: kill_node})

    def make() -> list[Any]:
        job.teams.append(on_nodes(sum(node["Alive"] for node in ray.nodes())))
        return with_state(job.teams[-1])

    (recovery,) = ckpt.supervise(make, job.train).recoveries
    assert len(recovery.lost) == 1
    assert recovery.restored is not None
    assert (recovery.restored.step, recovery.restored.world_size, recovery.restored.saved_world_size) == (3, 1, 2)
    job.is_whole()
