"""Growth: the simulation at many sizes, a program of its own for each; a table, the fitted exponents, a plot."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.scale.simulate import PLANNED, Figures, simulate
from benchmarks.scale.synthetic import Job

# The long ones, and those of much memory, last: `--most` leaves them out.
POINTS = [
    *(Job("mixed", 1000, chunks) for chunks in (1000, 10_000, 100_000)),
    *(Job("sharded", 1000, chunks) for chunks in (1000, 10_000, 100_000)),
    *(Job("replicated", 1000, chunks) for chunks in (1000, 10_000, 100_000)),
    *(Job(kind, workers, 100_000) for kind in ("mixed", "sharded") for workers in (10, 100)),
    Job("sharded", 10_000, 100_000),
    Job("mixed", 10_000, 100_000),
    Job("sharded", 1000, 1_000_000),
    Job("mixed", 1000, 1_000_000),
]
_LONG_S = 10.0
GOAL = (1000, 100_000)
GOAL_S, GOAL_BYTES = 5.0, 2 * 10**9


def measure(jobs: Iterable[Job], kept: Path, tries: int = 3) -> dict[Job, Figures]:
    """The figures of each job: of the fastest of some tries, as other programs only ever add to the time.

    Args:
        jobs: What to simulate.
        kept: JSON file of figures; jobs that stand there are not simulated again.
        tries: Of jobs that take less than 10 s; the others get one.
    """
    found: dict[str, dict[str, object]] = json.loads(kept.read_text()) if kept.exists() else {}
    out: dict[Job, Figures] = {}
    for job in jobs:
        name = f"{job.kind} {job.workers} {job.chunks}"
        if name not in found:
            figures = [_one(job)]
            while len(figures) < tries and figures[0].save_s + figures[0].restore_s < _LONG_S:
                figures.append(_one(job))
            found[name] = asdict(min(figures, key=lambda f: f.save_s))
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(found, indent=1))
        out[job] = Figures(**found[name])  # type: ignore[arg-type]  # as they were written
    return out


def _one(job: Job) -> Figures:
    command = [sys.executable, "-m", "benchmarks.scale", "point", job.kind, str(job.workers), str(job.chunks)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Figures(**json.loads(done.stdout))


def point(kind: str, workers: int, chunks: int) -> None:
    """One simulation in this process; prints its figures as JSON."""
    print(json.dumps(asdict(simulate(Job(kind, workers, chunks)))))


def table(found: dict[Job, Figures]) -> str:
    """A row a job, as Markdown."""
    head = [
        "state",
        "workers",
        "chunks",
        *PLANNED,
        "save, s",
        "peak MB",
        "save again, s",
        "peak MB",
        "restore, s",
        "peak MB",
        "manifest MB",
        "in MB",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for job, f in sorted(found.items(), key=lambda item: (item[0].kind, item[0].workers, item[0].chunks)):
        cells = [job.kind, f"{job.workers:,}", f"{f.chunks:,}"]
        cells += [f"{f.seconds.get(name, 0):.2f}" for name in PLANNED]
        cells += [
            f"**{f.save_s:.2f}**",
            f"{f.save_peak_bytes / 1e6:,.0f}",
            f"**{f.again_s:.2f}**",
            f"{f.again_peak_bytes / 1e6:,.0f}",
            f"{f.restore_s:.2f}{' (mapped)' * f.mapped}",
        ]
        cells += [f"{f.restore_peak_bytes / 1e6:,.0f}", f"{f.manifest_bytes / 1e6:.1f}", f"{f.bytes_in / 1e6:,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Slope of log time over log size, by least squares: 1 is linear. n log n from 10⁴ to 10⁶ gives 1.09."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)


def series(found: dict[Job, Figures]) -> dict[str, list[tuple[float, Figures]]]:
    """Figures along one axis at a time, from the size on where fixed costs count no more: size and figures, by axis."""
    out: dict[str, list[tuple[float, Figures]]] = {}
    for kind in ("mixed", "sharded", "replicated"):
        mine = [(job, f) for job, f in found.items() if job.kind == kind]
        by_chunks = sorted((job.chunks, f) for job, f in mine if job.workers == GOAL[0] and job.chunks >= 10_000)
        by_workers = sorted((job.workers, f) for job, f in mine if job.chunks == GOAL[1] and job.workers >= 100)
        for axis, rows in (("chunks", by_chunks), ("workers", by_workers)):
            if len(rows) > 1:
                out[f"{kind}, by {axis}"] = [(float(size), f) for size, f in rows]
    return out


def exponents(found: dict[Job, Figures]) -> str:
    """The fitted exponents as a Markdown table."""
    lines = ["| grows | from | to | save | save again | restore | save, peak memory |", "|---" * 7 + "|"]
    for name, rows in series(found).items():
        save = exponent([(size, f.save_s) for size, f in rows])
        again = exponent([(size, f.again_s) for size, f in rows])
        alike = [(size, f) for size, f in rows if f.mapped == rows[0][1].mapped]
        restore = f"{exponent([(size, f.restore_s) for size, f in alike]):.2f}" if len(alike) > 1 else ""
        memory = exponent([(size, float(f.save_peak_bytes)) for size, f in rows])
        cells = [name, f"{rows[0][0]:,.0f}", f"{rows[-1][0]:,.0f}", f"{save:.2f}", f"{again:.2f}", restore]
        lines.append("| " + " | ".join([*cells, f"{memory:.2f}"]) + " |")
    return "\n".join(lines)


def goal(found: dict[Job, Figures]) -> str:
    """Whether the goal is met, a line for each kind of job."""
    lines = []
    for job, f in found.items():
        if (job.workers, job.chunks) == GOAL:
            saves = {"save": (f.save_s, f.save_peak_bytes), "save again": (f.again_s, f.again_peak_bytes)}
            met = all(seconds <= GOAL_S and peak <= GOAL_BYTES for seconds, peak in saves.values())
            texts = [f"{name} {seconds:.2f} s, {peak / 1e9:.2f} GB" for name, (seconds, peak) in saves.items()]
            lines.append(f"- {job.kind}: {'; '.join(texts)}: {'met' if met else 'not met'}")
    return "\n".join(lines)


def plot(found: dict[Job, Figures], path: Path) -> None:
    """Seconds and memory over chunks (1,000 workers) and over workers (100,000 chunks)."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for name, rows in series(found).items():
        axis = axes[0] if name.endswith("chunks") else axes[1]
        sizes = [size for size, _ in rows]
        (line,) = axis.loglog(sizes, [f.save_s for _, f in rows], marker="o", label=f"{name.split(',')[0]}: save")
        again = {"marker": ".", "linestyle": ":", "color": line.get_color()}
        axis.loglog(sizes, [f.again_s for _, f in rows], label=f"{name.split(',')[0]}: save again", **again)
        alike = [(size, f) for size, f in rows if not f.mapped]
        style = {"marker": "x", "linestyle": "--", "color": line.get_color()}
        axis.loglog(
            [s for s, _ in alike], [f.restore_s for _, f in alike], label=f"{name.split(',')[0]}: restore", **style
        )
    for axis, what in zip(axes, ("chunks, 1,000 workers", "workers, 100,000 chunks"), strict=True):
        axis.set_xlabel(what)
        axis.grid(which="major", alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("seconds of the coordinator, one core")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
