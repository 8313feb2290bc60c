"""A learner's part of the tree of an Algorithm, and a learner from that part.

    policies/<id>/module       tensors by name                          (modules.py)
    policies/<id>/extra        what the module's own `get_state` adds, where its class has one
    policies/<id>/optimizers   by optimizer, with parameter names       (optimizers.py)
    policies/<id>/learner      KL coefficient, temperature, …           (learner_state.py)
    learner                    the same on all learners: number of updates, policies that train, optimizers of all
                               policies together
    learners/<index>           each learner's own: connectors, metrics, random generators, and what learners that
                               train together do not share (policies/<id>/learner, state of the temperature's optimizer)

Owns: which of this a learner gives, whether a tree fits a learner, and setting it. Promises: `learner_problems` changes
nothing, and `set_learner` changes nothing either where there are problems; dtypes and bits stay.

What learners have of their own (`learners/<index>`) is written by each, everything else is the same on all of them, but
`policies/<id>/learner` and what optimizers keep of parameters that are in no module: only learner 0 gives those, for
learners that have no counterpart.

Not for RLlib's `get_state` and `set_state` of learners: those convert dtypes, and leave the module alone where the
sequence number is not newer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ray.rllib.core import ALL_MODULES
from ray.rllib.core.learner.torch.torch_learner import TorchLearner

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.rllib.connectors import connectors_problems, connectors_tree, set_connectors
from rl_ckpt.rllib.data import UnsavableError, from_data, to_data
from rl_ckpt.rllib.learner_state import (
    custom_state,
    policies_to_train,
    policy_state,
    policy_state_problems,
    set_custom_state,
    set_policy_state,
)
from rl_ckpt.rllib.learner_threads import drop_batches, held
from rl_ckpt.rllib.metrics import metrics_problems, metrics_tree, set_metrics
from rl_ckpt.rllib.modules import module_extra, module_problems, module_tree, policies_of, set_module, weights_digest
from rl_ckpt.rllib.optimizers import class_name, optimizers_problems, optimizers_tree, own_state, set_optimizers
from rl_ckpt.rllib.rng import rng_tree, set_rng

Policies = Mapping[str, str]
"""Ids in the checkpoint → ids here."""

_PARTS = ("module", "optimizers", "learner")  # of every policy


def learner_tree(learner: TorchLearner) -> dict[str, Any]:
    """A learner's part of the tree.

    Args:
        learner: Built, and held (`learner_threads.held`) as long as the tree is used.

    Returns:
        The tree; tensors by reference, so whoever keeps it copies them.

    Raises:
        InvalidInputError: State that is neither arrays nor plain data; names it.
    """
    index: int = learner._learner_index
    policies = {policy: _policy_tree(learner, policy) for policy in policies_of(learner.module)}
    own = {}
    for policy, tree in policies.items():
        state, optimizers = tree["learner"], own_state(tree["optimizers"])
        if state or optimizers:
            own[policy] = {"learner": state, "optimizers": optimizers}
        if index:
            del tree["learner"]
            _leave_out(tree["optimizers"], optimizers)
    shared = {
        "class": class_name(learner),
        "weights_seq_no": learner._weights_seq_no,
        "policies_to_train": policies_to_train(learner),
        "optimizers": optimizers_tree(learner, ALL_MODULES),
    }
    mine = {
        "policies": own,
        "connectors": connectors_tree(learner._learner_connector),
        "custom": custom_state(learner),
        "metrics": metrics_tree(learner.metrics),
        "rng": rng_tree(),
    }
    return {"policies": policies, "learner": shared, "learners": {index: mine}}


def _policy_tree(learner: TorchLearner, policy: str) -> dict[str, Any]:
    module = learner.module[policy]
    tree: dict[str, Any] = {
        "module": module_tree(module),
        "optimizers": optimizers_tree(learner, policy),
        "learner": policy_state(learner, policy),
    }
    extra = module_extra(module)
    if extra:
        try:
            tree["extra"] = to_data(extra)
        except UnsavableError as why:
            raise InvalidInputError(
                f"what get_state() of the module of policy {policy!r} adds can't be saved: {why}; give arrays and "
                "plain data"
            ) from why
    return tree


def _leave_out(optimizers: dict[str, Any], own: Mapping[str, Any]) -> None:
    for name, states in own.items():
        for path in states:
            del optimizers[name]["state"][path]


def learner_problems(learner: TorchLearner, tree: Mapping[str, Any], policies: Policies | None = None) -> list[str]:
    """What of a tree does not fit a learner; nothing is changed.

    Args:
        learner: Built.
        tree: The checkpoint's, or what of it this learner needs: `policies/<id>` of the wanted ones, and, where the
            learner goes on as a whole, `learner` and `learners/<its index>` (`learners/0` where that is not saved).
        policies: Which policies to take; None: all, and the learner must have exactly those.

    Returns:
        One sentence for each thing that does not fit.
    """
    saved, here = tree.get("policies", {}), policies_of(learner.module)
    problems = []
    if policies is None:
        policies = {policy: policy for policy in saved}
        if missing := [policy for policy in here if policy not in saved]:
            problems.append(f"policies {missing} are not in the checkpoint; it has {list(saved)}")
    for source, target in policies.items():
        if source not in saved:
            problems.append(f"the checkpoint has no policy {source!r}; it has {list(saved)}")
        if target not in here:
            problems.append(f"this learner has no policy {target!r}; it has {list(here)}")
        if source in saved and target in here:
            found = _policy_problems(learner, target, saved[source])
            problems += [f"policy {source!r}{'' if source == target else f' as {target!r}'}: {text}" for text in found]
    if "learner" in tree:
        problems += optimizers_problems(learner, ALL_MODULES, tree["learner"]["optimizers"])
        mine, is_own = _mine(learner, tree)
        problems += connectors_problems(learner._learner_connector, mine.get("connectors", {}), "learner")
        problems += metrics_problems(learner.metrics, mine["metrics"]) if is_own else []
    return problems


def _policy_problems(learner: TorchLearner, policy: str, tree: Mapping[str, Any]) -> list[str]:
    if missing := [part for part in _PARTS if part not in tree]:
        return [f"the checkpoint has no {' and no '.join(missing)} of it"]
    return [
        *module_problems(learner.module[policy], tree["module"]),
        *optimizers_problems(learner, policy, tree["optimizers"]),
        *policy_state_problems(learner, policy, tree["learner"]),
    ]


def set_learner(
    learner: TorchLearner, tree: Mapping[str, Any], policies: Policies | None = None, token: str = ""
) -> None:
    """Gives a learner the state of a tree.

    Batches that wait for a learner's thread are dropped: they were sampled with other weights. Which policies train is
    the config's here and not set.

    Args:
        learner: Built. It is held meanwhile (`learner_threads.held`).
        tree: As for `learner_problems`; not kept: tensors are copied.
        policies: As for `learner_problems`.
        token: As for `held`; only learners that train together need one.

    Raises:
        InvalidInputError: It does not fit (all problems in one message); nothing was changed.
        SaveTimeoutError: The learner's thread could not be held; nothing was changed.
    """
    with held(learner, token):
        problems = learner_problems(learner, tree, policies)
        if problems:
            text = "\n  ".join(problems)
            raise InvalidInputError(f"the checkpoint does not fit the learner (nothing was changed):\n  {text}")
        drop_batches(learner)
        whole = "learner" in tree
        mine, is_own = _mine(learner, tree) if whole else ({}, False)
        saved = tree["policies"]
        for source, target in (policies or {policy: policy for policy in saved}).items():
            own = mine.get("policies", {}).get(source, {}) if is_own else {}
            _set_policy(learner, target, saved[source], own)
        if whole:
            _set_whole(learner, tree["learner"], mine, is_own)
            _forget_metrics(learner, tree.get("about", {}).get("policies", ()))


def _set_policy(learner: TorchLearner, policy: str, tree: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    set_module(learner.module[policy], tree["module"], from_data(tree.get("extra", {})))
    set_optimizers(learner, policy, tree["optimizers"], own.get("optimizers"))
    set_policy_state(learner, policy, own.get("learner", tree["learner"]))


def _set_whole(learner: TorchLearner, shared: Mapping[str, Any], mine: Mapping[str, Any], is_own: bool) -> None:
    set_optimizers(learner, ALL_MODULES, shared["optimizers"])
    # Directly: RLlib's `set_state` takes no weights with a number that is not above its own, so a rollback would keep
    # the later ones.
    learner._weights_seq_no = shared["weights_seq_no"]
    set_connectors(learner._learner_connector, mine.get("connectors", {}))
    set_custom_state(learner, mine.get("custom", {}))
    if is_own:
        set_metrics(learner.metrics, mine["metrics"])
        set_rng(mine["rng"])  # last: nothing after it may draw


def _forget_metrics(learner: TorchLearner, saved: Iterable[str]) -> None:
    """Statistics of policies that were left out, as RLlib's `remove_module` does: DQN would look for values in them."""
    with learner.metrics._threading_lock:
        for policy in set(saved) - set(learner.module.keys()):
            learner.metrics.stats.pop(policy, None)


def _mine(learner: TorchLearner, tree: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """The part of this learner, or of learner 0 where there is none, and whether it is its own."""
    parts, index = tree.get("learners", {}), learner._learner_index
    if index in parts:
        return parts[index], True
    return parts.get(0, {}), False


__all__ = ["Policies", "held", "learner_problems", "learner_tree", "set_learner", "weights_digest"]
