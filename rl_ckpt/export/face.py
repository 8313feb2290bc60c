"""`export_model` and `export_arrays`: the calls. The work is done in this package's other files.

Order of things: what the caller gave is checked, then what is installed, then the checkpoint is found, then the file is
made under a temporary name, checked, and given its name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.export.npz import write_npz
from rl_ckpt.export.out_file import check_path, new_file
from rl_ckpt.export.report import SUFFIXES, ExportReport, Format, as_json, check_format
from rl_ckpt.export.safetensors import write_safetensors
from rl_ckpt.export.source import Source, policy_source, selected_source, source_digest, with_source
from rl_ckpt.export.state_dict import import_torch, write_state_dict

_ARRAYS = {"state_dict": write_state_dict, "safetensors": write_safetensors, "numpy": write_npz}


def export_model(
    url: str,
    policy: str = "default_policy",
    format: Format = "onnx",
    path: str | os.PathLike[str] | None = None,
    *,
    step: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    opset: int | None = None,
    check: bool = True,
    module_class: Any = None,
) -> ExportReport:
    """Writes one policy of an RLlib checkpoint as a file that is used without this package. Starts no Ray.

    Args:
        url: Of the run.
        policy: Which one.
        format: "onnx": its `forward_inference`, for onnxruntime and others. "torch_export": the same, for
            `torch.export.load`. "state_dict": its tensors, for `torch.load(..., weights_only=True)`. "safetensors" and
            "numpy" (.npz): its arrays; streamed, without building the module.
        path: The local file to make; None: named after the policy, in the current folder. It must not exist.
        step: Which checkpoint; None: the newest good one.
        storage_options: For the file system that the run is on, as fsspec takes them.
        opset: Version of ONNX's operator set; None: the one that torch recommends.
        check: Whether an exported model is run on random inputs of several batch sizes, and compared with the policy
            (ONNX: in onnxruntime).
        module_class: The RLModule's class, where the checkpoint's own can't be imported.

    Returns:
        What was exported, and how large the differences were.

    Raises:
        InvalidInputError: Unknown policy (lists the known ones) or format, a file that exists, a folder that does not,
            or a module that can't be exported (says why).
        CheckpointNotFoundError: No such run or checkpoint.
        CorruptionError: The checkpoint asked for (or every one) is damaged.
        StorageError: The store failed, or the file's disk.
        ImportError: The format's libraries are not installed; says how to install them.
    """
    format_name = check_format(format)
    if not isinstance(policy, str) or not policy:
        raise InvalidInputError(f"policy={policy!r} must be the id of a policy")
    if opset is not None and (format_name != "onnx" or not isinstance(opset, int) or isinstance(opset, bool)):
        raise InvalidInputError(f"opset={opset!r} must be a version of ONNX's operator set, with format='onnx'")
    target = check_path(path, policy + SUFFIXES[format_name])

    def use(source: Source, notices: tuple[str, ...]) -> ExportReport:
        if format_name in _ARRAYS:
            return _write_arrays(source, format_name, target, notices)
        order = _ModelOrder(url, dict(storage_options or {}), format_name, target, opset, check, module_class)
        return _write_model(order, source, notices)

    _check_installed(format_name)
    return with_source(url, step, storage_options, lambda run, found: policy_source(run, found, policy), use)


def export_arrays(
    url: str,
    select: str | Sequence[str],
    format: Format = "safetensors",
    path: str | os.PathLike[str] | None = None,
    *,
    step: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    rank: int = 0,
) -> ExportReport:
    """Writes arrays of any checkpoint, RLlib's or not, as one file. Starts no Ray.

    Args:
        url: Of the run.
        select: Globs of saved paths, as `Checkpointer.load_state` takes them. Arrays get their paths as names; numbers
            and short text go into the metadata (`rl_ckpt.plain`), encoded as in the manifest.
        format: "safetensors", "numpy" or "state_dict".
        path: The local file to make; None: `arrays` with the format's suffix, in the current folder. It must not exist.
        step: Which checkpoint; None: the newest good one.
        storage_options: For the file system that the run is on, as fsspec takes them.
        rank: Whose per-rank leaves, where several workers saved. Sharded arrays come whole.

    Returns:
        What was exported.

    Raises:
        InvalidInputError: `select` chooses nothing, pickled leaves or long text, or dtypes that the format does not
            have; or as `export_model`.
        CheckpointError, ImportError: As `export_model`.
    """
    format_name = check_format(format, tuple(_ARRAYS))
    target = check_path(path, "arrays" + SUFFIXES[format_name])
    _check_installed(format_name)
    return with_source(
        url,
        step,
        storage_options,
        lambda run, found: selected_source(run, found, select, rank),
        lambda source, notices: _write_arrays(source, format_name, target, notices),
    )


@dataclass(frozen=True, slots=True)
class _ModelOrder:
    """What `export_model` was asked for, where a module has to be built."""

    url: str
    storage_options: dict[str, Any]
    format: str
    target: Path
    opset: int | None
    check: bool
    module_class: Any


def _check_installed(format: str) -> None:
    """Looks for what a format needs, before anything is read.

    Raises:
        ImportError: Something is not installed.
    """
    if format == "onnx":
        from rl_ckpt.export.onnx import check_installed

        check_installed()
    if format in ("onnx", "torch_export", "state_dict"):
        import_torch(format)


def _write_arrays(source: Source, format: str, target: Path, notices: tuple[str, ...]) -> ExportReport:
    with new_file(target) as temporary:
        found, repaired = _ARRAYS[format](source, temporary)
        size = temporary.stat().st_size
    if source.plain:
        repaired.append(f"no arrays, and so in the metadata alone: {', '.join(source.plain)}")
    report = _report(source, format, target, size, found)
    return replace(report, notices=(*notices, *repaired))


def _write_model(order: _ModelOrder, source: Source, notices: tuple[str, ...]) -> ExportReport:
    from rl_ckpt.export.check import BATCHES
    from rl_ckpt.export.model import model_of
    from rl_ckpt.export.onnx import write_onnx
    from rl_ckpt.export.torch_export import write_torch_export
    from rl_ckpt.rllib.policy import load_policy

    assert source.policy is not None
    module = load_policy(
        order.url,
        source.policy,
        step=source.manifest.step,
        module_class=order.module_class,
        inference_only=True,
        storage_options=order.storage_options,
    )
    model = model_of(module)
    digest, repaired = source_digest(source)
    about = {**model.metadata, "inputs": as_json(model.inputs), "outputs": as_json(model.outputs)}
    metadata = source.metadata(digest, about)
    opset = None
    with new_file(order.target) as temporary:
        if order.format == "onnx":
            opset, apart = write_onnx(model, temporary, metadata, order.opset, order.check)
        else:
            apart = write_torch_export(model, temporary, metadata, order.check)
        size = temporary.stat().st_size
    return replace(
        _report(source, order.format, order.target, size, digest),
        inputs=model.inputs,
        outputs=model.outputs,
        action_dist=model.action_dist,
        opset=opset,
        checked_batches=BATCHES if order.check else (),
        max_difference=apart,
        notices=(*notices, *repaired),
    )


def _report(source: Source, format: str, target: Path, size: int, digest: str) -> ExportReport:
    return ExportReport(
        path=str(target),
        format=format,
        bytes=size,
        policy=source.policy,
        step=source.manifest.step,
        checkpoint=source.manifest.id,
        tensors=len(source.arrays),
        weights_digest=digest,
    )
