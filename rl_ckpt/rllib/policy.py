"""Policies: one RLModule, saved and loaded on its own: no Algorithm, no environment, and no Ray started.

Owns: what a module is made of besides its weights (`policies/<id>/about`), and the two functions that people call.
Promises: a policy's load reads its own bytes, whatever else the checkpoint holds, and the module that comes back is
that which was saved: class, architecture, names, dtypes and bits of its parameters. Does not do: optimizers,
connectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import torch
from ray.rllib.core.models.catalog import Catalog
from ray.rllib.core.rl_module.apis import TargetNetworkAPI
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from ray.rllib.core.rl_module.rl_module import RLModule

from rl_ckpt import Checkpointer
from rl_ckpt.errors import InvalidInputError
from rl_ckpt.info import CheckpointInfo
from rl_ckpt.rllib.about import about_tree, check_about
from rl_ckpt.rllib.data import UnsavableError, from_data, to_data
from rl_ckpt.rllib.modules import module_extra, module_tree, set_module
from rl_ckpt.rllib.values import Decoder, Encoder, compact
from rl_ckpt.state.paths import escape, literal

DEFAULT_POLICY = "default_policy"


def policy_about(module: RLModule) -> dict[str, Any]:
    """How to build a module anew: plain data, classes by reference.

    Args:
        module: A single policy's, wrapped for distributed training or not, on any device.

    Raises:
        InvalidInputError: It is a MultiRLModule.
    """
    inner = module.unwrapped()
    if isinstance(inner, MultiRLModule):
        raise InvalidInputError(f"a MultiRLModule holds several policies ({', '.join(inner.keys())}); give one of them")
    encoder = Encoder()
    return {
        "class": encoder.encode(type(inner)),
        "observation_space": compact(encoder.encode(inner.observation_space)),
        "action_space": compact(encoder.encode(inner.action_space)),
        "model_config": compact(encoder.encode(inner.model_config)),
        "catalog_class": None if inner.catalog is None else encoder.encode(type(inner.catalog)),
        "inference_only": bool(inner.inference_only),
        "learner_only": bool(inner.learner_only),
        "target_networks": _has_target_networks(inner),
        "framework": inner.framework,
    }


def build_module(
    about: Mapping[str, Any], *, inference_only: bool | None = None, given: Mapping[str, Any] | None = None
) -> RLModule:
    """A module as `policy_about` described it, with weights as its constructor makes them. Starts no Ray.

    Args:
        about: As it was saved.
        inference_only: Whether to leave out what only training needs (value function, target networks); None: as saved.
        given: Values by place: "class", "observation_space", "action_space", "model_config" or what is in it
            ("model_config/activation"), "catalog_class".

    Raises:
        InvalidInputError: A class can't be found, or something was not stored; all of it is listed.
        CorruptionError: The data have a form that this release does not know.
    """
    decoder = Decoder(given)
    cls = decoder.cls(about["class"], "class", RLModule, "a class of RLModule")
    catalog = about["catalog_class"]
    if catalog is not None or "catalog_class" in decoder.given:
        catalog = decoder.cls(catalog, "catalog_class", Catalog, "a class of Catalog")
    spaces = {name: _space(decoder, about, name) for name in ("observation_space", "action_space")}
    model_config = decoder.decode(about["model_config"], "model_config")
    unknown = sorted(decoder.given.keys() - decoder.used)
    if decoder.problems or unknown or cls is None:
        raise InvalidInputError(_said(decoder.problems, unknown))
    lean = bool(about["inference_only"]) if inference_only is None else inference_only
    module: RLModule = cls(**spaces, inference_only=lean, model_config=model_config, catalog_class=catalog)
    module.learner_only = bool(about["learner_only"])
    if about["target_networks"] and not lean and isinstance(module, TargetNetworkAPI):
        module.make_target_networks()  # an Algorithm's learner does, after it has built the module
    return module


def save_policy(
    url: str,
    module: RLModule,
    policy_id: str = DEFAULT_POLICY,
    *,
    step: int = 0,
    metrics: Mapping[str, object] | None = None,
    tag: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> CheckpointInfo:
    """Saves one policy as a checkpoint of its own; returns when it is committed. Starts no Ray.

    Args:
        url: Of the run, a folder or any fsspec url; not that of an Algorithm's checkpoints.
        module: The policy's RLModule (`algorithm.get_module(policy_id)`).
        policy_id: Under which it is loaded.
        step: As for `Checkpointer.save`.
        metrics: As for `Checkpointer.save`.
        tag: As for `Checkpointer.save`.
        storage_options: For the file system, as fsspec takes them.

    Raises:
        InvalidInputError: The module, the id or the step can't be used; nothing was written.
        CheckpointError: As `Checkpointer.save_state`.
    """
    _check_id(policy_id)
    if not isinstance(module, RLModule):
        raise InvalidInputError(
            f"module is a {type(module).__name__}; give an RLModule, as `algorithm.get_module(policy_id)` returns it"
        )
    parts = {"about": policy_about(module), "module": module_tree(module), **_extra(module)}
    tree = {"about": about_tree("policy", [policy_id]), "policies": {policy_id: parts}}
    with Checkpointer(url, storage_options=storage_options) as checkpointer:
        return checkpointer.save_state(step, tree, metrics=metrics, tag=tag).result()


def load_policy(
    url: str,
    policy_id: str = DEFAULT_POLICY,
    *,
    step: int | None = None,
    module_class: type[RLModule] | None = None,
    given: Mapping[str, Any] | None = None,
    inference_only: bool | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> RLModule:
    """Loads one policy, out of its own checkpoint or an Algorithm's, ready for `forward_inference`.

    Only this policy's bytes are read. Needs no Algorithm and no environment, and starts no Ray.

    Args:
        url: Of the run.
        policy_id: Which policy.
        step: Which checkpoint; None: the newest good one.
        module_class: The module's class, where the saved one can't be imported here.
        given: Further values by place, as for `build_module`.
        inference_only: True leaves out what only training needs, and does not read it; None: as it was saved.
        storage_options: For the file system, as fsspec takes them.

    Returns:
        The module, on the CPU, in eval mode.

    Raises:
        CheckpointNotFoundError: No such run or checkpoint.
        InvalidInputError: No such policy (the known ones are listed), a class that can't be found, weights that don't
            fit the class that was given, or a newer release's checkpoint.
        CorruptionError: The checkpoint is damaged.
    """
    _check_id(policy_id)
    checkpointer = Checkpointer(url, storage_options=storage_options)
    below = f"policies/{escape(policy_id)}"
    parts = ("about", "extra", "module") if inference_only is None else ("about", "extra")
    tree = _load(checkpointer, step, ["about", *(literal(f"{below}/{part}") for part in parts)])
    about = check_about(tree, checkpointer.url)
    if about["kind"] == "old_stack":
        text = "holds Policies of RLlib's old API stack; `rl_ckpt.rllib.native.load_old_policy` reads them"
        raise InvalidInputError(f"{checkpointer.url} {text}")
    known = about["policies"]
    saved = tree.get("policies", {}).get(policy_id)
    if saved is None:
        raise InvalidInputError(f"{checkpointer.url} has no policy {policy_id!r}; its policies are {_listed(known)}")
    values = dict(given or {}) if module_class is None else {**(given or {}), "class": module_class}
    module = build_module(saved["about"], inference_only=inference_only, given=values)
    weights = saved.get("module", {})
    if inference_only is not None:
        names = [literal(f"{below}/module/{escape(name)}") for name in module_tree(module)]
        weights = _load(checkpointer, step, names)["policies"][policy_id]["module"] if names else {}
    if isinstance(module, torch.nn.Module):
        _take_dtypes(module, weights)
        module.eval()
    set_module(module, weights, from_data(saved.get("extra", {})))
    return module


def _check_id(policy_id: object) -> None:
    if not (isinstance(policy_id, str) and policy_id):
        raise InvalidInputError(f"policy_id={policy_id!r} must be a string, and not empty")


def _load(checkpointer: Checkpointer, step: int | None, select: list[str]) -> dict[str, Any]:
    try:
        tree = checkpointer.load_state(step, select=select)
    except InvalidInputError as error:
        raise InvalidInputError(f"no policy can be loaded from {checkpointer.url}: {error}") from error
    assert isinstance(tree, dict)
    return tree


def _space(decoder: Decoder, about: Mapping[str, Any], name: str) -> Any:
    found = decoder.decode(about[name], name)
    if found is not None and not isinstance(found, gym.Space):
        decoder.problem(name, f"{found!r} is given, but a space is needed")
    return found


def _has_target_networks(module: RLModule) -> bool:
    if not isinstance(module, TargetNetworkAPI):
        return False
    try:
        return bool(module.get_target_network_pairs())
    except (AttributeError, IndexError):  # they are attributes that the learner lets the module make
        return False


def _extra(module: RLModule) -> dict[str, Any]:
    """What the module's own `get_state` adds to its tensors, as a part of its tree; no part where it adds nothing."""
    extra = module_extra(module)
    try:
        return {"extra": to_data(extra)} if extra else {}
    except UnsavableError as why:
        raise InvalidInputError(f"what get_state() of the module adds can't be saved: {why}") from why


def _take_dtypes(module: torch.nn.Module, weights: Mapping[str, Any]) -> None:
    """Gives the new module's parameters and buffers the saved dtypes: a constructor makes float32 ones."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        saved = weights.get(name)
        if isinstance(saved, torch.Tensor) and saved.dtype != tensor.dtype:
            tensor.data = tensor.data.to(saved.dtype)


def _listed(ids: list[str]) -> str:
    return ", ".join(map(repr, ids)) or "none"


def _said(problems: Mapping[str, str], unknown: list[str]) -> str:
    lines = [f"{place}: {why}" for place, why in problems.items()]
    lines += [f"{place}: is given, but the policy has no such part" for place in unknown]
    others = ", ".join(f"{place!r}: ..." for place in problems if place != "class")
    ask = ["module_class=... of load_policy (given={'class': ...} of build_module)"] if "class" in problems else []
    ask += [f"given={{{others}}}"] if others else []
    return "the policy can't be built here:\n  " + "\n  ".join(lines) + (f"\nGive {', '.join(ask)}" if ask else "")
