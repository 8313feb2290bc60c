"""Saves that repeat the last one's plan, preparation, and state in Ray objects, with real actors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from rl_ckpt import Checkpointer, PerRank, Replicated
from rl_ckpt.errors import InvalidInputError
from tests.ray.holders import WAIT_S, Holder, give, link, memory_files, same, server_stats, spec_of, states_of

WORLD = 3


def state(rank: int, step: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "w": np.arange(300_000.0) + step,
        "own": np.full(1000, 100.0 * rank + step),
        "step": step,
        "rate": np.float32(step / 7),
        **more,
    }


@pytest.fixture(scope="module")
def workers(_no_aws_settings_from_outside: None, ray_node: None) -> list[Any]:
    return [Holder.remote() for _ in range(WORLD)]


@pytest.fixture
def ckpt(tmp_path: Path) -> Any:
    with Checkpointer(str(tmp_path / "run")) as made:
        yield made


def save(ckpt: Checkpointer, workers: list[Any], step: int, states: list[Any]) -> None:
    give(workers, states)
    assert ckpt.save(step, workers).result(WAIT_S).step == step


def restored(ckpt: Checkpointer, workers: list[Any], step: int) -> list[Any]:
    give(workers, [dict.fromkeys(saved) for saved in states_of(workers)])
    ckpt.restore(workers, step=step)
    return states_of(workers)


def repeats(ckpt: Checkpointer) -> int:
    return int(ray.get(link(ckpt).stats.remote())["repeats"])


def servers_here(ckpt: Checkpointer) -> list[str]:
    """Names of the run's shard servers, whether or not they took part in anything."""
    mine = spec_of(ckpt).server("")
    return [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["name"].startswith(mine)]


class TestRepeats:
    def test_every_step_comes_back_as_it_was(self, ckpt: Checkpointer, workers: list[Any]) -> None:
        for step in range(5):
            save(ckpt, workers, step, [state(rank, step) for rank in range(WORLD)])
        assert repeats(ckpt) == 4 * WORLD
        for step in (4, 0, 3, 1, 2):
            for rank, found in enumerate(restored(ckpt, workers, step)):
                same(found, state(rank, step))

    def test_a_leaf_that_only_changes_its_type(self, ckpt: Checkpointer, workers: list[Any]) -> None:
        values = (1, True, 1.0, 1)
        for step, value in enumerate(values):
            save(ckpt, workers, step, [state(rank, 0, done=value) for rank in range(WORLD)])
        assert repeats(ckpt) == 3 * WORLD
        for step, value in enumerate(values):
            found = restored(ckpt, workers, step)[1]["done"]
            assert (found, type(found)) == (value, type(value))

    def test_replicas_that_part_are_saved_each_by_itself(self, ckpt: Checkpointer, workers: list[Any]) -> None:
        save(ckpt, workers, 0, [state(rank) for rank in range(WORLD)])
        parted = [state(rank, 1, w=np.arange(300_000.0) * (rank + 1)) for rank in range(WORLD)]
        save(ckpt, workers, 1, parted)
        for found, expected in zip(restored(ckpt, workers, 1), parted, strict=True):
            same(found, expected)

    def test_a_buffer_that_grows_on_one_rank(self, ckpt: Checkpointer, workers: list[Any]) -> None:
        for step in range(3):
            states = [state(rank, step, buffer=PerRank(np.full(10 + step * (rank == 1), 7))) for rank in range(WORLD)]
            save(ckpt, workers, step, states)
        for step in range(3):
            found = restored(ckpt, workers, step)
            assert [len(each["buffer"]) for each in found] == [10, 10 + step, 10]

    def test_declared_replicas(self, ckpt: Checkpointer, workers: list[Any]) -> None:
        for step in range(4):
            save(ckpt, workers, step, [Replicated(state(0, step))] * WORLD)
        assert repeats(ckpt) == 3 * WORLD
        give(workers, [state(9, 9)] * WORLD)
        ckpt.restore(workers, step=2)
        for found in states_of(workers):
            same(found, state(0, 2))

    def test_other_workers_do_not_write_into_what_was_promised(self, ckpt: Checkpointer, workers: list[Any]) -> None:
        """The next save is of other processes, so the promise to the first ones is void."""
        save(ckpt, workers, 0, [state(rank) for rank in range(WORLD)])
        others = [Holder.remote() for _ in range(WORLD)]
        for step in (1, 2, 3):
            who = others if step % 2 else workers
            save(ckpt, who, step, [state(rank, step) for rank in range(WORLD)])
        for step in range(4):
            for rank, found in enumerate(restored(ckpt, workers, step)):
                same(found, state(rank, step))


class TestPrepare:
    def test_it_saves_nothing_and_the_first_save_repeats_its_plan(self, ckpt: Checkpointer, workers: list[Any]) -> None:
        give(workers, [state(rank) for rank in range(WORLD)])
        ckpt.prepare(workers)
        assert ckpt.checkpoints() == []
        (server,) = servers_here(ckpt)
        before = memory_files(server, "generation-*")
        assert len(before) == 2
        save(ckpt, workers, 0, [state(rank) for rank in range(WORLD)])
        assert repeats(ckpt) == WORLD
        assert memory_files(server, "generation-*")[:2] == before, "another one comes, and these stay"
        for rank, found in enumerate(restored(ckpt, workers, 0)):
            same(found, state(rank))

    def test_twice_and_with_saves_under_way(self, ckpt: Checkpointer, workers: list[Any]) -> None:
        give(workers, [state(rank) for rank in range(WORLD)])
        ckpt.prepare(workers)
        ckpt.prepare(workers)
        pending = ckpt.save(0, workers)
        ckpt.prepare(workers)
        assert pending.result(WAIT_S).step == 0
        save(ckpt, workers, 1, [state(rank, 1) for rank in range(WORLD)])

    def test_a_state_that_can_not_be_saved_is_said_before_training(
        self, ckpt: Checkpointer, workers: list[Any]
    ) -> None:
        give(workers, [{"w": object()}] * WORLD)
        with pytest.raises(InvalidInputError, match=r"w: .*object"):
            ckpt.prepare(workers)
        assert ckpt.checkpoints() == []

    def test_from_inside_the_workers(self, ckpt: Checkpointer, workers: list[Any]) -> None:
        give(workers, [state(rank) for rank in range(WORLD)])
        handles = [ckpt.worker(rank, WORLD) for rank in range(WORLD)]

        def prepare_and_save(holder: Any, handle: Any) -> int:
            handle.prepare(holder.state)
            return int(handle.save(0, holder.state).result(WAIT_S).step)

        calls = [worker.look.remote(prepare_and_save, handle) for worker, handle in zip(workers, handles, strict=True)]
        assert ray.get(calls, timeout=WAIT_S) == [0] * WORLD
        assert repeats(ckpt) == WORLD


class TestObjects:
    """State that is a Ray object already is not copied by the worker, and comes back as plain arrays."""

    def test_a_broadcast_object_is_staged_once_by_the_server(self, ckpt: Checkpointer, workers: list[Any]) -> None:
        for step in range(3):
            weights: dict[str, Any] = {"w": np.arange(200_000.0) + step, "b": np.ones(7), "name": "policy"}
            reference = ray.put(weights)
            ray.get([w.look.remote(_take_object, [reference], state(r, step)) for r, w in enumerate(workers)])
            info = ckpt.save(step, workers).result(WAIT_S)
            assert info.bytes < 1.5 * weights["w"].nbytes + 3 * 400_000 * 8
        assert repeats(ckpt) == 2 * WORLD
        for rank, found in enumerate(restored(ckpt, workers, 1)):
            same(found, state(rank, 1, object={"w": np.arange(200_000.0) + 1, "b": np.ones(7), "name": "policy"}))

    def test_the_object_may_go_as_soon_as_save_returns(self, ckpt: Checkpointer, workers: list[Any]) -> None:
        reference = ray.put(np.arange(2_000_000.0))
        ray.get([w.look.remote(_take_object, [reference], {}) for w in workers])
        pending = ckpt.save(0, workers)
        give(workers, [{"object": None}] * WORLD)
        del reference
        pending.result(WAIT_S)
        for found in restored(ckpt, workers, 0):
            assert np.array_equal(found["object"], np.arange(2_000_000.0))

    def test_the_next_checkpointer_has_servers_of_its_own(self, tmp_path: Path, workers: list[Any]) -> None:
        """The workers live on, and their nodes' servers have the names of before."""
        reference = ray.put(np.arange(100_000.0))
        ray.get([w.look.remote(_take_object, [reference], {}) for w in workers])
        for step in range(2):
            with Checkpointer(str(tmp_path / "run"), join_timeout_s=20.0) as ckpt:
                assert ckpt.save(step, workers).result(WAIT_S).step == step

    def test_restored_arrays_are_the_workers_own(self, ckpt: Checkpointer, workers: list[Any]) -> None:
        """torch does not know that memory of the object store is read-only: filling it would change what others see."""
        reference = ray.put({"t": torch.arange(50_000.0)})
        ray.get([w.look.remote(_take_object, [reference], {}) for w in workers])
        ckpt.save(0, workers).result(WAIT_S)
        other = ray.put({"t": torch.zeros(50_000)})
        ray.get([w.look.remote(_take_object, [other], {}) for w in workers])
        ckpt.restore(workers)
        assert torch.equal(ray.get(other)["t"], torch.zeros(50_000)), "the object was written to"
        for found in states_of(workers):
            assert torch.equal(found["object"]["t"], torch.arange(50_000.0))

    def test_a_declared_object(self, ckpt: Checkpointer, workers: list[Any]) -> None:
        reference = ray.put({"w": np.arange(100_000.0)})
        ray.get([w.look.remote(_take_object, [reference], {}, True) for w in workers])
        ckpt.save(0, workers).result(WAIT_S)
        for found in restored(ckpt, workers, 0):
            assert np.array_equal(found["object"]["w"], np.arange(100_000.0))
        assert sum(stats["bytes_staged"] for stats in server_stats(ckpt).values()) == 800_000

    def test_an_object_that_is_lost_is_named(self, ckpt: Checkpointer, workers: list[Any]) -> None:
        owner: Any = Holder.remote()
        reference = ray.get(owner.look.remote(_put, 1_000_000))
        ray.get([w.look.remote(_take_object, [reference], {}) for w in workers])
        ray.kill(owner)
        with pytest.raises(InvalidInputError, match=r"the Ray object .* can't be read"):
            _save_until_lost(ckpt, workers)


def _take_object(holder: Any, references: list[Any], more: dict[str, Any], declared: bool = False) -> None:
    holder.state = {**more, "object": Replicated(references[0]) if declared else references[0]}


def _put(_holder: Any, size: int) -> Any:
    return ray.put(np.zeros(size))


def _save_until_lost(ckpt: Checkpointer, workers: list[Any]) -> None:
    """The object goes a moment after its owner: until then, saves succeed."""
    for step in range(200):
        ckpt.save(step, workers).result(WAIT_S)
