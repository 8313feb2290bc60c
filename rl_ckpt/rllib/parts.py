"""The parts that each process contributes to the tree of a checkpoint, and takes from it.

Owns: which of learner, runner and driver writes and reads what; the rooms beside this one know how. Promises: as they
do: looking whether a part fits changes nothing.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gymnasium as gym
import msgspec
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.rllib.about import about_tree
from rl_ckpt.rllib.algorithm import (
    algorithm_problems,
    algorithm_tree,
    has_connectors,
    own_connectors_problems,
    set_algorithm,
    set_own_connectors,
)
from rl_ckpt.rllib.buffers import buffer_modules, buffer_problems, buffer_tree, left_out_tree, set_buffer
from rl_ckpt.rllib.config import config_tree
from rl_ckpt.rllib.fit import LOCAL_RUNNER, Plan
from rl_ckpt.rllib.learner import held, learner_problems, learner_tree, set_learner
from rl_ckpt.rllib.modules import policies_of, weights_digest
from rl_ckpt.rllib.policy import policy_about
from rl_ckpt.rllib.refs import class_ref
from rl_ckpt.rllib.rng import rng_tree
from rl_ckpt.rllib.runner import runner_problems, runner_tree, set_runner, set_weights
from rl_ckpt.rllib.team import AnyAlgorithm, Role
from rl_ckpt.rllib.values import Decoder


class Applied(msgspec.Struct, frozen=True, tag="applied"):
    """A process has set its part."""

    learners: tuple[dict[str, str], ...]
    """Digests of the weights of the learners in this process, by policy."""
    runners: tuple[dict[str, str], ...]
    """The same of its env runners."""
    eval_runners: tuple[dict[str, str], ...]
    """The same of its evaluation runners."""
    notices: tuple[str, ...] = ()


def local_roles(algo: AnyAlgorithm) -> tuple[Role, ...]:
    """What lives in the driver's process beside the Algorithm."""
    out = [Role("learner", 0)] if algo.learner_group._learner is not None else []
    out += [Role("env_runner", 0)] if algo.env_runner is not None else []
    out += [Role("eval_env_runner", 0)] if algo.eval_env_runner is not None else []
    return tuple(out)


def _object(target: Any, role: Role) -> Any:
    """What a role stands for: in an actor of its own, or in the driver's process."""
    if not isinstance(target, Algorithm):
        return target
    algo: AnyAlgorithm = target
    found = {"learner": algo.learner_group._learner, "env_runner": algo.env_runner}
    return found.get(role.kind, algo.eval_env_runner)


@contextlib.contextmanager
def part_tree(target: Any, role: Role, key: str, roles: Sequence[Role]) -> Iterator[dict[str, Any]]:
    """A process's part of the tree, by reference; nothing changes it while the block runs.

    Args:
        target: The Algorithm, a learner or a runner.
        role: What it is.
        key: Of the save, the same in all processes.
        roles: Of all that take part.
    """
    with contextlib.ExitStack() as still:
        if role.kind != "driver":
            yield _contribution(target, role, key, still)
            return
        tree = driver_tree(target, roles)
        for local in local_roles(target):
            _merge(tree, _contribution(_object(target, local), local, key, still))
        yield tree


def _class_of(algo: Algorithm) -> type:
    """The class that a program knows: in a trial of Ray Tune, Ray's actors are of a class derived from it, alike named.

    Of `tune_trainable`'s classes, the one that it was given.
    """
    cls: type = getattr(algo, "rl_ckpt_saves_as", type(algo))
    base = cls.__mro__[1]
    while (base.__module__, base.__qualname__) == (cls.__module__, cls.__qualname__):
        cls, base = base, base.__mro__[1]
    return cls


def _named_class(algo: Algorithm) -> str:
    """The name of the Algorithm's class, or of its nearest base that has one: a class made in a function has none.

    `load` takes the class from the config, and asks for what has no name there (`given={"algo_class": ...}`).
    """
    for cls in _class_of(algo).__mro__[:-1]:
        with contextlib.suppress(InvalidInputError):
            return class_ref(cls)
    raise AssertionError("ray.rllib's Algorithm is found by its name")


def _config_of(algo: AnyAlgorithm) -> AlgorithmConfig:
    """The config, with the class of the Algorithm: RLlib's copy names the one that its config's class was made for."""
    config: AlgorithmConfig = copy.copy(algo.config)
    vars(config)["algo_class"] = _class_of(algo)  # the copy is frozen too
    return config


def driver_tree(algo: AnyAlgorithm, roles: Sequence[Role]) -> dict[str, Any]:
    """What the Algorithm's process contributes beside its learner and runners."""
    roles = (*roles, *local_roles(algo))
    indices = {
        kind: sorted(role.index for role in roles if role.kind == kind) for kind in ("env_runner", "eval_env_runner")
    }
    tree: dict[str, Any] = {
        "about": about_tree(
            "algorithm",
            (),  # the learners know
            algorithm=_named_class(algo),
            num_learners=sum(role.kind == "learner" for role in roles),
            env_runners=indices["env_runner"],
            eval_env_runners=indices["eval_env_runner"],
        ),
        "config": config_tree(_config_of(algo)),
        "algorithm": {**algorithm_tree(algo), "rng": rng_tree()},
    }
    del tree["about"]["policies"]
    if algo.local_replay_buffer is not None:
        left_out = getattr(algo, "rl_ckpt_leaves_buffer_out", False)
        tree["replay_buffer"] = left_out_tree() if left_out else buffer_tree(algo.local_replay_buffer)
    return tree


def _contribution(thing: Any, role: Role, key: str, still: contextlib.ExitStack) -> dict[str, Any]:
    if role.kind != "learner":
        return {f"{role.kind}s": {role.index: runner_tree(thing)}}
    still.enter_context(held(thing, key))
    tree, modules = learner_tree(thing), policies_of(thing.module)
    for id_, module in modules.items():
        tree["policies"][id_]["about"] = policy_about(module)
    return {**tree, "about": {"policies": list(modules)}}


def _merge(tree: dict[Any, Any], more: Mapping[Any, Any]) -> None:
    """Adds what is new, branch by branch."""
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def part_problems(target: Any, parts: Sequence[Role], tree: Mapping[str, Any], plan: Plan) -> list[str]:
    """Why `apply_part` would fail; changes nothing."""
    out: list[str] = []
    missing = _missing(parts, tree, plan)
    if missing:
        return missing
    for role in parts:
        thing = target if role.kind == "driver" else _object(target, role)
        if role.kind == "driver":
            out += _driver_problems(thing, tree, plan)
        elif role.kind == "learner":
            out += _space_problems(policies_of(thing.module), tree, plan)
            out += learner_problems(thing, tree, plan.policies)
        else:
            out += runner_problems(thing, _runner_part(tree, role, plan), _weights(tree, plan))
    return out


def apply_part(target: Any, parts: Sequence[Role], tree: Mapping[str, Any], plan: Plan, key: str) -> Applied:
    """Sets what a process takes; it was found to fit.

    Returns:
        Digests of the weights that every learner and runner has now.
    """
    digests: dict[str, list[dict[str, str]]] = {"learner": [], "env_runner": [], "eval_env_runner": []}
    notices: list[str] = []
    for role in parts:
        thing = target if role.kind == "driver" else _object(target, role)
        if role.kind == "driver":
            notices += _set_driver(thing, tree, plan)
            continue
        if role.kind == "learner":
            with held(thing, f"{key}/apply"):
                set_learner(thing, tree, plan.policies)
        else:
            notices += _set_runner(thing, tree, role, plan)
        digests[role.kind].append(weights_digest(thing.module))
    learners, runners, eval_runners = map(tuple, digests.values())
    return Applied(learners, runners, eval_runners, tuple(notices))


def _driver_problems(algo: AnyAlgorithm, tree: Mapping[str, Any], plan: Plan) -> list[str]:
    if not plan.whole:
        return []
    out = algorithm_problems(algo, tree.get("algorithm", {}))
    out += own_connectors_problems(algo, _connectors(tree, plan)) if has_connectors(algo) else []
    buffer, saved = algo.local_replay_buffer, tree.get("replay_buffer")
    if buffer is not None and saved is not None:
        out += buffer_problems(buffer, saved)
    elif buffer is not None and "imported_from" not in tree["about"]:  # RLlib's own checkpoints have none
        out.append("the checkpoint has no part `replay_buffer`, and this Algorithm has a replay buffer")
    elif saved is not None:
        out.append("the checkpoint has a replay buffer, and this Algorithm has none")
    return out


def _set_driver(algo: AnyAlgorithm, tree: Mapping[str, Any], plan: Plan) -> list[str]:
    if not plan.whole:
        return []
    notices = set_algorithm(algo, tree["algorithm"])
    was, here = tree["about"].get("algorithm"), _named_class(algo)
    if was not in (None, here):
        notices.append(
            f"the checkpoint is of the class {was}, and this Algorithm is of {here}; all that was saved fits"
        )
    if has_connectors(algo):
        set_own_connectors(algo, _connectors(tree, plan))
    if algo.local_replay_buffer is None:
        return notices
    gone = sorted(set(buffer_modules(tree.get("replay_buffer", {}))) - set(plan.policies.values()))
    if gone:  # whole episodes of all agents: RLlib would look for modules that are not here, in every update
        notices.append(
            f"the saved replay buffer has steps of the policies {gone}, which are left out: this Algorithm's stays as "
            "it is (empty, after a load)"
        )
    elif "replay_buffer" in tree:
        set_buffer(algo.local_replay_buffer, tree["replay_buffer"], algo.config.policy_mapping_fn)
    else:
        notices.append("the checkpoint was imported and has no replay buffer: this Algorithm's stays as it is")
    return notices


def _connectors(tree: Mapping[str, Any], plan: Plan) -> Mapping[str, Any]:
    """For an Algorithm without a local runner: what it held itself, or a runner where there was a local one."""
    source = plan.source(LOCAL_RUNNER)
    runner = {} if source is None else tree.get(source[0], {}).get(source[1], {})
    found: Mapping[str, Any] = tree["algorithm"].get("connectors", runner.get("connectors", {}))
    return found


def _weights(tree: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Modules by their ids here."""
    saved = tree.get("policies", {})
    return {here: saved.get(id_, {}).get("module", {}) for id_, here in plan.policies.items()}


def _runner_part(tree: Mapping[str, Any], role: Role, plan: Plan) -> Mapping[str, Any]:
    source = plan.source(role)
    if not plan.whole or source is None:
        return {}
    part, index = source
    found: Mapping[str, Any] = tree.get(part, {}).get(index, {})
    return found


def _set_runner(runner: Any, tree: Mapping[str, Any], role: Role, plan: Plan) -> list[str]:
    if not plan.whole:  # its episodes go on, with other weights
        set_weights(runner, _weights(tree, plan))
        return []
    own = plan.own(role)
    number = tree["learner"]["weights_seq_no"]
    notices = set_runner(
        runner, _runner_part(tree, role, plan), _weights(tree, plan), number, own=own and plan.episodes
    )
    if not own:
        notices.append(
            f"{role} has no counterpart in the checkpoint: it takes a neighbour's connectors, and new episodes"
        )
    return notices


def _missing(parts: Sequence[Role], tree: Mapping[str, Any], plan: Plan) -> list[str]:
    """Components that a checkpoint should have and has not: another program wrote it, or part of it was left out."""
    kinds = {role.kind for role in parts}
    wanted: list[tuple[str, ...]] = [("about",)]
    of_policy = ("about", "module", "optimizers", "learner") if "learner" in kinds else ("module",)
    if kinds != {"driver"}:
        wanted += [("policies", saved, part) for saved in plan.policies for part in of_policy]
    if plan.whole and "driver" in kinds:
        wanted.append(("algorithm",))
    if plan.whole and kinds != {"driver"}:
        wanted.append(("learner",))
    return [f"the checkpoint has no component {'/'.join(path)!r}" for path in wanted if not _has(tree, path)]


def _has(tree: Any, path: Sequence[str]) -> bool:
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return False
        tree = tree[key]
    return True


def _space_problems(modules: Mapping[str, Any], tree: Mapping[str, Any], plan: Plan) -> list[str]:
    """Spaces of other shapes or kinds: said first, as they explain what else does not fit. Bounds may differ."""
    out = []
    for saved, here in plan.policies.items():
        about = tree["policies"][saved]["about"]
        for name in ("observation_space", "action_space") if here in modules else ():
            was, now = Decoder().decode(about[name], name), getattr(modules[here], name)
            if isinstance(was, gym.Space) and was != now and _form(was) != _form(now):
                out.append(f"policy {here!r}: its {name.replace('_', ' ')} is {now}, and was {was} when it was saved")
    return out


def _form(space: gym.Space[Any]) -> tuple[Any, ...]:
    bounded = not isinstance(space, gym.spaces.Box)
    return type(space), space.shape, space.dtype, repr(space) if bounded else ""
