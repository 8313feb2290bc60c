"""The files of a native 2.1 directory, as Ray 2.60 writes them.

Owns: names, metadata and what each pickle holds. Promises: a value that RLlib's own reading would change (it makes
float32 of float64 and int32 of int64) is an error here. Does not: where the state comes from, nor moving the finished
directory into place, which are `exporting.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.cloudpickle as cloudpickle
import torch
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from ray.rllib.utils.checkpoints import CHECKPOINT_VERSION_LEARNER_AND_ENV_RUNNER
from ray.rllib.utils.torch_utils import convert_to_torch_tensor

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.rllib.modules import module_extra, module_tree

_ARGS = "class_and_ctor_args.pkl"
_CHANGED = (
    "{}: RLlib's own reading of a checkpoint would change {}, since it makes float32 and int32 of wider ones (and "
    "builds modules in the dtypes of their constructors); nothing was written"
)


def write_component(
    folder: Path,
    kind: type,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    state: Any,
    *,
    metadata: str = "metadata.json",
    stem: str = "state",
) -> None:
    """Writes the three files that every component has.

    Args:
        folder: Of the component; made, with those above.
        kind: Its class.
        args: Of its constructor.
        kwargs: Of its constructor.
        state: What is not a subcomponent's.
        metadata: Name of its JSON file.
        stem: Of its state file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "class_and_ctor_args_file": _ARGS,
        "state_file": stem,
        "ray_version": ray.__version__,
        "ray_commit": ray.__commit__,
        "checkpoint_version": str(CHECKPOINT_VERSION_LEARNER_AND_ENV_RUNNER),
    }
    (folder / metadata).write_text(json.dumps(about))
    _dump(folder / _ARGS, {"class": kind, "ctor_args_and_kwargs": (args, dict(kwargs))})
    _dump(folder / f"{stem}.pkl", state)


def _dump(path: Path, value: Any) -> None:
    with path.open("wb") as file:
        cloudpickle.dump(value, file)


def native_state(module: RLModule) -> dict[str, Any]:
    """A module's state as RLlib keeps it in files: numpy arrays by name, or what its own `get_state` gives."""
    if module_extra(module) or type(module).get_state is not TorchRLModule.get_state:
        return dict(module.get_state())
    return {name: _as_numpy(value) for name, value in module_tree(module).items()}


def check_read_back(fresh: RLModule, state: Mapping[str, Any], tensors: Mapping[str, Any], policy: str) -> None:
    """Whether RLlib's own reading of a state gives the tensors that it was made of.

    Args:
        fresh: A module as RLlib will build it; it is set.
        state: As `native_state` gave it.
        tensors: By name, as they were saved.
        policy: Its id, for messages.

    Raises:
        InvalidInputError: It gives others; names them.
    """
    try:
        fresh.set_state(dict(state))
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise InvalidInputError(f"policy {policy!r}: {type(fresh).__qualname__}.set_state failed: {error}") from error
    read = module_tree(fresh)
    changed = [
        f"{name} ({str(tensor.dtype).removeprefix('torch.')})"
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and not (name in read and _same(read[name], tensor))
    ]
    if changed:
        raise InvalidInputError(_CHANGED.format(f"policy {policy!r}", ", ".join(changed[:8])))


def native_optimizer(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An optimizer's `state_dict` by positions, in numpy, from our tree by names.

    Raises:
        InvalidInputError: As `native_weights`.
    """
    positions: dict[str, int] = {}
    groups = []
    for group in tree["param_groups"]:
        at = [positions.setdefault(path, len(positions)) for path in group["params"]]
        groups.append({**group, "params": at})
    state = {}
    for path, values in tree["state"].items():
        tensors = {f"{key} of {path}": value for key, value in values.items() if isinstance(value, torch.Tensor)}
        _check_kept(tensors, f"optimizer {name!r}")
        state[positions[path]] = {key: _as_numpy(value) for key, value in values.items()}
    return {"state": state, "param_groups": groups, **tree.get("more", {})}


def _check_kept(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Whether RLlib's way of reading them gives the same values back."""
    changed = []
    for name, tensor in tensors.items():
        if not _same(convert_to_torch_tensor(_as_numpy(tensor)).to(tensor.dtype), tensor):
            changed.append(f"{name} ({str(tensor.dtype).removeprefix('torch.')})")
    if changed:
        raise InvalidInputError(_CHANGED.format(what, ", ".join(changed[:8])))


def _same(one: Any, other: torch.Tensor) -> bool:
    """Equal in dtype and values, of which NaNs are equal too."""
    if not isinstance(one, torch.Tensor) or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.nan_to_num(), other.nan_to_num()) and torch.equal(one.isnan(), other.isnan())


def _as_numpy(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    wide = value.float() if value.dtype == torch.bfloat16 else value  # numpy has no bfloat16; its values are float32's
    return wide.detach().cpu().numpy()
