"""Retention: a checkpoint stays where any rule keeps it; the newest and the tagged stay whatever the rules say."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_ckpt import EveryNSteps, InvalidInputError, KeepRule, LatestN
from rl_ckpt.format.records import CommitRecord
from rl_ckpt.plan.retention import Said, decide

rules = st.lists(
    st.builds(LatestN, st.integers(1, 5)) | st.builds(EveryNSteps, st.integers(1, 7)), min_size=1, max_size=3
)


@st.composite
def logs(draw: st.DrawFn) -> list[CommitRecord]:
    steps = draw(st.lists(st.tuples(st.integers(0, 30), st.none() | st.just("best")), max_size=12))
    return [
        CommitRecord(
            number=i + 1, run="r", write_id="w", epoch=1, id=f"{step}-{i}", step=step, manifest_bytes=0,
            manifest_digest="", bytes=0, bytes_written=0, time=0.0, tag=tag,
        )
        for i, (step, tag) in enumerate(steps)
    ]  # fmt: skip


def dropped(commits: list[CommitRecord], keep: list[KeepRule], now: float = 0.0, said: Said | None = None) -> set[str]:
    return {verdict.id for verdict in decide(commits, keep, now, said) if not verdict.keep}


@settings(deadline=None)
@given(logs(), rules)
def test_what_goes_is_what_no_rule_keeps(commits: list[CommitRecord], keep: list[KeepRule]) -> None:
    gone = dropped(commits, keep)
    for i, commit in enumerate(commits):
        newest = i == len(commits) - 1
        kept = any(
            len(commits) - i <= rule.n if isinstance(rule, LatestN) else commit.step % rule.n == 0
            for rule in keep
            if isinstance(rule, LatestN | EveryNSteps)
        )
        assert (commit.id in gone) == (not kept and not newest and commit.tag is None)


@settings(deadline=None)
@given(logs())
def test_without_rules_all_stay(commits: list[CommitRecord]) -> None:
    assert dropped(commits, []) == set()


@settings(deadline=None)
@given(logs(), rules, rules)
def test_more_rules_keep_more(commits: list[CommitRecord], some: list[KeepRule], more: list[KeepRule]) -> None:
    assert dropped(commits, [*some, *more]) <= dropped(commits, some)


@pytest.mark.parametrize("n", [0, -1, 1.5, "3", True, None])
@pytest.mark.parametrize("rule", [LatestN, EveryNSteps])
def test_bad_numbers_are_refused(rule: type[LatestN | EveryNSteps], n: object) -> None:
    with pytest.raises(InvalidInputError, match="n must be an integer of at least 1"):
        rule(n)  # type: ignore[arg-type]
