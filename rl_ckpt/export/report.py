"""What an export says: the report that `export_model` returns, and the metadata that goes into the file.

Plain data. Metadata is text by name, the same names in every format, so that a file can be used with nothing but itself
(docs/export.md, "What a file says about itself").
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from rl_ckpt.errors import InvalidInputError

Format = Literal["onnx", "torch_export", "state_dict", "safetensors", "numpy"]
FORMATS: tuple[str, ...] = get_args(Format)
SUFFIXES = {
    "onnx": ".onnx",
    "torch_export": ".pt2",
    "state_dict": ".pt",
    "safetensors": ".safetensors",
    "numpy": ".npz",
}
PREFIX = "rl_ckpt."
"""Of the names of all metadata."""
VERSION = "1"
"""Of the metadata's names and meanings."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or output of an exported model."""

    name: str
    """"obs", "obs.<key>" of Dict and "obs.<i>" of Tuple spaces, "state_in.<name>"; "action_dist_inputs", "actions",
    "state_out.<name>"."""
    dtype: str
    """numpy's name, or ml_dtypes'."""
    shape: tuple[int | str, ...]
    """Extents in elements; "batch" where any number goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was exported, and how it was checked."""

    path: str
    """Of the file."""
    format: str
    bytes: int
    """Of the file."""
    policy: str | None
    """Id of the policy; None for a part of the tree that was chosen by `select`."""
    step: int
    checkpoint: str
    """Id of the checkpoint that it was read from."""
    tensors: int
    """How many arrays of the checkpoint the file holds."""
    weights_digest: str
    """Of names, dtypes, shapes and bytes of all of them: 32 hex digits; the same in every format."""
    inputs: tuple[TensorInfo, ...] = ()
    """Of the model, in the order in which it takes them; none where the file holds arrays only."""
    outputs: tuple[TensorInfo, ...] = ()
    action_dist: str | None = None
    """Class of the distribution that `action_dist_inputs` are for, as "module:Class"."""
    opset: int | None = None
    """ONNX only."""
    checked_batches: tuple[int, ...] = ()
    """Batch sizes on which the file's outputs were compared with the policy's; none where it was not checked."""
    max_difference: float | None = None
    """The largest absolute difference in any output then."""
    notices: tuple[str, ...] = ()
    """Damage that was read around, and what is not in the file."""


def check_format(format: object, allowed: Sequence[str] = FORMATS) -> str:
    """A format's name.

    Raises:
        InvalidInputError: It is none of `allowed`.
    """
    if not isinstance(format, str) or format not in allowed:
        raise InvalidInputError(f"format={format!r} must be one of {', '.join(allowed)}")
    return format


def as_json(tensors: Sequence[TensorInfo]) -> str:
    """Inputs or outputs, for metadata."""
    return json.dumps([asdict(one) for one in tensors])
