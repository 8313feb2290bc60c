"""How much arrays differ: every dtype that can be stored, against exact arithmetic on a few elements."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_ckpt.state import differences
from rl_ckpt.state.differences import Difference, difference, is_numeric
from rl_ckpt.state.dtypes import ML_DTYPES, dtype_from_name

NAMES = ["float16", "float32", "float64", "int8", "int32", "int64", "uint8", "uint64", "complex64", "complex128"]
NAMES += [">f4", ">i8", "<M8[ns]", "<m8[s]", *ML_DTYPES]


@pytest.mark.parametrize("name", [*NAMES, "bool"])
def test_zeros_and_ones_of_every_dtype(name: str) -> None:
    dtype = dtype_from_name(name)
    a, b = np.array([0, 1, 1, 0], "i8").astype(dtype), np.array([0, 1, 0, 1], "i8").astype(dtype)
    found = difference(a, b)
    assert (found.changed, found.not_finite) == (2, 2 if name == "float8_e8m0fnu" else 0)  # which has no zero
    if not found.not_finite:
        assert found.most == 1.0
        assert math.isclose(found.norm, math.sqrt(2))
    assert difference(a, a).changed == 0
    assert is_numeric(dtype)


@pytest.mark.parametrize(
    ("a", "b", "most"),
    [
        (np.array([0], "u8"), np.array([2**64 - 1], "u8"), 2.0**64),
        (np.array([-(2**63)], "i8"), np.array([2**63 - 1], "i8"), 2.0**64),
        (np.array([-128], "i1"), np.array([127], "i1"), 255.0),
        (np.array([2], "u1"), np.array([3], "u1"), 1.0),
        (np.array([2**53], "i8"), np.array([2**53 + 1], "i8"), 1.0),
        (np.array([1], ">i8"), np.array([256], ">i8"), 255.0),
        (np.array(["2020-01-01"], "M8[D]"), np.array(["2020-01-11"], "M8[D]"), 10.0),
        (np.array([60000], "f2"), np.array([-60000], "f2"), 119936.0 + 64),
        (np.array([3 + 4j], "c8"), np.array([0], "c8"), 5.0),
        (np.array([448], ml_dtypes.float8_e4m3fn), np.array([-448], ml_dtypes.float8_e4m3fn), 896.0),
        (np.array([7], ml_dtypes.int4), np.array([-8], ml_dtypes.int4), 15.0),
        (np.array([1e38], ml_dtypes.bfloat16), np.array([-1e38], ml_dtypes.bfloat16), 2e38),
        (np.array([1e-300]), np.array([0.0]), 1e-300),
    ],
)
def test_no_dtype_wraps_around_or_overflows(a: Any, b: Any, most: float) -> None:
    for x, y in ((a, b), (b, a)):
        found = difference(x, y)
        assert math.isclose(found.most, most, rel_tol=4e-3)
        assert math.isclose(found.norm, found.most)


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    a = np.array([1.0, math.nan, math.inf, 2.0, 0.0, math.nan])
    b = np.array([1.0, math.nan, -math.inf, math.nan, 3.0, 1.0])
    found = difference(a, b)
    assert (found.changed, found.not_finite, found.most, found.norm) == (4, 3, 3.0, 3.0)


def test_a_zero_of_the_other_sign_is_another_value_at_no_distance() -> None:
    found = difference(np.array([0.0]), np.array([-0.0]))
    assert (found.changed, found.norm) == (1, 0.0)


@pytest.mark.parametrize("dtype", ["<U3", "S2", "V4", [("a", "i4"), ("b", "f8")]])
def test_of_what_is_no_number_only_the_share_is_told(dtype: Any) -> None:
    a = np.zeros(5, dtype)
    b = a.copy()
    b.view(np.uint8).reshape(5, -1)[3, 0] = 65
    found = difference(a, b)
    assert (found.changed, found.norm) == (1, 0.0)
    assert not is_numeric(a.dtype)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=40), st.randoms(), st.integers(1, 7))
def test_parts_add_up_to_the_whole(values: list[float], rng: Any, block: int) -> None:
    a = np.array(values)
    b = np.array([value if rng.random() < 0.5 else -value * rng.random() for value in values])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(differences, "_BLOCK", block)
        found = difference(a, b)
    parts = Difference()
    for x, y in zip(a, b, strict=True):
        parts.add(difference(np.array([x]), np.array([y])))
    apart = [abs(x - y) for x, y in zip(values, b.tolist(), strict=True)]
    most = max(apart)
    norm = most * math.sqrt(math.fsum((d / most) ** 2 for d in apart)) if most else 0.0
    for one in (found, parts):
        assert (one.changed, one.most) == (np.count_nonzero(a.view("u8") != b.view("u8")), most)
        assert math.isclose(one.norm, norm, rel_tol=1e-9)


def test_arrays_that_are_not_contiguous() -> None:
    a = np.arange(24.0).reshape(4, 6)
    b = a.copy()
    b[1, 2] += 5
    assert difference(a[1:3, 1:4], b[1:3, 1:4]).most == 5.0
    assert difference(a[2:, 1:4], b[2:, 1:4]).changed == 0
