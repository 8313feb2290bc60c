"""Rules about ages, metrics and tags, and the reasons that verdicts give; clocks that jump."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_ckpt import BestN, EveryNSteps, InvalidInputError, KeepRule, LatestN, NewerThan, OnePer, Tagged
from rl_ckpt.format.records import CommitRecord
from rl_ckpt.plan.retention import Said, check_rules, decide

HOUR, DAY = 3600.0, 86400.0
NOW = 1_800_000_000.0 - 1_800_000_000.0 % DAY + 10 * HOUR  # ten in the morning


def commit(step: int, time: float = NOW, tag: str | None = None, **metrics: float) -> CommitRecord:
    return CommitRecord(
        number=step + 1, run="r", write_id="w", epoch=1, id=f"{step}-a", step=step, manifest_bytes=0,
        manifest_digest="", bytes=0, bytes_written=0, time=time, metrics=dict(metrics), tag=tag,
    )  # fmt: skip


def kept(commits: list[CommitRecord], *rules: KeepRule, now: float = NOW, said: Said | None = None) -> list[int]:
    return [verdict.step for verdict in decide(commits, rules, now, said) if verdict.keep]


def why(commits: list[CommitRecord], step: int, *rules: KeepRule, said: Said | None = None) -> str:
    return next(verdict.why for verdict in decide(commits, rules, NOW, said) if verdict.step == step)


def every_ten_minutes(n: int) -> list[CommitRecord]:
    return [commit(step, NOW - (n - 1 - step) * 600) for step in range(n)]


def test_newer_than_keeps_what_is_younger() -> None:
    commits = every_ten_minutes(20)
    assert kept(commits, NewerThan(3000)) == [15, 16, 17, 18, 19]
    assert kept(commits, NewerThan(0.5)) == [19]


def test_one_per_keeps_the_last_of_each_period() -> None:
    commits = every_ten_minutes(20)  # of 6:50 to 10:00
    assert kept(commits, OnePer(HOUR)) == [0, 6, 12, 18, 19]
    assert kept(commits, OnePer(HOUR, 2)) == [18, 19]
    assert kept(commits, OnePer(DAY)) == [19]


def test_one_per_is_steady_under_sweep_after_sweep() -> None:
    """Swept after every save, what is left is what one sweep at the end leaves."""
    rules: list[KeepRule] = [LatestN(1), OnePer(HOUR, 4)]
    left: list[CommitRecord] = []
    for new in every_ten_minutes(60):
        left.append(new)
        ids = {verdict.id for verdict in decide(left, rules, new.time) if verdict.keep}
        left = [one for one in left if one.id in ids]
    assert [one.step for one in left] == kept(every_ten_minutes(60), *rules)


def test_best_of_a_metric() -> None:
    commits = [commit(step, score=score) for step, score in enumerate([1.0, 5.0, math.nan, 5.0, 2.0, 0.0])]
    assert kept(commits, BestN("score")) == [3, 5]
    assert kept(commits, BestN("score", n=2)) == [1, 3, 5]
    assert kept(commits, BestN("score", "min", 2)) == [0, 5]


def test_a_metric_that_no_checkpoint_has_drops_nothing() -> None:
    commits = [commit(step, score=1.0) for step in range(3)]
    assert kept(commits, BestN("scroe"), LatestN(1)) == [0, 1, 2]
    assert "no checkpoint has this metric" in decide(commits, [BestN("scroe")], NOW)[0].why
    assert decide(commits, [BestN("score", n=3)], NOW)[0].why == "BestN(metric='score', mode='max', n=3)"


def test_tags_keep_and_removals_drop_whatever_the_rules_say() -> None:
    commits = [commit(step, tag="mine" if step == 0 else None) for step in range(5)]
    said = Said({"1-a": ("good", "old")}, {"2-a": "somebody", "1-a": "somebody", "4-a": "somebody"}, frozenset({"3-a"}))
    assert kept(commits, Tagged()) == [0, 4]
    assert kept(commits, LatestN(5), said=said) == [0, 3, 4]
    assert kept(commits, Tagged(), said=Said({"1-a": ("good",)})) == [1, 4], "the tag given at save was taken off"
    assert why(commits, 1, LatestN(5), said=said) == "somebody asked to remove it"
    assert why(commits, 4, LatestN(5), said=said) == "the newest always stays, though somebody asked to remove it"
    assert "label can't be read" in why(commits, 3, LatestN(1), said=said)
    assert why(commits, 1, LatestN(1), said=Said({"1-a": ("good", "old")})) == "tagged good, old"


def test_verdicts_say_why() -> None:
    commits = [commit(step) for step in range(6)]
    assert why(commits, 4, LatestN(3), EveryNSteps(2)) == "LatestN(n=3), EveryNSteps(n=2)"
    assert why(commits, 1, LatestN(3)) == "no rule keeps it"
    assert why(commits, 1) == "there are no rules"
    assert why(commits, 5, LatestN(1)) == "the newest always stays"


@pytest.mark.parametrize("jump", [400 * DAY, -400 * DAY])
def test_a_clock_that_jumps_leaves_the_newest_and_the_tagged(jump: float) -> None:
    commits = [commit(0, NOW - 3 * DAY, tag="x"), commit(1, NOW - 2 * DAY), commit(2, NOW - HOUR)]
    rules: list[KeepRule] = [NewerThan(DAY), OnePer(DAY, 1)]
    assert {0, 2} <= set(kept(commits, *rules, now=NOW + jump))
    if jump < 0:
        assert kept(commits, *rules, now=NOW + jump) == [0, 1, 2], "what lies in the future is kept"


def test_a_time_in_the_future_is_said_and_does_not_count_as_a_period() -> None:
    commits = [commit(0, NOW - 2 * DAY), commit(1, NOW + 400 * DAY), commit(2, NOW)]
    assert kept(commits, OnePer(DAY, 2)) == [0, 1, 2]
    assert "ahead of this clock" in why(commits, 1, OnePer(DAY, 2))


any_rules = st.lists(
    st.builds(LatestN, st.integers(1, 4)) | st.builds(EveryNSteps, st.integers(1, 5))
    | st.builds(NewerThan, st.floats(0.1, 1e9)) | st.builds(OnePer, st.floats(0.1, 1e9), st.none() | st.integers(1, 3))
    | st.builds(BestN, st.sampled_from(["a", "b"]), st.sampled_from(["max", "min"])) | st.builds(Tagged),
    max_size=4,
)  # fmt: skip
any_commits = st.lists(
    st.tuples(st.floats(-1e12, 1e12), st.none() | st.just("t"), st.floats(allow_nan=True)), min_size=1, max_size=8
).map(lambda rows: [commit(step, time, tag, a=a) for step, (time, tag, a) in enumerate(rows)])


@settings(deadline=None)
@given(any_commits, any_rules, st.floats(-1e12, 1e12))
def test_whatever_the_times_the_newest_and_the_tagged_stay(
    commits: list[CommitRecord], rules: list[KeepRule], now: float
) -> None:
    verdicts = decide(commits, rules, now)
    assert [verdict.id for verdict in verdicts] == [one.id for one in commits]
    assert verdicts[-1].keep
    assert all(verdict.keep for verdict, one in zip(verdicts, commits, strict=True) if one.tag)
    more = decide(commits, [*rules, LatestN(2)], now) if rules else verdicts
    assert all(b.keep for a, b in zip(verdicts, more, strict=True) if a.keep)


def test_rules_that_keep_nothing_are_an_error() -> None:
    commits = [commit(step) for step in (1, 3, 5)]
    with pytest.raises(InvalidInputError, match=r"keep none of the 3 checkpoints .*LatestN\(1\)"):
        check_rules(commits, [EveryNSteps(2), NewerThan(1e-9)], NOW + 1, Said())
    with pytest.raises(InvalidInputError, match="keep none"):
        check_rules(commits, [Tagged()], NOW, Said())
    check_rules(commits, [Tagged()], NOW, Said({"1-a": ("x",)}))
    check_rules(commits, [EveryNSteps(5)], NOW, Said())
    check_rules([], [EveryNSteps(5)], NOW, Said())
    for wrong in (LatestN(1), LatestN, [LatestN], [3], "latest"):
        with pytest.raises(InvalidInputError, match="must be a list of rules"):
            check_rules(commits, wrong, NOW, Said())  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [0, -1, "3", True, None, math.inf, math.nan])
@pytest.mark.parametrize("rule", [NewerThan, OnePer])
def test_bad_seconds_are_refused(rule: type[NewerThan | OnePer], seconds: object) -> None:
    with pytest.raises(InvalidInputError, match="seconds must be a number greater than 0"):
        rule(seconds)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [0, -1, 1.5, "3", True])
def test_bad_numbers_of_periods_are_refused(n: object) -> None:
    with pytest.raises(InvalidInputError, match="n must be an integer of at least 1"):
        OnePer(60, n)  # type: ignore[arg-type]
