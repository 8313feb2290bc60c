"""Plain leaves: a lossless encoding of Python and numpy scalars (and tiny arrays) as JSON values.

None, booleans, strings, integers below 2**53 and finite floats stand for themselves; everything else is an object with
the tag "$" (docs/format.md, "Plain leaves"). Decoding runs no code of the checkpoint's, with one exception that the
caller must allow: a pickled leaf.
"""

from __future__ import annotations

import base64
import math
import pickle
import struct
from typing import Any

import numpy as np

from rl_ckpt.errors import CorruptionError, UntrustedDataError
from rl_ckpt.state.arrays import KINDS, ArraySpec, UnsupportedLeafError, flat_bytes, from_host, to_host
from rl_ckpt.state.dtypes import dtype_from_name, dtype_name

Json = None | bool | int | float | str | list[Any] | dict[str, Any]
"""A JSON value. (msgspec takes no recursive alias, so the inside of lists and objects is not typed.)"""

_SAFE_INT = 2**53
_MISSING_STRINGS: dict[str, dict[str, Any]] = {"": {}, "none": {"na_object": None}, "nan": {"na_object": math.nan}}


def encode(leaf: object) -> Json:
    """A plain leaf as JSON.

    Raises:
        UnsupportedLeafError: It is no plain leaf.
    """
    kind = type(leaf)
    if leaf is None or kind is bool:
        return leaf  # type: ignore[return-value]  # None or bool, by the line above
    if isinstance(leaf, np.generic):
        return _encode_scalar(leaf)
    if kind is int:
        assert isinstance(leaf, int)
        return leaf if abs(leaf) < _SAFE_INT else {"$": "int", "v": hex(leaf)}
    if kind is float:
        assert isinstance(leaf, float)
        return leaf if math.isfinite(leaf) else {"$": "float", "v": struct.pack("<d", leaf).hex()}
    if kind is str:
        assert isinstance(leaf, str)
        return leaf if is_utf8(leaf) else {"$": "str", "v": _b64(leaf.encode("utf-8", "surrogatepass"))}
    if kind is bytes:
        assert isinstance(leaf, bytes)
        return {"$": "bytes", "v": _b64(leaf)}
    if kind is complex:
        assert isinstance(leaf, complex)
        return {"$": "complex", "v": struct.pack("<dd", leaf.real, leaf.imag).hex()}
    raise UnsupportedLeafError(
        f"a {kind.__module__}.{kind.__qualname__} is neither an array nor plain data; turn it into arrays, numbers, "
        "strings and containers of them, or allow pickled leaves with `allow_pickle=True` (at save and again at load)"
    )


def encode_array(leaf: Any, spec: ArraySpec) -> Json:
    """A 0-dim or empty array as JSON."""
    return {
        "$": "array",
        "kind": spec.kind,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "v": _b64(bytes(flat_bytes(to_host(leaf, spec.kind)))),
    }


def encode_strings(leaf: Any) -> Json:
    """An array of numpy's variable-width strings as JSON.

    Raises:
        UnsupportedLeafError: Its dtype is another than `StringDType()` with None, NaN or nothing for missing values.
    """
    name = next((name for name, na in _MISSING_STRINGS.items() if np.dtypes.StringDType(**na) == leaf.dtype), None)
    if name is None:
        raise UnsupportedLeafError(
            f"an array of dtype {leaf.dtype!r}; use StringDType() or, for missing values, na_object=None or NaN"
        )
    values: list[Json] = [encode(v) if isinstance(v, str) else None for v in leaf.ravel().tolist()]
    return {"$": "strings", "na": name, "shape": list(leaf.shape), "v": values}


def encode_pickle(leaf: object) -> bytes:
    """A leaf by pickle.

    Raises:
        UnsupportedLeafError: It can't be pickled.
    """
    try:
        return pickle.dumps(leaf, protocol=5)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise UnsupportedLeafError(f"a {type(leaf).__name__} that can't be pickled either: {error}") from error


def decode_pickle(data: bytes, path: str, allow_pickle: bool) -> object:
    """The leaf that `encode_pickle` wrote.

    Raises:
        UntrustedDataError: The caller did not allow it.
    """
    check_pickle_allowed(path, allow_pickle)
    return pickle.loads(data)


def check_pickle_allowed(path: str, allow_pickle: bool) -> None:
    """Refuses to load a pickled leaf.

    Raises:
        UntrustedDataError: The caller did not allow it.
    """
    if not allow_pickle:
        raise UntrustedDataError(
            f"{path!r} was saved with pickle, and loading it would run code from the checkpoint; pass "
            "`allow_pickle=True` if you trust who wrote it, or leave it out with `select`"
        )


def decode(value: Json, path: str = "", allow_pickle: bool = False, as_numpy: bool = False) -> Any:
    """The leaf that the encoders wrote.

    Args:
        value: JSON value.
        path: Of the leaf, for messages.
        allow_pickle: Whether a pickled leaf may run code.
        as_numpy: Gives 0-dim and empty arrays of other kinds as numpy arrays.

    Raises:
        UntrustedDataError: A pickled leaf that the caller did not allow.
        CorruptionError: An unknown tag (a damaged file, or one of a newer release).
    """
    if not isinstance(value, dict):
        return value
    try:
        return _decode_tagged(value, path, allow_pickle, as_numpy)
    except (KeyError, TypeError, ValueError, OverflowError, struct.error, MemoryError, RecursionError) as error:
        raise CorruptionError(f"{path!r}: no plain leaf is {str(value)[:200]}: {error}") from error


def is_encoded(value: Json) -> bool:
    """Whether a JSON value looks like what the encoders write: an object has a tag and a value."""
    return not isinstance(value, list) and (not isinstance(value, dict) or ("$" in value and "v" in value))


def _decode_tagged(value: dict[str, Any], path: str, allow_pickle: bool, as_numpy: bool) -> Any:
    tag, v = value["$"], value["v"]
    if tag == "strings":
        return _decode_strings(value)
    if not isinstance(v, str):
        raise TypeError("its value is no text")
    match tag:
        case "int":
            return int(v, 16)
        case "float":
            return struct.unpack("<d", bytes.fromhex(v))[0]
        case "complex":
            return complex(*struct.unpack("<dd", bytes.fromhex(v)))
        case "str":
            return base64.b64decode(v).decode("utf-8", "surrogatepass")
        case "bytes":
            return base64.b64decode(v)
        case "np.str":
            return np.str_(base64.b64decode(v).decode("utf-8", "surrogatepass"))
        case "np.bytes":
            return np.bytes_(base64.b64decode(v))
        case "pickle":
            return decode_pickle(base64.b64decode(v), path, allow_pickle)
        case "scalar":
            return np.frombuffer(bytearray(base64.b64decode(v)), dtype_from_name(str(value["dtype"])))[0]
        case "array":
            shape = tuple(value["shape"])
            dtype = dtype_from_name(str(value["dtype"]))
            if str(value["kind"]) not in KINDS:
                raise ValueError(f"there are no arrays of kind {value['kind']!r}")
            host = np.frombuffer(bytearray(base64.b64decode(v)), np.uint8)
            if host.size != math.prod(shape) * dtype.itemsize:  # an empty one of any size is made without values
                raise ValueError(f"{host.size} bytes are no {dtype} array of shape {shape}")
            host = host.view(dtype).reshape(shape) if host.size else np.empty(shape, dtype)
            return from_host(host, "numpy" if as_numpy else str(value["kind"]))
    raise CorruptionError(f"{path!r}: unknown tag {tag!r} in the manifest; a newer release may know it")


def kind_tag(value: Json) -> str:
    """The kind of leaf that a JSON value stands for: the tag, or the JSON type's Python name."""
    return str(value.get("$")) if isinstance(value, dict) else type(value).__name__


def _encode_scalar(leaf: np.generic) -> Json:
    if isinstance(leaf, np.str_):  # its dtype would drop trailing NULs
        return {"$": "np.str", "v": _b64(str.encode(leaf, "utf-8", "surrogatepass"))}  # so would str(leaf)
    if isinstance(leaf, np.bytes_):
        return {"$": "np.bytes", "v": _b64(bytes(leaf))}
    name = dtype_name(leaf.dtype)
    if name is None or not leaf.dtype.itemsize:
        raise UnsupportedLeafError(f"a numpy scalar of dtype {leaf.dtype}")
    return {"$": "scalar", "dtype": name, "v": _b64(np.asarray(leaf).tobytes())}


def _decode_strings(value: dict[str, Json]) -> Any:
    na = _MISSING_STRINGS[str(value["na"])]
    items = value["v"]
    assert isinstance(items, list)
    flat = np.empty(len(items), np.dtypes.StringDType(**na))
    for i, item in enumerate(items):
        flat[i] = na["na_object"] if item is None else decode(item)
    return flat.reshape(value["shape"])


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def is_utf8(text: str) -> bool:
    """Whether a string can stand in a JSON file as it is (it has no lone surrogates)."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)
