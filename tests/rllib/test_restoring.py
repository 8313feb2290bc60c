"""After a restore all copies are compared; what differs is said, with who has it."""

from __future__ import annotations

import pytest

from rl_ckpt import CheckpointError
from rl_ckpt.rllib.fit import Plan
from rl_ckpt.rllib.inside import Fetched
from rl_ckpt.rllib.parts import Applied
from rl_ckpt.rllib.restoring import _compare, _problems
from rl_ckpt.rllib.team import Role, Team
from rl_ckpt.runtime.restore import RestoredRank

TEAM = Team((None, None, None), (Role("driver"), Role("learner", 0), Role("env_runner", 1)))
PLAN = Plan({"saved": "a"}, whole=True)


def applied(learners: list[str], runners: list[str], eval_runners: list[str] | None = None) -> Applied:
    return Applied(
        *(
            tuple({"a": digest, "other": f"any {digest}"} for digest in part or [])
            for part in (learners, runners, eval_runners)
        )
    )


def test_the_same_everywhere() -> None:
    parts = [applied([], ["x"], ["x"]), applied(["x"], []), applied([], ["x"])]
    assert _compare(PLAN, TEAM, parts, [{"a": "x"}]) == {"a": "x"}


@pytest.mark.parametrize(
    ("parts", "served", "who"),
    [
        ([applied([], ["x"], ["y"]), applied(["x"], []), applied([], ["x"])], [], "the Algorithm's process"),
        ([applied([], []), applied(["x"], []), applied([], ["y"])], [], "env runner 1"),
        ([applied([], []), applied(["y"], []), applied([], ["x"])], [], "learner 0"),
        ([applied([], []), applied(["x"], []), applied([], ["x"])], [{"a": "y"}], "the env-runner state server"),
    ],
)
def test_one_that_differs_is_named(parts: list[Applied], served: list[dict[str, str]], who: str) -> None:
    with pytest.raises(CheckpointError, match=rf"weights differ.*'y': \[.*{who}"):
        _compare(PLAN, TEAM, parts, served)


def test_nobody_has_it() -> None:
    with pytest.raises(CheckpointError, match="weights differ"):
        _compare(PLAN, TEAM, [applied([], [])] * 3, [])


def test_a_problem_of_several_is_said_once() -> None:
    report = RestoredRank("1-a", 1, 3, 0, {}, (), (), {})
    found = [Fetched(report, ("too wide",)), Fetched(report, ("too wide", "too deep")), Fetched(report, ())]
    assert _problems(TEAM, found) == ["the Algorithm's process, learner 0: too wide", "learner 0: too deep"]


def test_a_team_without_its_lost() -> None:
    team = TEAM.without((2,))
    assert [str(role) for role in team.roles] == ["the Algorithm's process", "learner 0"]
    assert team.absent == (Role("env_runner", 1),)
    assert len(team.handles) == 2
