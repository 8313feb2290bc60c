"""Episodes as state trees and back: every field, and what RLlib's own `get_state` loses."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("ray.rllib")
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer

from rl_ckpt.rllib.data import UnsavableError
from rl_ckpt.rllib.episodes import Spaces, modules_of, multi_from, multi_tree, single_from, single_tree
from rl_ckpt.state.tree import flatten
from tests.rllib.same import assert_same

OBSERVATION: Any = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
ACTION: Any = gym.spaces.Discrete(3)
SPACES = Spaces({"observation": OBSERVATION, "action": ACTION})


def fields(value: Any) -> Any:
    """An episode or buffer as plain containers, by all its slots."""
    if isinstance(value, InfiniteLookbackBuffer):
        return {"data": fields(value.data), "lookback": value.lookback, "finalized": value.finalized, "of": value.space}
    if isinstance(value, SingleAgentEpisode | MultiAgentEpisode):
        return {name: fields(getattr(value, name)) for name in value.__slots__}
    if isinstance(value, dict):
        return {key: fields(item) for key, item in value.items()}
    return [fields(item) for item in value] if isinstance(value, list) else value


def single(steps: int = 6, cut: int | None = None) -> SingleAgentEpisode:
    episode = SingleAgentEpisode(observation_space=OBSERVATION, action_space=ACTION)
    random = np.random.default_rng(1)
    episode.add_env_reset(random.random(2, np.float32), {"first": True})
    for step in range(steps):
        episode.add_env_step(
            random.random(2, np.float32), np.int64(step % 3), float(step), {"n": step, "deep": {"x": [step]}},
            extra_model_outputs={"logp": np.float32(step), "state_out": {"h": random.random(3, np.float32)}},
        )  # fmt: skip
    episode.custom_data["mine"] = {1: "x"}
    return episode if cut is None else episode.cut(cut)


def again(episode: Any, **more: Any) -> Any:
    """There and back."""
    is_single = isinstance(episode, SingleAgentEpisode)
    tree = (single_tree if is_single else multi_tree)(episode, SPACES, 100.0)
    flatten(tree)
    return single_from(tree, SPACES, 100.0) if is_single else multi_from(tree, SPACES, 100.0, **more)


@pytest.mark.parametrize(
    "make", [single, lambda: single(0), lambda: single(6, 0), lambda: single(6, 3), lambda: single(6, 9)]
)
def test_a_single_agents_episode_comes_back(make: Any) -> None:
    episode = make()
    back = again(episode)
    assert_same(fields(back), fields(episode))
    for each in (episode, back):
        each.add_env_step(np.zeros(2, np.float32), 1, 2.0, {}, terminated=True)
    assert_same(back.get_observations(), episode.get_observations())
    # Its spaces are the very ones: one-hot and filling work as before.
    assert back.observation_space is OBSERVATION
    hot = [each.get_actions(slice(-4, None), fill=0, one_hot_discrete=True) for each in (back, episode)]
    assert_same(hot[0], hot[1])


def test_a_chunk_of_arrays_comes_back() -> None:
    episode = single().to_numpy()
    assert_same(fields(again(episode)), fields(episode))


def test_a_slim_chunk_tells_length_return_and_duration() -> None:
    episode: Any = single(6, 2)
    episode.add_env_step(np.zeros(2, np.float32), 1, 2.5, {})
    episode._start_time, episode._last_step_time = 3.25, 7.5
    tree = single_tree(episode, SPACES, 7.75, slim=True)
    assert not {"observations", "actions", "infos", "extra_model_outputs"} & set(tree)
    back = single_from(tree, SPACES, 1000.0)
    assert (len(back), back.get_return(), back.get_duration_s()) == (1, 2.5, 4.25)
    assert (back.t, back.id_, back._start_time) == (episode.t, episode.id_, 995.5)


def several() -> MultiAgentEpisode:
    """Agent a acts at each step, b at each second one, so that its actions hang; c is rewarded before it comes."""
    spaces: Any = [dict.fromkeys("abc", space) for space in (OBSERVATION, ACTION)]
    episode = MultiAgentEpisode(
        observation_space=spaces[0],
        action_space=spaces[1],
        agent_to_module_mapping_fn=mapping,
    )
    look = np.ones(2, np.float32)
    episode.add_env_reset(observations={"a": look, "b": look})
    for step in range(5):
        who = ["a", "b"] if step % 2 else ["a"]
        acts: Any = {"a": 1} | ({"b": 2} if step % 2 == 0 else {})
        episode.add_env_step(
            observations=dict.fromkeys(who, look * step), actions=acts, rewards={"a": 1.0, "b": 0.5, "c": 2.0},
            infos={name: {"n": step} for name in who}, extra_model_outputs={name: {"logp": 0.1} for name in acts},
        )  # fmt: skip
    assert episode._hanging_actions_end
    return episode


def mapping(agent: Any, _episode: Any, **_more: Any) -> str:
    return f"policy of {agent}"


@pytest.mark.parametrize("cut", [None, 0, 1, 3])
def test_a_multi_agent_episode_comes_back(cut: int | None) -> None:
    episode = several() if cut is None else several().cut(cut)
    back = again(episode, of_agents=(episode.observation_space, episode.action_space), mapping_fn=mapping)
    assert_same(fields(back), fields(episode))
    look = np.zeros(2, np.float32)
    for each in (episode, back):
        each.add_env_step(
            observations={"a": look, "b": look, "c": look}, actions={"a": 0}, rewards={"a": 1.0, "c": 1.0},
            extra_model_outputs={"a": {"logp": 0.2}},
        )  # fmt: skip
    assert_same(fields(back)["env_t_to_agent_t"], fields(episode)["env_t_to_agent_t"])
    assert_same(back.get_rewards(-1), episode.get_rewards(-1))
    assert back.module_for("c") == "policy of c"


def test_the_modules_of_a_saved_episode() -> None:
    assert modules_of(multi_tree(several(), SPACES, 0.0)) == {f"policy of {agent}" for agent in "abc"}
    assert modules_of(single_tree(single(), SPACES, 0.0)) == set()


def test_a_space_of_nobody_is_refused() -> None:
    with pytest.raises(UnsavableError, match="neither the environment's nor a connector's"):
        single_tree(single(), Spaces({"action": ACTION}), 0.0)
    with pytest.raises(KeyError):
        single_from(single_tree(single(), SPACES, 0.0), Spaces({"action": ACTION}), 0.0)


def test_what_cannot_be_saved_is_named() -> None:
    episode = single()
    episode.infos.data[2]["handle"] = object()
    with pytest.raises(UnsavableError, match=rf"episode {episode.id_}: infos.*'handle'.* is a builtins\.object"):
        single_tree(episode, SPACES, 0.0)
