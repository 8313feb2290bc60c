"""Matching a checkpoint with a state: all that does not fit is listed, and choices do what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rl_ckpt import PerRank
from rl_ckpt.errors import InvalidInputError
from rl_ckpt.plan.match import Match
from tests.unit.plan.model import load, restore, save
from tests.unit.trees import assert_same

W, B = np.arange(6.0).reshape(2, 3), np.arange(3)
STATE = {"net": {"w": W, "b": B}, "opt": {"m": W + 1, "n": 3}, "steps": [1, 2]}


def blank() -> dict[str, Any]:
    return {"net": {"w": W * 0, "b": B * 0}, "opt": {"m": W * 0, "n": 0}, "steps": [0, 0]}


def into(template: Any, saved: Any = STATE, **choices: Any) -> tuple[Any, Match]:
    return restore(save([saved], ["s"]), 0, template, **choices)


def test_a_state_of_the_same_shape_is_filled_whole() -> None:
    found, match = into(blank())
    assert_same(found, STATE)
    assert (match.kept, bool(match.problems)) == ([], False)


def test_everything_that_does_not_fit_is_listed_at_once() -> None:
    template = {
        "net": {"w": W.astype("f4"), "b": np.zeros(4, int), "new": B},
        "opt": {"m": 5, "n": {"deep": 1}},
        "steps": [0, 0, 0],
        "more": 1,
    }
    _, match = into(template)
    assert match.problems.missing == ["net/new", "opt/n/deep", "steps/2", "more"]
    assert match.problems.unexpected == []
    assert match.problems.mismatched == {
        "net/w": "float64 array of shape (2, 3) in the checkpoint, float32 array of shape (2, 3) here",
        "net/b": "int64 array of shape (3,) in the checkpoint, int64 array of shape (4,) here",
        "opt/m": "float64 array of shape (2, 3) in the checkpoint, plain data here",
        "opt/n": "a leaf in the checkpoint, a dict here",
    }
    assert len(match.problems.lines()) == 8


def test_what_only_the_checkpoint_has_is_unexpected() -> None:
    template = blank()
    del template["opt"]
    _, match = into(template)
    assert match.problems.unexpected == ["opt/m", "opt/n"]


def test_not_strict_leaves_alone_what_does_not_fit() -> None:
    template = {"net": {"w": np.zeros((2, 3), "f4"), "b": B * 0}, "own": 7}
    found, match = into(template, strict=False)
    assert not match.problems
    assert_same(found, {"net": {"w": np.zeros((2, 3), "f4"), "b": B}, "own": 7})
    assert set(match.kept) == {"net/w", "own"}
    assert set(match.ignored) == {"opt/m", "opt/n", "steps/0", "steps/1"}


@pytest.mark.parametrize(
    ("select", "filled"),
    [
        ("net", ["net/w", "net/b"]),
        (["net/*", "!net/b"], ["net/w"]),
        ("!opt", ["net/w", "net/b", "steps/0", "steps/1"]),
        ("**/[wm]", ["net/w", "opt/m"]),
    ],
)
def test_select_fills_what_it_chooses_and_asks_for_no_more(select: Any, filled: list[str]) -> None:
    found, match = into(blank(), select=select)
    assert list(match.fills) == filled
    assert not match.problems
    assert set(match.kept) == {"net/w", "net/b", "opt/m", "opt/n", "steps/0", "steps/1"} - set(filled)
    assert ("net/b" in filled) == bool((found["net"]["b"] == B).all())


def test_select_that_chooses_nothing_says_what_there_is() -> None:
    with pytest.raises(
        InvalidInputError, match="select='nothing' chooses nothing; at the top the checkpoint has: net, opt"
    ):
        into(blank(), select="nothing")


def test_of_many_names_at_the_top_a_message_names_the_first() -> None:
    many = {f"k{i:02}": i for i in range(23)}
    with pytest.raises(InvalidInputError, match=r"has: k00, (k\d\d, ){18}k19 … and 3 more$"):
        into(many, saved=many, select="nothing")


def test_rename_moves_a_prefix_and_a_leaf() -> None:
    template = {"policy": {"w": W * 0, "bias": B * 0}, "opt": {"m": W * 0, "n": 0}, "steps": [0, 0]}
    found, match = into(template, rename={"net": "policy", "net/b": "policy/bias"})
    assert not match.problems
    assert_same(found, {"policy": {"w": W, "bias": B}, "opt": STATE["opt"], "steps": [1, 2]})


def test_rename_of_what_is_not_there_is_refused() -> None:
    with pytest.raises(
        InvalidInputError, match=r"rename: the checkpoint has no \['nett'\]; at the top it has: net, opt"
    ):
        into(blank(), rename={"nett": "policy"})


def test_rename_onto_one_path_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"several saved leaves the same path: \['net/w'\]"):
        into(blank(), rename={"opt/m": "net/w"})


@pytest.mark.parametrize("nothing", [None, {}])
def test_none_and_an_empty_dict_stand_for_what_the_checkpoint_has(nothing: Any) -> None:
    found, match = into({**blank(), "opt": nothing, "net": nothing})
    assert not match.problems
    assert match.kept == []
    assert_same(found, {"net": STATE["net"], "opt": STATE["opt"], "steps": [1, 2]})


@pytest.mark.parametrize("nothing", [None, {}])
def test_placeholders_take_empty_containers_too(nothing: Any) -> None:
    fresh = {"opt": {"state": {}, "groups": [{"lr": 0.1, "betas": (), "more": []}]}, "all": []}
    found, match = into({"opt": nothing, "all": None}, fresh)
    assert not match.problems
    assert_same(found, fresh)
    assert_same(into(nothing, fresh)[0], fresh)
    assert_same(into(nothing, {"opt": {}})[0], {"opt": {}})


def test_empty_containers_that_were_not_chosen_stay_away() -> None:
    found, _ = into({"a": None, "b": None}, {"a": {"x": {}, "y": 1}, "b": {"z": {}}}, select="a")
    assert_same(found, {"a": {"x": {}, "y": 1}, "b": None})


def test_none_in_the_checkpoint_and_here_fits_anything() -> None:
    assert_same(into({"a": B, "b": None}, {"a": None, "b": B})[0], {"a": None, "b": B})


def test_a_whole_state_may_be_a_placeholder() -> None:
    assert_same(into({})[0], STATE)


def test_tied_leaves_are_filled_alike_and_a_tie_that_was_apart_is_a_mismatch() -> None:
    weight = torch.zeros(3)
    tied, apart = {"a": torch.ones(3), "b": torch.full((3,), 2.0)}, {"a": weight, "b": weight}
    _, match = into(apart, tied)
    assert match.problems.mismatched == {"b": "tied to another leaf here, but saved apart from it"}
    both = torch.ones(3)
    found, match = into(apart, {"a": both, "b": both})
    assert not match.problems
    assert torch.equal(found["a"], torch.ones(3))
    assert torch.equal(found["b"], torch.ones(3))


def test_leaves_of_other_ranks_are_kept_and_not_missing() -> None:
    checkpoint = save([{"env": PerRank(B + rank), "w": W} for rank in range(2)], ["s", "s"])
    found, match = restore(checkpoint, 2, {"env": B * 0, "w": W * 0})
    assert not match.problems
    assert match.kept == ["env"]
    assert_same(found, {"env": B * 0, "w": W})


def test_a_shape_mismatch_between_plain_and_zero_dim_is_told() -> None:
    _, match = into({"x": 1.0}, {"x": np.array(1.0)})
    assert match.problems.mismatched == {"x": "float64 array of shape () in the checkpoint, plain data here"}


def test_a_select_without_state_keeps_containers_types() -> None:
    checkpoint = save([{"t": (1, [2, 3]), "d": {0: "x"}}], ["s"])
    assert_same(load(checkpoint, 0), {"t": (1, [2, 3]), "d": {0: "x"}})
