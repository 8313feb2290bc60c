"""Values that RLlib and environments hold, as state trees and back.

Owns: turning what a state tree does not take (sets, deques, default dicts, keys of any kind, random generators, object
arrays) into what it takes, and lists of a thousand equal things into one array. Promises: what comes back has the same
types, dtypes, order and bits, in memory of its own; nothing is pickled, and nothing of the checkpoint's is run. What
has no such form is an `UnsavableError` that names it. Does not know: what the values are for.

A tagged value is a dict with the key "$".
"""

from __future__ import annotations

import json
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from rl_ckpt.errors import CorruptionError

TAG = "$"
_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes))
_FACTORIES: dict[str, Callable[[], Any]] = {"dict": dict, "float": float, "int": int, "list": list, "set": set}
_PACKED = {"bool": (bool, np.bool_), "int": (int, np.int64), "float": (float, np.float64)}
_BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
_SHORTEST = 2  # a list that is packed has at least as many items


class UnsavableError(Exception):
    """Inside this room only: what can't be saved, where it is, and why."""


def to_data(value: Any, at: str = "") -> Any:
    """A value as a state tree; arrays and tensors by reference.

    Args:
        value: Containers, scalars, arrays, tensors, numpy generators, nested.
        at: Where it stands, for the error.

    Raises:
        UnsavableError: Something in it is none of these.
    """
    kind = type(value)
    if kind in _PLAIN or isinstance(value, np.generic):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach()
    encode = _ENCODERS.get(kind)
    if encode is None:
        raise UnsavableError(f"{at or 'the value'} is a {kind.__module__}.{kind.__qualname__}")
    return encode(value, at)


def from_data(tree: Any) -> Any:
    """The reverse of `to_data`; arrays are copies.

    Raises:
        CorruptionError: A tag that this release does not know.
    """
    if isinstance(tree, np.ndarray):
        return np.array(tree)
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if type(tree) is list:
        return [from_data(item) for item in tree]
    if type(tree) is tuple:
        return tuple(from_data(item) for item in tree)
    if not isinstance(tree, dict):
        return tree
    if TAG not in tree:
        return type(tree)((key, from_data(item)) for key, item in tree.items())
    decode = _DECODERS.get(tree[TAG])
    if decode is None:
        raise CorruptionError(f"a value of the unknown kind {tree[TAG]!r}; a newer release may read it")
    return decode(tree)


def _items(value: dict[Any, Any], at: str) -> list[Any]:
    return [[to_data(key, f"a key of {at}"), to_data(item, f"{at}[{key!r}]")] for key, item in value.items()]


def _dict(value: dict[Any, Any], at: str) -> Any:
    name = type(value).__name__
    if all(type(key) in (str, int) for key in value) and TAG not in value:
        return type(value)((key, to_data(item, f"{at}[{key!r}]")) for key, item in value.items())
    return {TAG: name, "items": _items(value, at)}


def _defaultdict(value: defaultdict[Any, Any], at: str) -> Any:
    factory = value.default_factory
    name = next((name for name, known in _FACTORIES.items() if known is factory), None)
    if name is None and factory is not None:
        raise UnsavableError(f"{at or 'the value'} is a defaultdict of {factory!r}")
    return {TAG: "defaultdict", "factory": name, "items": _items(value, at)}


def _generator(value: np.random.Generator | np.random.RandomState, at: str) -> Any:
    bits = value.bit_generator if isinstance(value, np.random.Generator) else value._bit_generator
    name = type(bits).__name__
    if name not in _BIT_GENERATORS:
        raise UnsavableError(f"{at or 'the value'} is a generator of {type(bits).__module__}.{name}")
    return {TAG: type(value).__name__, "state": json.dumps(bits.state, default=_numbers)}


def _numbers(value: Any) -> Any:
    return value.tolist()  # numpy's arrays and scalars; nothing else is in a generator's state


def _list(value: Sequence[Any], at: str) -> Any:
    """One array for many equal things, else the items."""
    kind = type(value[0]) if len(value) >= _SHORTEST else None
    if kind is None or any(type(item) is not kind for item in value):
        return [to_data(item, f"{at}[{index}]") for index, item in enumerate(value)]
    packed = _pack(kind, value, at)
    return packed if packed is not None else [to_data(item, f"{at}[{index}]") for index, item in enumerate(value)]


def _pack(kind: type, value: Sequence[Any], at: str) -> Any:
    first = value[0]
    if kind.__name__ in _PACKED and _PACKED[kind.__name__][0] is kind:
        if kind is int and any(not -(2**63) <= item < 2**63 for item in value):
            return None
        return {TAG: "list", "of": kind.__name__, "values": np.array(value, _PACKED[kind.__name__][1])}
    if issubclass(kind, np.number | np.bool_):
        return {TAG: "list", "of": "scalar", "values": np.array(value, first.dtype)}
    if kind is np.ndarray and not first.dtype.hasobject:
        if all(item.shape == first.shape and item.dtype == first.dtype for item in value):
            return {TAG: "list", "of": "array", "values": np.stack(value)}
        return None
    if kind is dict:
        keys = list(first)
        if any(list(item) != keys for item in value):
            return None
        columns = [_list([item[key] for item in value], f"{at}[…][{key!r}]") for key in keys]
        return {TAG: "list", "of": "dict", "n": len(value), "keys": to_data(keys, f"a key of {at}"), "columns": columns}
    if kind is tuple and first and all(len(item) == len(first) for item in value):
        columns = [_list([item[i] for item in value], f"{at}[…][{i}]") for i in range(len(first))]
        return {TAG: "list", "of": "tuple", "columns": columns}
    return None


def _array(value: np.ndarray[Any, Any], at: str) -> Any:
    if not value.dtype.hasobject:
        return value
    return {TAG: "objects", "shape": list(value.shape), "items": _list(list(value.ravel()), at)}


_ENCODERS: dict[type, Callable[[Any, str], Any]] = {
    dict: _dict,
    OrderedDict: _dict,
    defaultdict: _defaultdict,
    list: _list,
    tuple: lambda value, at: tuple(to_data(item, f"{at}[{index}]") for index, item in enumerate(value)),
    set: lambda value, at: {TAG: "set", "items": _list(list(value), at)},
    frozenset: lambda value, at: {TAG: "frozenset", "items": _list(list(value), at)},
    deque: lambda value, at: {TAG: "deque", "maxlen": value.maxlen, "items": _list(list(value), at)},
    np.ndarray: _array,
    np.random.Generator: _generator,
    np.random.RandomState: _generator,
}


def _unpack(tree: dict[str, Any]) -> list[Any]:
    match tree["of"]:
        case "bool" | "int" | "float":
            values: list[Any] = tree["values"].tolist()
            return values
        case "scalar":
            return list(tree["values"])
        case "array":
            return [np.array(item) for item in tree["values"]]
        case "dict":
            keys, columns = from_data(tree["keys"]), [from_data(column) for column in tree["columns"]]
            return [dict(zip(keys, (column[i] for column in columns), strict=True)) for i in range(tree["n"])]
        case "tuple":
            return list(zip(*(from_data(column) for column in tree["columns"]), strict=True))
        case other:
            raise CorruptionError(f"a list of the unknown kind {other!r}; a newer release may read it")


def _unpack_defaultdict(tree: dict[str, Any]) -> defaultdict[Any, Any]:
    factory = None if tree["factory"] is None else _FACTORIES[tree["factory"]]
    return defaultdict(factory, _pairs(tree))


def _pairs(tree: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [(from_data(key), from_data(item)) for key, item in tree["items"]]


def _objects(tree: dict[str, Any]) -> Any:
    shape = tuple(tree["shape"])
    array = np.empty(shape, object)
    for index, item in zip(np.ndindex(shape), from_data(tree["items"]), strict=True):
        array[index] = item
    return array


def generator_state(tree: dict[str, Any]) -> dict[str, Any]:
    """The state of a generator's bits, as numpy wants it."""
    state: dict[str, Any] = json.loads(tree["state"])
    dtype = np.uint32 if state["bit_generator"] == "MT19937" else np.uint64

    def arrays(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: arrays(item) for key, item in value.items()}
        return np.array(value, dtype) if isinstance(value, list) else value

    full: dict[str, Any] = arrays(state)
    return full


def _new_generator(tree: dict[str, Any]) -> Any:
    state = generator_state(tree)
    name = state["bit_generator"]
    if name not in _BIT_GENERATORS:
        raise CorruptionError(f"a random generator of the unknown kind {name!r}")
    bits = getattr(np.random, name)()
    bits.state = state
    return np.random.Generator(bits) if tree[TAG] == "Generator" else np.random.RandomState(bits)


_DECODERS: dict[Any, Callable[[dict[str, Any]], Any]] = {
    "dict": lambda tree: dict(_pairs(tree)),
    "OrderedDict": lambda tree: OrderedDict(_pairs(tree)),
    "defaultdict": _unpack_defaultdict,
    "list": _unpack,
    "set": lambda tree: set(from_data(tree["items"])),
    "frozenset": lambda tree: frozenset(from_data(tree["items"])),
    "deque": lambda tree: deque(from_data(tree["items"]), tree["maxlen"]),
    "objects": _objects,
    "Generator": _new_generator,
    "RandomState": _new_generator,
}
