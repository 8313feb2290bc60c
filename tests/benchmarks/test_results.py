"""The verdicts, tables and page of the benchmarks, on figures that are made up."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import msgspec
import pytest

from benchmarks import alternatives, page, results, run, servers, show
from benchmarks.questions import QUESTIONS, Question
from benchmarks.results import LIMIT, Failed, Goal, Results, Row, Series
from tests.project.test_docs import _dead_links
from tests.s3_servers import S3Server, free_port


def row(ours: float, limit: float | None, *goals: Goal, **others: float) -> Row:
    ways = tuple(Series(name, (value,)) for name, value in others.items())
    return Row("stall", "a case", "s", Series("ours", (ours,)), Series(LIMIT, (limit,)) if limit else None, ways, goals)


def results_of(*rows: Row, failed: tuple[Failed, ...] = ()) -> Results:
    machine = {"processor": "one", "cores": "4", "memory": "24 GiB", "system": "Linux", "ray": "2.60.0"}
    return Results("2026-01-01 00:00 UTC", machine, {"workers": 4}, 60.0, rows, failed)


@pytest.mark.parametrize(
    ("ours", "limit", "goal", "ratio", "met"),
    [
        (1.2, 1.0, Goal("at most", 1.2), 1.2, True),
        (1.2001, 1.0, Goal("at most", 1.2), 1.21, False),
        (1.0, 0.8999, Goal("at least", 0.9), 0.89, False),
        (1.0, 0.9, Goal("at least", 0.9), 0.9, True),
        (0.9999, 0.9, Goal("at least", 0.9), 0.9, True),
        (2.05, 0.02, Goal("at most", 3, plus=2.0), 102.5, True),
        (2.07, 0.02, Goal("at most", 3, plus=2.0), 103.5, False),
    ],
)
def test_a_ratio_is_cut_against_us_and_met_is_decided_before(
    ours: float, limit: float, goal: Goal, ratio: float, met: bool
) -> None:
    (verdict,) = row(ours, limit, goal).verdicts()
    assert verdict.met is met
    assert verdict.ratio == pytest.approx(ratio)


def test_goals_against_alternatives_and_against_nothing() -> None:
    goals = (Goal("at least", 3, "slow"), Goal("at least", 3, "fast"), Goal("at least", 3, "gone"))
    found = row(1.0, None, *goals, Goal("at most", 0, "", plus=1.0), slow=3.0, fast=2.99)
    assert [verdict.met for verdict in found.verdicts()] == [True, False, None, True]
    assert [verdict.ratio for verdict in found.verdicts()] == [3.0, 2.99, None, None]
    best = found.best_alternative()
    assert best is not None
    assert best.name == "fast"


def test_the_median_counts_and_raw_ways_are_no_alternatives() -> None:
    ways = (Series("raw client", (0.1,)), Series("other", (5.0,)))
    found = Row("s3", "c", "s", Series("ours", (9.0, 1.0, 2.0)), Series(LIMIT, (2.0, 2.0, 2.0)), ways)
    assert found.ours.median == 2.0
    assert found.ours.quartiles() == (1.5, 5.5)
    assert found.best_alternative() == ways[1]


def test_a_run_is_kept_whole(tmp_path: Path) -> None:
    kept = results_of(row(1.0, 2.0, Goal("at least", 0.9), other=3.0), failed=(Failed("s3", "RuntimeError: died"),))
    results.keep(kept, tmp_path / "a" / "run.json")
    assert results.load(tmp_path / "a" / "run.json") == kept
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(msgspec.ValidationError):
        results.load(tmp_path / "b.json")


def test_what_failed_or_was_not_run_is_no_figure() -> None:
    missing = msgspec.structs.replace(row(1.0, 2.0, Goal("at least", 3, "RLlib")), skipped={"RLlib": "not installed"})
    lines = show.summary(results_of(missing, failed=(Failed("s3", "RuntimeError: the ceph server died\nmore"),)))
    assert lines[0][-2:] == ["?", "RLlib: not installed"]
    assert lines[1][-2:] == ["FAILED", "RuntimeError: the ceph server died"]


def test_an_unmet_goal_carries_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = (("a case", "RLlib", "wrong goal"), ("case b", "", "wrong case"), ("case", "", "the disk is slow"))
    monkeypatch.setitem(QUESTIONS, "stall", Question("Stall", "memcpy", "saving", reasons=reasons))
    unmet, met = row(9.0, 1.0, Goal("at most", 1.2)), row(1.0, 1.0, Goal("at most", 1.2))
    assert [line[-2:] for line in show.summary(results_of(unmet, met))] == [["NO", "the disk is slow"], ["yes", ""]]


def test_the_page_has_every_row_and_its_pictures(tmp_path: Path) -> None:
    compared = row(0.5, 1.0, Goal("at least", 0.9), other=3.0)
    plain = Row("cold", "another case", "s", Series("ours", (1.0, 2.0)), Series(LIMIT, (1.0, 1.0)))
    page.write(results_of(compared, plain), tmp_path)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "never edited by hand" in text
    assert "1 of\n1 goals are met" in text
    for words in ("a case", "another case", "500 ms", "3.00 s (other)", "2.00", "≥ 0.9×", "1.50 s (1.25 s … 1.75 s)"):
        assert words in text
    assert _dead_links(tmp_path / "benchmarks.md") == []
    assert {path.name for path in (tmp_path / "img").iterdir()} == {"bench-stall.svg", "bench-cold.svg"}
    first = (tmp_path / "img" / "bench-stall.svg").read_bytes()
    page.write(results_of(compared, plain), tmp_path)
    assert (tmp_path / "img" / "bench-stall.svg").read_bytes() == first, "the same run gives the same files"


def test_two_runs_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    goal = Goal("at most", 1.2)
    show.comparison(results_of(row(1.0, 1.0, goal)), results_of(row(2.0, 1.0, goal)))
    said = capsys.readouterr().out
    assert all(word in said for word in ("a case", "1.00 s", "2.00 s", "2.00", "yes", "NO"))


def test_quantities_for_people() -> None:
    assert [results.shown(value, "s") for value in (1.234, 0.0123, 45e-6, 0)] == ["1.23 s", "12.3 ms", "45.0 µs", "0 s"]
    assert [results.shown(value, "bytes") for value in (2.5e9, 262144)] == ["2.50 GB", "262 kB"]


def test_a_server_that_died_is_noticed() -> None:
    gone = servers.Bucket(S3Server("gone", f"http://127.0.0.1:{free_port()}", "key", "secret"), "bucket")
    with pytest.raises(RuntimeError, match="the gone server died during the measurement"):
        gone.check_alive()


def test_every_question_has_a_module_and_every_alternative_too() -> None:
    for question in QUESTIONS.values():
        assert importlib.util.find_spec(f"benchmarks.questions.{question.module}")
    for kind in alternatives.ALTERNATIVES.values():
        assert importlib.util.find_spec(f"benchmarks.alternatives.{kind.module}")


def test_a_library_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("orbax", "lz4") else found(name))
    assert alternatives.missing("orbax") == alternatives.missing(alternatives.RLLIB) == "not installed"
    assert alternatives.missing("pickle + fsspec") is None


def test_what_ended_a_process_is_found_in_what_it_said() -> None:
    tail = "Traceback (most recent call last):\n  File x\nray.exceptions.RayTaskError(RuntimeError): no\nbye\n"
    assert run._last_words(tail) == "ray.exceptions.RayTaskError(RuntimeError): no"
    assert run._last_words("killed\n") == ""
