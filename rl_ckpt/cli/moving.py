"""`pull`, `push` and `watch`: checkpoints to other places."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rl_ckpt.catalog import Catalog
from rl_ckpt.cli.cluster import Address, connected
from rl_ckpt.cli.command import Session, command
from rl_ckpt.cli.listing import Ref, Run
from rl_ckpt.cli.place import ref, run_and_refs
from rl_ckpt.cli.progress import Meter
from rl_ckpt.cli.text import count, duration, size
from rl_ckpt.errors import InvalidInputError, SaveTimeoutError
from rl_ckpt.plan.retention import LatestN

if TYPE_CHECKING:
    from rl_ckpt.info import Progress, PullReport

_PANEL = "Move"
_LOOK_S = 0.5
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}

_Source = Annotated[str, typer.Argument(metavar="SRC", help="The run: a folder or any fsspec url.", show_default=False)]
_Target = Annotated[
    str, typer.Argument(metavar="DST", help="Its mirror; made where there is none.", show_default=False)
]
_At = Annotated[str, typer.Option(metavar="REF", help="Step, id, tag, 'latest', or 'all'.")]
_Streams = Annotated[int | None, typer.Option(min=1, metavar="N", help="Reads at a time, of each node.")]
_Limit = Annotated[str | None, typer.Option(metavar="RATE", help="Most bytes a second, such as 50MB or 1GiB.")]


def add(app: typer.Typer) -> None:
    """Adds these commands."""
    kept = "what arrived is kept, nothing of it is a checkpoint yet; the same command goes on from there"
    settings: dict[str, Any] = {"two_places": True, "interrupted": kept, "rich_help_panel": _PANEL}
    command(app, "pull", **settings)(_pull)
    command(app, "push", **settings)(_push)
    command(app, "watch", **settings)(_watch)
    settings = {"interrupted": "what is on its way goes on in the cluster", "rich_help_panel": _PANEL}
    command(app, "prefetch", **settings)(_prefetch)


def _pull(
    session: Session,
    src: _Source,
    dst: _Target,
    at: _At = "latest",
    streams: _Streams = None,
    limit: _Limit = None,
    address: Address = None,
) -> None:
    """Bring checkpoints of a run to another place; only what is missing there travels.

    Every chunk is verified on its way, and a checkpoint is there wholly or not at all. With --address the nodes of that
    cluster share the work.
    """
    _transfer(session, "pull", src, dst, at, streams, limit, address)


def _push(
    session: Session,
    src: _Source,
    dst: _Target,
    at: _At = "latest",
    streams: _Streams = None,
    limit: _Limit = None,
    address: Address = None,
) -> None:
    """Bring checkpoints of a run from here to another place: the same as `pull SRC DST`."""
    _transfer(session, "push", src, dst, at, streams, limit, address)


def _transfer(
    session: Session, what: str, src: str, dst: str, at: str, streams: int | None, limit: str | None,
    address: str | None,
) -> None:  # fmt: skip
    from rl_ckpt.transfer import pull

    with connected(address), Meter(session.out, what) as meter:
        report = pull(
            src,
            dst,
            at=ref(at),
            storage_options=session.options(src),
            dst_storage_options=session.to_options(dst),
            streams=streams,
            max_bytes_per_s=_rate(limit),
            progress=_teller(meter),
        )
    for notice in report.notices:
        session.out.warn(notice)
    if session.out.as_json:
        session.out.json({"report": report})
        return
    for line in _lines(report):
        session.out.line(line)


def _teller(meter: Meter) -> Any:
    def tell(now: Progress) -> None:
        note = f"{now.phase} {now.checkpoint}"
        meter.update(now.bytes, now.bytes_total or None, note, now.bytes_per_s, now.seconds_left)

    return tell


def _lines(report: PullReport) -> Sequence[str]:
    brought = ", ".join(report.checkpoints) or "nothing new"
    there = f"; there already: {', '.join(report.already)}" if report.already else ""
    rate = f", {size(report.bytes_moved / report.seconds)}/s" if report.bytes_moved and report.seconds else ""
    lines = [
        f"{report.destination}: {brought}{there}",
        f"{count(report.files, 'file')} travelled, {size(report.bytes_moved)} in {duration(report.seconds)}{rate}",
    ]
    if report.files_kept or report.bytes_kept:
        lines.append(f"{count(report.files_kept, 'file')} there already, {size(report.bytes_kept)} with parts of files")
    lines += [f"node {node}: {size(moved)}" for node, moved in report.bytes_by_node.items()]
    if not report.pinned and report.checkpoints:
        lines.append("the source could not be held against its sweep, as it can't be written to")
    return lines


def _watch(
    session: Session,
    src: _Source,
    dst: _Target,
    every_s: Annotated[float, typer.Option("--every", min=0.1, metavar="SECONDS", help="Between two looks.")] = 10.0,
    latest: Annotated[int | None, typer.Option(metavar="N", help="Keep the newest N at DST; all.")] = None,
    times: Annotated[int | None, typer.Option(min=1, metavar="N", help="End after N checkpoints; never.")] = None,
    streams: _Streams = None,
    limit: _Limit = None,
    address: Address = None,
) -> None:
    """Follow a run: bring every new checkpoint as it is committed. Ends with Ctrl-C. --json: a document a line."""
    from rl_ckpt.transfer import watch

    limit_bytes = _rate(limit)
    session.out.note(f"watching {src}, every {duration(every_s)}; Ctrl-C ends it")
    with connected(address):
        reports = watch(
            src,
            dst,
            poll_s=every_s,
            keep=() if latest is None else [LatestN(latest)],
            storage_options=session.options(src),
            dst_storage_options=session.to_options(dst),
            streams=streams,
            max_bytes_per_s=limit_bytes,
        )
        for seen, report in enumerate(reports, 1):
            for notice in report.notices:
                session.out.warn(notice)
            if session.out.as_json:
                session.out.json_line({"report": report})
            else:
                session.out.line("  ".join(_lines(report)))
                session.out.flush()
            if seen == times:
                return


def _prefetch(
    session: Session,
    url: Run = None,
    which: Ref = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Most bytes on a node, such as 20GiB.")] = None,
    address: Address = "auto",
) -> None:
    """Bring a checkpoint into the memory of a cluster's nodes: a restore that follows reads nothing from the store."""
    place, (word,) = run_and_refs([url, which], ["REF"], optional=1)
    from rl_ckpt.prefetching import prefetch

    options = session.options(place)
    at: str | int = "latest"
    if word is not None and word != at:
        at = Catalog(place, storage_options=options).find(ref(word)).id
    memory_bytes = None if memory is None else int(_bytes(memory, "--memory"))
    with connected(address), Meter(session.out, "prefetch") as meter:
        under_way = prefetch(place, at=at, storage_options=options, memory_bytes=memory_bytes)
        while not under_way.done():
            with contextlib.suppress(SaveTimeoutError):  # it goes on
                under_way.result(_LOOK_S)
            now = under_way.progress()
            if now is not None:
                meter.update(now.bytes_in_memory, now.bytes or None, now.checkpoint)
        report = under_way.result()
    for notice in report.notices:
        session.out.warn(notice)
    for name, why in {**report.fell_back, **report.damaged}.items():
        session.out.warn(f"{name}: {why}")
    if session.out.as_json:
        session.out.json({"url": place, "report": report})
        return
    left = f"; {size(report.bytes_left)} had no room and stay in the store" if report.bytes_left else ""
    session.out.line(
        f"step {report.step} ({report.id}): {size(report.bytes - report.bytes_left)} in the memory of "
        f"{count(len(report.nodes), 'node')}, {size(report.bytes_fetched)} read in {duration(report.seconds)}{left}"
    )
    for node, held in report.nodes.items():
        session.out.line(f"node {node}: {size(held)}")


def _rate(text: str | None) -> float | None:
    return None if text is None else _bytes(text.strip().removesuffix("/s"), "--limit")


def _bytes(text: str, option: str) -> float:
    """A number with k, M, G or T, times 1000, or with Ki, Mi, Gi or Ti, times 1024."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if found is None or not float(found[1]):
        raise InvalidInputError(f"{option} {text!r} must be a number of bytes, such as 800k, 50MB or 1GiB")
    unit: int = (1024 if found[3] else 1000) ** _POWERS[found[2]]
    return float(found[1]) * unit
