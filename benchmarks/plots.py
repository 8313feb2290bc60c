"""Pictures of a run as small SVG files: one for each question, medians as bars, quartiles as lines."""

from __future__ import annotations

from collections.abc import Sequence
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

    ways = [[row.ours, *([row.limit] if row.limit else []), *row.alternatives] for row in rows]
    heights = [len(each) * _BAR_IN + 0.45 for each in ways]
    figure = Figure(figsize=(_WIDTH_IN, sum(heights) + 0.6), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for each, row, series in zip(axes, rows, ways, strict=True):
        _bars(each, row, series)
    figure.savefig(path, metadata={"Date": None})


def _bars(axes: Axes, row: Row, ways: Sequence[Series]) -> None:
    scale, unit = (1e3, "ms") if row.unit == "s" else (1e-6, "MB")
    medians = [way.median * scale for way in ways]
    errors = [
        [median - way.quartiles()[0] * scale for way, median in zip(ways, medians, strict=True)],
        [way.quartiles()[1] * scale - median for way, median in zip(ways, medians, strict=True)],
    ]
    names = [way.name for way in ways]
    colours = [_COLOURS.get(name, _OTHER) for name in names]
    places = range(len(ways))
    axes.barh(places, medians, xerr=errors, color=colours, height=0.7, error_kw={"elinewidth": 0.8})
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_title(f"{row.case} [{unit}]", loc="left", fontsize=8)
