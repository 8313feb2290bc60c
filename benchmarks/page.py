"""docs/benchmarks.md and its plots, made from a kept run: never edited by hand, and the page says so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import plots, show
from benchmarks.questions import QUESTIONS
from benchmarks.results import Results, Row


def write(results: Results, docs: Path) -> None:
    """Writes the page and its pictures.

    Args:
        results: A run.
        docs: The folder of the documentation; pictures go into its `img`.
    """
    pictures = plots.write(results, docs / "img")
    (docs / "benchmarks.md").write_text(text(results, pictures))


def text(results: Results, pictures: Sequence[str] = ()) -> str:
    """The page.

    Args:
        results: A run.
        pictures: Names of questions that have a picture.
    """
    parts = [_head(results), "## All questions", _table(show.SUMMARY, show.summary(results))]
    for name in results.questions():
        question = QUESTIONS[name]
        parts += [f"## {question.title}", f"Limit: {question.limit}."]
        if name in pictures:
            parts.append(f"![{question.title}](img/{plots.file_name(name)})")
        parts += _tables(results.of(name))
    return "\n\n".join(parts) + "\n"


def _head(results: Results) -> str:
    met = [verdict.met for row in results.rows for verdict in row.verdicts()]
    settings = ", ".join(f"`{name}` {value}" for name, value in results.settings.items())
    machine = results.machine
    hardware = ", ".join(machine[key] for key in ("processor", "memory", "system")) + f", {machine['cores']} cores"
    versions = ", ".join(f"{n} {v}" for n, v in machine.items() if n not in ("processor", "cores", "memory", "system"))
    return f"""\
<!-- Made by `python -m benchmarks page RUN.json` from one run's samples. Don't edit: change benchmarks/ instead. -->
# Benchmarks

This page is made by the benchmark suite (`make bench`, then `python -m benchmarks page RUN.json`) from the samples of
one run, and never edited by hand. That run: {results.made}, {results.seconds / 60:.0f} minutes. {met.count(True)} of
{len(met)} goals are met; what is not stays in the table, with the reason.

- Machine: {hardware}.
- Versions: {versions}.
- Sizes: {settings} (sizes in MiB).

How it is measured: all ways of a question run in turn in every round, on the same bytes, every other round in reverse
order; the first rounds don't count. Figures are medians with their quartiles. A ratio is of the medians of one run and
is cut, never rounded, to two digits against us; "met" is decided before that. Alternatives are used as their own
documentation says, which the modules in `benchmarks/alternatives/` cite; where one does not fsync, that is added to
its time to durable and not to its stall. Disk reads come from the page cache, and servers and clients share one
machine: take ratios, not absolutes."""


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join(_line(cells) for cells in (header, rule, *lines))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _tables(rows: Sequence[Row]) -> list[str]:
    return [_table(header, lines) for header, lines in show.tables(rows)]
