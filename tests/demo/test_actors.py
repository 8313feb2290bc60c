"""Learner and rollout worker without Ray: whoever takes over a state goes on exactly as the other would have."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import numpy as np
import pytest

from rl_ckpt import PerRank
from rl_ckpt.demo.learner import Learner, Settings
from rl_ckpt.demo.observe import ObservationFilter, tree_digest
from rl_ckpt.demo.rollout import TIME_LIMIT, Batch, CartPoles, RolloutWorker

SMALL = Settings(hidden=16, minibatch=64, epochs=2)


def make_team(seed: int) -> tuple[Learner, list[RolloutWorker]]:
    learner = Learner(seed, SMALL)
    workers = [RolloutWorker((seed, i), envs=3) for i in range(2)]
    for worker in workers:
        worker.set_policy(*learner.policy())
    return learner, workers


def train(learner: Learner, workers: list[RolloutWorker], iterations: int) -> list[Batch]:
    seen = []
    for _ in range(iterations):
        batches = [worker.sample(40) for worker in workers]
        learner.update(*batches)
        for worker in workers:
            worker.set_policy(*learner.policy())
        seen += batches
    return seen


def assert_same_batches(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name in Batch.__slots__:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def as_kept(state: dict[str, Any]) -> dict[str, Any]:
    """What comes back from a checkpoint: a copy of that moment, without declarations."""
    plain = {name: part.tree if isinstance(part, PerRank) else part for name, part in state.items()}
    return copy.deepcopy(plain)


def test_a_job_that_takes_over_all_states_goes_on_bit_for_bit() -> None:
    learner, workers = make_team(seed=0)
    train(learner, workers, 3)
    team: list[Any] = [learner, *workers]
    saved = [as_kept(actor.get_state()) for actor in team]
    expected = train(learner, workers, 3)

    others_learner, others = make_team(seed=99)
    other_team: list[Any] = [others_learner, *others]
    for actor, state in zip(other_team, saved, strict=True):
        actor.set_state(state)
    assert [tree_digest(actor.get_state()) for actor in other_team] == [tree_digest(s) for s in saved]

    assert_same_batches(train(others_learner, others, 3), expected)
    assert others_learner.digests() == learner.digests()
    assert [w.digests() for w in others] == [w.digests() for w in workers]


def test_learning_does_not_change_a_state_that_was_set() -> None:
    learner, workers = make_team(seed=0)
    train(learner, workers, 1)
    state = as_kept(learner.get_state())
    before = tree_digest(state)
    learner.set_state(state)
    train(learner, workers, 1)
    assert tree_digest(state) == before


def test_every_rollout_worker_holds_the_learners_policy() -> None:
    learner, workers = make_team(seed=0)
    train(learner, workers, 2)
    team: list[Any] = [learner, *workers]
    parts = [{name: actor.digests()[name] for name in ("policy", "filter")} for actor in team]
    assert parts[0] == parts[1] == parts[2]


def test_environments_go_on_from_the_middle_of_an_episode() -> None:
    rng = np.random.default_rng(0)
    envs = CartPoles(4, rng)
    actions = np.random.default_rng(5).integers(0, 2, (120, 4))
    for row in actions[:15]:
        envs.step(row)
    state, generator = envs.get_state(), copy.deepcopy(rng.bit_generator.state)
    expected = [envs.step(row) for row in actions[15:]]
    assert any(ended.any() for _, _, ended, _ in expected)  # so that resets, which draw from the generator, are met

    other_rng = np.random.default_rng(1)
    other = CartPoles(4, other_rng)
    other.set_state(state)
    other_rng.bit_generator.state = generator
    for row, (followed, terminated, ended, returns) in zip(actions[15:], expected, strict=True):
        found = other.step(row)
        np.testing.assert_array_equal(found[0], followed)
        np.testing.assert_array_equal(found[1], terminated)
        np.testing.assert_array_equal(found[2], ended)
        assert found[3] == returns


def test_episodes_are_cut_off_at_the_time_limit_and_not_called_terminated() -> None:
    envs = CartPoles(1, np.random.default_rng(0))
    state = envs.get_state()
    envs.set_state({"physics": np.zeros_like(state["physics"]), "lengths": np.array([TIME_LIMIT - 1])})
    _, terminated, ended, returns = envs.step(np.array([0]))
    assert (terminated.item(), ended.item(), returns) == (False, True, [float(TIME_LIMIT)])
    assert envs.get_state()["lengths"].item() == 0


def test_filter_knows_mean_and_deviation_of_all_batches() -> None:
    rng = np.random.default_rng(0)
    batches = [rng.normal(3.0, 2.0, (n, 4)) for n in (1, 50, 7)]
    observed = ObservationFilter(4)
    for batch in batches:
        observed.update(batch)
    everything = np.concatenate(batches)
    state = observed.get_state()
    np.testing.assert_allclose(state["mean"], everything.mean(axis=0))
    np.testing.assert_allclose(state["var"], everything.var(axis=0))
    assert state["count"] == 58
    np.testing.assert_allclose(observed.apply(everything).std(axis=0), 1.0, rtol=1e-4)


@pytest.mark.parametrize(
    "other",
    [
        {"a": np.array([1.0, 2.5]), "b": 3},
        {"a": np.array([1.0, 2.0], dtype=np.float32), "b": 3},
        {"a": np.array([[1.0, 2.0]]), "b": 3},
        {"a": np.array([1.0, 2.0]), "b": 4},
        {"a": np.array([1.0, 2.0]), "c": 3},
    ],
)
def test_digests_tell_trees_apart(other: dict[str, Any]) -> None:
    assert tree_digest(other) != tree_digest({"a": np.array([1.0, 2.0]), "b": 3})


def test_cartpole_is_learned() -> None:
    learner = Learner(0, Settings(hidden=64, rate=1e-3))
    workers = [RolloutWorker((0, i), envs=8) for i in range(2)]
    means = []
    for _ in range(12):
        for worker in workers:
            worker.set_policy(*learner.policy())
        means.append(statistics.fmean(learner.update(*[w.sample(128) for w in workers]).returns))
    assert means[0] < 40
    assert max(means[-3:]) > 90
