"""What a run of the demo looks like: the table of saves, the checks, and the return over the steps.

Draws records on a terminal and into a PNG; decides nothing and measures nothing. The x axis of both plots is the number
of iterations the job worked through, so that the work that the failure cost and that was done again shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import plotext
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rl_ckpt.demo.records import JobResult, SaveRecord


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of the plots; x counts the iterations worked through, whatever step they were."""

    x: list[int]
    returns: list[float]
    save_x: list[int]
    save_returns: list[float]
    failure_x: int | None
    """Last iteration before the failure."""
    restored_x: int | None
    """Where the restored checkpoint was saved."""


def curve(result: JobResult) -> Curve:
    """The points to draw.

    Args:
        result: Records of a run; a failure is where `life` goes up.

    Returns:
        Points without NaN.
    """
    drawn = [(i + 1, r) for i, r in enumerate(result.iterations) if not math.isnan(r.mean_return)]
    at = {(r.life, r.step): (x, r.mean_return) for x, r in drawn}
    durable = {save.step for save in result.saves if not save.error}
    restored = result.recovery.restored_step if result.recovery else -1
    # A step that was worked through in both lives was saved in the life that had not lost it.
    saved = [point for (life, step), point in at.items() if step in durable and (life == 1 or step <= restored)]
    if result.recovery is None:
        saved = [point for (_, step), point in at.items() if step in durable]
    before = [x for x, r in drawn if r.life == 0]
    return Curve(
        x=[x for x, _ in drawn],
        returns=[r.mean_return for _, r in drawn],
        save_x=[x for x, _ in saved],
        save_returns=[y for _, y in saved],
        failure_x=before[-1] if result.recovery and before else None,
        restored_x=at[(0, restored)][0] if (0, restored) in at else None,
    )


def saves_table(saves: Sequence[SaveRecord]) -> Table:
    """One row per save.

    Args:
        saves: In the order in which they were begun.

    Returns:
        A table of step, bytes, bytes written, stall, time to durable, return, and how it ended.
    """
    table = Table(title="Checkpoints", title_justify="left")
    for heading in ("step", "bytes", "bytes written", "stall ms", "durable ms", "return"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for save in saves:
        table.add_row(
            str(save.step),
            f"{save.bytes:,}",
            f"{save.bytes_written:,}",
            f"{save.stall_s * 1e3:.0f}",
            f"{save.durable_s * 1e3:.0f}",
            f"{save.mean_return:.1f}",
            Text(save.error, style="red") if save.error else "committed",
        )
    return table


def terminal_plot(result: JobResult, width: int, height: int) -> str:
    """The return over the iterations, in characters.

    Args:
        result: Records of a run with at least one finished episode.
        width: Columns.
        height: Lines.

    Returns:
        The drawing, without colours.
    """
    points = curve(result)
    figure = plotext.figure
    figure.clear()
    figure.plot_size(width, height)
    figure.theme("colorless")
    figure.title("mean return over iterations")
    # Lower right: the curve begins low on the left and ends high on the right.
    figure.legend(x=width - 10, y=height - 5, ha="right", va="bottom")
    line = figure.signal(points.x, points.returns)
    line.lines()
    line.label("return")
    figure.draw(line)
    if points.save_x:
        marks = figure.signal(points.save_x, points.save_returns, marker="●")
        marks.label("saved")
        figure.draw(marks)
    if points.failure_x is not None:
        figure.line(points.failure_x, orientation="vertical", label="node killed")
    return str(figure.build().string(colorless=True))


def write_png(result: JobResult, path: Path) -> None:
    """The same plot as a PNG of 1,000 by 500 pixels.

    Args:
        result: Records of a run.
        path: File to write; its folder is made where it is missing.
    """
    points = curve(result)
    figure = Figure(figsize=(10, 5), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.plot(points.x, points.returns, color="tab:blue", label="mean return")
    axes.plot(points.save_x, points.save_returns, "o", color="tab:green", label="saved")
    if points.failure_x is not None:
        axes.axvline(points.failure_x + 0.5, color="tab:red", label="node killed")
    if points.failure_x is not None and points.restored_x is not None:
        axes.axvspan(points.restored_x, points.failure_x + 0.5, color="tab:red", alpha=0.12, label="work lost")
    axes.set(xlabel="iterations worked through", ylabel="mean return of episodes", title="CartPole, PPO")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _sources(bytes_from: Mapping[str, int]) -> str:
    """Where a restore found what it needed."""
    return ", ".join(f"{source} {size:,}" for source, size in bytes_from.items() if size) or "nowhere, it needed none"


def show(result: JobResult, console: Console, png: Path) -> None:
    """Print everything there is to say about a run, and write its PNG.

    Args:
        result: Records of the run.
        console: Where to print.
        png: File of the plot.
    """
    console.print(saves_table(result.saves))
    if not all(math.isnan(r.mean_return) for r in result.iterations):
        console.print(terminal_plot(result, width=min(console.width, 80), height=18), markup=False, highlight=False)
    recovery = result.recovery
    if recovery is not None:
        console.print(
            f"A node was killed after step {recovery.failed_after}; noticed after {recovery.noticed_s:.1f} s, "
            f"new actors after another {recovery.rebuilt_s:.1f} s, step {recovery.restored_step} restored in "
            f"{recovery.restored_s:.2f} s: {recovery.failed_after - recovery.restored_step} step(s) were done again.",
            soft_wrap=True,
        )
        console.print(f"The restore took its bytes from: {_sources(recovery.bytes_from)}.", soft_wrap=True)
    for check in result.checks:
        mark = Text("ok", "green") if check.passed else Text("FAILED", "red")
        console.print(mark, f" {check.name} ({check.detail})", soft_wrap=True, markup=False, highlight=False)
    write_png(result, png)
    console.print(f"plot: {png}", soft_wrap=True)
