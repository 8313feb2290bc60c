"""Environments: an equal one, never reset, goes on as the saved one does; what can't be saved is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import wrappers
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.wrappers import vector as vector_wrappers

pytest.importorskip("ray.rllib")

from rl_ckpt.rllib.data import UnsavableError
from rl_ckpt.rllib.env_state import MismatchError, env_tree, set_env
from rl_ckpt.state.tree import flatten
from tests.rllib.runner_cases import Counting, Pictures, Turns, Unsavable
from tests.rllib.same import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:gymnasium")

NAMES = [
    "CartPole-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1", "Acrobot-v1", "FrozenLake-v1",
    "CliffWalking-v1", "Taxi-v3", "Blackjack-v1",
]  # fmt: skip
ENVS: dict[str, Callable[[], Any]] = {
    **{name: partial(gym.make, name, max_episode_steps=30) for name in NAMES},
    "fickle taxi": lambda: gym.make("Taxi-v3", fickle_passenger=True, is_rainy=True),
    "sync": lambda: gym.make_vec("CartPole-v1", 3, "sync"),
    "vector entry point": lambda: gym.make_vec("CartPole-v1", 3, "vector_entry_point"),
    "vector wrappers": lambda: vector_wrappers.NormalizeReward(
        vector_wrappers.NormalizeObservation(
            vector_wrappers.RecordEpisodeStatistics(gym.make_vec("CartPole-v1", 2, "sync"))
        )
    ),
    "max and skip": lambda: wrappers.MaxAndSkipObservation(Pictures(), 3),
    "autoreset": lambda: wrappers.Autoreset(gym.make("CartPole-v1")),
    "own wrapper": lambda: Counting(wrappers.TransformReward(Pictures(), lambda reward: float(reward) / 2)),
}


def play(env: Any, steps: int) -> list[Any]:
    """Random actions of the environment's own space; a single environment is reset when it is done."""
    seen = []
    for _ in range(steps):
        action = env.action_space.sample()
        obs, reward, terminated, truncated, info = env.step(action)
        info = {key: value for key, value in info.items() if "episode" not in key}  # wall times
        seen.append([action, np.array(obs), reward, terminated, truncated, info])
        if (
            not isinstance(terminated, np.ndarray)
            and (terminated or truncated)
            and not isinstance(env, wrappers.Autoreset)
        ):
            seen.append(env.reset())
    return seen


@pytest.mark.parametrize("name", ENVS)
def test_an_environment_that_was_never_reset_goes_on(name: str) -> None:
    env = ENVS[name]()
    env.reset(seed=3)
    env.action_space.seed(5)
    play(env, 47)
    tree = env_tree(env)
    flatten(tree)  # nothing in it that a checkpoint does not take
    expected = play(env, 60)
    other = ENVS[name]()
    set_env(other, tree)
    assert_same(play(other, 60), expected)


@pytest.mark.parametrize("name", ["CartPole-v1", "sync", "own wrapper"])
def test_rolled_back_in_place_it_goes_on(name: str) -> None:
    env = ENVS[name]()
    env.reset(seed=3)
    generator = np.ravel(env.unwrapped.np_random)[0]  # of the first of a vector
    play(env, 20)
    tree = env_tree(env)
    expected = play(env, 30)
    set_env(env, tree)
    assert_same(play(env, 30), expected)
    assert np.ravel(env.unwrapped.np_random)[0] is generator  # whatever else holds it was rolled back too


def test_one_that_was_never_reset_can_be_saved() -> None:
    env, other = ENVS["CartPole-v1"](), ENVS["CartPole-v1"]()
    other.reset(seed=1)
    set_env(other, env_tree(env))
    with pytest.raises(gym.error.ResetNeeded):
        other.step(0)


class Forgetful(gym.Wrapper):  # type: ignore[type-arg]
    """Holds something and has no protocol."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.steps = 0


class Stateless(gym.RewardWrapper):  # type: ignore[type-arg]
    """Holds nothing."""

    def reward(self, reward: Any) -> Any:
        return reward * 2


class Heavier(CartPoleEnv):
    """Of a class that is known, and not known itself."""


class Handle(Pictures):
    """Gives something that is no data."""

    def get_state(self) -> dict[str, Any]:
        return {"handle": object()}


@pytest.mark.parametrize(
    ("env", "said"),
    [
        (Unsavable, r"the environment .*:Unsavable has no get_state\(\) and set_state\(state\)"),
        (lambda: Forgetful(Pictures()), r"the wrapper .*:Forgetful has no get_state\(\)"),
        (Heavier, "Heavier has no get_state"),  # what a subclass adds is not known
        (Handle, r"the state of .*:Handle\['handle'\] is a builtins\.object"),
        (lambda: gym.make_vec("CartPole-v1", 2, "async"), "processes of their own"),
    ],
)
def test_what_cannot_be_saved_is_named(env: Callable[[], Any], said: str) -> None:
    made = env()
    with pytest.raises(UnsavableError, match=said):
        env_tree(made)
    made.close()


def test_a_wrapper_that_holds_nothing_needs_no_methods() -> None:
    assert [layer["class"].split(":")[1] for layer in env_tree(Stateless(Pictures()))["layers"]] == [
        "Stateless",
        "Pictures",
    ]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: gym.make("Pendulum-v1"), "PendulumEnv here, and was .*CartPoleEnv"),
        (lambda: Counting(gym.make("CartPole-v1")), "Counting > "),
        (lambda: gym.make("CartPole-v1").unwrapped, "was .*TimeLimit"),
    ],
)
def test_another_environment_is_refused_unchanged(other: Callable[[], Any], said: str) -> None:
    env, wrong = gym.make("CartPole-v1"), other()
    env.reset(seed=1)
    wrong.reset(seed=2)
    before = env_tree(wrong)
    with pytest.raises(MismatchError, match=said):
        set_env(wrong, env_tree(env))
    assert_same(env_tree(wrong), before)


def test_another_number_of_environments_is_refused() -> None:
    two, three = (gym.make_vec("CartPole-v1", n, "sync") for n in (2, 3))
    with pytest.raises(MismatchError, match="2 environments here, and were 3"):
        set_env(two, env_tree(three))


def test_a_multi_agent_environment_goes_on() -> None:
    env, other = Turns(), Turns()
    env.reset(seed=4)
    for _ in range(5):
        env.step({0: 1})
    set_env(other, env_tree(env))
    assert_same([other.step({0: 1}) for _ in range(4)], [env.step({0: 1}) for _ in range(4)])
