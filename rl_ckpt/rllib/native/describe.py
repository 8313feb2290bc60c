"""What a native directory of the new API stack says of its Algorithm: config, classes, modules.

Owns: `class_and_ctor_args.pkl` of 2.1 and of 2.0, which differ: 2.0 pickled the config object and `RLModuleConfig`s,
2.1 has dicts. Does not: weights and states, which are `importing.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule, MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModule, RLModuleConfig, RLModuleSpec
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchDDPRLModule
from ray.rllib.policy.policy import PolicySpec

from rl_ckpt.errors import CorruptionError, InvalidInputError
from rl_ckpt.rllib.native.directory import NativeDirectory
from rl_ckpt.rllib.native.objects import NotImported, Objects

ARGS_FILE = "class_and_ctor_args.pkl"
MODULES = "learner_group/learner/rl_module"
_NOT_OF_THE_CONFIG = frozenset(("class", "algo_class", "_is_frozen", "_per_module_overrides", "module_specs"))


@dataclass(frozen=True, slots=True)
class Described:
    """An Algorithm, as its native checkpoint describes it."""

    algorithm: type[Algorithm]
    config: AlgorithmConfig
    """With a `NotImported` where a setting was left out."""
    modules: dict[str, RLModuleSpec]
    """By policy id."""
    multi: MultiRLModuleSpec
    """Of all of them, for a learner."""
    dropped: tuple[str, ...] = field(default=())
    """Settings that this Ray's config does not have."""


def describe_algorithm(directory: NativeDirectory, objects: Objects, given: AlgorithmConfig | None) -> Described:
    """Reads what the directory says of its Algorithm.

    Args:
        directory: Of version 2.0 or 2.1.
        objects: Makes classes of names.
        given: The config to be taken in place of the stored one; None: the stored one.

    Raises:
        InvalidInputError: A class that is needed is not found, or not to be imported; says what to do.
        CorruptionError: A file is missing or damaged, or not what RLlib writes there.
        UntrustedDataError: A pickle wants what is not allowed.
    """
    kind, args, _ = _args(directory, "", objects)
    if given is None:
        config, dropped = _config(args[0] if args else None, directory.url)
    else:
        config, dropped = given.copy(copy_frozen=False), ()
    if isinstance(kind, NotImported) and given is not None and given.algo_class is not None:
        kind = given.algo_class
    algorithm = _class(kind, Algorithm, "the Algorithm's class", directory.url)
    config.algo_class = algorithm
    ids = directory.folders(MODULES)
    if not ids:
        raise CorruptionError(f"{directory.url}/{MODULES}: no modules; the checkpoint is not complete")
    modules = {policy: describe_module(directory, f"{MODULES}/{policy}", objects) for policy in ids}
    return Described(algorithm, config, modules, _multi(directory, objects, modules), dropped)


def describe_module(directory: NativeDirectory, folder: str, objects: Objects) -> RLModuleSpec:
    """How one module is built; raises as `describe_algorithm`."""
    kind, _, kwargs = _args(directory, folder, objects)
    where = f"{directory.url}/{folder}".rstrip("/")
    if "config" in kwargs:  # 2.0
        kwargs = _from_module_config(kwargs["config"], where)
    if kind is TorchDDPRLModule:
        raise CorruptionError(f"{where}/{ARGS_FILE}: describes the wrapper of a module and not the module")
    missing = {"observation_space", "action_space", "model_config"} - kwargs.keys()
    if missing:
        raise CorruptionError(f"{where}/{ARGS_FILE}: lacks {sorted(missing)}")
    catalog, left = kwargs.get("catalog_class"), dict[str, str]()
    for name in ("observation_space", "action_space", "model_config"):
        found = [value for value in _all_in(kwargs[name]) if isinstance(value, NotImported)]
        left |= {name: found[0].why} if found else {}
    if isinstance(catalog, NotImported):
        left["catalog_class"] = catalog.why
    if left:
        raise InvalidInputError(f"{where}: the module can't be built: {left}; import with trust='full'")
    return RLModuleSpec(
        module_class=_class(kind, RLModule, "the module's class", where),
        observation_space=kwargs["observation_space"],
        action_space=kwargs["action_space"],
        inference_only=bool(kwargs.get("inference_only", False)),
        learner_only=bool(kwargs.get("learner_only", False)),
        model_config=kwargs["model_config"],
        catalog_class=catalog,
    )


def _args(directory: NativeDirectory, folder: str, objects: Objects) -> tuple[Any, list[Any], dict[str, Any]]:
    """Class, positional and keyword arguments of a component."""
    name = f"{folder}/{ARGS_FILE}" if folder else ARGS_FILE
    found = directory.mapping(name)
    try:
        args, kwargs = found["ctor_args_and_kwargs"]
        args = list(args) if isinstance(args, list | tuple) else [args]
        if not isinstance(kwargs, dict):
            raise TypeError("keyword arguments that are no dict")
        return objects.real(found["class"]), objects.real(args), objects.real(kwargs)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptionError(
            f"{directory.url}/{name}: not what RLlib writes there ({type(error).__name__}: {error})"
        ) from error


def _config(saved: Any, url: str) -> tuple[AlgorithmConfig, tuple[str, ...]]:
    """A config with the stored settings, of those that this Ray knows."""
    if isinstance(saved, AlgorithmConfig):
        kind: Any = type(saved)
        settings: Mapping[str, Any] = vars(saved)
    elif isinstance(saved, dict) and "class" in saved:
        kind, settings = saved["class"], saved
    elif isinstance(saved, NotImported):
        kind, settings = saved, {}
    else:
        raise CorruptionError(f"{url}/{ARGS_FILE}: holds a {type(saved).__name__}, where a config should be")
    config: AlgorithmConfig = _class(kind, AlgorithmConfig, "the config's class", url)()
    known, dropped = vars(config), []
    for name, value in settings.items():
        if name in _NOT_OF_THE_CONFIG:
            continue
        if name not in known:
            dropped.append(name)
        elif isinstance(value, NotImported) and value.name.startswith("ray.rllib."):
            dropped.append(name)  # of an older Ray: this one's default is what took its place
        else:
            known[name] = _policies(value) if name == "policies" else value
    return config, tuple(sorted(dropped))


def _policies(saved: Any) -> Any:
    """RLlib's checkpoints have tuples for what its configs have as PolicySpecs."""
    if not isinstance(saved, dict):
        return saved
    return {
        policy: PolicySpec(*spec) if isinstance(spec, tuple | list) and len(spec) == 4 else spec
        for policy, spec in saved.items()
    }


def _multi(directory: NativeDirectory, objects: Objects, modules: dict[str, RLModuleSpec]) -> MultiRLModuleSpec:
    kind, _, kwargs = _args(directory, MODULES, objects)
    cls = _class(kind, MultiRLModule, "the class of all modules together", directory.url)
    if cls is MultiRLModule:
        return MultiRLModuleSpec(rl_module_specs=dict(modules))
    named = ("observation_space", "action_space", "model_config")
    more = {name: kwargs.get(name) for name in named}
    if any(isinstance(value, NotImported) for part in more.values() for value in _all_in(part)):
        raise InvalidInputError(
            f"{directory.url}/{MODULES}: {cls.__qualname__} can't be built; import with trust='full'"
        )
    return MultiRLModuleSpec(multi_rl_module_class=cls, rl_module_specs=dict(modules), **more)


def _from_module_config(config: Any, where: str) -> dict[str, Any]:
    if isinstance(config, NotImported):
        raise InvalidInputError(f"{where}: {config.why}")
    if not isinstance(config, RLModuleConfig):
        raise CorruptionError(
            f"{where}/{ARGS_FILE}: holds a {type(config).__name__}, where a module's config should be"
        )
    found = dict(vars(config))
    return {**found, "model_config": found.get("model_config_dict")}


def _class(kind: Any, base: type, what: str, where: str) -> Any:
    """A class that is what it should be: nothing else is ever called."""
    if isinstance(kind, NotImported):
        raise InvalidInputError(f"{where}: {what} is {kind.why}")
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise CorruptionError(f"{where}: {what} is {kind!r}, which is no {base.__name__}")
    return kind


def _all_in(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [item for part in value.values() for item in _all_in(part)]
    if isinstance(value, list | tuple):
        return [item for part in value for item in _all_in(part)]
    return [value, *(_all_in(vars(value)) if hasattr(value, "__dataclass_fields__") else ())]
