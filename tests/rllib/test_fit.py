"""What of a checkpoint goes where: pure, without Ray."""

from __future__ import annotations

from typing import Any

import pytest

from rl_ckpt import InvalidInputError
from rl_ckpt.rllib.fit import Plan, plan_of, select_for
from rl_ckpt.rllib.team import Role
from rl_ckpt.state.paths import Selector


def about(**more: Any) -> dict[str, Any]:
    return {
        "kind": "algorithm",
        "policies": ["a", "b"],
        "num_learners": 2,
        "env_runners": [0, 2, 3],
        "eval_env_runners": [],
        **more,
    }


def test_everything_goes_to_its_own() -> None:
    plan = plan_of(about(), ["b", "a"], None, goes_on=True)
    assert plan.policies == {"a": "a", "b": "b"}
    assert plan.whole
    assert plan.episodes
    assert [plan.learner(Role("learner", index)) for index in range(3)] == [0, 1, 0]
    assert [plan.source(Role("env_runner", index)) for index in range(4)] == [
        ("env_runners", 0),
        ("env_runners", 0),  # runner 1 was dead when it was saved
        ("env_runners", 2),
        ("env_runners", 3),
    ]
    assert [plan.own(Role("env_runner", index)) for index in range(4)] == [True, False, True, True]
    assert plan.source(Role("eval_env_runner", 1)) == ("env_runners", 0)
    assert not plan.own(Role("eval_env_runner", 2))


def test_no_runners_at_all() -> None:
    plan = plan_of(about(env_runners=[]), ["a", "b"], None, goes_on=True)
    assert plan.source(Role("env_runner", 1)) is None
    assert "env_runners" not in " ".join(select_for(plan, [Role("env_runner", 1)]))


def chosen(plan: Plan, *parts: Role) -> set[str]:
    paths = [
        "about/format",
        "config/class",
        "algorithm/iteration",
        "replay_buffer/capacity",
        "learner/weights_seq_no",
        "learners/0/rng",
        "learners/1/rng",
        "policies/a/module/w",
        "policies/a/optimizers/o/state",
        "policies/b/module/w",
        "env_runners/0/rng",
        "env_runners/3/rng",
    ]
    selector = Selector(select_for(plan, parts))
    return {path for path in paths if selector(path)}


def test_each_reads_its_own_bytes_alone() -> None:
    plan = plan_of(about(), ["a", "b"], None, goes_on=True)
    assert chosen(plan, Role("driver")) == {"about/format", "algorithm/iteration", "replay_buffer/capacity"}
    assert chosen(plan, Role("learner", 1)) == {
        "about/format",
        "learner/weights_seq_no",
        "learners/1/rng",
        "policies/a/module/w",
        "policies/a/optimizers/o/state",
        "policies/b/module/w",
    }
    assert chosen(plan, Role("env_runner", 3)) == {
        "about/format",
        "learner/weights_seq_no",
        "env_runners/3/rng",
        "policies/a/module/w",
        "policies/b/module/w",
    }
    both = chosen(plan, Role("driver"), Role("learner", 0), Role("env_runner", 0))
    assert both == chosen(plan, Role("driver")) | chosen(plan, Role("learner", 0)) | {"env_runners/0/rng"}


def test_some_policies_alone() -> None:
    plan = plan_of(about(), ["x", "y"], {"b": "x"}, goes_on=False)
    assert (plan.policies, plan.whole, plan.episodes) == ({"b": "x"}, False, False)
    assert chosen(plan, Role("driver")) == {"about/format"}
    assert chosen(plan, Role("learner", 0)) == {"about/format", "policies/b/module/w"}
    assert chosen(plan, Role("env_runner", 3)) == {"about/format", "policies/b/module/w"}


@pytest.mark.parametrize(
    ("have", "wanted", "said"),
    [
        (["a", "b"], ["c"], r"the checkpoint has no policies \['c'\]; it has \['a', 'b'\]"),
        (["a"], None, r"this Algorithm has no policies \['b'\]"),
        (["a", "b", "c"], None, r"policies \['c'\] of this Algorithm are not in the checkpoint"),
        (["a", "b"], {"a": "b", "b": "b"}, r"\['b'\] of this Algorithm would be restored from several"),
        (["a", "b"], "a", "must be a list of ids"),
        (["a", "b"], {}, "must be a list of ids"),
    ],
)
def test_policies_that_do_not_fit(have: list[str], wanted: Any, said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        plan_of(about(), have, wanted, goes_on=True)


def test_a_policys_own_checkpoint_is_no_algorithm() -> None:
    with pytest.raises(InvalidInputError, match=r"of one policy, not of an Algorithm.*load_policy"):
        plan_of(about(kind="policy"), ["a"], None, goes_on=True)
