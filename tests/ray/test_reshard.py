"""Saved by N workers, restored onto M: replicated, sharded and per-rank state, on real actors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from rl_ckpt import Checkpointer, PerRank, Sharded
from tests.ray.holders import WAIT_S, Holder, HolderBase, copied, give, same, states_of

pytestmark = pytest.mark.usefixtures("ray_node")

PAIRS = [(1, 4), (4, 1), (2, 3), (3, 8), (8, 2), (4, 4)]
TABLE = np.arange(17 * 6, dtype="f4").reshape(17, 6)


@pytest.fixture(scope="module")
def pool(ray_node: None) -> list[Any]:
    return [Holder.remote() for _ in range(8)]


@pytest.fixture(scope="module")
def ckpt(ray_node: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpointer]:
    """One for all numbers of workers: each saves a step of its own."""
    with Checkpointer(str(tmp_path_factory.mktemp("run")), chunk_bytes=64) as made:
        yield made


def rows(rank: int, world: int) -> slice:
    """Uneven parts: the first rank gets what does not divide."""
    each, rest = divmod(len(TABLE), world)
    start = rank * each + (rest if rank else 0)
    return slice(start, start + each + (0 if rank else rest))


def grid(rank: int, world: int) -> tuple[slice, slice]:
    """Two columns of parts where that divides, else one."""
    wide = 2 if world % 2 == 0 else 1
    tall = world // wide
    cuts = np.linspace(0, len(TABLE), tall + 1).astype(int)
    row, column = divmod(rank, wide)
    step = TABLE.shape[1] // wide
    return slice(cuts[row], cuts[row + 1]), slice(column * step, (column + 1) * step)


def sharded_state(rank: int, world: int, factor: float, fill: bool) -> dict[str, Any]:
    by_rows, by_grid = rows(rank, world), grid(rank, world)
    shared = np.arange(100.0)
    tied = np.arange(5) * factor
    return {
        "shared": shared * factor,
        "rows": Sharded(TABLE[by_rows] * np.float32(factor), TABLE.shape, (by_rows.start, 0)),
        "grid": Sharded(TABLE[by_grid] * np.float32(factor), TABLE.shape, (by_grid[0].start, by_grid[1].start)),
        "rng": PerRank(np.full(3, rank if fill else -1)),
        "own": np.array([rank * 10 if fill else -1]),
        "nested": {"list": [1, (2.5, "x")], 7: np.float32(factor)},
        "tied": [tied, tied],
        "step": int(factor),
    }


def without_declarations(tree: Any) -> Any:
    """What set_state gets."""
    if isinstance(tree, Sharded):
        return tree.array
    if isinstance(tree, PerRank):
        return tree.tree
    if type(tree) in (list, tuple):
        return type(tree)(without_declarations(item) for item in tree)
    if isinstance(tree, dict):
        return {key: without_declarations(value) for key, value in tree.items()}
    return tree


def put_as_one_object(holder: HolderBase, world_rank: tuple[int, int], factor: float, fill: bool) -> None:
    """Made in the actor, so that arrays are the actor's own and tied arrays stay one object."""
    rank, world = world_rank
    holder.state = sharded_state(rank, world, factor, fill)


def give_shards(workers: list[Any], factor: float, *, fill: bool) -> None:
    world = len(workers)
    ray.get([w.look.remote(put_as_one_object, (rank, world), factor, fill) for rank, w in enumerate(workers)])


@pytest.mark.parametrize(("many", "then"), PAIRS)
def test_replicated_sharded_and_per_rank_state_come_back_on_any_number_of_workers(
    ckpt: Checkpointer, pool: list[Any], many: int, then: int
) -> None:
    step = 3 + PAIRS.index((many, then))
    give_shards(pool[:many], step, fill=True)
    ckpt.save(step, pool[:many]).result(WAIT_S)
    give_shards(pool[-then:], 1, fill=False)
    report = ckpt.restore(pool[-then:])
    assert report.step == step
    assert report.ranks_without_counterpart == tuple(range(many, then))
    assert report.ranks_dropped == tuple(range(then, many))
    assert set(report.kept) == set(range(many, then))
    for rank, found in enumerate(states_of(pool[-then:])):
        expected = without_declarations(sharded_state(rank, then, step, rank < many))
        if many == 1:  # what the only worker had, and did not declare its own, all workers had
            expected["own"] = np.array([0])
        same(found, expected)
        assert found["tied"][0] is found["tied"][1]


def test_arrays_are_filled_in_place(tmp_path: Path, pool: list[Any]) -> None:
    def remember(holder: Any) -> None:
        holder.array = holder.state["w"]

    def is_the_same(holder: Any) -> Any:
        return holder.array is holder.state["w"], holder.array

    with Checkpointer(str(tmp_path / "run")) as ckpt:
        give(pool[:2], [{"w": np.arange(10.0)}] * 2)
        ckpt.save(0, pool[:2]).result(WAIT_S)
        give(pool[:2], [{"w": np.zeros(10)}] * 2)
        ray.get([w.look.remote(remember) for w in pool[:2]])
        ckpt.restore(pool[:2])
        for kept, array in ray.get([w.look.remote(is_the_same) for w in pool[:2]]):
            assert kept
            same({"w": array}, {"w": np.arange(10.0)})


def test_none_and_empty_containers_take_what_was_saved(tmp_path: Path, pool: list[Any]) -> None:
    saved = {"opt": {0: {"m": np.arange(4.0), "count": 3}}, "maybe": np.arange(2), "none": None, "list": []}
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        give(pool[:2], [saved] * 2)
        ckpt.save(0, pool[:2]).result(WAIT_S)
        give(pool[:3], [{"opt": {}, "maybe": None, "none": None, "list": []}] * 3)
        ckpt.restore(pool[:3])
        for found in states_of(pool[:3]):
            same(found, saved)


def test_what_a_restored_worker_trains_does_not_change_the_checkpoint(tmp_path: Path, pool: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        give(pool[:2], [{"w": np.arange(10.0)}] * 2)
        ckpt.save(0, pool[:2]).result(WAIT_S)
        for _ in range(2):
            give(pool[:2], [{"w": None}] * 2)
            ckpt.restore(pool[:2])
            assert all(bool((found["w"] == np.arange(10.0)).all()) for found in states_of(pool[:2]))
            ray.get([w.look.remote(lambda holder: holder.state["w"].__iadd__(1)) for w in pool[:2]])


def test_copies_keep_what_they_copy() -> None:
    same(copied({"a": [np.arange(3), (1, None)]}), {"a": [np.arange(3), (1, None)]})
