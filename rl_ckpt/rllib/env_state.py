"""The state of environments: what a gymnasium or RLlib environment and its wrappers are in the middle of.

Owns: taking an environment apart, from the outermost wrapper inward, and setting an equal one. Promises: after
`set_env` the environment goes on, bit for bit, as the saved one did; where that can't be promised, an error says which
part and why, and the caller drops the running episodes. Does not know: episodes, runners.

An environment can be saved where its class has

- `get_state() -> state` and `set_state(state)`: the state as numbers, strings, arrays and containers of them;
  `set_state` may be called on an environment that was never reset. `np_random` and the generators of its spaces need
  not be in it, they are saved beside it. A wrapper gives only what it holds itself;
- or a row in `_FIELDS`: gymnasium's own environments and wrappers, and RLlib's vectors of environments.

A wrapper of another class without these methods is refused where it holds anything of its own. Wall times (of
`RecordEpisodeStatistics`) and recordings are not state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np

from rl_ckpt.rllib.data import UnsavableError, from_data, generator_state, to_data

_SYNC = ("_env_obs", "_rewards", "_terminations", "_truncations", "_autoreset_envs")
_WRAPPERS, _CONTROL, _TEXT = "gymnasium.wrappers.", "gymnasium.envs.classic_control.", "gymnasium.envs.toy_text."
_VECTOR = "gymnasium.wrappers.vector."
_STATISTICS = ("episode_count", "episode_returns", "episode_lengths", "time_queue", "return_queue", "length_queue")
_RUNNING = ("mean", "var", "count")
_FIELDS: dict[str, tuple[str, ...]] = {
    f"{_CONTROL}cartpole:CartPoleEnv": ("state", "steps_beyond_terminated"),
    f"{_CONTROL}cartpole:CartPoleVectorEnv": ("state", "steps", "prev_done", "steps_beyond_terminated", "low", "high"),
    f"{_CONTROL}mountain_car:MountainCarEnv": ("state",),
    f"{_CONTROL}continuous_mountain_car:Continuous_MountainCarEnv": ("state",),
    f"{_CONTROL}pendulum:PendulumEnv": ("state", "last_u"),
    f"{_CONTROL}acrobot:AcrobotEnv": ("state",),
    f"{_TEXT}frozen_lake:FrozenLakeEnv": ("s", "lastaction"),
    f"{_TEXT}cliffwalking:CliffWalkingEnv": ("s", "lastaction"),
    f"{_TEXT}taxi:TaxiEnv": ("s", "lastaction", "fickle_step", "taxi_orientation"),
    f"{_TEXT}blackjack:BlackjackEnv": ("dealer", "player", "dealer_top_card_suit", "dealer_top_card_value_str"),
    "ray.rllib.examples.envs.classes.stateless_cartpole:StatelessCartPole": ("state", "steps_beyond_terminated"),
    "ray.rllib.env.multi_agent_env:make_multi_agent.<locals>.MultiEnv": ("terminateds", "truncateds"),
    "gymnasium.vector.sync_vector_env:SyncVectorEnv": _SYNC,
    "ray.rllib.env.vector.sync_vector_multi_agent_env:SyncVectorMultiAgentEnv": (
        *(name for name in _SYNC if name != "_env_obs"), "_observations", "_infos",
    ),
    f"{_WRAPPERS}common:TimeLimit": ("_elapsed_steps",),
    f"{_WRAPPERS}common:OrderEnforcing": ("_has_reset",),
    f"{_WRAPPERS}common:PassiveEnvChecker": ("checked_reset", "checked_step"),
    f"{_WRAPPERS}common:Autoreset": ("autoreset",),
    f"{_WRAPPERS}common:RecordEpisodeStatistics": _STATISTICS,
    f"{_WRAPPERS}stateful_observation:TimeAwareObservation": ("timesteps",),
    f"{_WRAPPERS}stateful_observation:FrameStackObservation": ("obs_queue", "padding_value"),
    f"{_WRAPPERS}stateful_observation:DelayObservation": ("observation_queue",),
    f"{_WRAPPERS}stateful_observation:MaxAndSkipObservation": ("_obs_buffer",),
    f"{_WRAPPERS}stateful_observation:NormalizeObservation": (
        *(f"obs_rms.{name}" for name in _RUNNING), "_update_running_mean",
    ),
    f"{_WRAPPERS}stateful_reward:NormalizeReward": (
        *(f"return_rms.{name}" for name in _RUNNING), "discounted_reward", "_update_running_mean",
    ),
    f"{_WRAPPERS}stateful_action:StickyAction": ("last_action", "is_sticky_actions", "num_repeats", "repeats_taken"),
    f"{_WRAPPERS}atari_preprocessing:AtariPreprocessing": ("obs_buffer", "lives", "game_over"),
    f"{_VECTOR}common:RecordEpisodeStatistics": (*_STATISTICS, "prev_dones"),
    f"{_VECTOR}stateful_observation:NormalizeObservation": (
        *(f"obs_rms.{name}" for name in _RUNNING), "_update_running_mean",
    ),
    f"{_VECTOR}stateful_reward:NormalizeReward": (
        *(f"return_rms.{name}" for name in _RUNNING), "accumulated_reward", "_update_running_mean",
    ),
}  # fmt: skip
_ABSENT = "absent"
_SPACES = (
    "action_space", "observation_space", "_action_space", "_observation_space", "single_action_space",
    "single_observation_space", "action_spaces", "observation_spaces",
)  # fmt: skip
_WRAPPERS_OWN = frozenset((*_SPACES, "env", "_metadata", "_cached_spec", "_saved_kwargs"))


class MismatchError(Exception):
    """Inside this room only: a saved environment that does not fit the one that is here."""


def env_tree(env: Any) -> dict[str, Any]:
    """The state of an environment, of its wrappers, and of the environments in it.

    Args:
        env: A gymnasium environment or vector of environments, or RLlib's vector of multi-agent environments.

    Returns:
        "layers": from the outermost inward: "class", "fields" or "state", "generators", and "envs" of a vector.

    Raises:
        UnsavableError: The state can't be had; which part, why, and what to do.
        Exception: The environment's own `get_state` raised it.
    """
    return {"layers": [_layer_tree(layer) for layer in layers(env)]}


def set_env(env: Any, tree: dict[str, Any]) -> None:
    """Sets an environment, which need not have been reset, to a saved state.

    Raises:
        MismatchError: It is another environment, or wrapped in another way. Nothing was changed.
        Exception: The environment's own `set_state` raised it; the environment is of no use any more.
    """
    _check(env, tree)
    for layer, saved in zip(layers(env), tree["layers"], strict=True):
        _set_layer(layer, saved)


def layers(env: Any) -> Iterator[Any]:
    """The wrappers of an environment from the outermost inward, and the environment."""
    while _is_wrapper(env):
        yield env
        env = env.env
    yield env


def _is_wrapper(layer: Any) -> bool:
    return isinstance(layer, gym.Wrapper | gym.vector.VectorWrapper)


def _name(layer: Any) -> str:
    return f"{type(layer).__module__}:{type(layer).__qualname__}"


def _short(name: str) -> str:
    """Without the module: a class may have moved, or be a script's own (`__main__`)."""
    return name.partition(":")[2]


def has_protocol(layer: Any) -> bool:
    """Whether the layer's class has both `get_state` and `set_state`."""
    return all(callable(getattr(type(layer), name, None)) for name in ("get_state", "set_state"))


def _layer_tree(layer: Any) -> dict[str, Any]:
    name = _name(layer)
    tree: dict[str, Any] = {"class": name}
    if has_protocol(layer):
        tree["state"] = to_data(layer.get_state(), f"the state of {name}")
    elif name in _FIELDS:
        tree["fields"] = {field: _get(layer, field, name) for field in _FIELDS[name]}
        tree["envs"] = [env_tree(env) for env in vars(layer).get("envs", ())]
    elif not _is_stateless(layer):
        raise UnsavableError(_advice(layer, name))
    tree["generators"] = _generators(layer, name)
    return tree


def _is_stateless(layer: Any) -> bool:
    if not _is_wrapper(layer):
        return False
    return type(layer).__module__.startswith("gymnasium.") or not set(vars(layer)) - _WRAPPERS_OWN


def _advice(layer: Any, name: str) -> str:
    if isinstance(layer, gym.vector.AsyncVectorEnv):
        return "gym_env_vectorize_mode='async' runs environments in processes of their own; their state can't be had"
    if _is_wrapper(layer):
        return f"the wrapper {name} has no get_state() and set_state(state) (for what it holds itself)"
    return f"the environment {name} has no get_state() and set_state(state)"


def _get(layer: Any, field: str, name: str) -> Any:
    for part in field.split("."):
        if not hasattr(layer, part):  # made by the first reset
            return {_ABSENT: True}
        layer = getattr(layer, part)
    return to_data(layer, f"{name}.{field}")


def _generators(layer: Any, name: str) -> dict[str, Any]:
    """By attribute, of the layer's own `np_random` and of its spaces; None for one that was not used yet."""
    own: dict[str, Any] = {}
    if not _is_wrapper(layer) and "_np_random" in vars(layer):
        own["np_random"] = to_data(layer._np_random, f"{name}.np_random")
    for attribute, space in _spaces(layer).items():
        if space is not None:
            own[attribute] = [to_data(part._np_random, f"{name}.{attribute}") for part in _parts(space)]
    return own


def _spaces(layer: Any) -> dict[str, Any]:
    """A wrapper's own spaces, not those that it passes on; an environment's may be its class's."""
    if _is_wrapper(layer):
        return {name: vars(layer).get(name) for name in _SPACES}
    return {name: getattr(layer, name, None) for name in _SPACES}


def _parts(space: Any) -> Iterator[gym.Space[Any]]:
    """A space, or a dict of spaces, and the spaces in it, always in the same order."""
    if isinstance(space, gym.Space):
        yield space
    inner = space if isinstance(space, dict) else getattr(space, "spaces", ())
    children = list(inner.values()) if hasattr(inner, "values") else list(inner)
    children += [getattr(space, name, None) for name in ("feature_space", "node_space", "edge_space")]
    for child in children:
        if isinstance(child, gym.Space):
            yield from _parts(child)


def _check(env: Any, tree: dict[str, Any]) -> None:
    here, saved = [_name(layer) for layer in layers(env)], [layer["class"] for layer in tree["layers"]]
    if [_short(name) for name in here] != [_short(name) for name in saved]:
        raise MismatchError(f"the environment is {' > '.join(here)} here, and was {' > '.join(saved)}")
    for layer, saved_layer in zip(layers(env), tree["layers"], strict=True):
        envs, saved_envs = vars(layer).get("envs", ()), saved_layer.get("envs", ())
        if "state" not in saved_layer and len(envs) != len(saved_envs):
            raise MismatchError(f"there are {len(envs)} environments here, and were {len(saved_envs)}")
        for inner, saved_inner in zip(envs, saved_envs, strict=False):
            _check(inner, saved_inner)


def _set_layer(layer: Any, saved: dict[str, Any]) -> None:
    if "state" in saved:
        layer.set_state(from_data(saved["state"]))
    for field, value in saved.get("fields", {}).items():
        *above, last = field.split(".")
        holder = layer
        for part in above:
            holder = getattr(holder, part)
        if value != {_ABSENT: True} if isinstance(value, dict) else True:
            setattr(holder, last, from_data(value))
    for inner, saved_inner in zip(vars(layer).get("envs", ()), saved.get("envs", ()), strict=False):
        set_env(inner, saved_inner)
    _set_generators(layer, saved["generators"])


def _set_generators(layer: Any, saved: dict[str, Any]) -> None:
    if "np_random" in saved:
        layer._np_random = _set_generator(layer._np_random, saved["np_random"])
    for attribute, space in _spaces(layer).items():
        for part, state in zip(_parts(space), saved.get(attribute, ()), strict=False):
            part._np_random = _set_generator(part._np_random, state)


def _set_generator(here: np.random.Generator | None, saved: dict[str, Any] | None) -> Any:
    """In place where there is one of its kind: other objects may hold it too."""
    if saved is None:
        return None
    state = generator_state(saved)
    if isinstance(here, np.random.Generator) and type(here.bit_generator).__name__ == state["bit_generator"]:
        here.bit_generator.state = state
        return here
    return from_data(saved)
