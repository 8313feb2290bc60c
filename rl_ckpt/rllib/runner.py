"""One environment runner as a state tree and back; runs where the runner lives, local or in its actor.

Owns: what a `SingleAgentEnvRunner` or `MultiAgentEnvRunner` keeps between two calls of `sample`: connectors' state, the
random generators of its process, environments, running episodes with what their next action is computed from, counters
and metrics. Promises: after `set_runner` the runner samples, bit for bit, what the saved one would have sampled with
these weights; where an environment or an episode can't be saved or does not fit, running episodes are dropped, the
environment is reset before the first sample, and a notice says why. Weights are not in the tree: all runners have the
learner's. Does not know: the actors, the store, callbacks' own state.

Where RLlib itself is not deterministic, this can't be: it walks through sets of agent ids, whose order, for ids that
are strings, is another one in each process unless PYTHONHASHSEED is the same. Metrics that measure time differ.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.env.multi_agent_env_runner import MultiAgentEnvRunner

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.rllib import episodes
from rl_ckpt.rllib.connectors import connectors_problems, connectors_tree, set_connectors
from rl_ckpt.rllib.data import UnsavableError, from_data, to_data
from rl_ckpt.rllib.env_state import MismatchError, env_tree, set_env
from rl_ckpt.rllib.metrics import metrics_problems, metrics_tree, set_metrics
from rl_ckpt.rllib.modules import module_problems, policies_of, set_module
from rl_ckpt.rllib.packing import pack, unpack
from rl_ckpt.rllib.rng import rng_tree, set_rng

_DROPPED = "running episodes are dropped and the environments are reset before the first sample"
Runner = Any
"""A `SingleAgentEnvRunner` or `MultiAgentEnvRunner`; RLlib's own types leave most of their attributes out."""
Weights = Mapping[str, Mapping[str, Any]]
"""By module id, by name in the module's state dict."""


def runner_tree(runner: Runner) -> dict[str, Any]:
    """What an environment runner keeps between two calls of `sample`.

    Args:
        runner: Single- or multi-agent, local or in the process of its actor; with or without an environment.

    Returns:
        "kind", "counters", "connectors", "rng", "notices" (texts about what could not be saved) and "packed": see
        `runner_parts`.

    Raises:
        InvalidInputError: A connector's state can't be saved.
    """
    packed, notices = _packed(runner)
    return {
        "kind": _kind(runner),
        "counters": {"num_env_steps_sampled_lifetime": runner.num_env_steps_sampled_lifetime},
        "connectors": {
            "env_to_module": connectors_tree(runner._env_to_module),
            "module_to_env": connectors_tree(runner._module_to_env),
        },
        "notices": notices,
        "packed": packed,
        "rng": rng_tree(),
    }


def _packed(runner: Runner) -> tuple[dict[str, Any], list[str]]:
    """What `runner_parts` gives back, and notices."""
    metrics = {"metrics": metrics_tree(runner.metrics)}
    without = {"env": {}, "episodes": {}, **metrics}
    if runner.env is None:
        return pack(without), []
    try:
        return pack({"env": _of_the_user(env_tree, runner.env), "episodes": _episodes_tree(runner), **metrics}), []
    except (UnsavableError, InvalidInputError) as error:  # costs the episodes, not the save
        return pack(without), [f"{_name(runner)}: {error}; after a restore, {_DROPPED}"]


def runner_parts(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What is packed in a runner's tree: "env", "episodes" and "metrics".

    Raises:
        CorruptionError: It can't be read.
    """
    parts: dict[str, Any] = unpack(tree["packed"])
    return parts


def runner_problems(runner: Runner, tree: Mapping[str, Any], weights: Weights | None = None) -> list[str]:
    """What of a saved runner and of the learner's weights does not fit a runner; changes nothing."""
    problems = weights_problems(runner, weights or {})
    if not tree:
        return problems
    if tree["kind"] != _kind(runner):
        problems.append(f"{_name(runner)}: it is a {_kind(runner)} runner, and the checkpoint's was {tree['kind']}")
    for part in ("env_to_module", "module_to_env"):
        pipeline, saved = getattr(runner, f"_{part}"), tree["connectors"][part]
        problems += connectors_problems(pipeline, saved, f"{_name(runner)}, {part}")
    metrics = runner_parts(tree)["metrics"]
    return problems + [f"{_name(runner)}: {text}" for text in metrics_problems(runner.metrics, metrics)]


def set_runner(
    runner: Runner,
    tree: Mapping[str, Any],
    weights: Weights | None = None,
    weights_seq_no: int | None = None,
    *,
    own: bool = True,
) -> list[str]:
    """Sets a runner to what was saved of one; `runner_problems` must have found nothing.

    Args:
        runner: The runner, fresh or in use; what it was doing is dropped.
        tree: What `runner_tree` gave; empty: only the weights are set, and running episodes are dropped.
        weights: The learner's, by module id; the runner takes those that its modules have. None: it keeps its own.
        weights_seq_no: RLlib's number of these weights. The runner takes RLlib's later weights only if their number is
            larger, so it is set as it is, even to a smaller one. None: unchanged.
        own: Whether the tree is this very runner's. Of another's, connectors and counters are used, and the runner
            starts new episodes.

    Returns:
        Notices about what could not be continued.
    """
    set_weights(runner, weights or {}, weights_seq_no)
    notices: list[str] = []
    runner._time_after_sampling = None
    if tree:
        set_connectors(runner._env_to_module, tree["connectors"]["env_to_module"])
        set_connectors(runner._module_to_env, tree["connectors"]["module_to_env"])
        runner.num_env_steps_sampled_lifetime = tree["counters"]["num_env_steps_sampled_lifetime"]
    if tree and own:
        parts = runner_parts(tree)
        set_metrics(runner.metrics, parts["metrics"])
        notices = _continue(runner, parts, tree["notices"])
    else:
        _start_anew(runner)
    if tree and own:
        set_rng(tree["rng"])  # last: making environments anew draws from them
    return notices


def weights_problems(runner: Runner, weights: Weights) -> list[str]:
    """Names, shapes and dtypes of weights that a runner's modules want in another way; changes nothing."""
    return [
        f"{_name(runner)}, policy {policy!r}: {text}"
        for policy, module in _modules(runner).items()
        if policy in weights
        for text in module_problems(module, weights[policy])
    ]


def set_weights(runner: Runner, weights: Weights, weights_seq_no: int | None = None) -> None:
    """Sets the modules' weights without a detour through numpy: bits and dtypes as they are.

    Args:
        runner: The runner.
        weights: By module id; what an inference-only module leaves out is passed over.
        weights_seq_no: See `set_runner`.

    Raises:
        InvalidInputError: A module does not fit; it was not changed.
    """
    for policy, module in _modules(runner).items():
        if policy in weights:
            set_module(module, weights[policy])
    if weights_seq_no is not None:
        runner._weights_seq_no = weights_seq_no


def _modules(runner: Runner) -> dict[str, Any]:
    return {} if runner.module is None else policies_of(runner.module)


def _kind(runner: Runner) -> str:
    return "multi-agent" if isinstance(runner, MultiAgentEnvRunner) else "single-agent"


def _name(runner: Runner) -> str:
    group = "evaluation runner" if runner.config.in_evaluation else "environment runner"
    return f"{group} {runner.worker_index or 0}"


def _of_the_user(function: Callable[..., Any], *args: Any) -> Any:
    """Calls what calls methods of the user's environment; whatever these raise costs the episodes, not the runner."""
    try:
        return function(*args)
    except (UnsavableError, MismatchError):
        raise
    except Exception as error:  # an environment's get_state or set_state may raise anything
        raise UnsavableError(f"the environment raised {type(error).__name__}: {error}") from error


def _episodes_tree(runner: Runner) -> dict[str, Any]:
    now, spaces, slim = time.perf_counter(), _spaces(runner), not _callbacks_want_chunks(runner)

    def tree(episode: Any, slim: bool = False) -> dict[str, Any]:
        make = episodes.multi_tree if _kind(runner) == "multi-agent" else episodes.single_tree
        return make(episode, spaces, now, slim=slim)

    return {
        "needs_initial_reset": runner._needs_initial_reset,
        "running": [None if episode is None else tree(episode) for episode in runner._ongoing_episodes],
        "cached_to_module": to_data(runner._cached_to_module, "the next batch"),
        "shared_data": to_data(runner._shared_data, "the connectors' shared data"),
        "chunks": {
            name: [tree(episode, slim) for episode in chunks]
            for name, chunks in runner._ongoing_episodes_for_metrics.items()
        },
        "done": [tree(episode, slim) for episode in runner._done_episodes_for_metrics],
    }


def _callbacks_want_chunks(runner: Runner) -> bool:
    """Whether somebody is given the chunks that were returned already (`prev_episode_chunks`), and not only metrics."""
    methods = [getattr(type(callback), "on_episode_end", None) for callback in runner._callbacks]
    return bool(runner.config.callbacks_on_episode_end) or any(m is not RLlibCallback.on_episode_end for m in methods)


def _spaces(runner: Runner) -> episodes.Spaces:
    known: dict[str, Any] = {}
    if isinstance(runner, MultiAgentEnvRunner):
        for index, (observation, action) in enumerate(zip(*map(dict.values, _agents_spaces(runner, 0)), strict=True)):
            known |= {f"observation/{index}": observation, f"action/{index}": action}
    else:
        known = {"observation": runner.env.single_observation_space, "action": runner.env.single_action_space}
    for index, connector in enumerate(runner._env_to_module.connectors):
        known[f"connector/{index}"] = connector.observation_space
    return episodes.Spaces({label: space for label, space in known.items() if space is not None})


def _agents_spaces(runner: Runner, index: int) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Observation and action spaces by agent, as the runner gives them to a new episode."""
    env = runner.env.envs[index].unwrapped
    agents = env.possible_agents
    return {a: env.get_observation_space(a) for a in agents}, {a: env.get_action_space(a) for a in agents}


def _continue(runner: Runner, tree: Mapping[str, Any], noted: list[str]) -> list[str]:
    """Sets environments and episodes, or starts anew and says why."""
    why = None
    if runner.env is None:
        _start_anew(runner)
        return []
    saved = tree["episodes"]
    if not saved:
        why = noted[0] if noted else f"{_name(runner)}: it had no environment when it was saved"
    else:
        why = _misfit(runner, saved)
    if why is None:
        try:
            ready = _episodes(runner, saved)
            _of_the_user(set_env, runner.env, tree["env"])
        except (MismatchError, KeyError) as error:
            why = f"{_name(runner)}: {error}"
        except UnsavableError as error:
            why = f"{_name(runner)}: {error}"
            runner.make_env()  # half of the environments may be set
        else:
            for name, value in ready.items():
                setattr(runner, name, value)
            return []
    _start_anew(runner)
    return [why if why.endswith(_DROPPED) else f"{why}; {_DROPPED}"]


def _misfit(runner: Runner, saved: Mapping[str, Any]) -> str | None:
    if len(saved["running"]) != runner.num_envs:
        return f"{_name(runner)}: it has {runner.num_envs} environments, and had {len(saved['running'])}"
    mapped = set().union(*(episodes.modules_of(episode) for episode in saved["running"] if episode is not None))
    gone = sorted(str(module_id) for module_id in mapped if module_id not in _modules(runner))
    return f"{_name(runner)}: running episodes use the policies {gone}, which are not here" if gone else None


def _episodes(runner: Runner, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The runner's attributes; nothing is set yet."""
    now, spaces = time.perf_counter(), _spaces(runner)

    def episode(tree: dict[str, Any], index: int = 0) -> Any:
        if "agents" not in tree:
            return episodes.single_from(tree, spaces, now)
        of_agents, mapping_fn = _agents_spaces(runner, index), runner.config.policy_mapping_fn
        return episodes.multi_from(tree, spaces, now, of_agents=of_agents, mapping_fn=mapping_fn)

    chunks = {name: [episode(tree) for tree in trees] for name, trees in saved["chunks"].items()}
    return {
        "_needs_initial_reset": saved["needs_initial_reset"],
        "_ongoing_episodes": [None if tree is None else episode(tree, i) for i, tree in enumerate(saved["running"])],
        "_cached_to_module": _to_device(from_data(saved["cached_to_module"]), runner._device),
        "_shared_data": from_data(saved["shared_data"]),
        "_ongoing_episodes_for_metrics": defaultdict(list, chunks),
        "_done_episodes_for_metrics": [episode(tree) for tree in saved["done"]],
    }


def _to_device(value: Any, device: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) is dict:
        return {key: _to_device(item, device) for key, item in value.items()}
    return [_to_device(item, device) for item in value] if type(value) is list else value


def _start_anew(runner: Runner) -> None:
    """Drops what is running. A seeded runner gets another seed: with its own, every restore would replay the start."""
    dropped = not runner._needs_initial_reset or runner.num_env_steps_sampled_lifetime > 0
    runner._needs_initial_reset = True
    runner._ongoing_episodes = [None] * runner.num_envs
    runner._cached_to_module = None
    runner._ongoing_episodes_for_metrics.clear()
    runner._done_episodes_for_metrics.clear()
    if dropped and runner.config.seed is not None and not runner.config.in_evaluation:
        entropy = [runner.config.seed, runner.worker_index or 0, int(runner.num_env_steps_sampled_lifetime)]
        runner._seed = int(np.random.SeedSequence(entropy).generate_state(1)[0]) >> 1
