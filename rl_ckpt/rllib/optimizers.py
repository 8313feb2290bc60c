"""Optimizers of a TorchLearner as trees, by the names of their parameters.

torch numbers the state of an optimizer by the positions of its parameters, so one layer more or another order of
layers gives every moment to the wrong parameter, without an error where shapes agree. Here everything is kept under
the parameter's name.

Owns: the optimizers that a learner has registered for a policy (or for all policies together), their parameter groups,
state and lr schedulers, and whether saved ones fit. Promises: dtypes stay, also where the state has another dtype than
its parameter. Does not: configure optimizers; they must be there.

A parameter that is not in the policy's module has a name that begins with ".": ".learner.<attribute>" where the learner
holds it for the policy (SAC's temperature), ".policies.<id>.<name>" where it belongs to another policy's module, and
".unnamed.<position>" where nobody knows it; of those last the values are kept here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from ray.rllib.core.learner.torch.torch_learner import TorchLearner

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.rllib.data import UnsavableError, from_data, to_data
from rl_ckpt.rllib.modules import policies_of
from rl_ckpt.state.paths import escape


def optimizers_tree(learner: TorchLearner, policy: str) -> dict[str, Any]:
    """All optimizers that are registered for one policy.

    Args:
        learner: Built.
        policy: Its id; RLlib's `ALL_MODULES` for optimizers of all policies together.

    Returns:
        By the name they were registered under (without the policy's id): class, parameter groups with names, state by
        name, and lr schedulers where there are any. Tensors by reference.

    Raises:
        InvalidInputError: State that is neither tensors nor plain data.
    """
    names = parameter_names(learner, policy)
    return {name: _tree(learner, policy, name, optimizer, names) for name, optimizer in _registered(learner, policy)}


def _tree(
    learner: TorchLearner, policy: str, name: str, optimizer: torch.optim.Optimizer, names: Mapping[int, str]
) -> dict[str, Any]:
    saved = optimizer.state_dict()
    parameters = _parameters(optimizer, names)
    order = list(parameters)
    tree: dict[str, Any] = {
        "class": class_name(optimizer),
        "param_groups": [
            {**group, "params": [order[position] for position in group["params"]]} for group in saved["param_groups"]
        ],
        "state": {order[at]: state for at, state in saved["state"].items() if _is_position(at, order)},
    }
    other = {at: state for at, state in saved["state"].items() if not _is_position(at, order)}
    more = {key: value for key, value in saved.items() if key not in ("state", "param_groups")}
    unnamed = {path: value for path, value in parameters.items() if path.startswith(".unnamed.")}
    schedulers = _schedulers(learner, policy, name)
    if other:
        tree["other"] = other
    if more:
        tree["more"] = more
    if unnamed:
        tree["parameters"] = unnamed
    if schedulers:
        tree["schedulers"] = [{"class": class_name(item), "state": item.state_dict()} for item in schedulers]
    try:
        data: dict[str, Any] = to_data({key: _known_types(value) for key, value in tree.items()})
    except UnsavableError as why:
        raise InvalidInputError(
            f"optimizer {name!r} of policy {policy!r} can't be saved: {why}; keep tensors and plain data in its state"
        ) from why
    return data


def optimizers_problems(learner: TorchLearner, policy: str, tree: Mapping[str, Any]) -> list[str]:
    """What of the saved optimizers of one policy does not fit those here; nothing is changed.

    Args:
        learner: Whose optimizers are to be set.
        policy: Id here.
        tree: As `optimizers_tree` gave it.

    Returns:
        A sentence for each problem.
    """
    here = dict(_registered(learner, policy))
    names = parameter_names(learner, policy)
    problems = []
    if missing := [name for name in here if name not in tree]:
        problems.append(f"optimizers not in the checkpoint: {missing}; it has {list(tree)}")
    if unexpected := [name for name in tree if name not in here]:
        problems.append(f"optimizers in the checkpoint but not here: {unexpected}; here are {list(here)}")
    for name, optimizer in here.items():
        if name in tree:
            found = _problems(learner, policy, name, optimizer, tree[name], names)
            problems += [f"optimizer {name!r}: {text}" for text in found]
    return problems


def _problems(
    learner: TorchLearner,
    policy: str,
    name: str,
    optimizer: torch.optim.Optimizer,
    tree: Mapping[str, Any],
    names: Mapping[int, str],
) -> Iterator[str]:
    if tree["class"] != class_name(optimizer):
        yield f"class {tree['class']} was saved, {class_name(optimizer)} is here"
        return
    groups, here = from_data(tree["param_groups"]), _groups(optimizer, names)
    if len(groups) != len(here):
        yield f"{len(groups)} parameter groups were saved, {len(here)} are here"
        return
    for at, (group, params) in enumerate(zip(groups, here, strict=True)):
        which = f"parameter group {at} " if len(here) > 1 else ""
        if missing := [path for path in params if path not in group["params"]]:
            yield f"{which}has parameters that are not in the checkpoint: {missing}"
        if unexpected := [path for path in group["params"] if path not in params]:
            yield f"{which}of the checkpoint has parameters that are not here: {unexpected}"
    shapes = {path: tuple(value.shape) for path, value in _parameters(optimizer, names).items()}
    for path, value in tree.get("parameters", {}).items():
        if path in shapes and tuple(value.shape) != shapes[path]:
            yield f"{path}: shape {tuple(value.shape)} was saved, {shapes[path]} is here"
    yield from _scheduler_problems([item["class"] for item in tree.get("schedulers", ())], learner, policy)


def _scheduler_problems(saved: list[str], learner: TorchLearner, policy: str) -> Iterator[str]:
    here = [getattr(made, "func", made) for made in _scheduler_classes(learner, policy)]  # classes, partials, functions
    names = [_class_name(cls) for cls in here]
    unlike = [one != other for one, other, cls in zip(saved, names, here, strict=False) if isinstance(cls, type)]
    if saved and (len(saved) != len(here) or any(unlike)):
        yield f"lr schedulers {saved} were saved, {names} are configured here"


def set_optimizers(
    learner: TorchLearner, policy: str, tree: Mapping[str, Any], own: Mapping[str, Any] | None = None
) -> None:
    """Gives the optimizers of one policy their saved state. Only after `optimizers_problems` found none.

    Args:
        learner: Whose optimizers are set; they stay the objects that they are.
        policy: Id here.
        tree: As `optimizers_tree` gave it; not kept: tensors are copied.
        own: As `own_state` gave it for this very learner, in place of what learner 0 had.
    """
    names = parameter_names(learner, policy)
    for name, optimizer in _registered(learner, policy):
        state = {**tree[name]["state"], **(own or {}).get(name, {})}
        _set(learner, policy, name, optimizer, {**tree[name], "state": state}, names)


def _set(
    learner: TorchLearner,
    policy: str,
    name: str,
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Any],
    names: Mapping[int, str],
) -> None:
    tree = from_data(dict(saved))
    _set_schedulers(learner, policy, name, optimizer, tree.get("schedulers", []))
    parameters = _parameters(optimizer, names)
    positions = {path: at for at, path in enumerate(parameters)}
    with torch.no_grad():
        for path, value in tree.get("parameters", {}).items():
            parameters[path].copy_(value)
    groups = [
        {**group, "params": [positions[path] for path in params]}
        for params, group in zip(_groups(optimizer, names), tree["param_groups"], strict=True)
    ]
    state = {positions[path]: value for path, value in tree["state"].items()}
    optimizer.load_state_dict(
        {**tree.get("more", {}), "state": {**state, **tree.get("other", {})}, "param_groups": groups}
    )
    for path, value in tree["state"].items():  # torch has cast floating point state to the parameter's dtype
        _exact(optimizer.state[parameters[path]], value)
    _keep_fixed_lr(learner, optimizer)


def own_state(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The state of parameters that are not in modules: what learners that train together may have differently.

    Gradients of a module are averaged over the learners, those of SAC's temperature are not.

    Args:
        tree: As `optimizers_tree` gave it.

    Returns:
        By optimizer and parameter; without optimizers that have none.
    """
    own = {
        name: {path: state for path, state in optimizer["state"].items() if path.startswith((".learner.", ".unnamed."))}
        for name, optimizer in tree.items()
    }
    return {name: state for name, state in own.items() if state}


def parameter_names(learner: TorchLearner, policy: str) -> dict[int, str]:
    """Names of everything that an optimizer of `policy` may train, by the tensor's `id`; see the module's docstring."""
    names: dict[int, str] = {}
    modules = policies_of(learner.module)
    ordered = sorted(modules.items(), key=lambda item: item[0] != policy)  # its own first: a shared one is its own
    for other, module in ordered:
        if isinstance(module, torch.nn.Module):
            above = "" if other == policy else f".policies.{escape(other)}."
            for name, parameter in module.named_parameters(remove_duplicate=False):
                names.setdefault(id(parameter), above + name)
    for attribute, values in vars(learner).items():
        value = values.get(policy) if isinstance(values, dict) else None
        if isinstance(value, torch.nn.Parameter):
            names.setdefault(id(value), f".learner.{attribute}")
    return names


def class_name(thing: object) -> str:
    """Of an object's class: "package.module:Name"."""
    return _class_name(type(thing))


def _class_name(cls: Any) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _registered(learner: TorchLearner, policy: str) -> list[tuple[str, torch.optim.Optimizer]]:
    """By name, without making an entry for a policy that has none (the learner's own getter would)."""
    return learner.get_optimizers_for_module(policy) if policy in learner._module_optimizers else []


def _groups(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> list[list[str]]:
    """Names of the parameters by group, in torch's order."""
    groups, at = [], 0
    for group in optimizer.param_groups:
        paths = []
        for parameter in group["params"]:
            paths.append(names.get(id(parameter), f".unnamed.{at}"))
            at += 1
        groups.append(paths)
    return groups


def _parameters(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, torch.Tensor]:
    """Parameters by name, in torch's order: at the positions that its `state_dict` uses."""
    paths = [path for group in _groups(optimizer, names) for path in group]
    values = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return dict(zip(paths, values, strict=True))


def _is_position(at: object, order: list[str]) -> bool:
    return type(at) is int and 0 <= at < len(order)


def _known_types(value: Any) -> Any:
    """The same with `dict` in place of its subclasses (MultiStepLR's milestones are a Counter)."""
    if isinstance(value, dict):
        return {key: _known_types(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_known_types(item) for item in value)
    return value


def _exact(state: dict[str, Any], saved: Mapping[str, Any]) -> None:
    for key, value in saved.items():
        here = state.get(key)
        if isinstance(value, torch.Tensor) and isinstance(here, torch.Tensor) and here.dtype != value.dtype:
            state[key] = value.to(here.device)


def _keep_fixed_lr(learner: TorchLearner, optimizer: torch.optim.Optimizer) -> None:
    """A fixed learning rate is the config's: RLlib sets it after each update, so the first one must not differ."""
    schedule = learner._optimizer_lr_schedules.get(optimizer)
    if schedule is not None and not schedule.use_schedule and learner._lr_scheduler_classes is None:
        fixed: Any = schedule.get_current_value()
        learner._set_optimizer_lr(optimizer, lr=fixed)


def _scheduler_classes(learner: TorchLearner, policy: str) -> list[Any]:
    configured = learner._lr_scheduler_classes
    if configured is None:
        return []
    return list(configured[policy] if isinstance(configured, dict) else configured)


def _schedulers(learner: TorchLearner, policy: str, name: str) -> list[Any]:
    """Of torch's kind, which RLlib makes at the first update; empty before that."""
    found: list[Any] = learner._lr_schedulers.get(policy, {}).get(f"{policy}_{name}", [])
    return found


def _set_schedulers(
    learner: TorchLearner, policy: str, name: str, optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]]
) -> None:
    full = f"{policy}_{name}"
    if not saved:  # none had been made: RLlib makes new ones at the first update
        learner._lr_schedulers.get(policy, {}).pop(full, None)
        return
    schedulers = _schedulers(learner, policy, name)
    if not schedulers:
        # As RLlib makes them; each sets the optimizer's lr, which is overwritten when the optimizer is set after this.
        schedulers = [cls(optimizer) for cls in _scheduler_classes(learner, policy)]
        learner._lr_schedulers.setdefault(policy, {})[full] = schedulers
    for scheduler, item in zip(schedulers, saved, strict=True):
        here, state = vars(scheduler), item["state"]
        for key, value in state.items():
            if isinstance(value, dict) and isinstance(here.get(key), dict):
                state[key] = type(here[key])(value)
        scheduler.load_state_dict(state)
