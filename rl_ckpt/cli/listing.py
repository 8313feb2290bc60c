"""`ls` and `show`: what there is."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from rl_ckpt.catalog import Catalog
from rl_ckpt.cli.command import Session, command
from rl_ckpt.cli.output import Column
from rl_ckpt.cli.place import only_run, ref, run_and_refs
from rl_ckpt.cli.state_tree import leaves_of, tree_of
from rl_ckpt.cli.text import ago, count, number, size, when
from rl_ckpt.info import CheckpointInfo
from rl_ckpt.store.listing import find_ref, infos, read

RUN_HELP = "The run: a folder or any fsspec url. $RL_CKPT_URL where it is left out."
REF_HELP = "Step, id, tag, or 'latest'."
Run = Annotated[str | None, typer.Argument(metavar="URL", help=RUN_HELP, show_default=False)]
Ref = Annotated[str | None, typer.Argument(metavar="REF", help=REF_HELP, show_default=False)]

_COLUMNS = (
    Column("STEP", right=True, style="bold", whole=True), Column("TIME", whole=True),
    Column("SIZE", right=True, whole=True), Column("NEW", right=True, whole=True),
    Column("RANKS", right=True), Column("METRICS"), Column("TAGS", style="green"), Column("NOTE"),
    Column("ID", style="dim", whole=True), Column("PARENT", style="dim"),
)  # fmt: skip


def add(app: typer.Typer) -> None:
    """Adds these commands."""
    command(app, "ls", rich_help_panel="Look")(_ls)
    command(app, "show", rich_help_panel="Look")(_show)


def _ls(
    session: Session,
    url: Run = None,
    last: Annotated[int | None, typer.Option("--last", "-n", min=1, metavar="N", help="Only the newest N.")] = None,
    tag: Annotated[str | None, typer.Option(metavar="NAME", help="Only those with this tag.")] = None,
) -> None:
    """List the checkpoints of a run, the newest last.

    NEW is what the save wrote: less than SIZE where chunks were stored already. PARENT is shown where it is not the
    checkpoint above: the run went back there and on from there.
    """
    place = only_run(url)
    found = Catalog(place, storage_options=session.options(place)).checkpoints()
    chosen = [info for info in found if tag is None or tag in info.tags][-(last or 0) :]
    if session.out.as_json:
        session.out.json({"url": place, "checkpoints": [document(info) for info in chosen]})
        return
    if not chosen:
        what = "no checkpoint yet" if not found else f"none of its {count(len(found), 'checkpoint')} has tag {tag!r}"
        session.out.line(f"{place}: {what}")
        return
    session.out.table(_COLUMNS, _rows(chosen))
    if session.out.terminal:
        newest, held = found[-1], sum(info.bytes_written for info in found)
        age = ago(newest.time, time.time())
        session.out.line(f"{count(len(found), 'checkpoint')}, {size(held)} written, the newest {age}", "dim")


def document(info: CheckpointInfo) -> dict[str, object]:
    """A checkpoint in JSON: without its ancestors, which would make lists of them grow with the square."""
    names = ("step", "id", "url", "time", "bytes", "bytes_written", "world_size", "parent", "tags", "note", "metrics")
    return {name: getattr(info, name) for name in names}


def _rows(infos: list[CheckpointInfo]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    before: str | None = infos[0].parent
    for info in infos:
        metrics = " ".join(f"{name}={number(value)}" for name, value in info.metrics.items())
        parent = "" if info.parent == before else info.parent or "none"
        rows.append(
            (
                info.step, when(info.time), size(info.bytes), size(info.bytes_written), info.world_size, metrics,
                ",".join(info.tags), info.note, info.id, parent,
            )
        )  # fmt: skip
        before = info.id
    return rows


def _show(
    session: Session,
    url: Run = None,
    which: Ref = None,
    select: Annotated[
        list[str] | None, typer.Option("--select", "-s", metavar="GLOB", help="Only these paths; may be repeated.")
    ] = None,
    depth: Annotated[int | None, typer.Option(min=1, metavar="N", help="Levels that are shown.")] = None,
) -> None:
    """Show one checkpoint: who saved it when, and its state as a tree with shapes, dtypes and bytes."""
    place, (word,) = run_and_refs([url, which], ["REF"], optional=1)
    run, log, labels = read(place, session.options(place))
    commit = find_ref(run, log, labels, ref(word or "latest"))
    info = next(one for one in infos(run, log.commits, labels) if one.id == commit.id)
    manifest = run.manifest(commit)
    found = leaves_of(manifest, select)
    if session.out.as_json:
        files = [{"name": file.name, "bytes": file.bytes} for file in manifest.files]
        about = {
            "checkpoint": document(info) | {"lineage": info.lineage},
            "writer": manifest.writer,
            "files": files,
            "leaves": found,
        }
        session.out.json({"url": place, **about})
        return
    ancestors = f"{info.parent} ({count(len(info.lineage), 'ancestor')} in all)" if info.parent else "none"
    pairs: list[tuple[str, object]] = [
        ("checkpoint", info.id), ("step", info.step), ("saved", f"{when(info.time)} by {manifest.writer}"),
        ("ranks", info.world_size), ("size", f"{size(info.bytes)}, of which {size(info.bytes_written)} were new"),
        ("files", len(manifest.files)), ("parent", ancestors),
    ]  # fmt: skip
    pairs += [("tags", ", ".join(info.tags))] if info.tags else []
    pairs += [("note", info.note)] if info.note else []
    pairs += [(f"metric {name}", number(value)) for name, value in info.metrics.items()]
    session.out.fields(pairs)
    session.out.line()
    session.out.tree(tree_of(found, "state", depth))
