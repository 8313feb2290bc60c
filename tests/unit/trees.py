"""State trees for property tests: strategies for all that may be saved, and what "equal bit for bit" means."""

from __future__ import annotations

import math
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from hypothesis import strategies as st

from rl_ckpt.state.dtypes import ML_DTYPES, dtype_from_name

Array = np.ndarray[Any, np.dtype[Any]]

STRUCTURED = [
    np.dtype([("a", "i4"), ("b", "f8")]),
    np.dtype([("a", "i1"), ("b", "f8"), ("c", "?")], align=True),
    np.dtype({"names": ["x", "y"], "formats": ["u2", "f4"], "offsets": [2, 12], "itemsize": 24}),
    np.dtype([("in", [("x", ">f4"), ("name", "U3")], (2,)), ("when", "M8[us]"), ("raw", "S3")]),
    np.dtype([(("a title", "field"), "c8"), ("flag", "?", (2, 2))]),
]
NUMPY_DTYPES = [
    *(np.dtype(code) for code in "?bhilqBHILQefdgFDG"),
    *map(np.dtype, [">i2", ">u4", ">i8", ">f2", ">f4", ">f8", ">g", ">c8", ">c16", ">U3", ">M8[ms]", ">m8[D]"]),
    *map(np.dtype, ["M8[ns]", "M8[D]", "M8[25s]", "M8", "m8[us]", "m8[Y]", "m8", "S1", "S5", "U1", "U4", "V1", "V7"]),
    *STRUCTURED,
    *map(dtype_from_name, ML_DTYPES),
]
TORCH_DTYPES = [
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32),
    *(torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64),
    *(torch.complex128, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    torch.float8_e8m0fnu,
]
with warnings.catch_warnings():  # torch says once a process that it can do little with half-precision complex numbers
    warnings.simplefilter("ignore", UserWarning)
    torch.zeros((), dtype=torch.complex32)
JAX_DTYPES = ["bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "float32", "complex64"]
JAX_DTYPES += ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4"]
AWKWARD_KEYS = [
    "",
    "/",
    "~",
    "//",
    "~0",
    "~1",
    "~2",
    "~3",
    "0",
    "-1",
    "-0",
    "007",
    "1_0",
    "٣",
    "a/b",
    "@",
    "#1",
    "é",
    "\0",
]


def array_of(dtype: np.dtype[Any], shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Values of random bits (NaNs with payloads, NaT, infinities among them), C order."""
    if dtype.names:
        out = np.zeros(shape, dtype)
        for name in dtype.names:
            base, inner = dtype[name].subdtype or (dtype[name], ())
            out[name] = array_of(base, shape + inner, rng)
        return out
    size = math.prod(shape)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.kind == "U":
        points = rng.choice([0, 0x41, 0xDF, 0x4E2D, 0x1F600, 0x10FFFF], (size, dtype.itemsize // 4))
        return points.astype(f"{dtype.byteorder}u4").view(dtype).reshape(shape)
    return np.frombuffer(bytearray(rng.bytes(size * dtype.itemsize)), dtype).reshape(shape)


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...], rng: np.random.Generator) -> torch.Tensor:
    """A tensor of random bits."""
    flat = torch.zeros(math.prod(shape), dtype=dtype)
    host = rng.integers(0, 2 if dtype is torch.bool else 256, flat.numel() * flat.element_size(), np.uint8)
    flat.view(torch.uint8).copy_(torch.from_numpy(host))
    return flat.reshape(shape)


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "as it is": lambda a: a,
    "fortran": lambda a: np.asfortranarray(a),
    "transposed": lambda a: a.T,
    "reversed": lambda a: np.flip(a[None])[0, ...],
    "every other": lambda a: a[..., ::2] if a.ndim else a,
    "expanded": lambda a: np.broadcast_to(a, (2, *a.shape)),
}

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
any_text = st.text(st.characters(exclude_categories=()), max_size=6)
seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@st.composite
def numpy_arrays(draw: st.DrawFn) -> Array:
    array = array_of(draw(st.sampled_from(NUMPY_DTYPES)), draw(shapes), draw(seeds))
    array = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](array)
    if draw(st.booleans()):
        array.flags.writeable = False
    return array


@st.composite
def string_arrays(draw: st.DrawFn) -> Array:
    na: dict[str, Any] = draw(st.sampled_from([{}, {"na_object": None}, {"na_object": math.nan}]))
    values: list[Any] = draw(
        st.lists(st.text(max_size=5) | (st.just(na["na_object"]) if na else st.nothing()), max_size=4)
    )
    array = np.empty(len(values), np.dtypes.StringDType(**na))
    for i, value in enumerate(values):
        array[i] = value
    return array.reshape(draw(st.sampled_from([(-1,), (1, -1)]))) if values else array


@st.composite
def torch_tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(TORCH_DTYPES))
    tensor = tensor_of(dtype, draw(shapes), draw(seeds))
    view = draw(st.sampled_from(["none", "transposed", "expanded", "conj", "neg", "parameter", "frozen"]))
    if view == "transposed" and tensor.ndim > 1:
        return tensor.transpose(0, 1)
    if view == "expanded":
        return tensor.expand(2, *tensor.shape)
    if view == "conj" and tensor.is_complex() and dtype is not torch.complex32:
        return tensor.conj()
    if view == "neg" and tensor.is_complex() and dtype is not torch.complex32:
        return tensor.conj().imag
    if view in ("parameter", "frozen") and (tensor.is_floating_point() or view == "frozen"):
        return torch.nn.Parameter(tensor, requires_grad=view == "parameter")
    return tensor


@st.composite
def jax_arrays(draw: st.DrawFn) -> Any:
    dtype = dtype_from_name(draw(st.sampled_from(JAX_DTYPES)))
    return jnp.asarray(array_of(dtype, draw(shapes), draw(seeds)))


@st.composite
def numpy_scalars(draw: st.DrawFn) -> np.generic:
    if draw(st.integers(0, 9)) == 0:
        return np.str_(draw(any_text) + draw(st.sampled_from(["", "\0"])))
    scalar: np.generic = array_of(draw(st.sampled_from(NUMPY_DTYPES)), (1,), draw(seeds))[0]
    return scalar


def _long(part: Any) -> Any:
    return part * 1000


plain_leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**53 - 1, 2**53, -(2**53), 2**63, -(2**64), 10**40])
    | st.floats()
    | st.sampled_from([-0.0, 5e-324, 1e16, 1e22, struct.unpack("<d", b"\x01\0\0\0\0\0\xf8\xff")[0]])
    | st.complex_numbers(allow_nan=True)
    | any_text
    | st.binary(max_size=6)
    | st.sampled_from(["long ", "\ud800 ", b"\0\xff"]).map(_long)
)
leaves = plain_leaves | numpy_scalars() | numpy_arrays() | string_arrays() | torch_tensors() | jax_arrays()
keys: st.SearchStrategy[str | int] = (
    st.text(max_size=4) | st.sampled_from(AWKWARD_KEYS) | st.integers(-3, 3) | st.sampled_from([2**63, -(2**70)])
)


def trees(of: st.SearchStrategy[Any] = leaves, max_leaves: int = 8) -> st.SearchStrategy[Any]:
    """Nested containers of leaves, empty ones and a leaf alone among them."""
    return st.recursive(
        of,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(keys, inner, max_size=4)
            | st.dictionaries(keys, inner, max_size=4).map(OrderedDict)
        ),
        max_leaves=max_leaves,
    )


def assert_same(found: Any, expected: Any, path: str = "") -> None:
    """Equality of trees in container type, key order, kind, dtype, shape and bits."""
    want = np.ndarray if isinstance(expected, np.memmap) else type(expected)
    for family in (np.generic, jnp.ndarray):  # np.longlong and np.int64 are one dtype; jax's own class is private
        want = family if isinstance(expected, family) else want
    if not (isinstance(found, want) if want in (np.generic, jnp.ndarray) else type(found) is want):
        raise AssertionError(f"{path}: {type(found)} came back, {want} went in")
    if isinstance(expected, dict):
        assert list(found) == list(expected), path
        assert [type(key) for key in found] == [type(key) for key in expected], path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}/{key!r}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{path}/{i}")
    elif isinstance(expected, torch.Tensor):
        _assert_same_tensor(found, expected, path)
    elif isinstance(expected, np.ndarray | np.generic | jnp.ndarray):
        _assert_same_array(found, expected, path)
    else:
        assert _bits(found) == _bits(expected), f"{path}: {found!r} came back, {expected!r} went in"


def _bits(leaf: Any) -> object:
    if type(leaf) is float:
        return struct.pack("<d", leaf)
    return struct.pack("<dd", leaf.real, leaf.imag) if type(leaf) is complex else leaf


def _assert_same_tensor(found: torch.Tensor, expected: torch.Tensor, path: str) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), path
    if isinstance(expected, torch.nn.Parameter):
        assert found.requires_grad == expected.requires_grad, path
    if found.numel():
        one, other = (t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1) for t in (found, expected))
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), path


def _assert_same_array(found: Any, expected: Any, path: str) -> None:
    if isinstance(expected, np.str_ | np.bytes_):  # numpy's own comparison and conversion drop trailing NULs
        plain: Any = str if isinstance(expected, np.str_) else bytes
        assert (len(found), plain.__eq__(found, expected)) == (len(expected), True), f"{path}: {found!r}, {expected!r}"
        return
    assert found.dtype == expected.dtype, f"{path}: {found.dtype} came back, {expected.dtype} went in"
    assert found.shape == expected.shape, path
    one, other = np.asarray(found), np.asarray(expected)
    if one.dtype.kind == "T":
        assert [_string(v) for v in one.ravel()] == [_string(v) for v in other.ravel()], path
    elif one.dtype.names:
        for name in one.dtype.names:  # what lies between the fields is nobody's value
            _assert_same_array(one[name], other[name], f"{path}.{name}")
    else:
        assert _value_bytes(one) == _value_bytes(other), f"{path}: {one!r} came back, {other!r} went in"


def _string(value: Any) -> object:
    return "nan" if isinstance(value, float) else value and str(value)


def _value_bytes(array: Array) -> bytes:
    if array.dtype.kind in "fc" and array.dtype.itemsize in (16, 32) and array.dtype.name != "complex128":
        padded = np.frombuffer(array.tobytes(), np.uint8).reshape(-1, 16)  # x86: 10 bytes of value, 6 of padding
        return padded[:, 6:].tobytes() if array.dtype.byteorder == ">" else padded[:, :10].tobytes()
    return array.tobytes()
