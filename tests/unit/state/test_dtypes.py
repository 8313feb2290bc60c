"""Dtypes have one name each, and the storage in Arrow that docs/format.md gives for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rl_ckpt.state.dtypes import ML_DTYPES, arrow_storage, dtype_from_name, dtype_name
from tests.unit.trees import NUMPY_DTYPES

STORAGE = {
    **{name: (name, 1) for name in ("int8", "uint8", "int16", "uint32", "int64", "float16", "float32", "float64")},
    "bool": ("uint8", 1),
    "complex64": ("float32", 2),
    "complex128": ("float64", 2),
    "float128": ("uint8", 16),
    "complex256": ("uint8", 32),
    "<M8[ns]": ("int64", 1),
    "<m8[D]": ("int64", 1),
    ">M8[ms]": ("uint8", 8),
    ">f4": ("uint8", 4),
    "<U3": ("uint8", 12),
    "|S5": ("uint8", 5),
    "|V7": ("uint8", 7),
    "bfloat16": ("uint16", 1),
    **{name: (f"uint{8 * dtype_from_name(name).itemsize}", 1) for name in ML_DTYPES},
}


@pytest.mark.parametrize("dtype", NUMPY_DTYPES, ids=repr)
def test_a_name_gives_its_dtype_back(dtype: np.dtype[Any]) -> None:
    name = dtype_name(dtype)
    assert name is not None
    assert dtype_from_name(name) == dtype
    assert dtype_name(dtype_from_name(name)) == name


@pytest.mark.parametrize("name", STORAGE)
def test_storage_in_arrow(name: str) -> None:
    storage = arrow_storage(name)
    assert (storage.value_type, storage.per_element) == STORAGE[name]
    width = np.dtype(storage.value_type).itemsize * storage.per_element
    assert width == dtype_from_name(name).itemsize


@pytest.mark.parametrize("dtype", [np.dtype(object), np.dtypes.StringDType(), np.dtype([("o", "O")])], ids=repr)
def test_what_has_no_fixed_width_has_no_name(dtype: Any) -> None:
    assert dtype_name(dtype) is None
