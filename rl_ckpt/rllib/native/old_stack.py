"""Checkpoints of RLlib's old API stack: versions 1.0 and 1.1, of an Algorithm or of one Policy.

The old stack has Policies where the new one has RLModules and learners, and there is no way to make one of the other in
general. So these are kept as what they are (kind "old_stack"), and come back as Policies, as long as Ray has them.

Owns: their layout, in the source and in our tree. Promises: weights and optimizer state are the source's; nothing that
RLlib would unpickle at the load is kept. Does not: restore Algorithms of the old stack, their replay buffers and
filters; a Policy's connectors have its filter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ray.rllib.algorithms.registry import get_policy_class
from ray.rllib.policy.policy import Policy, PolicySpec
from ray.rllib.utils.serialization import space_from_dict, space_to_dict

from rl_ckpt.checkpointer import Checkpointer
from rl_ckpt.errors import CorruptionError, InvalidInputError
from rl_ckpt.rllib.about import about_tree, check_about
from rl_ckpt.rllib.data import UnsavableError, from_data, to_data
from rl_ckpt.rllib.native.directory import Kind, NativeDirectory
from rl_ckpt.rllib.native.objects import NotImported, Objects
from rl_ckpt.rllib.native.writing import native_optimizer
from rl_ckpt.rllib.values import Decoder, Encoder, missing
from rl_ckpt.state.paths import escape, literal

_NOT_KEPT = ("weights", "policy_spec", "_optimizer_variables", "connector_configs", "checkpoint_version")


class _Values(Encoder):
    """Knows what was left out."""

    def special(self, value: Any) -> Any | None:
        return missing(value.why) if isinstance(value, NotImported) else None


def old_stack_tree(
    directory: NativeDirectory, objects: Objects, kind: Kind, policy_id: str
) -> tuple[dict[str, Any], list[str]]:
    """A checkpoint of the old stack as our tree, and what was left out of it.

    Raises:
        As `import_native`.
    """
    notices: list[str] = []
    if kind.layout == "old policy":
        states = {policy_id: objects.real(directory.state("", "policy_state"))}
        algorithm: dict[str, Any] = {}
    else:
        whole = objects.real(directory.state("", "algorithm_state"))
        algorithm = {"iteration": int(whole.get("training_iteration", 0)), "counters": dict(whole.get("counters", {}))}
        ids = directory.folders("policies")
        states = {policy: objects.real(directory.state(f"policies/{policy}", "policy_state")) for policy in ids}
        worker = whole.get("worker")
        if isinstance(worker, dict) and worker.get("filters"):
            notices.append("filters of the worker are left out (those of its Policies' connectors are there)")
    trees = {}
    for policy, state in states.items():
        where = directory.url if kind.layout == "old policy" else f"{directory.url}/policies/{policy}"
        trees[policy] = _policy_tree(state, f"{where}/policy_state.pkl", policy, notices)
    tree = {"about": about_tree("old_stack", trees), "policies": trees}
    return tree | ({"algorithm": algorithm} if algorithm else {}), notices


def _policy_tree(state: dict[str, Any], file: str, policy: str, notices: list[str]) -> dict[str, Any]:
    try:
        spec = state["policy_spec"]
        parts = vars(spec) if isinstance(spec, PolicySpec) else spec
        spaces = {name: _space(parts[name]) for name in ("observation_space", "action_space")}
        kind, config = parts["policy_class"], parts["config"]
        weights = state["weights"]
        if not isinstance(weights, dict) or not all(isinstance(value, np.ndarray) for value in weights.values()):
            raise InvalidInputError(f"{file}: weights that are no arrays by name; only torch Policies are imported")
        optimizers = [_named(saved, weights) for saved in state.get("_optimizer_variables", [])]
    except InvalidInputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptionError(
            f"{file}: not the state of a torch Policy of version 1.x ({type(error).__name__}: {error})"
        ) from error
    values = _Values()
    rest = {key: value for key, value in state.items() if key not in _NOT_KEPT}
    try:
        return {
            "about": {
                "policy_class": kind if isinstance(kind, str) else values.encode(kind),
                "config": values.encode(config),
                **{name: values.encode(space) for name, space in spaces.items()},
            },
            "module": {name: torch.from_numpy(np.array(value)) for name, value in weights.items()},
            "optimizers": {str(at): to_data(saved) for at, saved in enumerate(optimizers)},
            "old_stack": to_data({**rest, "connectors": _connectors(state, policy, notices)}, file),
        }
    except UnsavableError as why:
        raise InvalidInputError(f"{why}, which is neither arrays nor plain data") from None


def _space(saved: Any) -> Any:
    return space_from_dict(saved) if isinstance(saved, dict) else saved


def _connectors(state: Mapping[str, Any], policy: str, notices: list[str]) -> Any:
    """Configs of a Policy's connectors without the pickles in them, which RLlib would load."""
    dropped: list[str] = []

    def kept(config: Any) -> Any:
        if isinstance(config, tuple | list) and len(config) == 2 and isinstance(config[0], str):
            name, params = config
            if isinstance(params, bytes | NotImported):
                dropped.append(name)
                return (name, None)
            return (name, [kept(item) for item in params] if isinstance(params, list) else params)
        return config

    found = {part: kept(config) for part, config in dict(state.get("connector_configs", {})).items()}
    lost = [name for name in dropped if name != "StateBufferConnector"]  # that has the outputs of a running episode
    if lost:
        notices.append(f"policy {policy!r}: the state of its connectors {lost} is a pickle, and left out")
    return found


def _named(saved: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state by names of parameters, where the weights tell them, else by positions."""
    groups, state = saved["param_groups"], saved["state"]
    count = sum(len(group["params"]) for group in groups)
    names = [name for name, value in weights.items() if value.dtype.kind == "f"]
    shapes = {
        at: np.shape(values.get("exp_avg", weights[names[at]])) for at, values in state.items() if at < len(names)
    }
    if len(names) != count or any(shape != weights[names[at]].shape for at, shape in shapes.items()):
        names = [f".unnamed.{at}" for at in range(count)]
    return {
        "param_groups": [{**group, "params": [names[at] for at in group["params"]]} for group in groups],
        "state": {names[at]: dict(values) for at, values in state.items()},
    }


def load_old_policy(
    url: str,
    policy_id: str = "default_policy",
    *,
    step: int | None = None,
    given: Mapping[str, Any] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Policy:
    """A Policy of the old API stack, from a checkpoint that was imported from version 1.0 or 1.1.

    Only this policy's bytes are read. Needs no Algorithm and no environment, and starts no Ray.

    Args:
        url: Of the run.
        policy_id: Which policy.
        step: Which checkpoint; None: the newest good one.
        given: What was left out at the import, by place: "policy_class", or "config/<setting>".
        storage_options: For the file system, as fsspec takes them.

    Raises:
        CheckpointNotFoundError: No such run or checkpoint.
        InvalidInputError: No such policy (the known ones are listed), one of the new stack, or something is missing
            here; all of it is listed.
        CorruptionError: The checkpoint is damaged.
    """
    checkpointer = Checkpointer(url, storage_options=storage_options)
    select = ["about", literal(f"policies/{escape(policy_id)}")]
    tree: dict[str, Any] = checkpointer.load_state(step, select=select)
    about = check_about(tree, checkpointer.url)
    if about["kind"] != "old_stack":
        raise InvalidInputError(f"{checkpointer.url} is of the new API stack; `load_policy` reads its policies")
    saved = tree.get("policies", {}).get(policy_id)
    if saved is None:
        raise InvalidInputError(f"{checkpointer.url} has no policy {policy_id!r}; its policies are {about['policies']}")
    return Policy.from_state(_state(saved, given, policy_id))


def _state(saved: Mapping[str, Any], given: Mapping[str, Any] | None, policy_id: str) -> dict[str, Any]:
    """What RLlib's `Policy.from_state` takes."""
    decoder = Decoder(given)
    said = saved["about"]
    parts = {name: decoder.decode(said[name], name) for name in ("observation_space", "action_space", "config")}
    kind = decoder.decode(said["policy_class"], "policy_class")
    unknown = sorted(decoder.given.keys() - decoder.used)
    if decoder.problems or unknown:
        lines = [f"{place}: {why}" for place, why in decoder.problems.items()]
        lines += [f"{place}: is given, but the policy has no such part" for place in unknown]
        raise InvalidInputError(f"policy {policy_id!r} can't be built here; give what is missing by given=: {lines}")
    kind = get_policy_class(kind) if isinstance(kind, str) else kind
    if not (isinstance(kind, type) and issubclass(kind, Policy)):
        raise InvalidInputError(f"policy {policy_id!r}: {said['policy_class']!r} is no Policy of this Ray")
    rest = from_data(saved["old_stack"])
    return {
        "weights": {name: tensor.numpy() for name, tensor in from_data(saved["module"]).items()},
        "_optimizer_variables": [
            native_optimizer(from_data(saved["optimizers"][at]), at) for at in sorted(saved["optimizers"], key=int)
        ],
        "connector_configs": rest.pop("connectors"),
        **rest,
        "policy_spec": {
            "policy_class": kind,
            "config": parts["config"],
            **{name: space_to_dict(parts[name]) for name in ("observation_space", "action_space")},
        },
    }
