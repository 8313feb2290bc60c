"""What a supervised job does not recover from, and says: bugs, damage, losses without end, bad arguments."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
from tests.ray.holders import (
    Holder,
    flip_bit,
    kill_process,
    pid_of,
)
from tests.ray.jobs import WORKERS, Job, advance, ended, kill_rank


@pytest.fixture
def ckpt(tmp_path: Path, ray_node: None) -> Iterator[Checkpointer]:
    with Checkpointer(str(tmp_path / "run"), join_timeout_s=20) as made:
        yield made


@pytest.fixture
def untiered(tmp_path: Path, ray_node: None) -> Iterator[Checkpointer]:
    """Only the store has checkpoints."""
    with Checkpointer(str(tmp_path / "run"), join_timeout_s=20, memory_tier=False) as made:
        yield made


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


def test_a_store_that_fails_for_a_moment_is_asked_again_in_a_recovery(
    ckpt: Checkpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, real = [StorageError("no connection")], ckpt.restore

    def restore(workers: Sequence[Any]) -> RestoreReport:
        if answers:
            raise answers.pop()
        return real(workers)

    def lose(team: list[Any]) -> None:
        monkeypatch.setattr(ckpt, "restore", restore)
        kill_rank(1)(team)

    job = Job(ckpt, {2: lose})
    (recovery,) = ckpt.supervise(job.make, job.train).recoveries
    assert (recovery.attempts, job.starts, len(job.teams)) == (2, [0, 2], 3)
    job.is_whole()


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
        ray.get(team[0].look.remote(lambda _: threading.Event().wait()), timeout=0.1)

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
