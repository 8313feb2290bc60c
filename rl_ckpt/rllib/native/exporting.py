"""Export: a checkpoint of ours into a native RLlib directory, which Ray 2.60 loads without us.

Owns: what of our tree goes into which component, and how the directory comes into being. Promises: an existing
directory with anything in it is never touched; the directory is there whole or not at all; weights and optimizer state
that Ray loads from it are equal to ours, or it is an error. Does not: replay buffers, random generators, environments
and running episodes, which native checkpoints have no place for.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.connectors.env_to_module import EnvToModulePipeline
from ray.rllib.connectors.module_to_env import ModuleToEnvPipeline
from ray.rllib.core import (
    ALL_MODULES,
    COMPONENT_ENV_RUNNER,
    COMPONENT_ENV_TO_MODULE_CONNECTOR,
    COMPONENT_LEARNER,
    COMPONENT_LEARNER_GROUP,
    COMPONENT_METRICS_LOGGER,
    COMPONENT_MODULE_TO_ENV_CONNECTOR,
    COMPONENT_OPTIMIZER,
    COMPONENT_RL_MODULE,
)
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule, MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModule, RLModuleSpec
from ray.rllib.env.multi_agent_env_runner import MultiAgentEnvRunner
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME, WEIGHTS_SEQ_NO
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger

from rl_ckpt.checkpointer import Checkpointer
from rl_ckpt.errors import InvalidInputError, StorageError
from rl_ckpt.rllib.about import check_about
from rl_ckpt.rllib.connectors import state_from
from rl_ckpt.rllib.data import from_data
from rl_ckpt.rllib.fit import check_policies
from rl_ckpt.rllib.load import Changes, configured
from rl_ckpt.rllib.metrics import set_metrics
from rl_ckpt.rllib.modules import set_module
from rl_ckpt.rllib.native.writing import check_read_back, native_optimizer, native_state, write_component
from rl_ckpt.rllib.policy import _take_dtypes, build_module
from rl_ckpt.rllib.refs import resolve

_READ = ("about", "config", "algorithm", "policies", "learner", "env_runners/*/connectors", "env_runners/*/counters")


def export_native(
    url: str,
    directory: str | os.PathLike[str],
    *,
    step: int | None = None,
    policies: Sequence[str] | None = None,
    policy_mapping_fn: Callable[..., str] | None = None,
    given: Mapping[str, Any] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> str:
    """Writes a checkpoint as a native directory (version 2.1), for `Algorithm.from_checkpoint`. Starts no Ray.

    A policy's checkpoint becomes what `RLModule.from_checkpoint` loads; of an Algorithm's, each folder
    `learner_group/learner/rl_module/<id>` is that too.

    Args:
        url: Of the run.
        directory: Local; it must not exist, or be empty.
        step: Which checkpoint; None: the newest good one.
        policies: Only these, of an Algorithm's; None: all.
        policy_mapping_fn: Maps agents to the policies left, where `policies` leaves some out. It is pickled.
        given: What the checkpoint could not hold, by place, as for `load`.
        storage_options: For `url`, as fsspec takes them.

    Returns:
        The directory's absolute path.

    Raises:
        CheckpointNotFoundError: No such run or checkpoint.
        InvalidInputError: The directory holds something; values that RLlib would change; something of the config or a
            module is missing here; unknown policies. Nothing was written.
        CorruptionError: The checkpoint is damaged.
        StorageError: The directory can't be written.
    """
    target = Path(directory).absolute()
    _check_free(target)
    checkpointer = Checkpointer(url, storage_options=storage_options)
    tree: dict[str, Any] = checkpointer.load_state(step, select=_READ)
    about = check_about(tree, checkpointer.url)
    changes = Changes(dict(given or {}), None, policies, policy_mapping_fn, None)
    if about["kind"] == "algorithm":
        if policies is not None:
            check_policies(policies, about["policies"])
        config = configured(tree, changes)
        return _finished(target, lambda folder: _write_algorithm(folder, tree, config, policies or about["policies"]))
    if about["kind"] == "policy":
        (policy,) = about["policies"]
        return _finished(target, lambda folder: _write_module(folder, policy, tree["policies"][policy]))
    raise InvalidInputError(
        f"{checkpointer.url} holds a checkpoint of the kind {about['kind']!r}, which has no counterpart in version 2.1"
    )


def _write_algorithm(folder: Path, tree: Mapping[str, Any], config: AlgorithmConfig, policies: Sequence[str]) -> None:
    algorithm = resolve(tree["about"]["algorithm"])
    if not (isinstance(algorithm, type) and issubclass(algorithm, Algorithm)):
        raise InvalidInputError(f"{tree['about']['algorithm']} is no class of Algorithm here")
    own = tree["algorithm"]
    known: Any = config.stats_cls_lookup
    logger = MetricsLogger(root=True, stats_cls_lookup=known)
    set_metrics(logger, own["metrics"])
    state = {COMPONENT_METRICS_LOGGER: logger.get_state(), "training_iteration": own["iteration"]}
    _write_learner(folder / COMPONENT_LEARNER_GROUP, tree, config, policies)
    _write_runner(folder / COMPONENT_ENV_RUNNER, tree, config)
    args = (config.get_state(),)
    write_component(folder, algorithm, args, {}, state, metadata="rllib_checkpoint.json", stem="algorithm_state")


def _write_learner(folder: Path, tree: Mapping[str, Any], config: AlgorithmConfig, policies: Sequence[str]) -> None:
    modules = folder / COMPONENT_LEARNER / COMPONENT_RL_MODULE
    specs: dict[str, RLModuleSpec] = {}
    optimizers: dict[str, Any] = {}
    for policy in policies:
        _check_name(policy)
        module = _write_module(modules / policy, policy, tree["policies"][policy])
        specs[policy] = RLModuleSpec.from_module(module)
        optimizers |= _optimizers(policy, tree["policies"][policy]["optimizers"])
    shared = tree["learner"]
    optimizers |= _optimizers(ALL_MODULES, shared["optimizers"])
    chosen = config._rl_module_spec
    cls = chosen.multi_rl_module_class if isinstance(chosen, MultiRLModuleSpec) else MultiRLModule
    spec = MultiRLModuleSpec(multi_rl_module_class=cls, rl_module_specs=specs)
    kwargs = {
        "observation_space": spec.observation_space,
        "action_space": spec.action_space,
        "inference_only": spec.inference_only,
        "learner_only": False,
        "model_config": spec.model_config,
        "rl_module_specs": specs,
    }
    write_component(modules, cls, (), kwargs, {}, stem="module_state")
    state = {
        "should_module_be_updated": config.policies_to_train,
        WEIGHTS_SEQ_NO: shared["weights_seq_no"],
        COMPONENT_OPTIMIZER: optimizers,
    }
    known = {"config": config, "module_spec": spec}
    write_component(folder / COMPONENT_LEARNER, config.learner_class, (), {**known, "module": None}, state)
    write_component(folder, LearnerGroup, (), known, {})


def _write_module(folder: Path, policy: str, tree: Mapping[str, Any]) -> RLModule:
    module: Any = build_module(tree["about"])
    fresh = build_module(tree["about"])
    _take_dtypes(module, tree["module"])
    set_module(module, tree["module"], from_data(tree.get("extra", {})))
    state = native_state(module)
    check_read_back(fresh, state, tree["module"], policy)
    args, kwargs = module.get_ctor_args_and_kwargs()
    write_component(folder, type(module), args, kwargs, state, stem="module_state")
    return fresh


def _optimizers(policy: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{policy}_{name}": {"module_id": policy, "state": native_optimizer(from_data(saved), f"{policy}_{name}")}
        for name, saved in tree.items()
    }


def _write_runner(folder: Path, tree: Mapping[str, Any], config: AlgorithmConfig) -> None:
    runners = tree.get("env_runners", {})
    if not runners:
        return
    own = runners[min(runners)]
    default = MultiAgentEnvRunner if config.is_multi_agent else SingleAgentEnvRunner
    state = {NUM_ENV_STEPS_SAMPLED_LIFETIME: own["counters"]["num_env_steps_sampled_lifetime"]}
    write_component(folder, config.env_runner_cls or default, (), {"config": config}, state)
    pipelines = (
        (COMPONENT_ENV_TO_MODULE_CONNECTOR, "env_to_module", EnvToModulePipeline),
        (COMPONENT_MODULE_TO_ENV_CONNECTOR, "module_to_env", ModuleToEnvPipeline),
    )
    for name, key, cls in pipelines:
        # Without the connectors that it is made of: those come from the config, when an Algorithm is built from it.
        write_component(folder / name, cls, (), {}, {})
        for connector, saved in own["connectors"].get(key, {}).items():
            if "#" in connector:
                raise InvalidInputError(
                    f"two connectors of class {connector.partition('#')[0]} have a state; native checkpoints hold only "
                    "one of a class"
                )
            write_component(folder / name / connector, object, (), {}, state_from(saved))


def _check_name(policy: str) -> None:
    if "/" in policy or policy in ("", ".", ".."):
        raise InvalidInputError(
            f"policy {policy!r}: native checkpoints have a folder of that name, which can't be made"
        )


def _check_free(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InvalidInputError(f"{target} is there and no directory; give another one")
    if target.is_dir() and any(target.iterdir()):
        raise InvalidInputError(f"{target} is not empty, and is not overwritten; give another directory, or remove it")


def _finished(target: Path, write: Callable[[Path], object]) -> str:
    """Lets a directory be written beside its place, and then moves it there."""
    part = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        try:
            part.mkdir(parents=True)
            write(part)
            _sync(part)
            # The last thing: a crash before it leaves a hidden folder, never half a checkpoint. It fails where
            # somebody else has put something there meanwhile.
            part.rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        _sync_folder(target.parent)
    except OSError as error:
        raise StorageError(f"{target} can't be written: {error}") from error
    return str(target)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
