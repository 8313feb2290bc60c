"""Dtypes: their names on storage, and how Arrow stores what it has no type for.

A dtype's name is numpy's own for the plain native ones ("float32", "bool"), ml_dtypes' for its own ("bfloat16"),
numpy's type string for what carries a size, a unit or a byte order ("<U5", "<M8[ns]", ">f4"), and "descr:" with numpy's
description as JSON for structured ones. Values are little-endian unless the name says otherwise.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import ml_dtypes
import msgspec
import numpy as np

ML_DTYPES: tuple[str, ...] = tuple(
    sorted(
        name
        for name in vars(ml_dtypes)
        if isinstance(getattr(ml_dtypes, name), type) and issubclass(getattr(ml_dtypes, name), np.generic)
    )
)
_ARROW_NATIVE = frozenset(
    ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"]
)


_NAME = r"bool|(u?int|float|complex)\d+|c?longdouble"
_SIMPLE = re.compile(rf"({_NAME}|[<>|][biufcSUV]\d+|[<>|][mM]8(\[\w+\])?)\Z", re.ASCII)
"""What numpy is asked about: names that it would take for code, objects or other spellings are none of ours."""


class ArrowStorage(msgspec.Struct, frozen=True):
    """How values of a dtype lie in an Arrow column: the Arrow value type, and how many of them make one element."""

    value_type: str
    per_element: int = 1


@functools.lru_cache(4096)  # numpy takes 5 µs to name a dtype; a job has a handful of them and 100,000 arrays
def dtype_name(dtype: np.dtype[np.generic]) -> str | None:
    """Name of a dtype on storage; None for what can't be stored (object, variable-width strings)."""
    if dtype.hasobject or dtype.kind == "T":
        return None
    if dtype.name in ML_DTYPES and dtype.isnative:
        return dtype.name
    if dtype.kind in "biufc" and dtype.isnative:
        return dtype.name
    if dtype.kind in "biufcMmSU" or (dtype.kind == "V" and dtype.names is None and dtype.subdtype is None):
        return dtype.str if dtype_from_name(dtype.str) == dtype else None
    if dtype.names is None:
        return None
    try:
        name = "descr:" + json.dumps(np.lib.format.dtype_to_descr(dtype))
    except ValueError:  # numpy has no description for fields that overlap or stand out of order
        return None
    return name if dtype_from_name(name) == dtype else None


@functools.cache
def dtype_from_name(name: str) -> np.dtype[np.generic]:
    """The dtype that `dtype_name` named.

    Raises:
        TypeError: No such dtype (a damaged file, or one of a newer release).
    """
    if name in ML_DTYPES:
        extended: np.dtype[np.generic] = np.dtype(getattr(ml_dtypes, name))
        return extended
    try:
        if not name.startswith("descr:"):
            return _simple(name)
        descr: Any = _tuples(json.loads(name[6:]))
        structured: np.dtype[np.generic] = np.lib.format.descr_to_dtype(descr)
    except (TypeError, ValueError, KeyError, OverflowError, RecursionError, MemoryError) as error:
        raise TypeError(f"there is no dtype {name[:200]!r} here: {error}") from error
    if structured.hasobject or structured.names is None:  # values that are addresses are never read from anywhere
        raise TypeError(f"{name[:200]!r} is no dtype of fixed-width fields")
    return structured


def _simple(name: str) -> np.dtype[np.generic]:
    """The dtype of a name or type string of numpy's, of the forms that are stored."""
    if not _SIMPLE.match(name):
        raise TypeError("not of a form that is stored")
    return np.dtype(name)


def _tuples(descr: object) -> object:
    """JSON has no tuples; numpy's description of a dtype is a list of them (fields), with shapes as tuples."""
    if not isinstance(descr, list):
        return descr
    return [_field(field) for field in descr]


def _field(field: list[object]) -> tuple[object, ...]:
    name, kind, *shape = field
    title = tuple(name) if isinstance(name, list) else name
    if isinstance(kind, str) and not _SIMPLE.match(kind):
        raise TypeError(f"{kind!r} is of no form that is stored")
    return (title, _tuples(kind), *(tuple(s) for s in shape if isinstance(s, list)))


@functools.cache
def arrow_storage(name: str) -> ArrowStorage:
    """The documented storage of a dtype, by its name (docs/format.md, "Dtypes")."""
    if name in _ARROW_NATIVE:
        return ArrowStorage(name)
    dtype = dtype_from_name(name)
    if name in ("bool", *ML_DTYPES):
        return ArrowStorage(f"uint{8 * dtype.itemsize}")
    if name in ("complex64", "complex128"):
        return ArrowStorage(f"float{4 * dtype.itemsize}", 2)
    if dtype.kind in "Mm" and dtype.isnative:
        return ArrowStorage("int64")
    return ArrowStorage("uint8", dtype.itemsize)
