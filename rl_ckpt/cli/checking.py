"""`verify` and `doctor`: whether it is good, and whether it would work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from rl_ckpt.catalog import Catalog
from rl_ckpt.cli.command import FAILED, Session, command
from rl_ckpt.cli.doctor import Finding, look_at_machine, look_at_store
from rl_ckpt.cli.listing import Ref, Run
from rl_ckpt.cli.place import ref, run_and_refs, run_and_rest
from rl_ckpt.cli.progress import Meter
from rl_ckpt.cli.text import count, duration, short, size, spoken
from rl_ckpt.errors import InvalidInputError
from rl_ckpt.info import Damage, VerifyReport

_STATES = {"good": "ok", "repaired": "ok", "damaged": "fail"}
_WIDTH = 18


def add(app: typer.Typer) -> None:
    """Adds these commands."""
    kept = "What was repaired until then stays repaired, nothing else was changed; the same command begins anew"
    command(app, "verify", rich_help_panel="Look", interrupted=kept)(_verify)
    command(app, "doctor", rich_help_panel="Look", interrupted="A sweep removes what the checks left")(_doctor)


def _verify(
    session: Session,
    url: Run = None,
    which: Ref = None,
    repair: Annotated[bool, typer.Option("--repair", help="Write good bytes back where there are any.")] = False,
) -> None:
    """Read every byte of one checkpoint, or of all, and compare it with what was committed. Exit code 1: damaged."""
    place, (word,) = run_and_refs([url, which], ["REF"], optional=1)
    catalog = Catalog(place, storage_options=session.options(place))
    with Meter(session.out, "verify") as meter:
        report = catalog.verify(None if word is None else ref(word), repair=repair, progress=meter.update)
    if session.out.as_json:
        session.out.json({"url": place, "ok": report.ok, "report": report})
    else:
        _tell(session, report)
    if not report.ok:
        raise typer.Exit(FAILED)


def _tell(session: Session, report: VerifyReport) -> None:
    session.out.states([(_STATES[state], name, state, "") for name, state in report.checkpoints.items()])
    for item in report.damage:
        session.out.line()
        session.out.fields(_damage(item))
    session.out.line()
    looked = f"{count(report.chunks, 'chunk')} in {count(report.files, 'file')}, {size(report.bytes)}"
    verdict = "all good" if not report.damage else "all good now" if report.ok else "DAMAGED"
    session.out.line(f"{verdict}: {looked} in {duration(report.seconds)}", "green" if report.ok else "bold red")


def _damage(item: Damage) -> list[tuple[str, object]]:
    where = "" if item.offset is None else f", {item.bytes} bytes at {item.offset}"
    pairs: list[tuple[str, object]] = [("file", f"{item.file}{where}"), ("found", item.found)]
    pairs += [("expected", item.expected)] if item.expected else []
    pairs += [("leaves", short(", ".join(item.paths), 400))] if item.paths else []
    pairs += [("needed by", short(", ".join(item.checkpoints), 400))] if item.checkpoints else []
    pairs += [("repaired from", item.repaired_from)] if item.repaired_from is not None else []
    return pairs + ([("what to do", spoken(item.advice))] if item.advice else [])


def _doctor(
    session: Session,
    url: Run = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Write nothing to the store.")] = False,
) -> None:
    """Check this machine, and the store of a run (there need not be one yet): each line says what to do.

    Writes a few small objects below probe/ of the run's url, and deletes them. Exit code 1: something fails.
    """
    try:
        place: str | None = run_and_rest([url])[0]
    except InvalidInputError:
        place = None  # this machine alone
    findings = list(_shown(session, look_at_machine()))
    if place is not None:
        findings += _shown(session, look_at_store(place, session.options(place), read_only))
    bad = sum(one.state == "fail" for one in findings)
    warned = sum(one.state == "warn" for one in findings)
    if session.out.as_json:
        session.out.json({"url": place, "ok": not bad, "findings": findings})
    else:
        session.out.line()
        session.out.line(
            f"{count(bad, 'failure')}, {count(warned, 'warning')}"
            + ("" if place is not None else "; no store was looked at: give the url of a run, also of a new one"),
            "bold red" if bad else "green",
        )
    if bad:
        raise typer.Exit(FAILED)


def _shown(session: Session, findings: Iterator[Finding]) -> Iterator[Finding]:
    """Shows each as it comes: some take seconds."""
    for one in findings:
        if not session.out.as_json:
            session.out.states([(one.state, one.name, one.found, one.advice)], _WIDTH)
        yield one
