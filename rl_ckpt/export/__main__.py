"""`python -m rl_ckpt.export URL …`: export a policy, or arrays, of a checkpoint as a file.

Exit codes: 0, the file is there, and was checked; 1, the checkpoint is damaged, or the store or the disk failed; 2, the
call must be changed (arguments, an unknown policy, a module that can't be exported, a library that is not installed);
130, interrupted. With any but 0 there is no file, nor a part of one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
from collections.abc import Sequence
from typing import Any

from rl_ckpt.errors import CheckpointError, CheckpointNotFoundError, InvalidInputError
from rl_ckpt.export.face import export_arrays, export_model
from rl_ckpt.export.report import FORMATS, ExportReport, TensorInfo


def main(argv: Sequence[str] | None = None) -> int:
    """Exports.

    Args:
        argv: Arguments; those of the process where None.

    Returns:
        The exit code, see above.
    """
    args = _parser().parse_args(argv)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the temporary file goes
    try:
        report = _export(args)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    except (InvalidInputError, CheckpointNotFoundError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    for line in _lines(report):
        print(line)
    for notice in report.notices:
        print(f"warning: {notice}", file=sys.stderr)
    return 0


def _export(args: argparse.Namespace) -> ExportReport:
    options = _options(args.storage_options)
    common: dict[str, Any] = {"step": args.step, "storage_options": options}
    if args.select:
        return export_arrays(args.url, args.select, args.format or "safetensors", args.out, **common)
    return export_model(
        args.url,
        args.policy,
        args.format or "onnx",
        args.out,
        opset=args.opset,
        check=not args.no_check,
        module_class=None if args.module_class is None else _class(args.module_class),
        **common,
    )


def _options(text: str | None) -> dict[str, Any]:
    try:
        options = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise InvalidInputError(f"--storage-options: {text!r} is no JSON: {error}") from error
    if not isinstance(options, dict):
        raise InvalidInputError(f"--storage-options: {text!r} must be a JSON object")
    return options


def _class(reference: str) -> Any:
    module, _, name = reference.partition(":")
    found: Any = importlib.import_module(module) if module and name else None
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        raise InvalidInputError(f"--module-class={reference!r}: there is no such class; write package.module:Class")
    return found


def _lines(report: ExportReport) -> list[str]:
    what = f"policy {report.policy!r}" if report.policy is not None else f"{report.tensors} arrays"
    lines = [
        f"{report.path}: {what} of step {report.step} ({report.checkpoint}) as {report.format}, {report.bytes} bytes"
    ]
    lines += [f"  input   {_tensor(one)}" for one in report.inputs]
    lines += [f"  output  {_tensor(one)}" for one in report.outputs]
    if report.action_dist:
        lines.append(f"  actions are drawn from {report.action_dist}")
    if report.max_difference is not None:
        sizes = ", ".join(map(str, report.checked_batches))
        lines.append(f"  checked with batches of {sizes}: largest difference {report.max_difference:g}")
    return [*lines, f"  weights {report.weights_digest}"]


def _tensor(info: TensorInfo) -> str:
    return f"{info.name}: {info.dtype} [{', '.join(map(str, info.shape))}]"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rl_ckpt.export",
        description="Export a policy, or arrays, of a checkpoint as a file that is used without rl_ckpt.",
        epilog="Exit codes: 0 done and checked, 1 damaged checkpoint or failed store, 2 wrong call, 130 interrupted.",
    )
    parser.add_argument("url", help="of the run: a folder or any fsspec URL")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--policy", default="default_policy", help="id of the policy (default: %(default)s)")
    what.add_argument("--select", action="append", metavar="GLOB", help="arrays by path instead; may be repeated")
    parser.add_argument("--format", choices=FORMATS, help="(default: onnx; with --select: safetensors)")
    parser.add_argument("--out", metavar="FILE", help="file to make (default: named after the policy)")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest good one)")
    parser.add_argument("--opset", type=int, help="ONNX operator set (default: the one that torch recommends)")
    parser.add_argument("--no-check", action="store_true", help="do not run the exported model and compare")
    parser.add_argument("--module-class", metavar="MODULE:CLASS", help="where the saved class can't be imported")
    parser.add_argument("--storage-options", metavar="JSON", help="for fsspec; credentials better in the environment")
    return parser


if __name__ == "__main__":
    sys.exit(main())
