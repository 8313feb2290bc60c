"""An Algorithm from the description in its checkpoint: config, class, policies; the state comes afterwards.

Owns: what of the saved config is replaced, and narrowing it to some of its policies. Does not: restore anything.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.rllib.about import check_about
from rl_ckpt.rllib.config import config_from
from rl_ckpt.rllib.fit import check_policies
from rl_ckpt.runtime.inside import guarded
from rl_ckpt.runtime.restore import RestoreRequest, restore_rank
from rl_ckpt.runtime.spec import Place, RunSpec


@dataclass(frozen=True, slots=True)
class Changes:
    """What a caller of `load` wants otherwise than it was saved."""

    given: Mapping[str, Any]
    config: AlgorithmConfig | None = None
    policies: Sequence[str] | None = None
    policy_mapping_fn: Callable[..., str] | None = None
    policies_to_train: Sequence[str] | Callable[..., bool] | None = None


def read_description(spec: RunSpec, url: str, step: int | None, *parts: str) -> dict[str, Any]:
    """Parts of a checkpoint that are plain data, read by this process alone.

    Args:
        spec: The run.
        url: Of the run, for messages.
        step: Which checkpoint; None: the newest good one.
        parts: `about`, and `config`.

    Raises:
        CheckpointNotFoundError: No such run or checkpoint.
        InvalidInputError: It is not one of RLlib's things.
    """
    place = Place(f"describe-{uuid.uuid4().hex}", 0, 1)
    found: dict[str, Any] = {}
    try:
        with guarded(spec, place, "lost_restore"):
            found, _ = restore_rank(spec, place, RestoreRequest(step, list(parts), ranks=(0,)), None)
    except InvalidInputError as error:
        if "chooses nothing" not in str(error):  # which `check_about` says better
            raise
    check_about(found, url)
    return found


def build(described: Mapping[str, Any], changes: Changes) -> Algorithm:
    """The Algorithm that a checkpoint describes, with weights as they are made.

    Raises:
        InvalidInputError: The config can't be rebuilt (one error names everything that is missing, and how to give it),
            or is not one that RLlib builds.
    """
    about = described["about"]
    if about["kind"] != "algorithm":
        text = f"the checkpoint is of one {about['kind']}, not of an Algorithm"
        reader = "native.load_old_policy" if about["kind"] == "old_stack" else "load_policy"
        raise InvalidInputError(f"{text}; `rl_ckpt.rllib.{reader}` reads it")
    if changes.policies is not None:
        check_policies(changes.policies, about["policies"])
    config = configured(described, changes)
    algo: Algorithm = config.build_algo()
    return algo


def start_ray() -> None:
    """Starts Ray where it does not run yet, as RLlib itself does."""
    if not ray.is_initialized():
        ray.init()


def configured(described: Mapping[str, Any], changes: Changes) -> AlgorithmConfig:
    """The config of a checkpoint, as it is wanted; raises as `build`."""
    config = _config(described, changes)
    _narrow(config, changes)
    return config


def _config(described: Mapping[str, Any], changes: Changes) -> AlgorithmConfig:
    if changes.config is not None:
        if changes.given:
            raise InvalidInputError("`config` replaces the saved one, and `given` changes it; give one of the two")
        return changes.config.copy(copy_frozen=False)
    if "config" not in described:
        raise InvalidInputError("the checkpoint has no part `config`; build an Algorithm and call `restore`")
    given = dict(changes.given)
    if changes.policy_mapping_fn is not None:
        given.setdefault("policy_mapping_fn", changes.policy_mapping_fn)
    if changes.policies_to_train is not None:
        given.setdefault("policies_to_train", changes.policies_to_train)
    config = config_from(described["config"], given=given)
    _forget_paths(config)
    return config


def _forget_paths(config: Any) -> None:
    """Weights come out of the checkpoint, and not from the native folders that the saved Algorithm began with.

    These may be gone by now, and RLlib would unpickle whatever lies there.
    """
    above = config._rl_module_spec
    specs = above.rl_module_specs if isinstance(above, MultiRLModuleSpec) else None
    for spec in (above, *(specs.values() if isinstance(specs, Mapping) else [specs])):
        if isinstance(spec, RLModuleSpec | MultiRLModuleSpec):
            spec.load_state_path = None


def _narrow(config: Any, changes: Changes) -> None:
    """Leaves policies out, and puts other functions in."""
    if changes.policy_mapping_fn is not None:
        config.multi_agent(policy_mapping_fn=changes.policy_mapping_fn)
    if changes.policies_to_train is not None:
        config.multi_agent(policies_to_train=changes.policies_to_train)
    if changes.policies is None:
        return
    if changes.policy_mapping_fn is None and len(changes.policies) > 1:
        raise InvalidInputError("`policies` leaves some out: give a `policy_mapping_fn` that maps agents to those left")
    wanted = list(changes.policies)
    if changes.policy_mapping_fn is None:
        config.multi_agent(policy_mapping_fn=_Always(wanted[0]))
    config.multi_agent(policies={id_: spec for id_, spec in config.policies.items() if id_ in wanted})
    trained = config.policies_to_train
    if trained is not None and not callable(trained):
        config.multi_agent(policies_to_train=[id_ for id_ in trained if id_ in wanted])
    modules = config._rl_module_spec
    if isinstance(modules, MultiRLModuleSpec):
        specs: Any = modules
        specs.rl_module_specs = specs.module_specs = {
            id_: spec for id_, spec in specs.rl_module_specs.items() if id_ in wanted
        }
    overrides = config.algorithm_config_overrides_per_module
    config.algorithm_config_overrides_per_module = {id_: v for id_, v in overrides.items() if id_ in wanted}


@dataclass(frozen=True, slots=True)
class _Always:
    """Maps every agent to one policy."""

    policy: str

    def __call__(self, *_args: Any, **_more: Any) -> str:
        return self.policy
