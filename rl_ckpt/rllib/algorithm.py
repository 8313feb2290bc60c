"""What belongs to the Algorithm itself: iteration, counters, metrics, connectors without a runner, callbacks' state.

Owns: the parts `algorithm/` and `replay_buffer/` of the tree, and what of an Algorithm must be forgotten at a restore:
requests under way to its actors, and batches that were being put together, since they hold samples of other weights.
Does not: learners, runners and their processes' generators, which are the other files' here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from rl_ckpt.rllib.connectors import connectors_problems, connectors_tree, set_connectors
from rl_ckpt.rllib.metrics import metrics_problems, metrics_tree, set_metrics
from rl_ckpt.rllib.team import AnyAlgorithm

_TOTALS = ("_time_total", "_timesteps_total", "_episodes_total")
_SINCE_RESTORE = ("_time_since_restore", "_timesteps_since_restore", "_iterations_since_restore")
_CONNECTORS = ("env_to_module", "module_to_env")
_QUEUES = ("data_to_place_on_learner", "_batch_being_built", "_episode_packs_being_built")  # IMPALA's and APPO's


def algorithm_tree(algo: AnyAlgorithm) -> dict[str, Any]:
    """The Algorithm's own state."""
    tree: dict[str, Any] = {
        "iteration": algo.iteration,
        "totals": {name.lstrip("_"): getattr(algo, name) for name in _TOTALS},
        "counters": dict(algo._counters),
        "metrics": metrics_tree(algo.metrics),
    }
    callbacks = {name: callback.get_state() for name, callback in _stateful_callbacks(algo)}
    if callbacks:
        tree["callbacks"] = callbacks
    if has_connectors(algo):
        tree["connectors"] = {part: connectors_tree(getattr(algo, f"{part}_connector")) for part in _CONNECTORS}
    return tree


def has_connectors(algo: AnyAlgorithm) -> bool:
    """Whether the Algorithm itself holds what its env runners' connectors have in common: it has no local runner.

    RLlib adds to it what each runner has seen, and gives the result to all of them in the next iteration.
    """
    return algo.env_to_module_connector is not None


def own_connectors_problems(algo: AnyAlgorithm, tree: Mapping[str, Any]) -> list[str]:
    """What of connectors' saved state (by part) does not fit the Algorithm's own; changes nothing."""
    return [
        text
        for part in _CONNECTORS
        for text in connectors_problems(getattr(algo, f"{part}_connector"), tree.get(part, {}), part)
    ]


def set_own_connectors(algo: AnyAlgorithm, tree: Mapping[str, Any]) -> None:
    """Sets the Algorithm's own connectors; `own_connectors_problems` must have found none."""
    for part in _CONNECTORS:
        set_connectors(getattr(algo, f"{part}_connector"), tree.get(part, {}))


def algorithm_problems(algo: AnyAlgorithm, tree: Mapping[str, Any]) -> list[str]:
    """Why `set_algorithm` would fail; changes nothing."""
    missing = [name for name in ("iteration", "totals", "counters", "metrics") if name not in tree]
    if missing:
        return [f"the checkpoint's part `algorithm` lacks {missing}"]
    return metrics_problems(algo.metrics, tree["metrics"])


def set_algorithm(algo: AnyAlgorithm, tree: Mapping[str, Any]) -> list[str]:
    """Puts the Algorithm's own state back.

    Returns:
        Notices: what had no place here.
    """
    algo._iteration = tree["iteration"]
    for name in _TOTALS:
        setattr(algo, name, tree["totals"][name.lstrip("_")])
    for name in _SINCE_RESTORE:
        setattr(algo, name, type(getattr(algo, name))(0))
    algo._restored = True
    algo._counters.clear()
    algo._counters.update(tree["counters"])
    set_metrics(algo.metrics, tree["metrics"])
    saved, notices = dict(tree.get("callbacks", {})), list[str]()
    for name, callback in _stateful_callbacks(algo):
        if name in saved:
            callback.set_state(saved.pop(name))
        else:
            notices.append(f"callback {name} has no state in the checkpoint and keeps its own")
    notices += [f"the state of callback {name} in the checkpoint has no such callback here" for name in saved]
    return notices


def forget_requests(algo: AnyAlgorithm) -> None:
    """Drops what is under way of before the restore: its samples and gradients are of other weights.

    The actors run such requests to their end, before what we ask of them later; nobody looks at the results.
    """
    for manager in _managers(algo):
        for actor_id in list(manager.actor_ids()):
            manager._remove_async_state(actor_id)
    for name in _QUEUES:
        if hasattr(algo, name):
            setattr(algo, name, [])
    for built in getattr(algo, "_ma_batches_being_built", {}).values():
        built.clear()


def forget_numbers(algo: AnyAlgorithm) -> None:
    """Makes offline evaluation's runners take the weights that RLlib gives them before the next evaluation.

    They take none whose number is not above that of their own, which in a rollback is the larger one. Nobody waits: an
    actor does what it is asked in order.
    """
    group = getattr(algo, "offline_eval_runner_group", None)
    if group is None:
        return
    if group.local_runner is not None:
        _forget_number(group.local_runner)
    for actor in group._worker_manager.actors().values():
        actor.__ray_call__.options(max_task_retries=0).remote(_forget_number)


def _forget_number(runner: Any) -> None:
    runner._weights_seq_no = 0


def _managers(algo: AnyAlgorithm) -> Iterator[Any]:
    groups = (algo.env_runner_group, algo.eval_env_runner_group, algo.learner_group)
    for manager in (*(group._worker_manager for group in groups if group is not None), algo._aggregator_actor_manager):
        if manager is not None:
            yield manager


def _stateful_callbacks(algo: AnyAlgorithm) -> Iterator[tuple[str, Any]]:
    """Callbacks of the user that have `get_state` and `set_state`, by class; the second of a class is "<class>#2".

    Not by place: whoever adds a callback before another would give that one's state to the wrong one.
    """
    seen: Counter[str] = Counter()
    for callback in algo.callbacks:
        if callable(getattr(callback, "get_state", None)) and callable(getattr(callback, "set_state", None)):
            name = type(callback).__qualname__
            seen[name] += 1
            yield name if seen[name] == 1 else f"{name}#{seen[name]}", callback
