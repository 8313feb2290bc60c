"""`fork` and `diff`: runs that begin with a checkpoint of another, and what differs between two checkpoints."""

from __future__ import annotations

from typing import Annotated

import typer

from rl_ckpt.cli.command import FAILED, Session, command
from rl_ckpt.cli.listing import REF_HELP, Run, document
from rl_ckpt.cli.place import ref, run_and_refs
from rl_ckpt.cli.text import count, duration, short, size
from rl_ckpt.info import ArrayChange, Diff

_PANEL = "Compare and branch"


def add(app: typer.Typer) -> None:
    """Adds these commands."""
    command(app, "diff", rich_help_panel=_PANEL, two_places=True)(_diff)
    again = "the new run is not there yet, or whole; the same command goes on"
    command(app, "fork", rich_help_panel=_PANEL, two_places=True, interrupted=again)(_fork)


def _diff(
    session: Session,
    url: Run = None,
    a: Annotated[str | None, typer.Argument(metavar="A", help="The one before; the parent of B.")] = None,
    b: Annotated[str | None, typer.Argument(metavar="B", help="The one after; the newest.")] = None,
    other: Annotated[str | None, typer.Option(metavar="URL", help="Run of B, where it is another one.")] = None,
    select: Annotated[
        list[str] | None, typer.Option("--select", "-s", metavar="GLOB", help="Only these paths; may be repeated.")
    ] = None,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="End with 1 where anything differs.")] = False,
) -> None:
    """Compare two checkpoints: paths added (+), removed (-) and changed (~), and by how much.

    Only chunks that differ are read.
    """
    from rl_ckpt.lineage import diff

    place, (before, after) = run_and_refs([url, a, b], ["A", "B"], optional=2)
    found = diff(
        place,
        other,
        a=None if before is None else ref(before),
        b=None if after is None else ref(after),
        select=select or None,
        storage_options=session.options(place),
        b_storage_options=None if other is None else session.to_options(other),
    )
    if session.out.as_json:
        parts = {name: getattr(found, name) for name in ("added", "removed", "arrays", "leaves", "unchanged")}
        ends = {"a": document(found.a), "b": document(found.b)}
        session.out.json({**ends, "same": found.same, **parts, "bytes_read": found.bytes_read})
    else:
        for line, style in _lines(found):
            session.out.line(line, style)
    if exit_code and not found.same:
        raise typer.Exit(FAILED)


def _lines(found: Diff) -> list[tuple[str, str]]:
    lines = [(f"- {path}{_ranks(ranks)}", "red") for path, ranks in found.removed.items()]
    lines += [(f"+ {path}{_ranks(ranks)}", "green") for path, ranks in found.added.items()]
    for leaf in found.leaves:
        lines.append((f"~ {leaf.path}{_ranks(leaf.ranks)}: {short(repr(leaf.before))} → {short(repr(leaf.after))}", ""))
    lines += [(f"~ {one.path}{_ranks(one.ranks)}: {_array(one)}", "") for one in found.arrays]
    same = f"{count(found.unchanged, 'leaf', 'leaves')} the same"
    read = f"{size(found.bytes_read)} read in {duration(found.seconds)}"
    return [*lines, (f"{found.a.id} → {found.b.id}: {same}, {read}", "dim")]


def _array(one: ArrayChange) -> str:
    text = one.after if one.before == one.after else f"{one.before} → {one.after}"
    if one.share is not None:
        text += f", {one.share:.2%} of {count(one.elements, 'element')}"
    if one.norm is not None:
        text += f", norm {one.norm:.4g}, at most {one.max_abs:.4g}"
    return f"{text}, {one.not_finite} not finite" if one.not_finite else text


def _ranks(ranks: tuple[int, ...] | None) -> str:
    return "" if ranks is None else f" (ranks {', '.join(map(str, ranks))})"


def _fork(
    session: Session,
    src: Annotated[str, typer.Argument(metavar="SRC", help="The run that is forked.", show_default=False)],
    dst: Annotated[str, typer.Argument(metavar="DST", help="Url of the new run.", show_default=False)],
    at: Annotated[str, typer.Option(metavar="REF", help=REF_HELP)] = "latest",
    verify: Annotated[bool, typer.Option("--verify", help="Read and compare every chunk first.")] = False,
) -> None:
    """Begin a new run with a checkpoint of another, without copying its bytes: the source keeps them for it."""
    from rl_ckpt.lineage import fork

    info = fork(
        src,
        dst,
        at=ref(at),
        storage_options=session.to_options(dst),
        source_storage_options=session.options(src),
        verify=verify,
    )
    if session.out.as_json:
        session.out.json({"url": dst, "source": src, "checkpoint": document(info)})
    else:
        session.out.line(f"{dst}: begins with {info.id} of step {info.step}, {size(info.bytes)}, none of them copied")
