"""Tables in the terminal: one for each question, the summary at the end, and two runs side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.questions import QUESTIONS
from benchmarks.results import LIMIT, Results, Row, Series, Verdict, shown

SUMMARY = ("question", "case", "us", "best alternative", "limit", "ratio", "quartiles", "goal", "met", "reason if not")


def machine(found: Mapping[str, str], console: Console) -> None:
    """Hardware and versions."""
    console.print(", ".join(f"{name} {value}" for name, value in found.items()), highlight=False)


def question(name: str, rows: Sequence[Row], console: Console) -> None:
    """All ways of one question: medians with quartiles."""
    for header, lines in tables(rows):
        table = Table(title=f"{QUESTIONS[name].title} (limit: {QUESTIONS[name].limit})")
        for column in header:
            table.add_column(column)
        for line in lines:
            table.add_row(*line)
        console.print(table)


def tables(rows: Sequence[Row]) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Header and lines: a line for each way where there are alternatives, a line for each case where there are none."""
    plain = [row for row in rows if not (row.alternatives or row.skipped)]
    if plain:
        yield ["case", "ours", "limit"], [[r.case, spread(r.ours, r.unit), spread(r.limit, r.unit)] for r in plain]
    rest = [row for row in rows if row.alternatives or row.skipped]
    if rest:
        names = dict.fromkeys(name for row in rest for name in (*(a.name for a in row.alternatives), *row.skipped))
        notes = {series.name: series.note for row in rest for series in row.alternatives}
        lines = [["ours", "", *(spread(row.ours, row.unit) for row in rest)]]
        lines.append(["limit", "", *(spread(row.limit, row.unit) for row in rest)])
        for name in names:
            cells = [row.skipped[name] if name in row.skipped else spread(row.other(name), row.unit) for row in rest]
            lines.append([name, notes.get(name, ""), *cells])
        yield ["way", "note", *(row.case for row in rest)], lines


def spread(series: Series | None, unit: str) -> str:
    """Median and quartiles."""
    if series is None:
        return "–"
    low, high = series.quartiles()
    return f"{shown(series.median, unit)} ({shown(low, unit)} … {shown(high, unit)})"


def summary(results: Results) -> list[list[str]]:
    """The one table at the end: a line for each goal."""
    lines = []
    for row in results.rows:
        best = row.best_alternative()
        for verdict in row.verdicts():
            limit = _limit(row)
            alternative = f"{shown(best.median, row.unit)} ({best.name})" if best else "–"
            lines.append(
                [
                    QUESTIONS[row.question].title,
                    row.case,
                    shown(row.ours.median, row.unit),
                    alternative,
                    limit,
                    _ratio(verdict),
                    _quartiles(verdict),
                    verdict.goal.text(row.unit),
                    {True: "yes", False: "NO", None: "?"}[verdict.met],
                    _reason(row, verdict),
                ]
            )
    lines += [
        [QUESTIONS[failed.question].title, *["–"] * 7, "FAILED", failed.why.splitlines()[0]]
        for failed in results.failed
    ]
    return lines


def _limit(row: Row) -> str:
    if row.limit is None:
        return "–"
    return shown(row.limit.median, row.unit) + (f" ({row.limit.note})" if row.limit.note else "")


def _ratio(verdict: Verdict) -> str:
    if verdict.ratio is None:
        return "–"
    against = "" if verdict.goal.against == LIMIT else f" ({verdict.goal.against})"
    return f"{verdict.ratio:.2f}{against}"


def _quartiles(verdict: Verdict) -> str:
    return "–" if verdict.spread is None else f"{verdict.spread[0]:.2f} … {verdict.spread[1]:.2f}"


def _reason(row: Row, verdict: Verdict) -> str:
    if verdict.met is None:
        return f"{verdict.goal.against}: {row.skipped.get(verdict.goal.against, 'not measured')}"
    return "" if verdict.met else QUESTIONS[row.question].reason(row.case, verdict.goal.against)


def run(results: Results) -> None:
    """The summary."""
    console = Console(width=None if os.isatty(1) else 200)
    table = Table(title=f"All questions ({results.seconds / 60:.1f} minutes)")
    for column in SUMMARY:
        table.add_column(column)
    for line in summary(results):
        table.add_row(*line)
    console.print(table)


def comparison(a: Results, b: Results) -> None:
    """Each goal's ratio in two runs, and how ours changed."""
    console = Console(width=None if os.isatty(1) else 200)
    machine(a.machine, console)
    machine(b.machine, console)
    table = Table(title=f"A: {a.made}; B: {b.made}")
    for column in ("question", "case", "ours A", "ours B", "B / A", "ratio A", "ratio B", "goal", "met A", "met B"):
        table.add_column(column)
    for line in _compared(a, b):
        table.add_row(*line)
    console.print(table)


def _compared(a: Results, b: Results) -> Iterator[list[str]]:
    others = {(row.question, row.case): row for row in b.rows}
    for row in a.rows:
        other = others.get((row.question, row.case))
        if other is None:
            continue
        change = f"{other.ours.median / row.ours.median:.2f}" if row.ours.median else "–"
        # By goal, not by place: a run of another version may hold a row against other goals.
        theirs = {verdict.goal: verdict for verdict in other.verdicts()}
        for mine in row.verdicts():
            its = theirs.get(mine.goal)
            words = {True: "yes", False: "NO", None: "?"}
            yield [
                row.question,
                row.case,
                shown(row.ours.median, row.unit),
                shown(other.ours.median, other.unit),
                change,
                _ratio(mine),
                _ratio(its) if its else "–",
                mine.goal.text(row.unit),
                words[mine.met],
                words[its.met] if its else "–",
            ]
