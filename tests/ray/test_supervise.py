"""A supervised training loop: real processes are killed under it, and it goes on from its newest checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from rl_ckpt import Checkpointer, RestoreReport
from rl_ckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptionError,
    InvalidInputError,
    StorageError,
    WorkerFailuresError,
)
from rl_ckpt.runtime import supervise
from tests.ray.gated_s3 import Gate
from tests.ray.holders import (
    HEALTH,
    WAIT_S,
    Holder,
    flip_bit,
    kill_process,
    link,
    on_nodes,
    pid_of,
    same,
    servers,
    several_nodes,
    states_of,
    until,
)

WORKERS, STEPS = 3, 5


def fresh(rank: int) -> dict[str, Any]:
    return {"w": np.zeros(1000), "own": np.full(10, 100.0 * rank), "step": 0}


def trained(rank: int, steps: int) -> dict[str, Any]:
    """What `advance` makes of a fresh state."""
    return {"w": np.full(1000, float(steps)), "own": np.full(10, 100.0 * rank + steps), "step": steps}


def advance(holder: Any) -> int:
    state = holder.state
    state["w"] = state["w"] + 1
    state["own"] = state["own"] + 1
    state["step"] += 1
    return int(state["step"])


def die(_holder: Any) -> None:
    os._exit(1)


def with_state(workers: list[Any]) -> list[Any]:
    ray.get([worker.put.remote(fresh(rank)) for rank, worker in enumerate(workers)], timeout=WAIT_S)
    return workers


class Job:
    """Trains for a number of steps with a save after each, and meets with an accident before some of them."""

    def __init__(self, ckpt: Checkpointer, accidents: dict[int, Callable[[list[Any]], None]] | None = None) -> None:
        self.ckpt = ckpt
        self.accidents = dict(accidents or {})
        self.teams: list[list[Any]] = []
        self.starts: list[int] = []

    def make(self) -> list[Any]:
        self.teams.append([Holder.remote() for _ in range(WORKERS)])
        return with_state(self.teams[-1])

    def train(self, workers: Sequence[Any], restored: RestoreReport | None) -> str:
        team, step = list(workers), 0 if restored is None else restored.step
        self.starts.append(step)
        while step < STEPS:
            self.accidents.pop(step, lambda _: None)(team)
            step = ray.get([worker.look.remote(advance) for worker in team], timeout=WAIT_S)[0]
            self.ckpt.save(step, team).result(WAIT_S)
        return "done"

    def is_whole(self) -> None:
        """The state is that of a job that lost nothing, and so is every checkpoint."""
        for rank, found in enumerate(states_of(self.teams[-1])):
            same(found, trained(rank, STEPS))
        assert [info.step for info in self.ckpt.checkpoints()] == list(range(1, STEPS + 1))


def kill_rank(rank: int) -> Callable[[list[Any]], None]:
    return lambda team: kill_process(pid_of(team[rank]))


def ended(worker: Any) -> bool:
    try:
        ray.get(worker.take.remote(), timeout=WAIT_S)
    except ray.exceptions.RayActorError:
        return True
    return False


@pytest.fixture(scope="module")
def cluster(_no_aws_settings_from_outside: None) -> Iterator[Any]:
    with several_nodes(2, HEALTH) as made:
        yield made


@pytest.fixture
def ckpt(tmp_path: Path, cluster: Any) -> Iterator[Checkpointer]:
    with Checkpointer(str(tmp_path / "run"), join_timeout_s=20) as made:
        yield made


@pytest.fixture
def untiered(tmp_path: Path, cluster: Any) -> Iterator[Checkpointer]:
    """Only the store has checkpoints."""
    with Checkpointer(str(tmp_path / "run"), join_timeout_s=20, memory_tier=False) as made:
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


def test_make_workers_may_fail_while_a_death_is_not_known_yet(ckpt: Checkpointer) -> None:
    job = Job(ckpt)
    calls: list[int] = []
    dead: Any = Holder.remote()
    kill_process(pid_of(dead))

    def make() -> list[Any]:
        calls.append(len(calls))
        if len(calls) < 3:
            ray.get(dead.take.remote())
        return job.make()

    assert ckpt.supervise(make, job.train).recoveries == ()
    assert len(calls) == 3
    job.is_whole()


def test_no_new_workers_in_time(ckpt: Checkpointer) -> None:
    dead: Any = Holder.remote()
    kill_process(pid_of(dead))
    calls: list[int] = []

    def make() -> list[Any]:
        calls.append(1)
        return list(ray.get([dead.take.remote()]))

    with pytest.raises(WorkerFailuresError, match=r"within 1 s, after \d+ attempts") as caught:
        ckpt.supervise(make, Job(ckpt).train, recover_timeout_s=1)
    assert isinstance(caught.value.__cause__, ray.exceptions.RayActorError)
    assert f"after {len(calls)} attempts" in str(caught.value)
    assert len(calls) >= 2


def test_a_store_that_fails_at_the_first_start_is_said_at_once(
    ckpt: Checkpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def restore(_workers: Sequence[Any]) -> RestoreReport:
        raise StorageError("access denied")

    monkeypatch.setattr(ckpt, "restore", restore)
    job = Job(ckpt)
    with pytest.raises(StorageError, match="access denied"):
        ckpt.supervise(job.make, job.train)
    assert len(job.teams) == 1


def test_a_store_that_fails_until_the_end_of_a_recovery_is_what_is_raised(
    ckpt: Checkpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def restore(_workers: Sequence[Any]) -> RestoreReport:
        raise StorageError("no connection")

    def lose(team: list[Any]) -> None:
        monkeypatch.setattr(ckpt, "restore", restore)
        kill_rank(1)(team)

    job = Job(ckpt, {2: lose})
    with pytest.raises(StorageError, match="no connection"):
        ckpt.supervise(job.make, job.train, recover_timeout_s=0)
    assert len(job.teams) == 2


def test_losses_without_progress_are_limited(ckpt: Checkpointer) -> None:
    job = Job(ckpt)
    starts: list[int] = []

    def train(workers: Sequence[Any], _restored: RestoreReport | None) -> None:
        starts.append(1)
        kill_process(pid_of(workers[1]))
        ray.get([worker.look.remote(advance) for worker in workers])

    with pytest.raises(WorkerFailuresError, match="gave up after 3 losses in a row with no new checkpoint") as caught:
        ckpt.supervise(job.make, train, max_failures=2)
    assert len(starts) == len(job.teams) == 3
    assert isinstance(caught.value.__cause__, ray.exceptions.RayActorError)
    assert caught.value.lost == (1,)


def test_a_new_checkpoint_resets_the_limit(ckpt: Checkpointer) -> None:
    job = Job(ckpt, {step: kill_rank(step % WORKERS) for step in range(1, STEPS)})
    report = ckpt.supervise(job.make, job.train, max_failures=1)
    assert len(report.recoveries) == STEPS - 1
    job.is_whole()


def raise_value_error(_holder: Any) -> None:
    raise ValueError("a bug")


def test_errors_of_the_users_code_are_raised_at_once(ckpt: Checkpointer) -> None:
    def bug(team: list[Any]) -> None:
        ray.get(team[0].look.remote(raise_value_error))

    job = Job(ckpt, {2: bug})
    with pytest.raises(ValueError, match="a bug"):
        ckpt.supervise(job.make, job.train)
    assert len(job.teams) == 1
    assert [ended(worker) for worker in job.teams[0]] == [False] * WORKERS


def test_a_get_state_that_raises_is_no_loss(ckpt: Checkpointer) -> None:
    def spoil(team: list[Any]) -> None:
        ray.get(team[0].look.remote(lambda holder: setattr(holder, "get_state", lambda: 1 / 0)))

    job = Job(ckpt, {2: spoil})
    with pytest.raises(WorkerFailuresError, match="ZeroDivisionError") as caught:
        ckpt.supervise(job.make, job.train)
    assert (caught.value.lost, len(job.teams)) == ((), 1)


class FailsInInit:
    def __init__(self) -> None:
        raise ValueError("no such file")


def test_workers_whose_constructor_raises_are_made_once(ckpt: Checkpointer) -> None:
    calls: list[int] = []

    def make() -> list[Any]:
        calls.append(1)
        failing: Any = ray.remote(num_cpus=0)(FailsInInit)
        return [failing.remote()]

    with pytest.raises(CheckpointError, match="no such file"):
        ckpt.supervise(make, Job(ckpt).train)
    assert calls == [1]


def test_what_the_user_names_counts_as_a_loss(ckpt: Checkpointer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "_SILENCE_S", 1.0)

    def hang(team: list[Any]) -> None:
        ray.get(team[0].look.remote(lambda _: __import__("time").sleep(600)), timeout=0.1)

    job = Job(ckpt, {2: hang})
    with pytest.raises(ray.exceptions.GetTimeoutError):
        ckpt.supervise(job.make, job.train)
    again = Job(ckpt, {3: hang})
    (recovery,) = ckpt.supervise(again.make, again.train, retry_on=[ray.exceptions.GetTimeoutError]).recoveries
    assert (recovery.lost, again.starts) == ((), [2, 3])
    again.is_whole()


def test_an_error_of_the_store_is_a_loss_only_where_a_worker_is_lost(ckpt: Checkpointer) -> None:
    def refuse(_team: list[Any]) -> None:
        raise StorageError("the store refused")

    def refuse_and_kill(team: list[Any]) -> None:
        kill_process(pid_of(team[2]))
        raise StorageError("a shard server could not be reached")

    job = Job(ckpt, {2: refuse})
    with pytest.raises(StorageError, match="refused"):
        ckpt.supervise(job.make, job.train)
    assert len(job.teams) == 1
    again = Job(ckpt, {2: refuse_and_kill})
    (recovery,) = ckpt.supervise(again.make, again.train).recoveries
    assert (recovery.lost, again.starts) == ((2,), [2, 2])
    again.is_whole()


def test_damage_is_raised_and_not_tried_again(untiered: Checkpointer, tmp_path: Path) -> None:
    def damage(team: list[Any]) -> None:
        for folder in (tmp_path / "run" / "shards").iterdir():
            flip_bit(folder)
        kill_process(pid_of(team[0]))

    job = Job(untiered, {1: damage})
    with pytest.raises(CorruptionError):
        untiered.supervise(job.make, job.train)
    assert len(job.teams) == 2


def test_it_never_begins_anew_once_there_was_a_checkpoint(untiered: Checkpointer, tmp_path: Path) -> None:
    def lose_all(team: list[Any]) -> None:
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        kill_process(pid_of(team[0]))

    job = Job(untiered, {1: lose_all})
    with pytest.raises(CheckpointNotFoundError):
        untiered.supervise(job.make, job.train)
    assert job.starts == [0]
    (tmp_path / "elsewhere").rename(tmp_path / "run")


def test_an_interrupt_goes_through(ckpt: Checkpointer) -> None:
    def interrupt(_team: list[Any]) -> None:
        raise KeyboardInterrupt

    job = Job(ckpt, {2: interrupt})
    with pytest.raises(KeyboardInterrupt):
        ckpt.supervise(job.make, job.train)
    assert [ended(worker) for worker in job.teams[0]] == [False] * WORKERS


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
                until(lambda: "joining" in ray.get(link(ckpt).__ray_call__.remote(_states)), "rank 0 has joined")
                kill_process(pid_of(workers[1]))
                ray.get([waiting, workers[1].take.remote()])
            ray.get([w.look.remote(save_alone, handle, step) for w, handle in saving], timeout=WAIT_S)

    (recovery,) = ckpt.supervise(job.make, train).recoveries
    assert (recovery.lost, job.starts) == ((1,), [0, 1])
    job.is_whole()


def _states(coordinator: Any) -> list[str]:
    return list(coordinator._saves.states().values())


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


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"max_failures": -1}, "max_failures"),
        ({"max_failures": True}, "max_failures"),
        ({"retry_on": [KeyboardInterrupt]}, "retry_on"),
        ({"retry_on": ["ValueError"]}, "retry_on"),
        ({"recover_timeout_s": "1"}, "recover_timeout_s"),
        ({"settle_timeout_s": float("nan")}, "settle_timeout_s"),
    ],
)
def test_bad_arguments(ckpt: Checkpointer, what: dict[str, Any], message: str) -> None:
    job = Job(ckpt)
    with pytest.raises(InvalidInputError, match=message):
        ckpt.supervise(job.make, job.train, **what)
    assert job.teams == []


@pytest.mark.parametrize(("returned", "message"), [([], "no workers"), ([7], "rank 0, no actor handle")])
def test_make_workers_that_returns_no_workers(ckpt: Checkpointer, returned: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        ckpt.supervise(lambda: returned, Job(ckpt).train)


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
