"""A learner on its own, to take a native checkpoint's state: no Algorithm, no environment, and no Ray started.

RLlib numbers the state of an optimizer by the positions of its parameters, and only a learner knows which parameter
stands where. So one is built from the stored config and modules, given the state, and read by name
(`rllib/learner.py`).

Owns: building it, and setting it with nothing converted and nothing passed over. Promises: what does not fit is an
error that names the file and all of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModule

from rl_ckpt.errors import CorruptionError, InvalidInputError
from rl_ckpt.rllib.native.objects import NotImported
from rl_ckpt.rllib.rng import rng_tree, set_rng

_LIKE_PARAMETERS = frozenset(("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg"))
"""State that has the shape of its parameter in every optimizer of torch that keeps it."""


@contextlib.contextmanager
def built_learner(config: AlgorithmConfig, spec: MultiRLModuleSpec) -> Iterator[TorchLearner]:
    """A learner as the config says, on the CPU, alone; it is shut down after the block.

    Args:
        config: Not changed. What of it was `NotImported` stands at its default in the learner.
        spec: Of the modules.

    Raises:
        InvalidInputError: The config's learner is not of torch, or can't be built here.
    """
    lean = config.copy(copy_frozen=False)
    defaults = vars(type(config)())
    for name, value in list(vars(lean).items()):
        if isinstance(value, NotImported):
            vars(lean)[name] = defaults.get(name)
    vars(lean).update(num_learners=0, num_gpus_per_learner=0, seed=None)  # a seed would be everybody's in this process
    kind = lean.learner_class
    if not (isinstance(kind, type) and issubclass(kind, TorchLearner)):
        raise InvalidInputError(f"{kind!r} is no TorchLearner; checkpoints of other frameworks are not imported")
    generators = rng_tree()  # building draws from them, and the caller's are not ours to move on
    try:
        learner = kind(config=lean, module_spec=spec)
        learner.build()
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError, ImportError) as error:
        raise InvalidInputError(
            f"{kind.__qualname__} can't be built from the stored config and modules "
            f"({type(error).__name__}: {error}); give the config by config=..."
        ) from error
    finally:
        set_rng(generators)
    try:
        yield learner
    finally:
        learner.shutdown()


def load_module(module: RLModule, state: Mapping[Any, Any], file: str) -> None:
    """Sets a module to native weights, by name, in its own dtypes.

    Raises:
        CorruptionError: Names or shapes are others than the module's; lists them.
        InvalidInputError: A dtype is another, so that values would be converted.
    """
    here = module.state_dict() if isinstance(module, torch.nn.Module) else {}
    missing, unexpected = [n for n in here if n not in state], [n for n in state if n not in here]
    if missing or unexpected:
        raise CorruptionError(
            f"{file}: its weights are not those of {type(module).__qualname__} as the checkpoint describes it: "
            f"missing {missing[:8]}, unexpected {[str(name) for name in unexpected[:8]]}"
        )
    tensors = {name: _tensor(state[name], here[name], f"{file}: {name}") for name in here}
    if isinstance(module, torch.nn.Module):
        module.load_state_dict(tensors)


def set_optimizers(learner: TorchLearner, state: Any, file: str) -> None:
    """Gives the learner's optimizers their native state, by position.

    Raises:
        CorruptionError: Optimizers, groups, positions or shapes are others than the learner's.
    """
    here = learner._named_optimizers
    if not isinstance(state, dict) or set(state) != set(here):
        names = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise CorruptionError(f"{file}: optimizers {names} are in it, and {sorted(here)} belong to this checkpoint")
    for name, optimizer in here.items():
        where = f"{file}: optimizer {name!r}"
        saved = state[name].get("state") if isinstance(state[name], dict) else None
        if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
            raise CorruptionError(f"{where} has no parameter groups and state")
        _set_optimizer(optimizer, saved, where)


def _set_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], where: str) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    counts = [len(group["params"]) for group in optimizer.param_groups]
    found = [len(group["params"]) for group in saved["param_groups"]]
    if counts != found or any(at not in range(len(parameters)) for at in saved["state"]):
        raise CorruptionError(f"{where} has {found} parameters in its groups, and the modules' are {counts}")
    state = {}
    for at, values in saved["state"].items():
        of_one = f"{where}, parameter {at}"
        state[at] = {key: _moment(key, value, parameters[at], f"{of_one}: {key}") for key, value in values.items()}
    groups = [
        {key: _python(value) for key, value in group.items() if key != "params"} | {"params": group["params"]}
        for group in saved["param_groups"]
    ]
    kept = {**{key: value for key, value in saved.items() if key not in ("state", "param_groups")}}
    optimizer.load_state_dict({**kept, "state": state, "param_groups": groups})


def _tensor(value: Any, like: Any, where: str) -> Any:
    if not isinstance(like, torch.Tensor):
        return value  # a module's extra state
    if isinstance(value, torch.Tensor):
        made = value
    elif isinstance(value, np.ndarray | np.generic):
        made = torch.from_numpy(np.array(value))
    elif isinstance(value, bool | int | float) and not like.ndim:  # RLlib makes numbers of 0-dim tensors
        made = torch.tensor(value, dtype=like.dtype)
    else:
        raise CorruptionError(f"{where} is a {type(value).__name__}, where a tensor should be")
    if made.shape != like.shape:
        raise CorruptionError(f"{where} has shape {tuple(made.shape)}, and the module's has {tuple(like.shape)}")
    if made.dtype != like.dtype and not (not like.ndim or torch.equal(made, made.to(like.dtype).to(made.dtype))):
        raise InvalidInputError(
            f"{where} is {made.dtype} in the file, and {like.dtype} in the module: values would change"
        )
    return made.to(like.dtype)


def _moment(key: str, value: Any, parameter: torch.Tensor, where: str) -> Any:
    """State of a parameter: tensors again, which RLlib had made numpy's."""
    if isinstance(value, np.ndarray) and value.ndim:
        if key in _LIKE_PARAMETERS and value.shape != tuple(parameter.shape):
            raise CorruptionError(f"{where} has shape {value.shape}, and its parameter has {tuple(parameter.shape)}")
        return torch.from_numpy(np.array(value))
    if isinstance(value, np.ndarray | np.generic | float | int) and not isinstance(value, bool):
        return torch.tensor(float(value))  # the count of steps
    return value


def _python(value: Any) -> Any:
    """Numbers as torch has them in its groups."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and not value.ndim):
        return value.item()
    return tuple(_python(item) for item in value) if isinstance(value, tuple) else value
