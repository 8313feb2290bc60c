"""torch.export: the policy's forward_inference as a program that torch loads without RLlib or this package.

`torch.export.load(path).module()(obs)` runs it. Its metadata are the extra file `rl_ckpt.json`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rl_ckpt.export.check import check_outputs
from rl_ckpt.export.model import BATCH, Model, traced

if TYPE_CHECKING:
    from torch.export import ExportedProgram

EXTRA_FILE = "rl_ckpt.json"


def exported_program(model: Model) -> ExportedProgram:
    """Traces a policy, with a dynamic batch.

    Raises:
        InvalidInputError: It can't be traced.
    """
    import torch

    batch = torch.export.Dim(BATCH)
    shapes = (tuple({0: batch} for _ in model.inputs),)
    inputs = model.random_inputs(3, seed=0)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that an LSTM sets attributes of its own while it is traced
        program: ExportedProgram = traced(
            lambda: torch.export.export(model.wrapped, inputs, dynamic_shapes=shapes), "torch.export"
        )
    return program


def write_torch_export(model: Model, path: Path, metadata: Mapping[str, str], check: bool) -> float | None:
    """Writes the file.

    Args:
        model: The policy.
        path: Of an empty file.
        metadata: For the extra file.
        check: Whether to load the file and compare.

    Returns:
        The largest difference.

    Raises:
        InvalidInputError: The module can't be exported, or the file gives something else than the policy.
        OSError: The file can't be written.
    """
    import torch

    program = exported_program(model)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={EXTRA_FILE: json.dumps(dict(metadata))})
    if not check:
        return None
    with path.open("rb") as file:
        loaded = torch.export.load(file).module()
    return check_outputs(model, lambda inputs: loaded(*inputs))
