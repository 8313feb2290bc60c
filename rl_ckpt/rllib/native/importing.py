"""Import: a native RLlib directory into a checkpoint of ours.

Owns: the way from one to the other, for checkpoints of the new API stack (2.0, 2.1) and single RLModules; those of the
old one are `old_stack.py`'s. Promises: nothing is written at the target before all of the source was read and fits
together; weights and optimizer state are the source's, bit for bit.

What native checkpoints do not hold can't come out of them: random generators, environments, running episodes, replay
buffers, PPO's KL coefficient, SAC's temperature. These are as a new Algorithm has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import (
    COMPONENT_ENV_RUNNER,
    COMPONENT_ENV_TO_MODULE_CONNECTOR,
    COMPONENT_METRICS_LOGGER,
    COMPONENT_MODULE_TO_ENV_CONNECTOR,
    COMPONENT_OPTIMIZER,
)
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME, WEIGHTS_SEQ_NO
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger

from rl_ckpt.checkpointer import Checkpointer
from rl_ckpt.errors import CorruptionError, InvalidInputError
from rl_ckpt.info import CheckpointInfo
from rl_ckpt.options import check_step
from rl_ckpt.rllib.about import about_tree
from rl_ckpt.rllib.config import _Encoder, _public_place
from rl_ckpt.rllib.connectors import state_tree
from rl_ckpt.rllib.data import UnsavableError
from rl_ckpt.rllib.learner import learner_tree
from rl_ckpt.rllib.metrics import metrics_tree, set_metrics
from rl_ckpt.rllib.modules import module_tree, policies_of
from rl_ckpt.rllib.native.describe import MODULES, Described, describe_algorithm, describe_module
from rl_ckpt.rllib.native.directory import NativeDirectory, Trust, check_allowed
from rl_ckpt.rllib.native.learning import built_learner, load_module, set_optimizers
from rl_ckpt.rllib.native.objects import NotImported, Objects
from rl_ckpt.rllib.packing import pack
from rl_ckpt.rllib.policy import policy_about
from rl_ckpt.rllib.refs import class_ref
from rl_ckpt.rllib.rng import rng_tree
from rl_ckpt.rllib.values import missing

_LEARNER = "learner_group/learner"
_NOBODY = -1
"""Index of the env runner that connectors and counters are stored for: no runner's own, so each takes them over, and
starts new episodes with generators of its own."""


class _ConfigEncoder(_Encoder):
    """Knows what was left out."""

    def special(self, value: Any) -> Any | None:
        return missing(value.why) if isinstance(value, NotImported) else super().special(value)


@dataclass(frozen=True, slots=True)
class NativeImport:
    """What an import did."""

    checkpoint: CheckpointInfo
    """That was written."""
    kind: str
    """"algorithm", "policy" or "old_stack"."""
    version: str
    """Of RLlib's layout, that the source has."""
    ray: str
    """Version of Ray that wrote the source; empty where it does not say."""
    policies: tuple[str, ...]
    """Ids of what was imported."""
    missing: Mapping[str, str]
    """Settings of the config that were left out, by name, and why: `load(given={name: ...})` takes them."""
    notices: tuple[str, ...] = ()
    """What else differs from the source."""


def import_native(
    source: str,
    url: str,
    *,
    allow_pickle: bool = False,
    trust: Trust = "restricted",
    allow_imports: Sequence[str] = (),
    config: AlgorithmConfig | None = None,
    policy_id: str = "default_policy",
    step: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    source_options: Mapping[str, Any] | None = None,
) -> NativeImport:
    """Imports a native RLlib checkpoint, of an Algorithm, a single RLModule, or the old API stack. Starts no Ray.

    Args:
        source: The directory: a local path or any fsspec url. Versions 1.0, 1.1, 2.0 and 2.1.
        url: Of the run that gets the checkpoint.
        allow_pickle: Must be True, since native checkpoints are made of pickles.
        trust: "restricted" runs no code of them; "full" unpickles as Ray does: only what you would run as a script.
        allow_imports: Packages whose classes a restricted import may import by name, beside RLlib's and gymnasium's:
            those of your own modules, environments and callbacks.
        config: In place of the stored config.
        policy_id: Under which a single RLModule or Policy is stored; an Algorithm's have ids.
        step: Of the new checkpoint; None: its training iteration.
        storage_options: For `url`, as fsspec takes them.
        source_options: For `source`.

    Returns:
        What was imported, and what was left out.

    Raises:
        UntrustedDataError: `allow_pickle` is not set, or a pickle asks for a call that is not allowed.
        CheckpointNotFoundError: There is nothing at `source`.
        CorruptionError: A file is missing, damaged or truncated, or files do not fit together.
        InvalidInputError: Not a native checkpoint or one of another version, or a class is needed that is not found.
        CheckpointError: As `Checkpointer.save_state`. Nothing was written in all these cases.
    """
    wanted = None if step is None else check_step(step)
    objects = Objects(allow_imports)
    directory = NativeDirectory(source, trust, source_options)  # a wrong path is said before any word is asked for
    check_allowed(allow_pickle, source)
    kind = directory.kind()
    if kind.layout == "algorithm":
        tree, described = _algorithm(directory, objects, config)
        left_out, notices = _missing(described), _notices(described)
    elif kind.layout == "rl module":
        tree, left_out, notices = _policy(directory, objects, policy_id), {}, []
    else:
        from rl_ckpt.rllib.native.old_stack import old_stack_tree

        tree, notices = old_stack_tree(directory, objects, kind, policy_id)
        left_out = {}
    tree["about"] |= {"imported_from": {"version": kind.version, "ray": kind.ray}}
    at = tree.get("algorithm", {}).get("iteration", 0) if wanted is None else wanted
    with Checkpointer(url, storage_options=storage_options) as checkpointer:
        info = checkpointer.save_state(at, tree).result()
    policies = tuple(tree["about"]["policies"])
    return NativeImport(info, tree["about"]["kind"], kind.version, kind.ray, policies, left_out, tuple(notices))


def _algorithm(
    directory: NativeDirectory, objects: Objects, config: AlgorithmConfig | None
) -> tuple[dict[str, Any], Described]:
    described = describe_algorithm(directory, objects, config)
    state = objects.real(directory.state("", "algorithm_state", "state"))
    with built_learner(described.config, described.multi) as learner:
        _set_learner(directory, objects, learner, described)
        learned = learner_tree(learner)
        for policy, module in policies_of(learner.module).items():
            learned["policies"][policy]["about"] = policy_about(module)
    tree = {
        "about": about_tree(
            "algorithm",
            described.modules,
            algorithm=class_ref(described.algorithm),
            num_learners=1,
            env_runners=[_NOBODY],
            eval_env_runners=[],
        ),
        "config": _ConfigEncoder().config(described.config),
        "algorithm": _algorithm_state(described.config, state, f"{directory.url}/algorithm_state.pkl"),
        "env_runners": {_NOBODY: _runner(directory, objects, described)},
        **learned,
    }
    return tree, described


def _set_learner(directory: NativeDirectory, objects: Objects, learner: TorchLearner, described: Described) -> None:
    file = f"{directory.url}/{_LEARNER}/state.pkl"
    state = objects.real(directory.state(_LEARNER))
    for policy in described.modules:
        folder = f"{MODULES}/{policy}"
        weights = directory.state(folder, "module_state", "state")
        load_module(policies_of(learner.module)[policy], weights, f"{directory.url}/{folder}/module_state.pkl")
    if COMPONENT_OPTIMIZER not in state:
        raise CorruptionError(f"{file}: holds no optimizers (only {sorted(map(str, state))})")
    set_optimizers(learner, state.pop(COMPONENT_OPTIMIZER), file)
    learner._weights_seq_no = int(state.pop(WEIGHTS_SEQ_NO, 0))
    state.pop("should_module_be_updated", None)  # the config says it
    set_metrics(learner.metrics, _metrics(learner.config, state.pop(COMPONENT_METRICS_LOGGER, None), file))
    if state:
        learner.set_state(state)  # what the learner's own class adds


def _metrics(config: AlgorithmConfig, saved: Any, file: str) -> dict[str, Any]:
    """Of a native metrics logger's state, as we keep it. RLlib's own reading knows the forms of all its releases."""
    known: Any = config.stats_cls_lookup
    logger = MetricsLogger(root=True, stats_cls_lookup=known)
    if saved:
        try:
            logger.set_state(saved)
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            raise CorruptionError(f"{file}: metrics that can't be read ({type(error).__name__}: {error})") from error
    return metrics_tree(logger)


def _algorithm_state(config: AlgorithmConfig, state: dict[str, Any], file: str) -> dict[str, Any]:
    iteration = state.get("training_iteration")
    if not isinstance(iteration, int):
        raise CorruptionError(f"{file}: training_iteration is {iteration!r}, where a number should be")
    return {
        "iteration": iteration,
        "totals": {"time_total": 0.0, "timesteps_total": 0, "episodes_total": 0},
        "counters": {},
        "metrics": _metrics(config, state.get(COMPONENT_METRICS_LOGGER), file),
        "rng": rng_tree(),
    }


def _runner(directory: NativeDirectory, objects: Objects, described: Described) -> dict[str, Any]:
    """Connectors and counters, which every env runner takes over."""
    folder = COMPONENT_ENV_RUNNER
    state = objects.real(directory.state(folder)) if directory.folders(folder) else {}
    above = f"{folder}/" if directory.folders(folder) else ""  # runners that are only remote leave no folder
    return {
        "kind": "multi-agent" if described.config.is_multi_agent else "single-agent",
        "counters": {"num_env_steps_sampled_lifetime": state.get(NUM_ENV_STEPS_SAMPLED_LIFETIME, 0)},
        "connectors": {
            "env_to_module": _connectors(directory, objects, above + COMPONENT_ENV_TO_MODULE_CONNECTOR),
            "module_to_env": _connectors(directory, objects, above + COMPONENT_MODULE_TO_ENV_CONNECTOR),
        },
        "notices": [],
        "packed": pack({"env": {}, "episodes": {}, "metrics": metrics_tree(MetricsLogger())}),
    }


def _connectors(directory: NativeDirectory, objects: Objects, folder: str, above: str = "") -> dict[str, Any]:
    """States of a pipeline's connectors by name, as `rllib/connectors.py` names them."""
    found: dict[str, Any] = {}
    for name in directory.folders(folder):
        inner = f"{folder}/{name}"
        if directory.folders(inner):
            found |= _connectors(directory, objects, inner, f"{above}{name}/")
            continue
        state = objects.real(directory.state(inner))
        if state:
            try:
                found[above + name] = state_tree(state, f"{directory.url}/{inner}/state.pkl")
            except UnsavableError as error:
                raise InvalidInputError(f"{error}, which is neither arrays nor plain data") from None
    return found


def _policy(directory: NativeDirectory, objects: Objects, policy_id: str) -> dict[str, Any]:
    """A single RLModule's directory."""
    if not (isinstance(policy_id, str) and policy_id):
        raise InvalidInputError(f"policy_id={policy_id!r} must be a string, and not empty")
    spec = describe_module(directory, "", objects)
    module: RLModule = spec.build()
    load_module(module, directory.state("", "module_state", "state"), f"{directory.url}/module_state.pkl")
    parts = {"about": policy_about(module), "module": module_tree(module)}
    return {"about": about_tree("policy", [policy_id]), "policies": {policy_id: parts}}


def _missing(described: Described) -> dict[str, str]:
    settings = vars(described.config).items()
    return {_public_place(name): value.why for name, value in settings if isinstance(value, NotImported)}


def _notices(described: Described) -> list[str]:
    if not described.dropped:
        return []
    kind = type(described.config).__qualname__
    return [f"settings that {kind} of this Ray does not have: {', '.join(described.dropped)}"]
