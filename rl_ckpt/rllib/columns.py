"""Columns: lists of Python values as a few arrays and a schema, and back, exactly.

Owns: how many small values (episodes with their ids, counters, infos, numpy arrays) become a handful of large arrays,
so that a checkpoint's manifest has an entry per column and not one per value. Promises: what comes back equals what
went in, in type, key order, dtype, shape and bits; equal values give equal arrays. Refuses what it does not know, by
name, before anything is stored; nothing is pickled. Does not know: episodes, blocks, checkpoints.

A schema is JSON: {"k": kind, …}. A column of values of more than one type is split by type ("mixed").
"""

from __future__ import annotations

import itertools
import json
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rl_ckpt.errors import CorruptionError, InvalidInputError
from rl_ckpt.state.dtypes import dtype_from_name, dtype_name

Array = np.ndarray[Any, np.dtype[Any]]
Schema = dict[str, Any]

_INTS = (np.int8, np.int16, np.int32, np.int64)
_MAX_VARIANTS = 16  # of dicts by their keys; with more, a dict is a list of pairs
_DICTS: dict[type, str] = {dict: "dict", OrderedDict: "OrderedDict"}
_ESCAPED = str.maketrans({char: f"%{ord(char):02X}" for char in "%.#|["})
_LISTS: dict[type, str] = {list: "list", tuple: "tuple", deque: "deque"}


@dataclass(frozen=True, slots=True)
class Columns:
    """Values as arrays."""

    rows: int
    """How many values."""
    schema: str
    """JSON; says what the arrays mean."""
    arrays: dict[str, Array] = field(default_factory=dict)
    """By name; each C-contiguous."""

    @property
    def nbytes(self) -> int:
        """Of all arrays, in bytes."""
        return sum(array.nbytes for array in self.arrays.values())


def encode(values: Sequence[Any], where: str) -> Columns:
    """Turns values into columns.

    Args:
        values: None, bools, numbers, strings, bytes, numpy scalars and arrays; dict, OrderedDict, list, tuple and deque
            of them, nested.
        where: What they are, for messages.

    Returns:
        The columns. Arrays are new, or the one array given where there is a single one.

    Raises:
        InvalidInputError: A value of another type.
    """
    encoder = _Encoder(where)
    schema = encoder.column(values, "")
    return Columns(len(values), json.dumps(schema, separators=(",", ":")), encoder.arrays)


def decode(columns: Columns, where: str) -> list[Any]:
    """The values that `encode` took.

    Args:
        columns: What it gave.
        where: What they are, for messages.

    Returns:
        The values; arrays among them are views of the columns' arrays.

    Raises:
        CorruptionError: Arrays and schema don't fit together.
    """
    try:
        return _decode(json.loads(columns.schema), columns.arrays, "", columns.rows)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CorruptionError(f"{where}: its columns don't fit together ({type(error).__name__}: {error})") from error


class _Encoder:
    """One call of `encode`."""

    def __init__(self, where: str) -> None:
        self.arrays: dict[str, Array] = {}
        self._where = where

    def column(self, values: Sequence[Any], name: str) -> Schema:
        """Schema of a column; its arrays are added under names that begin with `name`."""
        types = set(map(type, values))
        if len(types) > 1:
            return self._split(values, list(map(type, values)), name)
        if not types:
            return {"k": "empty"}
        (kind,) = types
        encoder = _ENCODERS.get(kind)
        if encoder is not None:
            return encoder(self, values, name)
        if issubclass(kind, np.generic):
            return self._scalars(values, name)
        raise InvalidInputError(
            f"{self._where}{f' ({name})' if name else ''} holds a {kind.__module__}.{kind.__qualname__}, which is "
            "neither an array nor plain data"
        )

    def _split(self, values: Sequence[Any], keys: Sequence[Hashable], name: str) -> Schema:
        """By type, or whatever `keys` says; groups stand in the order in which their first value comes."""
        codes: dict[Hashable, int] = {}
        which = [codes.setdefault(key, len(codes)) for key in keys]
        groups: list[list[Any]] = [[] for _ in codes]
        for value, code in zip(values, which, strict=True):
            groups[code].append(value)
        schemas = [[len(group), self.column(group, _inner(name, i))] for i, group in enumerate(groups)]
        return {"k": "mixed", "which": self._integers(which, _inner(name, "which")), "of": schemas}

    def _integers(self, values: Sequence[int] | Array, name: str) -> Schema:
        """Numbers of our own making (lengths, codes): never large, often all the same."""
        array = np.asarray(values, np.int64)
        if len(array) and (array == array[0]).all():
            return {"k": "int", "v": int(array[0])}
        self.arrays[name] = narrowed(array)
        return {"k": "int"}

    def none(self, values: Sequence[None], name: str) -> Schema:
        return {"k": "none"}

    def bools(self, values: Sequence[bool], name: str) -> Schema:
        if len(set(values)) == 1:
            return {"k": "bool", "v": values[0]}
        self.arrays[name] = np.array(values, np.bool_)
        return {"k": "bool"}

    def ints(self, values: Sequence[int], name: str) -> Schema:
        try:
            array = np.array(values, np.int64)
        except OverflowError:
            return {"k": "hex", "of": self.strings([hex(value) for value in values], name)}
        if len(array) > 1 and (array == array[0]).all():
            return {"k": "int", "v": values[0]}
        self.arrays[name] = narrowed(array)
        return {"k": "int"}

    def floats(self, values: Sequence[float], name: str) -> Schema:
        array = np.array(values, np.float64)
        if len(array) > 1 and np.isfinite(array[0]) and (array.view(np.int64) == array.view(np.int64)[0]).all():
            return {"k": "float", "v": values[0]}
        self.arrays[name] = array
        return {"k": "float"}

    def complexes(self, values: Sequence[complex], name: str) -> Schema:
        self.arrays[name] = np.array(values, np.complex128)
        return {"k": "complex"}

    def strings(self, values: Sequence[str], name: str) -> Schema:
        different = list(dict.fromkeys(values))
        if len(values) > 1 and len(different) == 1 and values[0].isascii():
            return {"k": "str", "v": values[0]}
        if len(values) >= 16 and 4 * len(different) <= len(values):
            codes = {value: code for code, value in enumerate(different)}
            which = self._integers([codes[value] for value in values], _inner(name, "code"))
            return {"k": "coded", "code": which, "n": len(different), "of": self._texts(different, name)}
        return self._texts(values, name)

    def _texts(self, values: Sequence[str], name: str) -> Schema:
        return {"k": "str", "of": self.byte_strings([v.encode("utf-8", "surrogatepass") for v in values], name)}

    def byte_strings(self, values: Sequence[bytes], name: str) -> Schema:
        self.arrays[name] = np.frombuffer(b"".join(values), np.uint8)
        return {"k": "bytes", "n": self._integers(list(map(len, values)), _inner(name, "n"))}

    def dicts(self, values: Sequence[dict[Any, Any]], name: str) -> Schema:
        variants = set(map(tuple, values))
        # Types of all keys, not of the variants': (1,) and (True,) are equal.
        if len(variants) > _MAX_VARIANTS or not set(map(type, itertools.chain.from_iterable(values))) <= {str, int}:
            return self._pairs(values, name)
        if len(variants) > 1:
            return self._split(values, list(map(tuple, values)), name)
        (keys,) = variants
        columns = [self.column([value[key] for value in values], _child(name, key)) for key in keys]
        return {"k": _DICTS[type(values[0])], "keys": list(keys), "of": columns}

    def _pairs(self, values: Sequence[dict[Any, Any]], name: str) -> Schema:
        """Dicts of many different sets of keys, or with keys of other types."""
        lengths = list(map(len, values))
        keys = self.column(list(itertools.chain.from_iterable(values)), _inner(name, "keys"))
        inner = self.column([v for value in values for v in value.values()], _inner(name, "values"))
        kind = _DICTS[type(values[0])]
        return {"k": "pairs", "t": kind, "n": self._integers(lengths, _inner(name, "n")), "keys": keys, "of": inner}

    def lists(self, values: Sequence[Any], name: str) -> Schema:
        """Lists of any lengths, one after the other in a column; tuples of equal length as a column for each place."""
        kind = _LISTS[type(values[0])]
        lengths = list(map(len, values))
        if kind == "tuple" and len(set(lengths)) == 1 and lengths[0] <= _MAX_VARIANTS:
            places = [self.column([v[i] for v in values], _child(name, i)) for i in range(lengths[0])]
            return {"k": "places", "of": places}
        schema = {"k": kind, "n": self._integers(lengths, _inner(name, "n"))}
        if kind == "deque":
            schema["max"] = self.column([value.maxlen for value in values], _inner(name, "max"))
        schema["of"] = self.column(list(itertools.chain.from_iterable(values)), f"{name}[]")
        return schema

    def ndarrays(self, values: Sequence[Array], name: str) -> Schema:
        """Arrays that differ in their first axis at most, one after the other."""
        shapes = {(value.dtype, value.ndim, value.shape[1:]) for value in values}
        if len(shapes) > 1:
            return self._split(values, [(v.dtype, v.ndim, v.shape[1:]) for v in values], name)
        ((dtype, ndim, rest),) = shapes
        dtype_text = self._dtype(dtype, name)
        if ndim == 0:
            self.arrays[name] = np.array([value[()] for value in values], dtype)
            return {"k": "array", "dtype": dtype_text, "ndim": 0, "rest": []}
        # One array alone is taken as it is: a save copies it in any case.
        self.arrays[name] = np.ascontiguousarray(values[0]) if len(values) == 1 else np.concatenate(values)
        lengths = self._integers([len(value) for value in values], _inner(name, "n"))
        return {"k": "array", "dtype": dtype_text, "ndim": ndim, "rest": list(rest), "n": lengths}

    def _scalars(self, values: Sequence[np.generic], name: str) -> Schema:
        dtypes = {value.dtype for value in values}
        if len(dtypes) > 1:
            return self._split(values, [value.dtype for value in values], name)
        (dtype,) = dtypes
        text = self._dtype(dtype, name)
        self.arrays[name] = np.array(values, dtype)
        return {"k": "scalar", "dtype": text}

    def _dtype(self, dtype: np.dtype[Any], name: str) -> str:
        text = dtype_name(dtype)
        if text is None or not dtype.itemsize:
            raise InvalidInputError(f"{self._where} ({name}) holds an array of dtype {dtype}, which can't be stored")
        return text


_ENCODERS: dict[type, Callable[[_Encoder, Any, str], Schema]] = {
    type(None): _Encoder.none,
    bool: _Encoder.bools,
    int: _Encoder.ints,
    float: _Encoder.floats,
    complex: _Encoder.complexes,
    str: _Encoder.strings,
    bytes: _Encoder.byte_strings,
    dict: _Encoder.dicts,
    OrderedDict: _Encoder.dicts,
    list: _Encoder.lists,
    tuple: _Encoder.lists,
    deque: _Encoder.lists,
    np.ndarray: _Encoder.ndarrays,
}


def narrowed(array: Array) -> Array:
    """Integers in the smallest signed dtype that holds them all."""
    if not len(array):
        return array.astype(np.int8)
    low, high = int(array.min()), int(array.max())
    return array.astype(next(t for t in _INTS if np.iinfo(t).min <= low and high <= np.iinfo(t).max))


def _child(name: str, key: str | int) -> str:
    """Name of a column within a column. Distinct keys give distinct names, so names are never stored twice."""
    text = f"#{key}" if isinstance(key, int) else key.translate(_ESCAPED)
    return f"{name}.{text}" if name else text


def _inner(name: str, what: str | int) -> str:
    """Name of what belongs to a column itself: lengths, codes, groups. No key gives such a name."""
    return f"{name}|{what}"


def _decode(schema: Schema, arrays: dict[str, Array], name: str, rows: int) -> list[Any]:
    kind = schema["k"]
    simple = _SIMPLE.get(kind)
    if simple is not None:
        values = [schema["v"]] * rows if "v" in schema else simple(arrays[name])
        if len(values) != rows:
            raise ValueError(f"{len(values)} values of {name!r} where {rows} belong")
        return values
    return _DECODERS[kind](schema, arrays, name, rows)


def _listed(array: Array) -> list[Any]:
    values: list[Any] = array.tolist()
    return values


_SIMPLE: dict[str, Callable[[Array], list[Any]]] = {
    "bool": _listed,
    "int": _listed,
    "float": _listed,
    "complex": _listed,
}


def _lengths(schema: Schema, arrays: dict[str, Array], name: str, rows: int) -> tuple[list[int], int]:
    """Where each value starts in its flat column, one more for the end; and the length of that column."""
    lengths = _decode(schema["n"], arrays, _inner(name, "n"), rows)
    ends = list(itertools.accumulate(lengths, initial=0))
    return ends, ends[-1]


def _cut(flat: Any, ends: list[int]) -> list[Any]:
    return [flat[a:b] for a, b in itertools.pairwise(ends)]


def _decode_bytes(schema: Schema, arrays: dict[str, Array], name: str, rows: int) -> list[Any]:
    ends, _ = _lengths(schema, arrays, name, rows)
    return _cut(arrays[name].tobytes(), ends)


def _decode_str(schema: Schema, arrays: dict[str, Array], name: str, rows: int) -> list[Any]:
    if "v" in schema:
        return [schema["v"]] * rows
    return [v.decode("utf-8", "surrogatepass") for v in _decode_bytes(schema["of"], arrays, name, rows)]


def _decode_coded(schema: Schema, arrays: dict[str, Array], name: str, rows: int) -> list[Any]:
    values = _decode_str(schema["of"], arrays, name, schema["n"])
    return [values[code] for code in _decode(schema["code"], arrays, _inner(name, "code"), rows)]


def _decode_mixed(schema: Schema, arrays: dict[str, Array], name: str, rows: int) -> list[Any]:
    groups = [iter(_decode(of, arrays, _inner(name, i), n)) for i, (n, of) in enumerate(schema["of"])]
    return [next(groups[code]) for code in _decode(schema["which"], arrays, _inner(name, "which"), rows)]


def _decode_dict(schema: Schema, arrays: dict[str, Array], name: str, rows: int) -> list[Any]:
    make: type = OrderedDict if schema["k"] == "OrderedDict" else dict
    keys = schema["keys"]
    columns = [_decode(of, arrays, _child(name, key), rows) for key, of in zip(keys, schema["of"], strict=True)]
    if not columns:
        return [make() for _ in range(rows)]
    return [make(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


def _decode_pairs(schema: Schema, arrays: dict[str, Array], name: str, rows: int) -> list[Any]:
    make: type = OrderedDict if schema["t"] == "OrderedDict" else dict
    ends, total = _lengths(schema, arrays, name, rows)
    keys = _decode(schema["keys"], arrays, _inner(name, "keys"), total)
    values = _decode(schema["of"], arrays, _inner(name, "values"), total)
    return [make(zip(keys[a:b], values[a:b], strict=True)) for a, b in itertools.pairwise(ends)]


def _decode_list(schema: Schema, arrays: dict[str, Array], name: str, rows: int) -> list[Any]:
    ends, total = _lengths(schema, arrays, name, rows)
    parts = _cut(_decode(schema["of"], arrays, f"{name}[]", total), ends)
    if schema["k"] == "tuple":
        return list(map(tuple, parts))
    if schema["k"] == "deque":
        longest = _decode(schema["max"], arrays, _inner(name, "max"), rows)
        return [deque(part, maxlen=n) for part, n in zip(parts, longest, strict=True)]
    return parts


def _decode_places(schema: Schema, arrays: dict[str, Array], name: str, rows: int) -> list[Any]:
    columns = [_decode(of, arrays, _child(name, i), rows) for i, of in enumerate(schema["of"])]
    return list(zip(*columns, strict=True)) if columns else [()] * rows


def _decode_arrays(schema: Schema, arrays: dict[str, Array], name: str, rows: int) -> list[Any]:
    flat = arrays[name]
    if flat.dtype != dtype_from_name(schema["dtype"]) or list(flat.shape[1:]) != schema["rest"]:
        raise ValueError(f"{name!r} is {flat.dtype} of shape {flat.shape}")
    if schema["ndim"] == 0:
        return [np.array(value, flat.dtype) for value in flat]
    ends, total = _lengths(schema, arrays, name, rows)
    if total != len(flat):
        raise ValueError(f"{len(flat)} rows of {name!r} where {total} belong")
    return _cut(flat, ends)


_DECODERS: dict[str, Callable[[Schema, dict[str, Array], str, int], list[Any]]] = {
    "empty": lambda schema, arrays, name, rows: [],
    "none": lambda schema, arrays, name, rows: [None] * rows,
    "hex": lambda schema, arrays, name, rows: [int(v, 16) for v in _decode(schema["of"], arrays, name, rows)],
    "str": _decode_str,
    "coded": _decode_coded,
    "bytes": _decode_bytes,
    "mixed": _decode_mixed,
    "dict": _decode_dict,
    "OrderedDict": _decode_dict,
    "pairs": _decode_pairs,
    "list": _decode_list,
    "tuple": _decode_list,
    "deque": _decode_list,
    "places": _decode_places,
    "array": _decode_arrays,
    "scalar": lambda schema, arrays, name, rows: list(arrays[name]),
}
