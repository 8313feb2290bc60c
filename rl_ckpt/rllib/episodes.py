"""Episodes of RLlib as state trees and back, with their lookback buffers.

Owns: `SingleAgentEpisode`, `MultiAgentEpisode` and the buffers in them. Promises: an episode that comes back goes on as
the saved one would have; types and bits of everything in it are kept. RLlib's own `get_state`/`from_state` lose the
last observation of an agent that has acted and waits, and a multi-agent episode's lookback, so they are not used.
Does not know: environments, runners.

Spaces are not saved: an episode's spaces are those of its environment or of a connector, and are found again by label
(`Spaces`). Times of `perf_counter` mean nothing in another process and are kept relative to the time of the save.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer

from rl_ckpt.rllib.data import UnsavableError, from_data, to_data

_SINGLE = ("id_", "agent_id", "module_id", "multi_agent_episode_id", "t", "t_started", "is_terminated", "is_truncated")
_MULTI = (
    "id_", "env_t", "env_t_started", "is_terminated", "is_truncated", "_len_lookback_buffers", "agent_t_started",
    "_agent_to_module_mapping", "_hanging_actions_end", "_hanging_extra_model_outputs_end", "_hanging_rewards_end",
    "_hanging_rewards_begin",
)  # fmt: skip
_SKIP = -1  # stands for SKIP_ENV_TS_TAG in an array of agent steps
_NO_SPACE = ""


@dataclass(frozen=True)
class Spaces:
    """The spaces that episodes of a runner may have, by label."""

    by_label: Mapping[str, gym.Space[Any]]

    def label(self, space: gym.Space[Any] | None) -> str:
        """Of a space; the label of an equal one will do.

        Raises:
            UnsavableError: The space is none of these.
        """
        if space is None:
            return _NO_SPACE
        same = [label for label, known in self.by_label.items() if known is space]
        equal = same or [label for label, known in self.by_label.items() if known == space]
        if not equal:
            raise UnsavableError(
                f"the space {space} of a running episode is neither the environment's nor a connector's"
            )
        return equal[0]

    def space(self, label: str) -> gym.Space[Any] | None:
        """The reverse of `label`.

        Raises:
            KeyError: No such space here.
        """
        return None if label == _NO_SPACE else self.by_label[label]


def _buffer_tree(buffer: InfiniteLookbackBuffer, at: str) -> dict[str, Any]:
    return {"data": to_data(buffer.data, at), "lookback": buffer.lookback, "finalized": buffer.finalized}


def _buffer(tree: dict[str, Any], space: gym.Space[Any] | None) -> InfiniteLookbackBuffer:
    buffer = InfiniteLookbackBuffer(space=space)
    buffer.data, buffer.lookback, buffer.finalized = from_data(tree["data"]), tree["lookback"], tree["finalized"]
    return buffer


def _times(episode: Any, now: float) -> list[float | None]:
    return [None if time is None else time - now for time in (episode._start_time, episode._last_step_time)]


def _set_times(episode: Any, tree: dict[str, Any], now: float) -> None:
    start, last = (None if time is None else time + now for time in tree["times"])
    episode._start_time, episode._last_step_time = start, last


def single_tree(episode: SingleAgentEpisode, spaces: Spaces, now: float, *, slim: bool = False) -> dict[str, Any]:
    """A single agent's episode.

    Args:
        episode: Running or done, of lists or of arrays.
        spaces: Of its runner.
        now: `perf_counter` at the save.
        slim: Only what RLlib's metrics want of a chunk that was returned already: lengths, rewards, times.

    Raises:
        UnsavableError: It holds something that can't be saved.
    """
    at = f"episode {episode.id_}"
    tree = {name: to_data(getattr(episode, name), f"{at}: {name}") for name in _SINGLE}
    tree |= {"times": _times(episode, now), "rewards": _buffer_tree(episode.rewards, f"{at}: rewards"), "slim": slim}
    if slim:
        return tree
    return tree | {
        "observations": _buffer_tree(episode.observations, f"{at}: observations"),
        "actions": _buffer_tree(episode.actions, f"{at}: actions"),
        "infos": _buffer_tree(episode.infos, f"{at}: infos"),
        "extra_model_outputs": [
            [to_data(name), _buffer_tree(buffer, f"{at}: {name}")]
            for name, buffer in episode.extra_model_outputs.items()
        ],
        "observation_space": spaces.label(episode.observation_space),
        "action_space": spaces.label(episode.action_space),
        "last_observation": to_data(episode._last_added_observation, f"{at}: the last observation"),
        "last_infos": to_data(episode._last_added_infos, f"{at}: the last infos"),
        "custom_data": to_data(episode.custom_data, f"{at}: custom_data"),
    }


def single_from(tree: dict[str, Any], spaces: Spaces, now: float) -> SingleAgentEpisode:
    """The reverse of `single_tree`.

    Raises:
        KeyError: A space that is not here.
    """
    episode = SingleAgentEpisode(id_=tree["id_"])
    for name in _SINGLE:
        setattr(episode, name, from_data(tree[name]))
    _set_times(episode, tree, now)
    episode.rewards = _buffer(tree["rewards"], episode.rewards.space)
    if tree["slim"]:
        return episode
    episode.observations = _buffer(tree["observations"], None)
    episode.actions = _buffer(tree["actions"], None)
    episode.infos = _buffer(tree["infos"], None)
    episode.extra_model_outputs = {from_data(name): _buffer(saved, None) for name, saved in tree["extra_model_outputs"]}
    episode.observation_space = spaces.space(tree["observation_space"])  # of the buffer too
    episode.action_space = spaces.space(tree["action_space"])
    episode._last_added_observation = from_data(tree["last_observation"])
    episode._last_added_infos = from_data(tree["last_infos"])
    episode._custom_data = from_data(tree["custom_data"])
    episode.validate()
    return episode


def multi_tree(episode: MultiAgentEpisode, spaces: Spaces, now: float, *, slim: bool = False) -> dict[str, Any]:
    """As `single_tree`, of many agents."""
    at = f"episode {episode.id_}"
    tree = {name: to_data(getattr(episode, name), f"{at}: {name}") for name in _MULTI}
    steps = {
        agent: {"data": _steps(buffer.data), "lookback": buffer.lookback}
        for agent, buffer in episode.env_t_to_agent_t.items()
    }
    return tree | {
        "times": _times(episode, now),
        "env_t_to_agent_t": to_data(steps, at),
        "agents": [
            [to_data(agent), single_tree(part, spaces, now, slim=slim)]
            for agent, part in episode.agent_episodes.items()
        ],
        "custom_data": {} if slim else to_data(episode.custom_data, f"{at}: custom_data"),
    }


def multi_from(
    tree: dict[str, Any],
    spaces: Spaces,
    now: float,
    *,
    of_agents: tuple[dict[Any, gym.Space[Any]], dict[Any, gym.Space[Any]]],
    mapping_fn: Callable[..., Any],
) -> MultiAgentEpisode:
    """The reverse of `multi_tree`.

    Args:
        tree: What `multi_tree` gave.
        spaces: Of the runner.
        now: `perf_counter` at the restore.
        of_agents: Observation and action spaces by agent, as the runner gives them to new episodes.
        mapping_fn: The runner's agent-to-module mapping, for agents that are still to come.

    Raises:
        KeyError: A space that is not here.
    """
    episode = MultiAgentEpisode(id_=tree["id_"], agent_to_module_mapping_fn=mapping_fn)
    episode.observation_space, episode.action_space = of_agents
    for name in _MULTI:
        setattr(episode, name, from_data(tree[name]))
    _set_times(episode, tree, now)
    for agent, saved in from_data(tree["env_t_to_agent_t"]).items():
        steps = [episode.SKIP_ENV_TS_TAG if step == _SKIP else step for step in saved["data"]]
        buffer = InfiniteLookbackBuffer()
        buffer.data, buffer.lookback = steps, saved["lookback"]
        episode.env_t_to_agent_t[agent] = buffer
    episode.agent_episodes = {from_data(agent): single_from(saved, spaces, now) for agent, saved in tree["agents"]}
    episode._custom_data = from_data(tree["custom_data"])
    return episode


def _steps(data: Any) -> list[int]:
    return [_SKIP if step == MultiAgentEpisode.SKIP_ENV_TS_TAG else int(step) for step in data]


def modules_of(tree: dict[str, Any]) -> set[Any]:
    """The ids of the modules that the agents of a saved episode are mapped to."""
    if "agents" not in tree:
        return {tree["module_id"]} - {None}
    return {saved["module_id"] for _, saved in tree["agents"]} | set(
        from_data(tree["_agent_to_module_mapping"]).values()
    )
