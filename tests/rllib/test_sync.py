"""After a rollback or a load, no sample of other weights trains the learner, and the next synchronisation works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from rl_ckpt.rllib import AlgorithmCheckpointer
from tests.rllib.small import assert_all_hold, built, digests_of, impala_config, ppo_config

CASES: dict[str, Callable[[], Any]] = {
    "ppo": lambda: (
        ppo_config()
        .env_runners(num_env_runners=2)
        .evaluation(evaluation_interval=100, evaluation_num_env_runners=1, evaluation_duration=1)
    ),
    "impala": lambda: impala_config().learners(num_learners=1, num_aggregator_actors_per_learner=0),
}


def numbers(algo: Any) -> list[int]:
    """The number of the weights of every remote runner."""
    actors = algo.env_runner_group._worker_manager.actors().values()
    return ray.get([actor.__ray_call__.remote(lambda runner: runner._weights_seq_no) for actor in actors])


def under_way(algo: Any) -> int:
    groups = (algo.env_runner_group, algo.eval_env_runner_group)
    return sum(group.num_in_flight_async_reqs() for group in groups if group is not None)


def trained_on(algo: Any) -> list[list[int]]:
    """For each update of one iteration, the numbers of the weights that its samples were drawn with."""
    found: list[list[int]] = []
    group = algo.learner_group
    update = type(group).update

    def noting(**kwargs: Any) -> Any:
        data: Any = kwargs.get("training_data")
        episodes = kwargs.get("episodes") or [e for part in ray.get(list(data.episodes_refs)) for e in part]
        used = {int(n) for e in episodes for n in e.get_extra_model_outputs("weights_seq_no")}
        found.append(sorted(used))
        return update(group, **kwargs)

    group.update = noting
    try:
        algo.train()
    finally:
        del group.update
    return found


@pytest.mark.parametrize("name", CASES)
def test_after_a_rollback_only_the_restored_weights_have_sampled(name: str, ray_small: None, tmp_path: Path) -> None:
    with AlgorithmCheckpointer(str(tmp_path)) as ckpt, built(CASES[name]()) as algo:
        algo.train()
        ckpt.save(algo).result()
        saved = ckpt.restore(algo)
        number = numbers(algo)[0]
        expected = digests_of(algo)["learner 0"]
        for _ in range(2):
            algo.train()
        assert min(numbers(algo)) > number
        if name == "impala":
            assert under_way(algo) > 0  # samples of the weights that are rolled back
        ckpt.restore(algo)
        assert under_way(algo) == 0
        assert set(numbers(algo)) == {number}
        assert_all_hold(algo, expected)
        assert trained_on(algo)[0] == [number]
        if name == "ppo":  # IMPALA's learner goes on by itself
            digests = digests_of(algo)
            assert digests["runner 1"] == digests["runner 2"] == digests["learner 0"] != expected
            assert numbers(algo) == [number + 1] * 2
    assert saved.step == 1


def test_after_a_load_the_first_synchronisation_gets_through(ray_small: None, tmp_path: Path) -> None:
    with AlgorithmCheckpointer(str(tmp_path)) as ckpt:
        with built(CASES["ppo"]()) as algo:
            algo.train()
            ckpt.save(algo).result()
            expected = digests_of(algo)["learner 0"]
        loaded = ckpt.load()
        try:
            assert_all_hold(loaded, expected)
            (number,) = set(numbers(loaded))
            assert trained_on(loaded) == [[number]]
            digests = digests_of(loaded)
            assert digests["runner 1"] == digests["runner 2"] == digests["learner 0"] != expected
        finally:
            loaded.stop()
