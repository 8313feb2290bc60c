"""Whether an exported model gives what the policy gives, on random inputs of several batch sizes.

Owns: the sizes, the tolerances, and the message. The tolerance is for another order of the same operations, as runtimes
fuse and reorder them; integers (actions) have to be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.export.model import Model

if TYPE_CHECKING:
    import torch

BATCHES = (1, 2, 7, 32)
_TOLERANCE = {"float64": 1e-8, "float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}
"""Of a difference, relative to the largest value of the output, by dtype."""

Runner = Callable[[Sequence["torch.Tensor"]], Sequence[Any]]
"""Runs the exported file on inputs; gives its outputs as numpy arrays or tensors."""


def check_outputs(model: Model, run: Runner) -> float:
    """Compares an exported model with its policy.

    Args:
        model: The policy.
        run: The exported file.

    Returns:
        The largest absolute difference of any output.

    Raises:
        InvalidInputError: They differ by more than the tolerance, or the policy differs from itself.
    """
    largest = 0.0
    for batch in BATCHES:
        inputs = model.random_inputs(batch, seed=1000 + batch)
        expected, again = model.run(inputs), model.run(inputs)
        for info, a, b in zip(model.outputs, expected, again, strict=True):
            if _difference(_host(a), _host(b)) != 0:
                raise InvalidInputError(
                    f"the module's forward_inference gives another {info.name!r} each time (it draws random numbers, "
                    "or keeps state of its own); such a module can't be exported. Sample from action_dist_inputs "
                    "outside of it"
                )
        for info, want, have in zip(model.outputs, expected, run(inputs), strict=True):
            largest = max(largest, _checked(info.name, info.dtype, batch, _host(want), _host(have)))
    return largest


def _checked(name: str, dtype: str, batch: int, want: Any, have: Any) -> float:
    if want.shape != have.shape:
        raise InvalidInputError(
            f"the exported model gives {name!r} of shape {have.shape} for a batch of {batch}, the policy {want.shape}"
        )
    difference = _difference(want, have)
    allowed = _TOLERANCE.get(dtype, 0.0) * max(1.0, float(np.max(np.abs(want), initial=0)))
    if not difference <= allowed:
        raise InvalidInputError(
            f"the exported model's {name!r} differs from the policy's by {difference:g} on random inputs of batch size "
            f"{batch}; {allowed:g} is allowed. Was part of its forward_inference fixed when it was traced (a Python "
            "branch, a random number, a counter)?"
        )
    return difference


def _difference(a: Any, b: Any) -> float:
    """The largest absolute difference; infinite where only one of two values is a number, 0 where both are none."""
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(a - b))
    return float(np.max(np.where(np.isnan(apart), np.inf, apart), initial=0.0))


def _host(value: Any) -> Any:
    """Values as float64."""
    import torch

    if torch.is_tensor(value):
        value = value.detach().to(torch.float64).numpy()
    return np.asarray(value).astype(np.float64)
