"""`tag`, `untag`, `note`, `rm` and `sweep`: which checkpoints stay."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from rl_ckpt.catalog import Catalog
from rl_ckpt.cli.command import Session, command
from rl_ckpt.cli.listing import Ref, Run, document
from rl_ckpt.cli.output import Column
from rl_ckpt.cli.place import only_run, ref, run_and_refs, run_and_rest
from rl_ckpt.cli.text import count, size
from rl_ckpt.errors import InvalidInputError
from rl_ckpt.info import CheckpointInfo, SweepReport
from rl_ckpt.options import Options
from rl_ckpt.plan.retention import BestN, EveryNSteps, KeepRule, LatestN, NewerThan, OnePer

_PANEL = "Keep and remove"
_HOUR_S, _DAY_S = 3600.0, 86400.0
_UNITS = {"": 1.0, "s": 1.0, "min": 60.0, "h": _HOUR_S, "d": _DAY_S, "w": 7 * _DAY_S}
_VERDICTS = (Column("STEP", right=True), Column("ID", whole=True), Column("VERDICT", style="bold"), Column("WHY"))

_Grace = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="How long files stay for readers that are at them, such as 90s or 2h; 10min."),
]


def add(app: typer.Typer) -> None:
    """Adds these commands."""
    command(app, "tag", rich_help_panel=_PANEL)(_tag)
    command(app, "untag", rich_help_panel=_PANEL)(_untag)
    command(app, "note", rich_help_panel=_PANEL)(_note)
    rest = "what was not removed yet is whole, or goes with the next sweep"
    command(app, "rm", rich_help_panel=_PANEL, interrupted=rest)(_rm)
    command(app, "sweep", rich_help_panel=_PANEL, interrupted=rest)(_sweep)


def _tag(
    session: Session,
    url: Run = None,
    which: Ref = None,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The tag.", show_default=False)] = None,
) -> None:
    """Give a checkpoint a tag: it is never swept from then on, and found by it."""
    place, words = run_and_refs([url, which, name], ["REF", "the tag's NAME"])
    catalog = Catalog(place, storage_options=session.options(place))
    _tell(session, place, catalog.tag(ref(str(words[0])), str(words[1])))


def _untag(
    session: Session,
    url: Run = None,
    which: Ref = None,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The tag.", show_default=False)] = None,
) -> None:
    """Take a tag off a checkpoint; without any, the retention rules decide on it again."""
    place, words = run_and_refs([url, which, name], ["REF", "the tag's NAME"])
    catalog = Catalog(place, storage_options=session.options(place))
    _tell(session, place, catalog.untag(ref(str(words[0])), str(words[1])))


def _note(
    session: Session,
    url: Run = None,
    which: Ref = None,
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="In place of the one before; '' takes it away.")
    ] = None,
) -> None:
    """Write a note on a checkpoint."""
    place, words = run_and_refs([url, which, text], ["REF", "the TEXT"])
    catalog = Catalog(place, storage_options=session.options(place))
    _tell(session, place, catalog.note(ref(str(words[0])), str(words[1])))


def _tell(session: Session, place: str, info: CheckpointInfo) -> None:
    if session.out.as_json:
        session.out.json({"url": place, "checkpoint": document(info)})
        return
    tags = f"tags {', '.join(info.tags)}" if info.tags else "no tags"
    session.out.line(f"checkpoint {info.id} of step {info.step}: {tags}{f'; note: {info.note}' if info.note else ''}")


def _rm(
    session: Session,
    url: Run = None,
    refs: Annotated[
        list[str] | None, typer.Argument(metavar="REF", help="Which: steps, ids or tags.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Tagged ones too.")] = False,
    grace: _Grace = None,
) -> None:
    """Remove checkpoints: never the newest, nor what a reader or a fork holds.

    Where a job that is alive owns the run, it is asked to do it with its next save.
    """
    place, words = run_and_rest([url, *(refs or ())])
    if not words:
        raise InvalidInputError(f"REF is missing: which checkpoints of {place} are to be removed?")
    catalog = Catalog(place, storage_options=session.options(place))
    _report(session, place, catalog.remove([ref(word) for word in words], force=force, grace_s=_grace_s(grace)))


def _sweep(
    session: Session,
    url: Run = None,
    latest: Annotated[int | None, typer.Option(metavar="N", help="Keep the newest N.")] = None,
    every: Annotated[int | None, typer.Option(metavar="N", help="Keep those whose step N divides.")] = None,
    best: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC[:max|min][:N]", help="Keep the N with the best value; may be repeated."),
    ] = None,
    newer: Annotated[str | None, typer.Option(metavar="TIME", help="Keep what is newer, such as 12h or 7d.")] = None,
    hourly: Annotated[int | None, typer.Option(metavar="N", help="Keep one for each of the last N hours.")] = None,
    daily: Annotated[int | None, typer.Option(metavar="N", help="Keep one for each of the last N days.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only say what would go, and why.")] = False,
    grace: _Grace = None,
) -> None:
    """Delete the checkpoints that none of the given rules keeps, and files that no checkpoint names.

    Without rules all checkpoints stay, and only leftovers go. The newest, tagged ones and what somebody reads always
    stay. Files go when the grace time is over, so by a later sweep.
    """
    place = only_run(url)
    rules = _rules(latest, every, best, newer, hourly, daily)
    catalog = Catalog(place, storage_options=session.options(place))
    _report(session, place, catalog.sweep(rules, dry_run=dry_run, grace_s=_grace_s(grace)))


def _rules(
    latest: int | None, every: int | None, best: list[str] | None, newer: str | None, hourly: int | None,
    daily: int | None,
) -> list[KeepRule]:  # fmt: skip
    rules: list[KeepRule] = []
    if latest is not None:
        rules.append(LatestN(latest))
    if every is not None:
        rules.append(EveryNSteps(every))
    rules += [_best(text) for text in best or ()]
    if newer is not None:
        rules.append(NewerThan(seconds(newer, "--newer")))
    if hourly is not None:
        rules.append(OnePer(_HOUR_S, hourly))
    if daily is not None:
        rules.append(OnePer(_DAY_S, daily))
    return rules


def _best(text: str) -> BestN:
    """`METRIC[:max|min][:N]`, read from the right, as a metric's name may hold a colon."""
    found = re.fullmatch(r"(?P<metric>.+?)(:(?P<mode>max|min))?(:(?P<n>\d+))?", text, re.DOTALL)
    if found is None:
        raise InvalidInputError(f"--best {text!r} must be METRIC, METRIC:min or METRIC:max:3, say")
    return BestN(found["metric"], found["mode"] or "max", int(found["n"] or 1))


def seconds(text: str, option: str) -> float:
    """A length of time, such as 90, 90s, 10min, 2h, 7d or 4w.

    Raises:
        InvalidInputError: It is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip())
    if found is None or found[2] not in _UNITS:
        raise InvalidInputError(f"{option} {text!r} must be a length of time such as 90s, 10min, 2h, 7d or 4w")
    return float(found[1]) * _UNITS[found[2]]


def _grace_s(text: str | None) -> float:
    return Options.grace_s if text is None else seconds(text, "--grace")


def _report(session: Session, place: str, report: SweepReport) -> None:
    if session.out.as_json:
        session.out.json({"url": place, "report": report})
        return
    out, gone = session.out, set(report.deleted)
    stays = {**report.pinned, **report.requested}
    rows = [
        (v.step, v.id, "keep" if v.keep or v.id not in gone else "go", stays.get(v.id, v.why)) for v in report.verdicts
    ]
    if rows:
        out.table(_VERDICTS, rows)
        out.line()
    would = "would be " if report.dry_run else ""
    out.line(f"{count(len(report.deleted), 'checkpoint')} {would}removed")
    if report.files or report.partial_uploads:
        uploads = f", {count(report.partial_uploads, 'unfinished upload')}" if report.partial_uploads else ""
        out.line(f"{count(report.files, 'file')} {would}deleted, {size(report.bytes)}{uploads}")
    if report.waiting_files:
        waiting = f"{count(report.waiting_files, 'file')}, {size(report.waiting_bytes)}"
        out.line(f"{waiting}: deleted by a later sweep, when the grace time is over")
    for checkpoint, who in report.requested.items():
        out.line(f"{checkpoint}: {who}")
    if report.put_back:
        out.line(f"put back, as they were tagged meanwhile: {', '.join(report.put_back)}")
    for notice in report.notices:
        out.warn(notice)
