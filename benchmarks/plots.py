"""Pictures of a run as small SVG files: one for each question, medians as bars, quartiles as lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.questions import QUESTIONS
from benchmarks.results import Results, Row, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"ours": "#1f6f8b", "limit": "#9aa5ad"}
_OTHER = "#d9b382"
_BAR_IN = 0.24
_WIDTH_IN = 7.5
# Text stays text, and ids don't change from run to run: small files, small differences.
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rl_ckpt",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def file_name(question: str) -> str:
    """Of a question's picture."""
    return f"bench-{question}.svg"


def write(results: Results, folder: Path) -> list[str]:
    """Draws every question that compares something.

    Returns:
        The questions that have a picture now.
    """
    import matplotlib as mpl

    mpl.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    done = []
    for question in results.questions():
        rows = [row for row in results.of(question) if row.limit or row.alternatives]
        if rows:
            with mpl.rc_context(_STYLE):
                _draw(QUESTIONS[question].title, rows, folder / file_name(question))
            done.append(question)
    return done


def _draw(title: str, rows: Sequence[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    compared = [row for row in rows if row.alternatives]
    plain = [row for row in rows if not row.alternatives]
    panels = [_ways(row) for row in compared] + ([_cases(plain)] if plain else [])
    heights = [len(panel.names) * _BAR_IN + 0.45 for panel in panels]
    figure = Figure(figsize=(_WIDTH_IN, sum(heights) + 0.6), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for each, panel in zip(axes, panels, strict=True):
        _bars(each, panel)
    figure.savefig(path, metadata={"Date": None})


@dataclass(frozen=True)
class _Panel:
    """Bars below one another."""

    title: str
    names: list[str]
    series: list[Series]
    colours: list[str]
    unit: str


def _ways(row: Row) -> _Panel:
    """All ways of one case."""
    series = [row.ours, *([row.limit] if row.limit else []), *row.alternatives]
    names = [each.name for each in series]
    return _Panel(row.case, names, series, [_COLOURS.get(name, _OTHER) for name in names], row.unit)


def _cases(rows: Sequence[Row]) -> _Panel:
    """Ours and the limit, case by case."""
    # Each case is followed by its limit.
    bars = [bar for row in rows for bar in ((row.case, row.ours), ("limit", row.limit)) if bar[1] is not None]
    names, series = [name for name, _ in bars], [each for _, each in bars if each is not None]
    colours = [_COLOURS["limit" if name == "limit" else "ours"] for name in names]
    return _Panel("ours, and the limit", names, series, colours, rows[0].unit)


def _bars(axes: Axes, panel: _Panel) -> None:
    scale, unit = (1e3, "ms") if panel.unit == "s" else (1e-6, "MB")
    medians = [way.median * scale for way in panel.series]
    errors = [
        [median - way.quartiles()[0] * scale for way, median in zip(panel.series, medians, strict=True)],
        [way.quartiles()[1] * scale - median for way, median in zip(panel.series, medians, strict=True)],
    ]
    places = range(len(medians))
    axes.barh(places, medians, xerr=errors, color=panel.colours, height=0.7, error_kw={"elinewidth": 0.8})
    axes.set_yticks(places, panel.names)
    axes.invert_yaxis()
    axes.set_title(f"{panel.title} [{unit}]", loc="left", fontsize=8)
