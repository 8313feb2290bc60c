"""Other numbers of learners, env runners and evaluation runners than were saved, at a load and at a restore."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rl_ckpt.rllib import AlgorithmCheckpointer
from tests.rllib.small import assert_all_hold, built, digests_of, full_digest, ppo_config


def evaluated(config: Any, runners: int) -> Any:
    return config.evaluation(evaluation_interval=1, evaluation_num_env_runners=runners, evaluation_duration=1)


def moments_of(algo: Any) -> list[Any]:
    """Of every learner's optimizer."""

    def look(learner: Any) -> Any:
        (optimizer,) = learner._named_optimizers.values()
        return [{k: v.tolist() for k, v in state.items()} for state in optimizer.state.values()]

    return [found.get() for found in algo.learner_group.foreach_learner(look)]


def test_learners_and_runners_in_other_numbers(ray_small: None, tmp_path: Path) -> None:
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    local = evaluated(ppo_config().env_runners(num_env_runners=2), 1)
    with built(local) as algo, AlgorithmCheckpointer(first) as ckpt:
        algo.train()
        ckpt.save(algo).result()
        acts, full, moments = digests_of(algo)["learner 0"], full_digest(algo), moments_of(algo)
        counters = algo.metrics.peek(("env_runners", "num_env_steps_sampled_lifetime"))

        spread = {"num_learners": 2, "num_env_runners": 1, "evaluation_num_env_runners": 2}
        other = ckpt.load(given=spread)  # 0 → 2 learners, 2 → 1 runners, 1 → 2 evaluation runners
        try:
            report = ckpt.last_restore
            assert (report.learners, report.env_runners, report.eval_env_runners) == (2, 2, 3)
            assert_all_hold(other, acts)
            assert moments_of(other) == moments * 2
            assert other.metrics.peek(("env_runners", "num_env_steps_sampled_lifetime")) == counters
            assert "evaluation runner 2 has no counterpart" in " ".join(report.notices)
            other.train()
            with AlgorithmCheckpointer(second) as ckpt_2:
                ckpt_2.save(other).result()
                acts_2, moments_2 = digests_of(other)["learner 0"], moments_of(other)
                other.train()
                algo.train()

                report = ckpt_2.restore(algo)  # 2 → 0 learners, in place
                assert_all_hold(algo, acts_2)
                assert moments_of(algo) == moments_2[:1]
                assert (report.learners, algo.iteration) == (1, 2)
                algo.train()

                report = ckpt.restore(other)  # 0 → 2 learners, in place, of another run
                assert full_digest(other) == full
                assert_all_hold(other, acts)
                assert moments_of(other) == moments * 2
                other.train()
                assert digests_of(other)["learner 0"] == digests_of(other)["learner 1"]
        finally:
            other.stop()


@pytest.mark.parametrize("runners", [0, pytest.param(3, marks=pytest.mark.soak)])
def test_more_runners_or_none(ray_small: None, tmp_path: Path, runners: int) -> None:
    with AlgorithmCheckpointer(str(tmp_path)) as ckpt:
        with built(ppo_config().env_runners(num_env_runners=2)) as algo:
            algo.train()
            ckpt.save(algo).result()
            acts = digests_of(algo)["learner 0"]
        other = ckpt.load(given={"num_env_runners": runners})
        try:
            assert_all_hold(other, acts)
            other.train()
        finally:
            other.stop()
