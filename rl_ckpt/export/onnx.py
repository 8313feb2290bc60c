"""ONNX: the policy's forward_inference with a dynamic batch, in one file, checked with onnxruntime.

Needs torch, onnx, onnxscript and onnxruntime (extra `export`).
"""

from __future__ import annotations

import importlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.export.check import check_outputs
from rl_ckpt.export.model import BATCH, Model, told, traced
from rl_ckpt.export.torch_export import exported_program

_MOST_BYTES = (2 << 30) - (1 << 20)  # of a protobuf message
_NEEDS = ("onnx", "onnxscript", "onnxruntime")


def check_installed() -> None:
    """Looks for what an export needs, before anything is read.

    Raises:
        ImportError: Something is not installed.
    """
    for name in _NEEDS:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"format='onnx' needs {name}: pip install 'rl-ckpt[export]'") from error


def write_onnx(
    model: Model, path: Path, metadata: Mapping[str, str], opset: int | None, check: bool
) -> tuple[int, float | None]:
    """Writes the file.

    Args:
        model: The policy.
        path: Of an empty file.
        metadata: For the file's `metadata_props`.
        opset: Version of the default operator set; None: the one that torch recommends.
        check: Whether to run the file in onnxruntime and compare.

    Returns:
        The operator set's version, and the largest difference.

    Raises:
        InvalidInputError: The module can't be exported, not in that operator set, or gives something else as a file.
        OSError: The file can't be written.
    """
    proto = _proto(model, opset)
    for name, text in metadata.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = name, text
    found = next(int(one.version) for one in proto.opset_import if one.domain in ("", "ai.onnx"))
    if opset not in (None, found):
        raise InvalidInputError(
            f"this model can't be had in version {opset} of ONNX's operator set; the exporter gives version {found}"
        )
    path.write_bytes(proto.SerializeToString())
    return found, _check(model, path) if check else None


def _proto(model: Model, opset: int | None) -> Any:
    import torch

    size = sum(p.nbytes for p in [*model.wrapped.parameters(), *model.wrapped.buffers()])
    if size > _MOST_BYTES:
        raise InvalidInputError(
            f"the module has {size} bytes of parameters, and an ONNX file holds at most 2 GiB; use "
            "format='torch_export'"
        )
    program = exported_program(model)
    with warnings.catch_warnings(), _quiet("torch.onnx._internal.exporter._registration"):
        warnings.simplefilter("ignore")  # torch's own deprecations
        made = traced(
            lambda: torch.onnx.export(
                program,
                (),
                dynamo=True,
                input_names=[one.name for one in model.inputs],
                output_names=[one.name for one in model.outputs],
                opset_version=opset,
                external_data=False,
                verbose=False,
            ),
            "the ONNX exporter",
        )
    proto = made.model_proto
    _name_the_batch(proto)
    return proto


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keeps a logger's warnings back: torch's, of operators of a torchvision that nobody asked for."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _name_the_batch(proto: Any) -> None:
    """Calls the one free extent "batch"; the exporter gives it a number of its own."""
    symbol = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]:
        for extent in value.type.tensor_type.shape.dim:
            if extent.dim_param:  # the symbol, or a term with it
                extent.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", BATCH, extent.dim_param)


def _check(model: Model, path: Path) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    errors = onnxruntime.capi.onnxruntime_pybind11_state
    refusals = (
        errors.Fail,
        errors.NotImplemented,
        errors.InvalidGraph,
        errors.InvalidArgument,
        errors.RuntimeException,
    )
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]
        by_name = [one.name for one in model.inputs]
        return check_outputs(
            model,
            lambda inputs: session.run(
                [one.name for one in model.outputs],
                {name: inputs[by_name.index(name)].numpy() for name in names},
            ),
        )
    except refusals as error:
        raise InvalidInputError(
            f"onnxruntime on this machine's CPU can't run the exported model: {told(error)}. `check=False` exports it "
            "unchecked, for another runtime"
        ) from error
