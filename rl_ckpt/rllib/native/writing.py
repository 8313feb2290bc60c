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
from ray.rllib.utils.checkpoints import CHECKPOINT_VERSION_LEARNER_AND_ENV_RUNNER
from ray.rllib.utils.torch_utils import convert_to_torch_tensor

from rl_ckpt.errors import InvalidInputError

_ARGS = "class_and_ctor_args.pkl"


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


def native_weights(module: Mapping[str, Any], policy: str) -> dict[str, Any]:
    """A module's tensors as RLlib keeps them in files: numpy arrays by name.

    Args:
        module: Tensors by name, of any dtype.
        policy: Its id, for messages.

    Raises:
        InvalidInputError: RLlib's own reading would give other values; names the tensors.
    """
    tensors = {name: value for name, value in module.items() if isinstance(value, torch.Tensor)}
    _check_kept(tensors, f"policy {policy!r}")
    return {name: _as_numpy(value) for name, value in module.items()}


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
        read = convert_to_torch_tensor(_as_numpy(tensor)).to(tensor.dtype)
        if not torch.equal(read.nan_to_num(), tensor.nan_to_num()) or not torch.equal(read.isnan(), tensor.isnan()):
            changed.append(f"{name} ({str(tensor.dtype).removeprefix('torch.')})")
    if changed:
        raise InvalidInputError(
            f"{what}: RLlib's own reading of a checkpoint would change the values of {', '.join(changed[:8])}, since "
            "it makes float32 of wider ones; nothing was written"
        )


def _as_numpy(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    wide = value.float() if value.dtype == torch.bfloat16 else value  # numpy has no bfloat16; its values are float32's
    return wide.detach().cpu().numpy()
