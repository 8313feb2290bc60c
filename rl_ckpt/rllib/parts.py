"""The parts that each process contributes to the tree of a checkpoint, and takes from it.

Owns: which of learner, runner and driver writes and reads what; the rooms beside this one know how. Promises: as they
do: looking whether a part fits changes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from ray.rllib.algorithms.algorithm import Algorithm

from rl_ckpt.rllib.about import about_tree
from rl_ckpt.rllib.algorithm import algorithm_problems, algorithm_tree, set_algorithm
from rl_ckpt.rllib.buffers import buffer_problems, buffer_tree, set_buffer
from rl_ckpt.rllib.config import config_tree
from rl_ckpt.rllib.fit import Plan
from rl_ckpt.rllib.learner import learner_problems, learner_tree, set_learner
from rl_ckpt.rllib.modules import weights_digest
from rl_ckpt.rllib.policy import policy_about
from rl_ckpt.rllib.refs import class_ref
from rl_ckpt.rllib.rng import rng_tree
from rl_ckpt.rllib.runner import runner_problems, runner_tree, set_runner
from rl_ckpt.rllib.team import Role, team_of


class Applied(msgspec.Struct, frozen=True, tag="applied"):
    """A process has set its part."""

    learners: tuple[dict[str, str], ...]
    """Digests of the weights of the learners in this process, by policy."""
    runners: tuple[dict[str, str], ...]
    """The same of its env runners."""
    eval_runners: tuple[dict[str, str], ...]
    """The same of its evaluation runners."""
    notices: tuple[str, ...] = ()


def local_roles(algo: Algorithm) -> tuple[Role, ...]:
    """What lives in the driver's process beside the Algorithm."""
    out = [Role("learner", 0)] if algo.learner_group._learner is not None else []
    out += [Role("env_runner", 0)] if algo.env_runner is not None else []
    out += [Role("eval_env_runner", 0)] if algo.eval_env_runner is not None else []
    return tuple(out)


def _object(target: Any, role: Role) -> Any:
    """What a role stands for: in an actor of its own, or in the driver's process."""
    if not isinstance(target, Algorithm):
        return target
    found = {"learner": target.learner_group._learner, "env_runner": target.env_runner}
    return found.get(role.kind, target.eval_env_runner)


@contextlib.contextmanager
def part_tree(target: Any, role: Role) -> Iterator[dict[str, Any]]:
    """A process's part of the tree, by reference; nothing changes it while the block runs."""
    if role.kind == "driver":
        tree = driver_tree(target)
        for local in local_roles(target):
            _merge(tree, _contribution(_object(target, local), local))
        yield tree
    else:
        yield _contribution(target, role)


def driver_tree(algo: Algorithm) -> dict[str, Any]:
    """What the Algorithm's process contributes beside its learner and runners."""
    team = team_of(algo)
    roles = (*team.roles, *local_roles(algo))
    indices = {kind: sorted(role.index for role in roles if role.kind == kind) for kind in ("env_runner", "eval_env_runner")}
    tree = {
        "about": about_tree(
            "algorithm",
            _policies(algo),
            algorithm=class_ref(type(algo)),
            num_learners=sum(role.kind == "learner" for role in roles),
            env_runners=indices["env_runner"],
            eval_env_runners=indices["eval_env_runner"],
        ),
        "config": config_tree(algo.config),
        "algorithm": {**algorithm_tree(algo), "rng": rng_tree()},
    }
    if algo.local_replay_buffer is not None:
        tree["replay_buffer"] = buffer_tree(algo.local_replay_buffer)
    return tree


def _contribution(thing: Any, role: Role) -> dict[str, Any]:
    if role.kind != "learner":
        return {f"{role.kind}s": {role.index: runner_tree(thing)}}
    tree = learner_tree(thing)
    for id_, module in policies_of(thing.module).items():
        tree["policies"][id_]["about"] = policy_about(module)
    return tree


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
    for role in parts:
        thing = target if role.kind == "driver" else _object(target, role)
        if role.kind == "driver":
            out += _driver_problems(thing, tree, plan)
        elif role.kind == "learner":
            out += learner_problems(thing, _learner_part(tree, role, plan), plan.policies)
        else:
            weights = _weights(tree, plan)
            modules = policies_of(thing.module)
            for id_ in weights.keys() & modules.keys():
                out += [f"policy {id_!r}: {text}" for text in module_problems(modules[id_], weights[id_])]
            own = _runner_part(tree, role, plan)
            out += runner_problems(thing, own) if own is not None else []
    return out


def apply_part(target: Any, parts: Sequence[Role], tree: Mapping[str, Any], plan: Plan) -> Applied:
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
            set_learner(thing, _learner_part(tree, role, plan), plan.policies)
        else:
            own = _runner_part(tree, role, plan)
            notices += set_runner(thing, own, _weights(tree, plan), _weights_seq_no(tree, plan))
        digests[role.kind].append(weights_digest(thing.module))
    return Applied(*(tuple(digests[kind]) for kind in ("learner", "env_runner", "eval_env_runner")), tuple(notices))
