"""How much two arrays differ: norm and greatest size of the difference, and how many elements are others.

Owns: what "differ" means for each dtype. An element is changed where its bits are; its difference is taken in float64,
or exactly in integers, so that no dtype wraps around or overflows. Pure: in blocks, so that memory is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from rl_ckpt.state.arrays import Host
from rl_ckpt.state.dtypes import ML_DTYPES

_BLOCK = 1 << 18  # elements at once: 2 MiB as float64


class Difference(msgspec.Struct):
    """The difference of parts of two arrays; parts are added up."""

    changed: int = 0
    """Elements whose bits differ."""
    not_finite: int = 0
    """Of those, the ones with an infinity or NaN on one side: they are left out of norm and greatest size."""
    most: float = 0.0
    """Greatest absolute difference of an element."""
    _squares: float = 0.0
    """Sum of the squares, over `most` squared: neither overflows nor vanishes."""

    @property
    def norm(self) -> float:
        """Euclidean norm of the difference."""
        return self.most * math.sqrt(self._squares)

    def add(self, other: Difference) -> None:
        """Takes another part in."""
        self.changed += other.changed
        self.not_finite += other.not_finite
        most = max(self.most, other.most)
        if most:
            mine, others = self._squares * (self.most / most) ** 2, other._squares * (other.most / most) ** 2
            self.most, self._squares = most, mine + others


def is_numeric(dtype: np.dtype[Any]) -> bool:
    """Whether there is a difference between two values: not of text, bytes, or structures."""
    return dtype.kind in "biufcMm" or dtype.name in ML_DTYPES


def difference(a: Host, b: Host) -> Difference:
    """Compares two arrays.

    Args:
        a: Any dtype that is stored, any shape.
        b: Of the same dtype and shape.

    Returns:
        The difference; of values that are no numbers only how many changed.
    """
    out = Difference()
    for x, y in _blocks(a, b):
        changed = _changed(x, y)
        part = Difference(changed=int(np.count_nonzero(changed)))
        if part.changed and is_numeric(a.dtype):
            sizes = _sizes(x[changed], y[changed])
            finite = sizes[np.isfinite(sizes)]
            part.not_finite = len(sizes) - len(finite)
            part.most = float(finite.max(initial=0.0))
            part._squares = float(np.square(finite / part.most).sum()) if part.most else 0.0
        out.add(part)
    return out


def _blocks(a: Host, b: Host) -> Iterator[tuple[Host, Host]]:
    x, y = a.reshape(-1), b.reshape(-1)
    for start in range(0, x.size, _BLOCK):
        yield x[start : start + _BLOCK], y[start : start + _BLOCK]


def _changed(x: Host, y: Host) -> Any:
    """Where the bits differ, as an array of bool."""
    width = x.dtype.itemsize
    if width in (1, 2, 4, 8):
        return _bits(x, width) != _bits(y, width)
    return (_bits(x, 1).reshape(x.size, width) != _bits(y, 1).reshape(x.size, width)).any(axis=1)


def _bits(x: Host, width: int) -> np.ndarray[Any, np.dtype[Any]]:
    return np.ascontiguousarray(x).view(np.uint8).view(f"u{width}")


def _sizes(x: Host, y: Host) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Absolute differences, element by element."""
    name = x.dtype.name if x.dtype.name in ML_DTYPES else ""
    if x.dtype.kind in "iuMm" or name.startswith(("int", "uint")):
        return _whole_numbers(x, y, bool(name))
    if x.dtype.kind == "b":
        return np.ones(x.size)
    wide = np.complex128 if x.dtype.kind == "c" or "complex" in name else np.float64
    with np.errstate(invalid="ignore", over="ignore"):
        sizes: np.ndarray[Any, np.dtype[np.float64]] = np.abs(x.astype(wide) - y.astype(wide))
    return sizes


def _whole_numbers(x: Host, y: Host, narrow: bool) -> np.ndarray[Any, np.dtype[np.float64]]:
    if x.dtype.kind in "Mm":
        x, y = (part.astype(part.dtype.newbyteorder("=")).view(np.int64) for part in (x, y))
    wide = np.uint64 if x.dtype.kind == "u" else np.int64
    p, q = x.astype(np.int64 if narrow else wide), y.astype(np.int64 if narrow else wide)
    more, less = np.maximum(p, q), np.minimum(p, q)
    # Modulo 2**64 the difference of the two is right, also where it does not fit in their own type.
    return np.subtract(more.view(np.uint64), less.view(np.uint64)).astype(np.float64)
