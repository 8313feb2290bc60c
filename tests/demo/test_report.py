"""What the demo prints and draws says what the records say."""

from __future__ import annotations

import io
import math
import struct
from pathlib import Path

import pytest
from rich.console import Console

from rl_ckpt.demo.records import Check, IterationRecord, JobConfig, JobResult, RecoveryRecord, SaveRecord
from rl_ckpt.demo.report import curve, saves_table, show, terminal_plot, write_png


@pytest.fixture
def result() -> JobResult:
    """Steps 1 to 6, a failure, steps 5 to 8 again after a restore of step 4; saves at 2, 4, 6 (lost) and 8."""
    first = [IterationRecord(step, 20.0 * step, 5, life=0) for step in range(1, 7)]
    first[0] = IterationRecord(1, math.nan, 0, life=0)
    second = [IterationRecord(step, 20.0 * step + 1, 5, life=1) for step in range(5, 9)]
    return JobResult(
        iterations=first + second,
        saves=[
            SaveRecord(2, 40.0, 0.012, 0.1, 1_234_567, 1_234_567),
            SaveRecord(4, 80.0, 0.003, 0.2, 1_234_567, 7_654),
            SaveRecord(6, 120.0, 0.003, 0.2, 0, 0, error="worker 3 is gone"),
            SaveRecord(8, 161.0, 0.003, 0.2, 1_234_567, 8_000),
        ],
        recovery=RecoveryRecord(6, 4, noticed_s=1.0, rebuilt_s=2.0, restored_s=0.25),
        checks=[Check("the step went on", True, "restored 4, then came 5")],
    )


def printed(result: JobResult, png: Path) -> str:
    console = Console(file=io.StringIO(), width=120)
    show(result, console, png)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_row_for_each_save(result: JobResult) -> None:
    table = saves_table(result.saves)
    rows = list(zip(*[column.cells for column in table.columns], strict=True))
    assert rows[0] == ("2", "1,234,567", "1,234,567", "12", "100", "40.0", "committed")
    assert rows[1][:3] == ("4", "1,234,567", "7,654")
    assert "worker 3 is gone" in str(rows[2][-1])
    assert len(rows) == len(result.saves)


def test_curve_keeps_work_that_was_done_twice_apart(result: JobResult) -> None:
    points = curve(result)
    assert points.x == [2, 3, 4, 5, 6, 7, 8, 9, 10]  # the first iteration ended no episode
    assert points.returns == [40.0, 60.0, 80.0, 100.0, 120.0, 101.0, 121.0, 141.0, 161.0]
    assert (points.save_x, points.save_returns) == ([2, 4, 10], [40.0, 80.0, 161.0])
    assert (points.failure_x, points.restored_x) == (6, 4)


def test_curve_of_a_run_without_failure(result: JobResult) -> None:
    calm = JobResult(iterations=result.iterations[:6], saves=result.saves[:2])
    points = curve(calm)
    assert (points.save_x, points.failure_x, points.restored_x) == ([2, 4], None, None)


def test_png_is_a_png_of_the_promised_size(result: JobResult, tmp_path: Path) -> None:
    path = tmp_path / "new" / "return.png"
    write_png(result, path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1000, 500)
    assert data.rstrip().endswith(b"IEND\xaeB`\x82")


def test_terminal_plot_shows_saves_and_the_failure(result: JobResult) -> None:
    drawing = terminal_plot(result, width=80, height=18)
    lines = drawing.splitlines()
    assert len(lines) == 18
    assert max(map(len, lines)) <= 80
    assert "●" in drawing
    assert "node killed" in drawing
    assert "\x1b" not in drawing


def test_everything_is_shown(result: JobResult, tmp_path: Path) -> None:
    text = printed(result, tmp_path / "return.png")
    for expected in (
        "1,234,567",
        "killed after step 6",
        "step 4 restored",
        "2 step(s)",
        "the step went on",
        "return.png",
    ):
        assert expected in text


def test_a_run_in_which_nothing_ended_is_shown_all_the_same(tmp_path: Path) -> None:
    text = printed(JobResult(iterations=[IterationRecord(1, math.nan, 0, 0)]), tmp_path / "return.png")
    assert "Checkpoints" in text


@pytest.mark.parametrize(
    ("recovery", "checks", "passed"),
    [(True, [True, True], True), (True, [True, False], False), (True, [], False), (False, [True], False)],
)
def test_a_run_passes_only_if_it_recovered_and_all_checks_hold(
    result: JobResult, recovery: bool, checks: list[bool], passed: bool
) -> None:
    found = JobResult(
        recovery=result.recovery if recovery else None, checks=[Check("something", ok, "") for ok in checks]
    )
    assert found.passed is passed


@pytest.mark.parametrize(("iterations", "save_every"), [(36, 4), (8, 4), (6, 2), (9, 3), (4, 1)])
def test_the_failure_comes_after_a_save_and_before_the_end(iterations: int, save_every: int) -> None:
    config = JobConfig(url="", iterations=iterations, save_every=save_every)
    assert save_every <= config.fail_at < iterations
    if save_every > 1:
        assert config.fail_at % save_every != 0
