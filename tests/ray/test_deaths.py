"""Who dies while a save is under way, in which state of it: the save goes on where it can, else it ends by name.

Real processes, killed by SIGKILL at places where the test holds them (stops.py). After each, the next save works, and
what was committed comes back bit-identical.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from rl_ckpt import Checkpointer, PendingSave, PerRank, Replicated
from rl_ckpt.errors import CheckpointError, SaveTimeoutError, WorkerFailuresError
from rl_ckpt.store.pending import in_thread
from tests.ray.holders import (
    HEALTH,
    MEMORY,
    WAIT_S,
    HolderBase,
    give,
    kill_process,
    link,
    memory_files,
    on_nodes,
    pid_of,
    same,
    servers,
    several_nodes,
    states_of,
    until,
)
from tests.ray.stops import Stop, hang, here, hold, state_of_saves, stop

STAGING = "rl_ckpt.runtime.staging"
SERVER = "rl_ckpt.runtime.shard_server"


def shared(step: int = 0) -> dict[str, Any]:
    """What all workers have: nothing of it is lost with one of them."""
    return {
        "w": np.arange(100_000.0) + step,
        "v": np.arange(50_000.0) - step,
        "declared": Replicated(np.arange(30_000.0) * step),
        "step": step,
    }


def plain(step: int = 0) -> dict[str, Any]:
    """The same as it comes back."""
    return shared(step) | {"declared": np.arange(30_000.0) * step}


def own(rank: int, step: int = 0) -> dict[str, Any]:
    return shared(step) | {"own": PerRank(np.full(10, 100.0 * rank + step))}


@pytest.fixture(scope="module")
def cluster(_no_aws_settings_from_outside: None) -> Iterator[Any]:
    with several_nodes(3, HEALTH) as made:
        yield made


@pytest.fixture(scope="module")
def workers(cluster: Any) -> list[Any]:
    """Nobody kills these."""
    return on_nodes(3)


def run(tmp_path: Path, **options: Any) -> Checkpointer:
    return Checkpointer(str(tmp_path / "run"), join_timeout_s=20, chunk_bytes=1 << 18, **options)


def saving(ckpt: Checkpointer, step: int, team: Sequence[Any]) -> Future[PendingSave]:
    """A call of `save` that the test does not wait for."""
    work: Any = lambda: ckpt.save(step, team)  # noqa: E731 - the helper is typed for results of saves
    call: Any = in_thread(work, f"save-{step}")
    found: Future[PendingSave] = call
    return found


def comes_back(ckpt: Checkpointer, workers: Sequence[Any], step: int) -> None:
    give(workers, [{}] * len(workers))
    assert ckpt.restore(workers, strict=False).step == step
    for found in states_of(workers):
        same({k: found[k] for k in plain()}, plain(step))


def saves_again(ckpt: Checkpointer, workers: Sequence[Any], step: int) -> None:
    give(workers, [shared(step)] * len(workers))
    assert ckpt.save(step, workers).result(WAIT_S).step == step
    comes_back(ckpt, workers, step)


def late(at: Stop, state: Any) -> Callable[[], Any]:
    """A state that is there once the test lets it be."""

    def wait() -> Any:
        at.wait()
        return state

    return wait


# Workers.


def test_a_worker_that_dies_while_another_is_late_is_replaced(tmp_path: Path, workers: list[Any]) -> None:
    team, at = [workers[0], on_nodes(2)[1], workers[2]], stop(tmp_path, "late")
    with run(tmp_path) as ckpt:
        give(team, [shared(1), shared(1), late(at, shared(1))])
        pid = pid_of(team[1])
        save = saving(ckpt, 1, team)
        at.reached()
        until(lambda: here(link(ckpt)) == {0, 1}, "two have joined")
        kill_process(pid)
        at.go()
        assert save.result(WAIT_S).result(WAIT_S).world_size == 3
        comes_back(ckpt, workers, 1)


@pytest.mark.parametrize("repeated", [False, True], ids=["first", "repeated"])
def test_a_worker_that_dies_while_it_stages_is_replaced_in_the_same_save(
    tmp_path: Path, workers: list[Any], repeated: bool
) -> None:
    team, at = [workers[0], on_nodes(2)[1], workers[2]], stop(tmp_path, "staging")
    with run(tmp_path) as ckpt:
        for step in range(3 if repeated else 0):
            give(team, [shared(step)] * 3)
            ckpt.save(step, team).result(WAIT_S)
        give(team, [shared(9)] * 3)
        hold(team[1], at, STAGING, "stage_repeat" if repeated else "stage")
        pid = pid_of(team[1])
        save = saving(ckpt, 9, team)
        at.reached()
        kill_process(pid)
        if repeated:  # it stages before it asks: it has not joined, and the save ends by its name
            with pytest.raises(WorkerFailuresError, match="rank 1 is dead"):
                save.result(WAIT_S)
        else:
            info = save.result(WAIT_S).result(WAIT_S)
            assert info.world_size == 3
            comes_back(ckpt, workers, 9)
        saves_again(ckpt, workers, 10)
        saves_again(ckpt, workers, 11)


def test_what_only_the_dead_worker_had_ends_the_save_by_name_and_the_next_one_works(
    tmp_path: Path, workers: list[Any]
) -> None:
    team, at = [workers[0], on_nodes(2)[1], workers[2]], stop(tmp_path, "staging")
    with run(tmp_path) as ckpt:
        saves_again(ckpt, workers, 1)
        give(team, [own(rank, 2) for rank in range(3)])
        hold(team[1], at, STAGING, "stage")
        pid = pid_of(team[1])
        save = saving(ckpt, 2, team)
        at.reached()
        kill_process(pid)
        with pytest.raises(WorkerFailuresError, match="rank 1 died, and only it had 'own'") as failed:
            save.result(WAIT_S)
        assert set(failed.value.failures) == {1}
        assert [info.step for info in ckpt.checkpoints()] == [1]
        comes_back(ckpt, workers, 1)
        rest = [team[0], team[2]]
        give(rest, [own(rank, 2) for rank in range(2)])
        assert ckpt.save(2, rest).result(WAIT_S).world_size == 2


def test_who_takes_over_and_has_trained_meanwhile_ends_the_save_by_name(tmp_path: Path, workers: list[Any]) -> None:
    team, at = [workers[0], on_nodes(2)[1]], stop(tmp_path, "staging")
    with run(tmp_path) as ckpt:
        give(team, [shared(3)] * 2)
        hold(team[1], at, STAGING, "stage")
        pid = pid_of(team[1])
        save = saving(ckpt, 3, team)
        at.reached()
        until(lambda: state_of_saves(link(ckpt)) == {"staging"}, "the orders are given")
        give(team[:1], [shared(4)])  # another driver, say: ours is still in `save`
        kill_process(pid)
        with pytest.raises(CheckpointError, match=r"rank 0: .*changed|other values at"):
            save.result(WAIT_S)
        assert ckpt.checkpoints() == []
        saves_again(ckpt, workers, 5)


# Hangs.


def test_a_worker_that_hangs_is_named_while_the_others_train_on(tmp_path: Path, workers: list[Any]) -> None:
    at = stop(tmp_path, "busy")
    with Checkpointer(str(tmp_path / "run"), join_timeout_s=2) as ckpt:
        saves_again(ckpt, workers, 1)
        busy = workers[1].look.remote(lambda _: at.wait())
        at.reached()
        with pytest.raises(SaveTimeoutError, match=r"ranks \[1\]"):
            ckpt.save(2, workers)
        give([workers[0], workers[2]], [shared(3)] * 2)  # their calls have returned
        at.go()
        ray.get(busy, timeout=WAIT_S)
        saves_again(ckpt, workers, 2)


def test_a_worker_that_hangs_in_staging_is_named_and_never_writes_into_a_later_save(
    tmp_path: Path, workers: list[Any]
) -> None:
    at = stop(tmp_path, "staging")
    with Checkpointer(str(tmp_path / "run"), join_timeout_s=2) as ckpt:
        give(workers, [shared(1)] * 3)
        hold(workers[1], at, STAGING, "stage")
        with pytest.raises(SaveTimeoutError, match=r"ranks \[1\]"):
            ckpt.save(1, workers).result(WAIT_S)
        rest = [workers[0], workers[2]]
        for step in (2, 3, 4):
            saves_again(ckpt, rest, step)
        at.go()
        comes_back(ckpt, rest, 4)
        saves_again(ckpt, workers, 5)


# What a user's methods may do.


class Leaving(HolderBase):
    """Its get_state ends the process, as the user's library sees it."""

    def get_state(self) -> Any:
        raise self.state["raises"]


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(3),
        pytest.param(KeyboardInterrupt(), marks=pytest.mark.soak),
        pytest.param(MemoryError("no more"), marks=pytest.mark.soak),
    ],
    ids=repr,
)
def test_whatever_get_state_raises_the_actor_lives(tmp_path: Path, workers: list[Any], error: BaseException) -> None:
    team = [workers[0], on_nodes(2, Leaving)[1]]
    pid = pid_of(team[1])
    give(team, [shared(), {"raises": error}])
    with run(tmp_path) as ckpt:
        with pytest.raises(WorkerFailuresError, match=type(error).__name__):
            ckpt.save(1, team)
        assert pid_of(team[1]) == pid
        saves_again(ckpt, workers, 1)


# Shard servers.


@pytest.mark.parametrize("when", ["reserving", "staging", "writing"])
def test_a_shard_server_killed_at_any_time_of_a_save_comes_back_and_the_save_commits(
    tmp_path: Path, workers: list[Any], when: str
) -> None:
    at = stop(tmp_path, when)
    with run(tmp_path) as ckpt:
        give(workers, [shared(1)] * 3)
        ckpt.prepare(workers) if when != "reserving" else None
        ckpt.save(1, workers[:2]).result(WAIT_S)  # so that the servers are there
        victim = ray.get_actor(sorted(servers(ckpt))[0], namespace="rl_ckpt")
        old = pid_of(victim)
        give(workers, [shared(2) | ({"more": np.ones(400_000)} if when == "reserving" else {})] * 3)
        if when == "reserving":
            hold(victim, at, "rl_ckpt.runtime.huge_pages", "fill")
        elif when == "staging":
            hold(workers[0], at, STAGING, "stage")
        else:
            hold(victim, at, SERVER, "write_files")
        save = saving(ckpt, 2, workers)
        at.reached()
        kill_process(old)
        at.go()
        assert save.result(WAIT_S).result(WAIT_S).step == 2
        assert until(lambda: pid_of(victim), "it is back") != old
        comes_back(ckpt, workers, 2)
        saves_again(ckpt, workers, 3)


def test_a_shard_server_killed_while_it_stages_ray_objects_stages_them_again(
    tmp_path: Path, workers: list[Any]
) -> None:
    at, team = stop(tmp_path, "objects"), workers[:2]
    with run(tmp_path) as ckpt:
        saves_again(ckpt, team, 1)
        victim = ray.get_actor(sorted(servers(ckpt))[0], namespace="rl_ckpt")
        weights = np.arange(90_000.0)
        reference = ray.put(weights)
        ray.get([w.look.remote(_take_reference, [reference]) for w in team])
        hold(victim, at, SERVER, "stage_objects")
        save = saving(ckpt, 2, team)
        at.reached()
        kill_process(pid_of(victim))
        at.go()
        assert save.result(WAIT_S).result(WAIT_S).step == 2
        np.testing.assert_array_equal(ckpt.load_state(2)["ref"], weights)


def _take_reference(holder: Any, references: list[Any]) -> None:
    holder.state = {"ref": references[0], "b": np.ones(1000)}


def test_staging_memory_wiped_by_hand_costs_one_save(tmp_path: Path, workers: list[Any]) -> None:
    with run(tmp_path) as ckpt:
        for step in (1, 2, 3):
            saves_again(ckpt, workers, step)
        for name in servers(ckpt):
            for file in memory_files(name, "generation-*"):
                (MEMORY / name / file).unlink()
        give(workers, [shared(4)] * 3)
        with contextlib.suppress(CheckpointError):
            ckpt.save(4, workers).result(WAIT_S)
        saves_again(ckpt, workers, 5)


# The coordinator.


def save_inside(holder: Any, handle: Any, step: int) -> int:
    """Worker mode: a rank saves what it has."""
    return int(handle.save(step, holder.get_state()).result(WAIT_S).step)


def hold_save(ckpt: Checkpointer, workers: list[Any], when: str, at: Stop, step: int) -> None:
    give(workers, [shared(step)] * 3)
    if when == "joining":
        give(workers[2:], [late(at, shared(step))])
    elif when == "reserving":
        hang(link(ckpt), at, "name")
    elif when == "staging":
        hold(workers[2], at, STAGING, "stage")
    elif when == "writing":
        hold(servers(ckpt)[sorted(servers(ckpt))[0]], at, SERVER, "write_files")
    else:
        hang(link(ckpt), at, "commit", after=when == "committed")


def by_driver(ckpt: Checkpointer, workers: list[Any]) -> Callable[[], list[Any]]:
    save = saving(ckpt, 2, workers)
    return lambda: [save.result(WAIT_S).result(WAIT_S).step]


def by_workers(ckpt: Checkpointer, workers: list[Any]) -> Callable[[], list[Any]]:
    calls = [worker.look.remote(save_inside, ckpt.worker(rank, 3), 2) for rank, worker in enumerate(workers)]
    return lambda: [_of(call) for call in calls]


KILLS = [(when, "driver") for when in ("joining", "reserving", "staging", "writing", "committing", "committed")]
KILLS += [(when, "workers") for when in ("joining", "staging", "committed")]
LONG = {("reserving", "driver"), ("staging", "driver"), ("joining", "workers"), ("committed", "workers")}


@pytest.mark.parametrize(
    ("when", "mode"),
    [pytest.param(*kill, id="-".join(kill), marks=[pytest.mark.soak] if kill in LONG else []) for kill in KILLS],
)
def test_the_coordinator_killed_in_any_state_leaves_the_save_whole_or_absent(
    tmp_path: Path, workers: list[Any], when: str, mode: str
) -> None:
    at = stop(tmp_path, when)
    with run(tmp_path) as ckpt:
        saves_again(ckpt, workers, 1)
        hold_save(ckpt, workers, when, at, 2)
        outcomes = by_driver(ckpt, workers) if mode == "driver" else by_workers(ckpt, workers)
        at.reached()
        old = pid_of(link(ckpt))
        if when == "joining":
            until(lambda: here(link(ckpt)) == {0, 1}, "two have joined")
        kill_process(old)
        at.go()
        if when == "committed":
            assert set(outcomes()) == {2}
        else:
            with pytest.raises(CheckpointError):
                outcomes()
        assert [info.step for info in ckpt.checkpoints()] == ([1, 2] if when == "committed" else [1])
        until(lambda: pid_of(link(ckpt)) != old, "the coordinator is back")
        for step in (3, 4) if when == "committed" else (2, 3):
            saves_again(ckpt, workers, step)
        for name in servers(ckpt):
            assert len(memory_files(name, "generation-*")) <= 3, "what the dead one knew of is not left"


def _of(call: Any) -> Any:
    try:
        return ray.get(call, timeout=WAIT_S)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, CheckpointError):
            raise error.cause from error
        raise


# Nodes; last of those that share the cluster.


def lose_node(cluster: Any, node: Any) -> None:
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in [raylet, *raylet.children(recursive=True)]:
        process.kill()
    cluster.remove_node(node, allow_graceful=False)


def on_node(node: Any) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    kind = ray.remote(num_cpus=0)(HolderBase)
    return kind.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)).remote()


def doomed(cluster: Any, ckpt: Checkpointer) -> Any:
    """A node on which the run's coordinator is not."""
    ray.get(link(ckpt).stats.remote())
    node = cluster.add_node(num_cpus=2, object_store_memory=80 << 20)
    cluster.wait_for_nodes()
    return node


def test_a_node_that_dies_while_it_stages_is_replaced_in_the_same_save(
    tmp_path: Path, cluster: Any, workers: list[Any]
) -> None:
    with run(tmp_path) as ckpt:
        node, at = doomed(cluster, ckpt), stop(tmp_path, "staging")
        team = [workers[0], workers[1], on_node(node)]
        give(team, [shared(1)] * 3)
        hold(team[2], at, STAGING, "stage")
        save = saving(ckpt, 1, team)
        at.reached()
        lose_node(cluster, node)
        assert save.result(WAIT_S).result(WAIT_S).step == 1
        comes_back(ckpt, workers, 1)
        saves_again(ckpt, workers, 2)


@pytest.mark.parametrize("copied", [False, True], ids=["alone", "copied"])
def test_a_node_that_dies_while_it_writes(tmp_path: Path, cluster: Any, workers: list[Any], copied: bool) -> None:
    """A buddy that has a copy writes in its place; else the save ends by name, and the next one works."""
    with run(tmp_path, memory_tier=copied) as ckpt:
        node, at = doomed(cluster, ckpt), stop(tmp_path, "writing")
        team = [workers[0], workers[1], on_node(node)]
        saves_again(ckpt, team, 1)
        give(team, [shared(2)] * 3)
        lost = next(name for name in servers(ckpt) if name.endswith(node.node_id[:16]))
        hold(servers(ckpt)[lost], at, SERVER, "write_files")
        pending = ckpt.save(2, team)
        at.reached()
        if copied:
            others = [name for name in servers(ckpt) if name != lost]
            until(lambda: any(memory_files(name, f"held-part-2-*{lost}") for name in others), "a buddy has a copy")
        lose_node(cluster, node)
        if copied:
            assert pending.result(WAIT_S).step == 2
        else:
            with pytest.raises(WorkerFailuresError, match=lost):
                pending.result(WAIT_S)
        comes_back(ckpt, workers, 2 if copied else 1)
        saves_again(ckpt, workers, 3)
