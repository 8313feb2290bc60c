"""Values → columns → values, exactly."""

from collections import OrderedDict, deque

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_ckpt.errors import CorruptionError, InvalidInputError
from rl_ckpt.rllib.columns import Columns, decode, encode
from tests.rllib.same import assert_same

_arrays = st.builds(
    lambda dtype, shape: np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype),
    st.sampled_from(["<f4", "int8", "bool", "complex64"]),
    st.lists(st.integers(0, 3), max_size=3),
)
_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**80), 2**80),
    st.floats(),
    st.complex_numbers(),
    st.text(),
    st.binary(max_size=5),
    st.builds(np.float32, st.floats(width=32)),
    st.builds(np.int64, st.integers(-(2**63), 2**63 - 1)),
    _arrays,
)
_values = st.recursive(
    _scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(lambda v: deque(v, maxlen=4)),
        st.dictionaries(st.one_of(st.text("n|.#[%a1", max_size=3), st.integers(0, 2)), inner, max_size=3),
        st.dictionaries(st.text(max_size=2), inner, max_size=2).map(OrderedDict),
        st.dictionaries(st.tuples(st.integers(0, 2)), inner, max_size=2),
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_values, max_size=6))
def test_what_comes_back_is_what_went_in(values):
    assert_same(decode(encode(values, "x"), "x"), values)


@pytest.mark.parametrize(
    "values",
    [
        ["same"] * 20,
        ["a", "b"] * 20,
        [f"{i}" for i in range(40)],
        [0.0, -0.0],
        [1.5] * 3,
        [float("nan")] * 2,
        [np.array(1.0, ml_dtypes.bfloat16)[()]] * 2 + [np.ones(3, ml_dtypes.bfloat16)],
        [np.array(3), np.array(4)],
        [np.zeros((0, 3)), np.ones((2, 3))],
        [{f"k{i}": i} for i in range(40)],
        [{1: "int"}, {"1": "str"}, {True: "bool"}],
        [{"n": [1]}, {"n": [2, 3]}, {"n|n": []}],
        [tuple(range(40)), tuple(range(3))],
        [{"a.b": 1.5, "a": {"b": 2.5}, "#0": 3.5, 0: 4.5, "n": [5.5], "n[]": 6.5, "s": "x", "s|n": 7.5}],
    ],
)
def test_special_cases(values):
    assert_same(decode(encode(values, "x"), "x"), values)


def test_many_small_values_are_few_arrays():
    steps = [{"obs": np.full(4, i, np.float32), "info": {"lives": i % 3}, "id": f"{i:032x}"} for i in range(1000)]
    columns = encode(steps, "x")
    assert sorted(columns.arrays) == ["id", "info.lives", "obs"]
    assert columns.nbytes == 1000 * (16 + 1 + 32)


def test_what_is_no_data_is_named():
    with pytest.raises(InvalidInputError, match=r"infos \(a\.b\) holds a builtins\.set"):
        encode([{"a": {"b": {1, 2}}}], "infos")
    with pytest.raises(InvalidInputError, match=r"infos \(a\) holds an array of dtype object"):
        encode([{"a": np.array([None])}], "infos")


def test_columns_that_do_not_fit_are_damage():
    whole = encode([np.ones(3), np.ones(2)], "x")
    for arrays in ({}, {**whole.arrays, "": np.ones(4)}, {**whole.arrays, "": np.ones(5, np.float32)}):
        with pytest.raises(CorruptionError, match="x: its columns don't fit together"):
            decode(Columns(2, whole.schema, arrays), "x")
    with pytest.raises(CorruptionError):
        decode(Columns(3, whole.schema, whole.arrays), "x")
