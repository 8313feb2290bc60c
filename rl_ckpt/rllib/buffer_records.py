"""Records: an episode of a replay buffer as plain data, and back.

Owns: which fields of RLlib's `SingleAgentEpisode` and `MultiAgentEpisode` (Ray 2.60) make up an episode, and the table
of spaces that they share. Promises: the episode that comes back answers every getter as the one that was saved did.
Not saved: an agent-to-module mapping function, which is code (the caller gives it again), and what only an episode
needs into which an environment still puts steps (the last observation added); a buffer appends whole pieces.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import gymnasium as gym
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.rllib.spaces import space_from, space_tree

Record = dict[str, Any]
MappingFn = Callable[[Any, Any], str]


class SpaceTable:
    """Spaces, each once: every episode has copies of its own, and a buffer holds thousands of them."""

    def __init__(self, saved: Sequence[Mapping[str, Any]] = ()) -> None:
        """Takes what `tree` gave.

        Raises:
            CorruptionError: It can't be read.
        """
        self._spaces: list[gym.Space[Any]] = [space_from(tree) for tree in saved]
        self._places: dict[Hashable, int] = {}

    def tree(self) -> list[dict[str, Any]]:
        """As plain data."""
        return [space_tree(space) for space in self._spaces]

    def place(self, space: gym.Space[Any] | None) -> int | None:
        """Where a space stands in the table; it is added where there is no equal one.

        Raises:
            InvalidInputError: A space of a class that can't be stored.
        """
        if space is None:
            return None
        key = _key(space)
        place = None if key is None else self._places.get(key)
        if place is None:
            place = next(
                (i for i, known in enumerate(self._spaces) if type(known) is type(space) and known == space), None
            )
        if place is None:
            space_tree(space)  # now, where the error can be told of this space
            self._spaces.append(space)
            place = len(self._spaces) - 1
        if key is not None:
            self._places[key] = place
        return place

    def at(self, place: int | None) -> gym.Space[Any] | None:
        """The space at a place."""
        return None if place is None else self._spaces[place]


def _key(space: gym.Space[Any]) -> Hashable | None:
    """Equal for equal spaces, and quickly made; None for spaces that have to be compared."""
    kind = type(space)
    if kind is gym.spaces.Box:
        assert isinstance(space, gym.spaces.Box)
        return (kind, space.dtype, space.shape, space.low.tobytes(), space.high.tobytes())
    if kind is gym.spaces.Discrete:
        assert isinstance(space, gym.spaces.Discrete)
        return (kind, space.dtype, int(space.n), int(space.start))
    return None


def record_of(episode: Any, spaces: SpaceTable) -> Record:
    """An episode as plain data; arrays by reference.

    Raises:
        InvalidInputError: It is no episode that this release knows.
    """
    if type(episode) is MultiAgentEpisode:
        return _multi_record(episode, spaces)
    if type(episode) is SingleAgentEpisode:
        return _single_record(episode, spaces)
    kind = type(episode)
    raise InvalidInputError(f"the replay buffer holds a {kind.__module__}.{kind.__qualname__}, which is no episode")


def episode_of(record: Record, spaces: SpaceTable, mapping_fn: MappingFn | None) -> Any:
    """The episode of a record.

    Args:
        record: What `record_of` gave.
        spaces: The table that it refers to.
        mapping_fn: Of multi-agent episodes: which module an agent has that comes in later.
    """
    if "agent_episodes" in record:
        return _multi_episode(record, spaces, mapping_fn)
    return _single_episode(record, spaces)


def _single_record(episode: SingleAgentEpisode, spaces: SpaceTable) -> Record:
    return {
        "id": episode.id_,
        "agent_id": episode.agent_id,
        "module_id": episode.module_id,
        "multi_agent_episode_id": episode.multi_agent_episode_id,
        "is_terminated": episode.is_terminated,
        "is_truncated": episode.is_truncated,
        "t_started": episode.t_started,
        "t": episode.t,
        "observations": _column(episode.observations, spaces),
        "actions": _column(episode.actions, spaces),
        "rewards": _column(episode.rewards, spaces),
        "infos": _column(episode.infos, spaces),
        "extra_model_outputs": {key: _column(value, spaces) for key, value in episode.extra_model_outputs.items()},
        "observation_space": spaces.place(episode._observation_space),
        "action_space": spaces.place(episode._action_space),
        "start_time": episode._start_time,
        "last_step_time": episode._last_step_time,
        "custom_data": episode._custom_data,
    }


def _single_episode(record: Record, spaces: SpaceTable) -> SingleAgentEpisode:
    episode: Any = SingleAgentEpisode(id_=record["id"])
    episode.agent_id = record["agent_id"]
    episode.module_id = record["module_id"]
    episode.multi_agent_episode_id = record["multi_agent_episode_id"]
    episode.is_terminated = record["is_terminated"]
    episode.is_truncated = record["is_truncated"]
    episode.t_started = record["t_started"]
    episode.t = record["t"]
    episode.observations = _lookback(record["observations"], spaces)
    episode.actions = _lookback(record["actions"], spaces)
    episode.rewards = _lookback(record["rewards"], spaces)
    episode.infos = _lookback(record["infos"], spaces)
    episode.extra_model_outputs = defaultdict(
        functools.partial(InfiniteLookbackBuffer, lookback=episode.observations.lookback),
        {key: _lookback(value, spaces) for key, value in record["extra_model_outputs"].items()},
    )
    episode._observation_space = spaces.at(record["observation_space"])
    episode._action_space = spaces.at(record["action_space"])
    episode._start_time = record["start_time"]
    episode._last_step_time = record["last_step_time"]
    episode._custom_data = record["custom_data"]
    single: SingleAgentEpisode = episode
    return single


def _column(buffer: InfiniteLookbackBuffer, spaces: SpaceTable) -> Record:
    return {
        "lookback": buffer.lookback,
        "finalized": buffer.finalized,
        "space": spaces.place(buffer.space),
        "data": buffer.data,
    }


def _lookback(column: Record, spaces: SpaceTable) -> InfiniteLookbackBuffer:
    buffer = InfiniteLookbackBuffer(space=spaces.at(column["space"]))
    buffer.data = column["data"]
    buffer.lookback = column["lookback"]
    buffer.finalized = column["finalized"]
    return buffer


def _multi_record(episode: MultiAgentEpisode, spaces: SpaceTable) -> Record:
    return {
        "id": episode.id_,
        "agent_to_module": episode._agent_to_module_mapping,
        "observation_space": _spaces(episode.observation_space, spaces),
        "action_space": _spaces(episode.action_space, spaces),
        "env_t_started": episode.env_t_started,
        "env_t": episode.env_t,
        "agent_t_started": dict(episode.agent_t_started),
        "env_t_to_agent_t": {agent: _column(steps, spaces) for agent, steps in episode.env_t_to_agent_t.items()},
        "hanging_actions_end": episode._hanging_actions_end,
        "hanging_extra_model_outputs_end": dict(episode._hanging_extra_model_outputs_end),
        "hanging_rewards_end": dict(episode._hanging_rewards_end),
        "hanging_rewards_begin": dict(episode._hanging_rewards_begin),
        "len_lookback_buffers": episode._len_lookback_buffers,
        "is_terminated": episode.is_terminated,
        "is_truncated": episode.is_truncated,
        "agent_episodes": {agent: _single_record(one, spaces) for agent, one in episode.agent_episodes.items()},
        "start_time": episode._start_time,
        "last_step_time": episode._last_step_time,
        "custom_data": episode._custom_data,
    }


def _multi_episode(record: Record, spaces: SpaceTable, mapping_fn: MappingFn | None) -> MultiAgentEpisode:
    episode = MultiAgentEpisode(id_=record["id"], agent_to_module_mapping_fn=mapping_fn or _no_mapping)
    episode._agent_to_module_mapping = record["agent_to_module"]
    episode.observation_space = _spaces_back(record["observation_space"], spaces)
    episode.action_space = _spaces_back(record["action_space"], spaces)
    episode.env_t_started = record["env_t_started"]
    episode.env_t = record["env_t"]
    episode.agent_t_started.update(record["agent_t_started"])
    for agent, steps in record["env_t_to_agent_t"].items():
        episode.env_t_to_agent_t[agent] = _lookback(steps, spaces)
    episode._hanging_actions_end = record["hanging_actions_end"]
    episode._hanging_extra_model_outputs_end.update(record["hanging_extra_model_outputs_end"])
    episode._hanging_rewards_end.update(record["hanging_rewards_end"])
    episode._hanging_rewards_begin.update(record["hanging_rewards_begin"])
    episode._len_lookback_buffers = record["len_lookback_buffers"]
    episode.is_terminated = record["is_terminated"]
    episode.is_truncated = record["is_truncated"]
    episode.agent_episodes = {agent: _single_episode(one, spaces) for agent, one in record["agent_episodes"].items()}
    episode._start_time = record["start_time"]
    episode._last_step_time = record["last_step_time"]
    episode._custom_data = record["custom_data"]
    return episode


def _no_mapping(agent: Any, episode: Any) -> str:
    """Stands in where no mapping function was given: a wrong module would be worse than an error."""
    raise InvalidInputError(
        f"agent {agent!r} came into a restored episode, and no agent_to_module_mapping_fn was given at the restore"
    )


def _spaces(given: Any, spaces: SpaceTable) -> Any:
    """A multi-agent episode has a dict of spaces by agent, or one space."""
    if type(given) is dict:
        return {agent: spaces.place(space) for agent, space in given.items()}
    return spaces.place(given)


def _spaces_back(saved: Any, spaces: SpaceTable) -> Any:
    return {agent: spaces.at(place) for agent, place in saved.items()} if isinstance(saved, dict) else spaces.at(saved)
