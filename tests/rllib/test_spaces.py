"""Spaces come back as they were: type, bounds, dtypes, starts and order, through a store and without pickle."""

from __future__ import annotations

import pickle
import uuid
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.rllib.utils.spaces.flexdict import FlexDict
from ray.rllib.utils.spaces.repeated import Repeated
from ray.rllib.utils.spaces.simplex import Simplex

from rl_ckpt import Checkpointer, CorruptionError, InvalidInputError
from rl_ckpt.rllib.spaces import space_from, space_tree

FLOATS, INTS = ["float16", "float32", "float64"], ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint64"]


def stored(tree: Any) -> Any:
    """A tree after a save and a load, in memory."""
    with Checkpointer(f"memory://{uuid.uuid4().hex}", weak_commits=True) as checkpointer:
        checkpointer.save_state(0, {"tree": tree}).result(60)
        return checkpointer.load_state()["tree"]


def looks(space: Any) -> Any:
    """Everything about a space but its generator, to compare: spaces' own `==` takes many for equal."""
    if isinstance(space, gym.Space):
        parts = {k: v for k, v in vars(space).items() if k not in ("_np_random", "_char_index")}
        return (type(space), {k: looks(v) for k, v in parts.items()})
    if isinstance(space, dict):
        return [(k, looks(v)) for k, v in space.items()]
    if isinstance(space, list | tuple):
        return (type(space), [looks(v) for v in space])
    if isinstance(space, np.ndarray | np.generic):
        return (space.dtype, space.shape, space.tobytes())
    return (type(space), space)


shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@st.composite
def boxes(draw: st.DrawFn) -> spaces.Box:
    dtype, shape = np.dtype(draw(st.sampled_from([*FLOATS, *INTS, "bool"]))), draw(shapes)
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    if dtype.kind == "b":
        return spaces.Box(0, 1, shape, np.bool_)  # type: ignore[arg-type]  # gymnasium takes it
    if draw(st.booleans()):  # as most give them
        low, high = draw(st.sampled_from([(0, 1), (0, 127), (-np.inf, np.inf), (-1.5, 7.0)]))
        return spaces.Box(low if dtype.kind != "u" else 0, high if dtype.kind != "u" else 9, shape, dtype.type)
    # Infinite bounds of integers are given as floats; of int64, gymnasium overflows.
    given_as = np.dtype("float64") if dtype.kind == "i" and dtype != np.int64 and draw(st.booleans()) else dtype
    lows = np.array(rng.integers(0, 9, shape), given_as)
    highs = lows + np.array(rng.integers(0, 9, shape), given_as)
    if given_as.kind == "f":
        lows = np.where(rng.random(shape) < 0.3, -np.inf, lows).astype(given_as)
        highs = np.where(rng.random(shape) < 0.3, np.inf, highs).astype(given_as)
    return spaces.Box(np.asarray(lows), np.asarray(highs), shape, dtype.type)


@st.composite
def multi_discretes(draw: st.DrawFn) -> spaces.MultiDiscrete:
    shape, dtype = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)), draw(st.sampled_from(INTS))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    return spaces.MultiDiscrete(rng.integers(1, 9, shape), dtype=dtype, start=rng.integers(0, 9, shape))


discretes: Any = st.builds(
    lambda n, start, dtype: spaces.Discrete(n, start=start, dtype=dtype),
    st.integers(1, 100),
    st.integers(0, 20),
    st.sampled_from(INTS),
)
simple = st.one_of(
    boxes(),
    discretes,
    multi_discretes(),
    st.builds(spaces.MultiBinary, st.one_of(st.integers(1, 5), st.tuples(st.integers(1, 3), st.integers(1, 3)))),
    st.builds(
        lambda low, more, chars: spaces.Text(low + more, min_length=low, charset=chars),
        st.integers(0, 3),
        st.integers(1, 5),
        st.one_of(st.text(min_size=1, max_size=5), st.frozensets(st.characters(), min_size=1, max_size=5)),
    ),
    st.builds(spaces.Graph, st.one_of(boxes(), discretes), st.one_of(st.none(), boxes(), discretes)),
    st.builds(lambda n: Simplex((2, n)), st.integers(1, 4)),
    st.builds(lambda n: Simplex((n,), np.arange(1.0, n + 1), np.float64), st.integers(1, 4)),
)
keys = st.one_of(st.text(min_size=1, max_size=4), st.sampled_from(["a/b", "0", "$", "type"]))
any_space = st.recursive(
    simple,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(spaces.Tuple),
        st.lists(inner, min_size=1, max_size=3).map(spaces.OneOf),
        st.dictionaries(keys, inner, max_size=3).map(spaces.Dict),
        st.lists(st.tuples(keys, inner), max_size=3, unique_by=lambda item: item[0]).map(spaces.Dict),
        st.dictionaries(keys, inner, max_size=3).map(FlexDict),
        st.builds(spaces.Sequence, inner),
        st.builds(Repeated, inner, st.integers(1, 9)),
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(any_space)
def test_any_space_comes_back(space: gym.Space[Any]) -> None:
    found = space_from(stored(space_tree(space)))
    assert looks(found) == looks(space)


def test_samples_of_what_came_back_are_the_same() -> None:
    space = spaces.Dict(
        {"image": spaces.Box(0, 255, (4, 4, 3), np.uint8), "word": spaces.Text(5), "move": spaces.Discrete(4, start=-2)}
    )
    found = space_from(stored(space_tree(space)))
    space.seed(7)
    found.seed(7)
    for one, other in ((space.sample(), found.sample()) for _ in range(5)):
        assert looks(one) == looks(other)


def test_infinite_bounds_of_integers_are_still_infinite() -> None:
    space = spaces.Box(-np.inf, np.inf, (2,), np.int64)
    found = space_from(stored(space_tree(space)))
    assert not found.is_bounded()  # type: ignore[attr-defined]
    assert looks(found) == looks(space)


def test_a_stacked_sequence_comes_back() -> None:
    space = spaces.Sequence(spaces.Box(0, 1, (2,)), stack=True)
    assert looks(space_from(stored(space_tree(space)))) == looks(space)


def test_the_space_that_a_preprocessor_left_behind_comes_back() -> None:
    space: Any = spaces.Box(-1, 1, (4,))
    space.original_space = spaces.Dict({"x": spaces.Discrete(4)})
    found: Any = space_from(stored(space_tree(space)))
    assert looks(found.original_space) == looks(space.original_space)


def test_bounds_of_an_image_take_no_room() -> None:
    tree = space_tree(spaces.Box(0, 255, (84, 84, 4), np.uint8))
    assert all(np.ndim(tree[part]) == 0 for part in ("low", "high", "below", "above"))


ODD_KEYS: Any = {("a", 1): spaces.Discrete(2)}


class Maze(spaces.Box):
    """Somebody's own."""


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (Maze(0, 1, (2,)), "an object of class .*:Maze, a space that is not stored"),
        (spaces.Tuple([Maze(0, 1, (2,))]), "a space that is not stored"),
        (spaces.Dict(ODD_KEYS), r"a Dict space with the key \('a', 1\); keys must be str or int"),
    ],
)
def test_a_space_that_is_not_known_is_named(space: gym.Space[Any], said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        space_tree(space)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"type": "Maze"}, "no space of type 'Maze' is known; a newer release may know it"),
        ({}, "no space of type None"),
        ({"type": "Discrete", "n": 0, "start": 0, "dtype": "int64"}, "these data describe no Discrete space"),
        ({"type": "Discrete"}, "these data describe no Discrete space"),
        ({"type": "Box", "shape": (2,), "dtype": "O"}, "these data describe no Box space"),
    ],
)
def test_data_that_describe_no_space_are_told(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(CorruptionError, match=said):
        space_from(tree)


def test_nothing_is_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickled")

    for name in ("dumps", "dump", "loads", "load"):
        monkeypatch.setattr(pickle, name, refuse)
    assert space_from(stored(space_tree(spaces.Discrete(3)))) == spaces.Discrete(3)
