"""Deep equality that knows types, dtypes and bits."""

import struct

import numpy as np


def assert_same(found, expected, path="value"):
    """Equal in type, and to the last bit; objects of other types by their fields."""
    assert type(found) is type(expected), f"{path}: {type(found)} where {type(expected)} belongs"
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype, f"{path}: {found.dtype}, {expected.dtype}"
        assert found.shape == expected.shape, f"{path}: {found.shape}, {expected.shape}"
        assert found.tobytes() == expected.tobytes(), f"{path}: {found} != {expected}"
    elif isinstance(expected, np.generic):
        assert_same(np.asarray(found), np.asarray(expected), path)
    elif isinstance(expected, dict):
        assert list(found) == list(expected), f"{path}: keys {list(found)} != {list(expected)}"
        assert list(map(type, found)) == list(map(type, expected)), f"{path}: types of keys"
        for key in expected:
            assert_same(found[key], expected[key], f"{path}[{key!r}]")
    elif hasattr(expected, "maxlen"):
        assert found.maxlen == expected.maxlen, path
        assert_same(list(found), list(expected), path)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), f"{path}: {len(found)} where {len(expected)} belong"
        for place, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{path}[{place}]")
    elif isinstance(expected, float):
        assert struct.pack("<d", found) == struct.pack("<d", expected), f"{path}: {found} != {expected}"
    elif isinstance(expected, complex):
        assert_same([found.real, found.imag], [expected.real, expected.imag], path)
    else:
        assert found == expected, f"{path}: {found!r} != {expected!r}"
