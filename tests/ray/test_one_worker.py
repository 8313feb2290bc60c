"""One lost worker is replaced and restored alone, while the others keep running and keep what they have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from rl_ckpt import Checkpointer, Sharded
from rl_ckpt.errors import InvalidInputError, WorkerFailuresError
from tests.ray.holders import (
    WAIT_S,
    Holder,
    give,
    kill_process,
    link,
    number_of_sets,
    on_nodes,
    pid_of,
    same,
    several_nodes,
    states_of,
)

WORLD = 4


def state(rank: int, step: int) -> dict[str, Any]:
    return {
        "w": np.arange(50_000.0) + step,
        "own": np.full(1000, 1000.0 * rank + step),
        "rank": rank,
    }


@pytest.fixture(scope="module")
def cluster(_no_aws_settings_from_outside: None) -> Iterator[Any]:
    with several_nodes(2) as made:
        yield made


@pytest.fixture
def ckpt(tmp_path: Path, cluster: Any) -> Iterator[Checkpointer]:
    with Checkpointer(str(tmp_path / "run"), join_timeout_s=20) as made:
        yield made


@pytest.fixture
def workers(ckpt: Checkpointer) -> list[Any]:
    """A team that has saved steps 0 and 1, trained on to 2, and then lost rank 2."""
    team = on_nodes(WORLD)
    for step in (0, 1):
        give(team, [state(rank, step) for rank in range(WORLD)])
        ckpt.save(step, team).result(WAIT_S)
    give(team, [state(rank, 2) for rank in range(WORLD)])
    kill_process(pid_of(team[2]))
    assert ckpt.lost_ranks(team) == [2]
    return team


def repeats(ckpt: Checkpointer) -> int:
    return int(ray.get(link(ckpt).stats.remote())["repeats"])


def test_the_replacement_gets_what_its_rank_had_and_the_others_keep_what_they_have(
    ckpt: Checkpointer, workers: list[Any]
) -> None:
    workers[2] = on_nodes(1)[0]
    give([workers[2]], [state(2, 9)])
    report = ckpt.restore([workers[2]], ranks=[2])
    assert (report.step, report.world_size, report.saved_world_size) == (1, 1, WORLD)
    assert (report.ranks_without_counterpart, report.ranks_dropped) == ((), ())
    found = states_of(workers)
    same(found[2], state(2, 1))
    for rank in (0, 1, 3):
        same(found[rank], state(rank, 2))
    assert number_of_sets(workers) == [0, 0, 1, 0]

    # The next save is whole, and so is the one after it, by which time the standing plan holds again for everybody.
    before = repeats(ckpt)
    for step in (3, 4, 5):
        give(workers, [state(rank, step) for rank in range(WORLD)])
        info = ckpt.save(step, workers).result(WAIT_S)
        assert (info.world_size, info.lineage[0]) == (WORLD, ckpt.checkpoints()[-2].id)
    assert repeats(ckpt) == before + 2 * WORLD
    give(workers, [state(rank, 9) for rank in range(WORLD)])
    ckpt.restore(workers, step=3)
    for rank, one in enumerate(states_of(workers)):
        same(one, state(rank, 3))


def test_a_save_that_meets_the_loss_says_which_ranks_to_replace(ckpt: Checkpointer, workers: list[Any]) -> None:
    """The worked example: replace what the error names, and save again."""
    with pytest.raises(WorkerFailuresError) as caught:
        ckpt.save(2, workers)
    assert caught.value.lost == (2,)
    for rank in caught.value.lost:
        workers[rank] = Holder.remote()
        give([workers[rank]], [state(rank, 9)])
    ckpt.restore([workers[rank] for rank in caught.value.lost], ranks=caught.value.lost)
    assert ckpt.save(2, workers).result(WAIT_S).step == 2
    give(workers, [state(rank, 9) for rank in range(WORLD)])
    ckpt.restore(workers)
    found = states_of(workers)
    for rank in range(WORLD):
        same(found[rank]["own"], state(rank, 1 if rank == 2 else 2)["own"])


def test_several_are_restored_in_any_order_and_by_step(ckpt: Checkpointer, workers: list[Any]) -> None:
    pair = on_nodes(2)
    give(pair, [state(rank, 9) for rank in (3, 2)])
    report = ckpt.restore(pair, ranks=[3, 2], step=0)
    assert (report.step, report.world_size) == (0, 2)
    for rank, found in zip((3, 2), states_of(pair), strict=True):
        same(found, state(rank, 0))
    # The others are where they were: the next save continues the newest checkpoint, not the one that was asked for.
    workers[2] = pair[1]
    assert ckpt.save(2, workers).result(WAIT_S).lineage[0] == next(i.id for i in ckpt.checkpoints() if i.step == 1)


def test_what_is_left_alone_is_told_by_saved_rank(ckpt: Checkpointer, workers: list[Any]) -> None:
    one = on_nodes(1)
    give(one, [state(2, 9) | {"new": 1}])
    report = ckpt.restore(one, ranks=[2], strict=False)
    assert report.kept == {2: ("new",)}


def restore_alone(holder: Any, handle: Any, step: int | None) -> int:
    holder.state = handle.restore(holder.state, step=step, alone=True)
    return int(handle.last_restored.step)


def save_alone(holder: Any, handle: Any, step: int) -> Any:
    return handle.save(step, holder.state).result(WAIT_S).lineage[0]


def test_a_worker_restores_itself_alone(ckpt: Checkpointer, workers: list[Any]) -> None:
    handles = [ckpt.worker(rank, WORLD) for rank in range(WORLD)]
    workers[2] = on_nodes(1)[0]
    give([workers[2]], [state(2, 9)])
    assert ray.get(workers[2].look.remote(restore_alone, handles[2], 0), timeout=WAIT_S) == 0
    found = states_of(workers)
    same(found[2], state(2, 0))
    same(found[0], state(0, 2))
    saves = [w.look.remote(save_alone, handle, 2) for w, handle in zip(workers, handles, strict=True)]
    assert set(ray.get(saves, timeout=WAIT_S)) == {next(i.id for i in ckpt.checkpoints() if i.step == 1)}


def test_a_shard_is_found_by_the_box_that_the_replacement_declares(ckpt: Checkpointer) -> None:
    def part(rank: int, value: float) -> dict[str, Any]:
        return {"part": Sharded(np.full(8, value), global_shape=(16,), offset=(8 * rank,))}

    team = on_nodes(2)
    give(team, [part(rank, rank + 1.0) for rank in range(2)])
    ckpt.save(0, team).result(WAIT_S)
    one = on_nodes(1)
    give(one, [part(1, 9.0)])
    ckpt.restore(one, ranks=[1])
    assert np.array_equal(states_of(one)[0]["part"], np.full(8, 2.0))


BAD_RANKS: list[tuple[Any, str]] = [
    ([4], "was saved by ranks 0 … 3"),
    ([-1], "an int of at least 0"),
    ([True], "an int of at least 0"),
    ([2.0], "an int of at least 0"),
    ([1, 2], "names 2 ranks for 1 workers"),
    ([], "names 0 ranks for 1 workers"),
    (2, "must be a list"),
    ("2", "must be a list"),
]


def test_ranks_that_can_not_be(ckpt: Checkpointer) -> None:
    team = on_nodes(WORLD)
    give(team, [state(rank, 0) for rank in range(WORLD)])
    ckpt.save(0, team).result(WAIT_S)
    for ranks, message in BAD_RANKS:
        with pytest.raises(InvalidInputError, match=message):
            ckpt.restore(team[:1], ranks=ranks)
    with pytest.raises(InvalidInputError, match="a rank of its own"):
        ckpt.restore(team[:2], ranks=[1, 1])
    assert number_of_sets(team) == [0] * WORLD


def test_busy_workers_are_not_lost(cluster: Any, ckpt: Checkpointer) -> None:
    team = on_nodes(2)
    ray.get([worker.take.remote() for worker in team])
    team[0].look.remote(lambda _: __import__("threading").Event().wait(600))
    assert ckpt.lost_ranks(team, patience_s=0.5) == []
    kill_process(pid_of(team[1]))
    assert ckpt.lost_ranks(team) == [1]
