"""Saves and restores called from inside the workers: every rank calls, in any kind of actor."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from rl_ckpt import Checkpointer
from rl_ckpt.errors import (
    CheckpointNotFoundError,
    InvalidInputError,
    SaveTimeoutError,
    StorageError,
    WorkerFailuresError,
)
from tests.ray.holders import WAIT_S, AsyncHolder, Holder, HolderBase, copied, give, link, same, states_of
from tests.ray.stops import fail, hold, stop

pytestmark = pytest.mark.usefixtures("ray_node")


def state(rank: int, step: int = 0) -> dict[str, Any]:
    return {"w": np.arange(1000.0) + step, "own": np.full(10, rank), "n": step}


def save(holder: Any, handle: Any, step: int) -> Any:
    return handle.save(step, holder.state, metrics={"loss": 0.5}, tag="kept").result(WAIT_S)


def save_fails(holder: Any, handle: Any, step: int) -> Any:
    """The error of a save, as a value."""
    try:
        handle.save(step, holder.state).result(WAIT_S)
    except (InvalidInputError, WorkerFailuresError, SaveTimeoutError) as error:
        return error
    return None


def restore(holder: Any, handle: Any) -> Any:
    holder.state = handle.restore(holder.state)
    return handle.last_restored.step


def restore_nothing_given(holder: Any, handle: Any) -> Any:
    return handle.restore()


def on_all(workers: list[Any], what: Any, *args: Any, handles: list[Any]) -> list[Any]:
    calls = [w.look.remote(what, handle, *args) for w, handle in zip(workers, handles, strict=True)]
    return list(ray.get(calls, timeout=WAIT_S))


def go_back(holder: Any, handle: Any) -> Any:
    """Restores step 5, and saves steps 6, which fails, and 7; gives its lineage."""
    holder.state = handle.restore(holder.state, step=5)
    with pytest.raises(StorageError, match="disk is full"):
        handle.save(6, holder.state).result(WAIT_S)
    return handle.save(7, holder.state).result(WAIT_S).lineage


@pytest.fixture(scope="module")
def workers(ray_node: None) -> list[Any]:
    return [Holder.remote() for _ in range(2)]


@pytest.fixture(scope="module")
def ckpt(ray_node: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Checkpointer(str(tmp_path_factory.mktemp("run") / "run"), join_timeout_s=20) as made:
        yield made


@pytest.fixture
def handles(ckpt: Checkpointer) -> list[Any]:
    return [ckpt.worker(rank, 2) for rank in range(2)]


@pytest.mark.parametrize("inside", [False, True])
def test_a_job_that_went_back_stays_there_though_its_first_save_fails(
    tmp_path: Path, workers: list[Any], inside: bool
) -> None:
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        infos = []
        for step in (5, 6, 7):
            give(workers, [state(rank, step) for rank in range(2)])
            infos.append(ckpt.save(step, workers).result(WAIT_S))
        fail(link(ckpt), "commit", StorageError("the disk is full"))
        if inside:
            found = on_all(workers, go_back, handles=[ckpt.worker(rank, 2) for rank in range(2)])
        else:
            ckpt.restore(workers, step=5)
            with pytest.raises(StorageError, match="disk is full"):
                ckpt.save(6, workers).result(WAIT_S)
            found = [ckpt.save(7, workers).result(WAIT_S).lineage]
        assert set(found) == {(infos[0].id,)}


@pytest.mark.parametrize("alike", [True, False])
def test_a_save_continues_one_of_its_branch_that_is_still_being_written(
    tmp_path: Path, workers: list[Any], alike: bool
) -> None:
    """Whether its state has the shape of the last one, and so comes by another message, or not."""
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        for step in (5, 6):
            give(workers, [state(rank, step) for rank in range(2)])
            ckpt.save(step, workers).result(WAIT_S)
        ckpt.restore(workers, step=5)
        at = stop(tmp_path, "commit")
        hold(link(ckpt), at, "rl_ckpt.store.committer", "entries")
        first = ckpt.save(7, workers)
        give(workers, [state(rank, 8) | ({} if alike else {"more": np.ones(3)}) for rank in range(2)])
        second = ckpt.save(8, workers)
        assert not first.done()
        at.passed.touch()
        assert second.result(WAIT_S).lineage[0] == first.result(WAIT_S).id


def test_every_rank_saves_and_restores_its_own_state(tmp_path: Path, workers: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        handles = [ckpt.worker(rank, 2) for rank in range(2)]
        give(workers, [state(rank, 3) for rank in range(2)])
        infos = on_all(workers, save, 3, handles=handles)
        assert {info.id for info in infos} == {ckpt.checkpoints()[0].id}
        assert (infos[0].metrics, infos[0].tag, infos[0].world_size) == ({"loss": 0.5}, "kept", 2)
        give(workers, [state(9, 9) for _ in range(2)])
        assert on_all(workers, restore, handles=handles) == [3, 3]
        for rank, found in enumerate(states_of(workers)):
            same(found, state(rank, 3))


def test_restores_one_after_the_other_all_end(workers: list[Any], ckpt: Checkpointer, handles: list[Any]) -> None:
    give(workers, [state(rank, 1) for rank in range(2)])
    on_all(workers, save, 1, handles=handles)
    for _ in range(20):
        assert on_all(workers, restore, handles=handles) == [1, 1]


def test_a_handle_pickles_and_a_rank_without_state_gets_what_was_saved(
    workers: list[Any], ckpt: Checkpointer, handles: list[Any]
) -> None:
    give(workers, [state(rank, 2) for rank in range(2)])
    on_all(workers, save, 2, handles=handles)
    again = [pickle.loads(pickle.dumps(handle)) for handle in handles]
    assert [(h.rank, h.world_size) for h in again] == [(0, 2), (1, 2)]
    for rank, tree in enumerate(on_all(workers, restore_nothing_given, handles=again)):
        same(tree, state(rank, 2))


@pytest.mark.parametrize("kind", [HolderBase, AsyncHolder])
def test_threaded_and_async_actors_save_and_restore(kind: type, tmp_path: Path) -> None:
    ckpt = Checkpointer(str(tmp_path / "run"))
    actor: Any = ray.remote(num_cpus=0)(kind)
    actors = [actor.options(max_concurrency=4).remote() for _ in range(2)]
    handles = [ckpt.worker(rank, 2) for rank in range(2)]
    give(actors, [state(rank, 5) for rank in range(2)])
    if kind is AsyncHolder:
        saves = [a.save_async.remote(h, 5) for a, h in zip(actors, handles, strict=True)]
        assert {info.step for info in ray.get(saves, timeout=WAIT_S)} == {5}
    else:
        assert {info.step for info in on_all(actors, save, 5, handles=handles)} == {5}
    give(actors, [state(0, 0) for _ in range(2)])
    if kind is AsyncHolder:
        ray.get([a.restore_async.remote(h) for a, h in zip(actors, handles, strict=True)], timeout=WAIT_S)
    else:
        on_all(actors, restore, handles=handles)
    for rank, found in enumerate(states_of(actors)):
        same(found, state(rank, 5))
    ckpt.save(6, actors).result(WAIT_S)  # and from the driver
    give(actors, [state(0, 0) for _ in range(2)])
    assert ckpt.restore(actors).step == 6
    ckpt.close()


def test_one_rank_fails_the_others_are_told_and_a_retry_works(
    workers: list[Any], ckpt: Checkpointer, handles: list[Any]
) -> None:
    give(workers, [state(0, 10), {"w": object()}])
    errors = on_all(workers, save_fails, 10, handles=handles)
    for error in errors:
        assert isinstance(error, InvalidInputError)
        assert "w: a builtins.object" in str(error)
    give(workers, [state(rank, 10) for rank in range(2)])
    assert {info.step for info in on_all(workers, save, 10, handles=handles)} == {10}


def test_ranks_that_disagree_on_the_world_size_are_told(workers: list[Any], ckpt: Checkpointer) -> None:
    give(workers, [state(rank, 11) for rank in range(2)])
    errors = on_all(workers, save_fails, 11, handles=[ckpt.worker(0, 2), ckpt.worker(1, 3)])
    assert all(isinstance(error, InvalidInputError) for error in errors)
    assert "workers, others say" in str(errors[0])


def test_ranks_that_disagree_on_the_step_time_out_by_name(tmp_path: Path, workers: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run"), join_timeout_s=1.0) as ckpt:
        give(workers, [state(rank) for rank in range(2)])
        calls = [worker.look.remote(save_fails, ckpt.worker(rank, 2), 20 + rank) for rank, worker in enumerate(workers)]
        errors = ray.get(calls, timeout=WAIT_S)
        assert all(isinstance(error, SaveTimeoutError) for error in errors)
        assert ["ranks [1]" in str(errors[0]), "ranks [0]" in str(errors[1])] == [True, True]
        assert ckpt.checkpoints() == []


def test_a_step_that_is_committed_is_refused_to_every_rank(
    workers: list[Any], ckpt: Checkpointer, handles: list[Any]
) -> None:
    give(workers, [state(rank, 12) for rank in range(2)])
    on_all(workers, save, 12, handles=handles)
    errors = on_all(workers, save_fails, 12, handles=handles)
    assert all("committed already" in str(error) for error in errors)


def test_a_worker_restores_from_a_run_without_checkpoints_with_a_clear_error(
    tmp_path: Path, workers: list[Any]
) -> None:
    with (
        Checkpointer(str(tmp_path / "none")) as ckpt,
        pytest.raises(CheckpointNotFoundError, match="nothing is there yet"),
    ):
        on_all(workers, restore, handles=[ckpt.worker(rank, 2) for rank in range(2)])


def test_the_coordinator_drains_after_failed_joins(workers: list[Any], ckpt: Checkpointer, handles: list[Any]) -> None:
    give(workers, [state(0, 30), {"w": object()}])
    on_all(workers, save_fails, 30, handles=handles)
    ray.get(link(ckpt).drain.remote(), timeout=WAIT_S)


@pytest.mark.parametrize(("rank", "world"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_out_of_range_is_refused(ckpt: Checkpointer, rank: int, world: int) -> None:
    with pytest.raises(InvalidInputError, match="rank="):
        ckpt.worker(rank, world)


def test_states_are_copied_by_the_holders() -> None:
    tree = {"a": np.arange(3)}
    tree["a"].flags.writeable = False
    assert copied(tree)["a"].flags.writeable
