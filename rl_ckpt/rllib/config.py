"""Config: an AlgorithmConfig as plain data, and back.

Owns: which settings are stored, and under which names a caller gives what was not. Promises: the config that comes back
has the same settings, in value and type, as the one that was saved; everything that is missing here (code without a
name, classes that can't be imported, environments that nobody registered) is one error that lists all of it. Stored are
the differences from the defaults of the config's class, so defaults are those of the Ray that loads. Does not do:
pickling, building an Algorithm.

A config names classes and functions that RLlib then calls: it is loaded from whom you would take a script.
"""

from __future__ import annotations

import functools
import importlib.util
import types
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.policy.policy import PolicySpec
from ray.tune.registry import ENV_CREATOR, _global_registry, register_env

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.rllib.values import TAG, Decoder, Encoder, compact, same
from rl_ckpt.state.paths import join

_NOT_STORED = frozenset(("_is_frozen", "_per_module_overrides", "input_filesystem_kwargs", "output_filesystem_kwargs"))
"""Whether the config may still be changed; what RLlib makes of the other settings and keeps; and the credentials of
offline data's stores, which a checkpoint must not hold (they come from the environment, or are given)."""
_POLICY_PARTS = ("policy_class", "observation_space", "action_space", "config")


def config_tree(config: AlgorithmConfig) -> dict[str, Any]:
    """A config as a state tree.

    Args:
        config: Of any algorithm, frozen or not; it is not changed.

    Returns:
        Its class and the settings that differ from that class's defaults: plain data, with classes and functions by
        reference, and descriptions where a value can't be stored (lambdas, closures, objects, custom spaces).
    """
    return _Encoder().config(config)


def config_from(tree: Mapping[str, Any], *, given: Mapping[str, Any] | None = None) -> AlgorithmConfig:
    """The config that `config_tree` described, not frozen.

    Args:
        tree: As it was saved.
        given: Values by place: what the checkpoint could not hold, and settings to be replaced. A place is a setting's
            name (`"policy_mapping_fn"`) or leads into it (`"env_config/reward_fn"`, `"callbacks_on_train_result/0"`);
            "class" is the config's class. For `"env"`, a class, a name, or a function that makes one from the
            env_config, which is then registered under the saved name.

    Returns:
        The config. An environment that was registered with Ray by an importable function is registered again.

    Raises:
        InvalidInputError: Something is missing here, or `given` names what is not there; all of it is listed.
        CorruptionError: The data have a form that this release does not know.
    """
    decoder = _Decoder({_stored_place(place): value for place, value in (given or {}).items()})
    config = decoder.config(tree, "")
    unknown = [place for place in decoder.given if place not in decoder.used]
    if decoder.problems or unknown:
        raise InvalidInputError(_said(decoder.problems, unknown))
    assert config is not None
    return config


class _Encoder(Encoder):
    def special(self, value: Any) -> Any | None:
        if isinstance(value, AlgorithmConfig):
            return {TAG: "config", "v": self.config(value)}
        if isinstance(value, MultiRLModuleSpec):
            tree = self._dataclass(value)
            tree["fields"].pop("module_specs", None)  # the same dict once more
            return {**tree, TAG: "multi_spec"}
        if type(value) is PolicySpec:
            return {TAG: "policy_spec", **{part: self.encode(getattr(value, part)) for part in _POLICY_PARTS}}
        return None

    def config(self, config: AlgorithmConfig) -> dict[str, Any]:
        cls = type(config)
        defaults = _defaults(cls)
        settings = {}
        for name in vars(config).keys() - _NOT_STORED:
            tree = self._setting(name, vars(config)[name])
            if not (name in defaults and same(tree, defaults[name])):
                settings[name] = compact(tree)
        removed = [name for name in defaults if name not in vars(config)]
        return {"class": self.encode(cls), "settings": dict(sorted(settings.items())), "removed": removed}

    def _setting(self, name: str, value: Any) -> Any:
        if name == "env" and isinstance(value, str):
            return self._env(value)
        if name == "evaluation_config" and type(value) is dict and isinstance(value.get("env"), str):
            return {**self.encode(value), "env": self._env(value["env"])}
        return self.encode(value)

    def _env(self, name: str) -> Any:
        creator = None
        if _global_registry.contains(ENV_CREATOR, name):
            creator = self.encode(_global_registry.get(ENV_CREATOR, name))
        elif name in gym.registry:
            creator = str(gym.registry[name].entry_point)
        return {TAG: "env", "name": name, "creator": creator}


class _Decoder(Decoder):
    def special(self, tree: Mapping[str, Any], place: str) -> Any:
        match tree[TAG]:
            case "config":
                return self.config(tree["v"], place)
            case "env":
                return self._env(tree, place)
            case "policy_spec":
                return PolicySpec(*(self.decode(tree[part], join(place, part)) for part in _POLICY_PARTS))
            case "multi_spec":
                spec = self._dataclass(tree, place)
                if spec is not None:
                    spec.module_specs = spec.rl_module_specs
                return spec
        return super().special(tree, place)

    def config(self, tree: Mapping[str, Any], place: str) -> AlgorithmConfig | None:
        cls = self.cls(tree["class"], join(place, "class"), AlgorithmConfig, "a class of AlgorithmConfig")
        settings = {name: self.decode(item, join(place, name)) for name, item in tree["settings"].items()}
        if cls is None:
            self.used.update(self.given)  # whether they fit can't be told
            return None
        config: AlgorithmConfig = cls()
        for name in tree["removed"]:
            vars(config).pop(name, None)
        if not place:
            settings.update(self._replaced(config, settings))
        vars(config).update(settings)
        return config

    def _replaced(self, config: AlgorithmConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings given for which nothing was stored: they stood at their defaults."""
        more = {}
        for place in self.given.keys() - self.used:
            if place in vars(config) and place not in settings:
                more[place] = self.given[place]
                self.used.add(place)
        return more

    def decode(self, tree: Any, place: str) -> Any:
        creator = self.given.get(place)
        if type(tree) is dict and tree.get(TAG) == "env" and isinstance(creator, types.FunctionType):
            self.used.add(place)
            register_env(tree["name"], creator)
            return tree["name"]
        return super().decode(tree, place)

    def _env(self, tree: Mapping[str, Any], place: str) -> Any:
        name, creator = str(tree["name"]), tree["creator"]
        if is_known_env(name):
            return name
        if isinstance(creator, str) or creator is None:
            entry = f" (its entry point was {creator})" if creator else ""
            return self.problem(place, f"the environment {name!r}{entry} is registered neither with gymnasium nor Ray")
        trial = _Decoder()
        make = trial.decode(creator, place)
        if trial.problems:
            why = next(iter(trial.problems.values()))
            return self.problem(
                place,
                f"the environment {name!r} is not registered here (it was with {why}); call "
                f"`ray.tune.register_env({name!r}, ...)` before, or give it",
            )
        register_env(name, make)
        return name


def is_known_env(name: str) -> bool:
    """Whether RLlib finds an environment by this name: registered with Ray or gymnasium, or the path of a class."""
    if _global_registry.contains(ENV_CREATOR, name):
        return True
    try:
        gym.spec(name)
    except (gym.error.Error, ImportError):
        module = name.rpartition(".")[0]
        try:
            return bool(module) and ":" not in name and importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            return False
    return True


@functools.lru_cache(64)
def _defaults(cls: type[AlgorithmConfig]) -> dict[str, Any]:
    """The default settings of a class, encoded."""
    encoder = _Encoder()
    return {name: encoder._setting(name, value) for name, value in vars(cls()).items() if name not in _NOT_STORED}


_STORED_NAMES = {
    "callbacks": "callbacks_class",
    "env_to_module_connector": "_env_to_module_connector",
    "framework": "framework_str",
    "input": "input_",
    "lambda": "lambda_",
    "learner_class": "_learner_class",
    "learner_connector": "_learner_connector",
    "model_config": "_model_config",
    "module_to_env_connector": "_module_to_env_connector",
    "rl_module_spec": "_rl_module_spec",
    "train_batch_size_per_learner": "_train_batch_size_per_learner",
}
"""Settings by the names that the config's methods have for them."""
_PUBLIC_NAMES = {stored: public for public, stored in _STORED_NAMES.items()}


def _stored_place(place: str) -> str:
    first, slash, rest = place.partition("/")
    return _STORED_NAMES.get(first, first) + slash + rest


def _public_place(place: str) -> str:
    first, slash, rest = place.partition("/")
    return _PUBLIC_NAMES.get(first, first) + slash + rest


def _said(problems: Mapping[str, str], unknown: list[str]) -> str:
    lines = [f"{_public_place(place)}: {why}" for place, why in problems.items()]
    lines += [f"{_public_place(place)}: is given, but the config has no such setting" for place in unknown]
    example = ", ".join(f"{_public_place(place)!r}: ..." for place in problems)
    ask = f"\nGive what is missing by these names: given={{{example}}}" if problems else ""
    return "the config can't be rebuilt here (nothing was changed):\n  " + "\n  ".join(lines) + ask
