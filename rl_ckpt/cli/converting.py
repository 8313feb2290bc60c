"""`export` and `import`: policies and arrays as files of others, and RLlib's own checkpoints as ours."""

from __future__ import annotations

import importlib
from pathlib import PurePath
from typing import Annotated, Any, Literal

import typer

from rl_ckpt.catalog import Catalog
from rl_ckpt.cli.command import Session, command
from rl_ckpt.cli.listing import Ref, Run, document
from rl_ckpt.cli.place import ref, run_and_refs, run_and_rest
from rl_ckpt.cli.text import size
from rl_ckpt.errors import InvalidInputError
from rl_ckpt.export.face import export_arrays, export_model
from rl_ckpt.export.report import SUFFIXES, ExportReport, Format, TensorInfo

Trust = Literal["restricted", "full"]


def add(app: typer.Typer) -> None:
    """Adds these commands."""
    nothing = "nothing was written"
    command(app, "export", rich_help_panel="Bring in and take out", interrupted=nothing)(_export)
    command(app, "import", rich_help_panel="Bring in and take out", interrupted=nothing)(_import)


def _export(
    session: Session,
    url: Run = None,
    which: Ref = None,
    policy: Annotated[str, typer.Option(metavar="ID", help="Which policy.")] = "default_policy",
    select: Annotated[
        list[str] | None,
        typer.Option("--select", "-s", metavar="GLOB", help="Arrays by path instead; may be repeated."),
    ] = None,
    form: Annotated[
        Format | None, typer.Option("--format", "-f", help="onnx; with --select: safetensors.", show_default=False)
    ] = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="File to make; named after the policy.")] = None,
    step: Annotated[int | None, typer.Option(metavar="N", help="As REF.")] = None,
    opset: Annotated[int | None, typer.Option(metavar="N", help="ONNX operator set; the one torch recommends.")] = None,
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not run the model and compare.")] = False,
    module_class: Annotated[
        str | None, typer.Option(metavar="MODULE:CLASS", help="Where the saved class can't be imported.")
    ] = None,
) -> None:
    """Export a policy, or arrays, as a file that is used without rl_ckpt: as ONNX or safetensors, say."""
    place, (word,) = run_and_refs([url, which], ["REF"], optional=1)
    if select and policy != "default_policy":
        raise InvalidInputError("--policy and --select: give one of them")
    if form is None and out is not None:
        _check_suffix(out, "safetensors" if select else "onnx")
    common: dict[str, Any] = {"step": _step(session, place, word, step), "storage_options": session.options(place)}
    if select:
        report = export_arrays(place, select, form or "safetensors", out, **common)
    else:
        found = None if module_class is None else _class(module_class)
        report = export_model(
            place, policy, form or "onnx", out, opset=opset, check=not no_check, module_class=found, **common
        )
    for notice in report.notices:
        session.out.warn(notice)
    if session.out.as_json:
        session.out.json({"url": place, "report": report})
        return
    for line in _lines(report):
        session.out.line(line)


def _check_suffix(out: str, form: Format) -> None:
    """Fails where a file's name says another format than the one that is made without --format."""
    meant = next((name for name, suffix in SUFFIXES.items() if suffix == PurePath(out).suffix), form)
    if meant != form:
        raise InvalidInputError(f"--out {out} is named as {meant}, and {form} is made without --format: give it")


def _step(session: Session, place: str, word: str | None, step: int | None) -> int | None:
    """The step that a ref means; an export reads the newest checkpoint of a step."""
    if word is None or step is not None:
        if word is not None:
            raise InvalidInputError("REF and --step: give one of them")
        return step
    named = ref(word)
    if isinstance(named, int):
        return named
    catalog = Catalog(place, storage_options=session.options(place))
    info = catalog.find(named)
    newest = catalog.find(info.step)
    if newest.id != info.id:
        raise InvalidInputError(
            f"{word!r} is checkpoint {info.id}, and {newest.id} is a newer one of the same step, which is what an "
            f"export of step {info.step} reads; fork the run at {info.id}, and export from the fork"
        )
    return info.step


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


def _import(
    session: Session,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder or url of RLlib's own checkpoint.")],
    url: Run = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Needed: such checkpoints are made of pickles.")
    ] = False,
    trust: Annotated[
        Trust, typer.Option(help="restricted: runs no code of them; full: as Ray does, only what you trust.")
    ] = "restricted",
    allow_import: Annotated[
        list[str] | None, typer.Option(metavar="PACKAGE", help="Of your own classes that they name; may be repeated.")
    ] = None,
    policy_id: Annotated[str, typer.Option(metavar="ID", help="Of a single module or policy.")] = "default_policy",
    step: Annotated[int | None, typer.Option(metavar="N", help="Of the checkpoint; its training iteration.")] = None,
) -> None:
    """Import one of RLlib's own checkpoints (Algorithm, RLModule, old API stack) as a checkpoint of a run."""
    place, rest = run_and_rest([url])
    if rest:
        raise InvalidInputError(f"{rest[0]!r} is too much (the run is {place})")
    from rl_ckpt.rllib.native import import_native

    done = import_native(
        source,
        place,
        allow_pickle=allow_pickle,
        trust=trust,
        allow_imports=allow_import or (),
        policy_id=policy_id,
        step=step,
        storage_options=session.options(place),
    )
    for notice in done.notices:
        session.out.warn(notice)
    for name, why in done.missing.items():
        session.out.warn(f"setting {name} was left out: {why}")
    info = done.checkpoint
    if session.out.as_json:
        about = {"kind": done.kind, "version": done.version, "ray": done.ray, "policies": done.policies}
        session.out.json({"url": place, "checkpoint": document(info), "missing": done.missing, **about})
        return
    what = f"{done.kind} of RLlib's layout {done.version}, policies {', '.join(done.policies) or 'none'}"
    session.out.line(f"checkpoint {info.id} of step {info.step} in {place}: {what}, {size(info.bytes)}")
