"""Values: what people put into configs, as a state tree, and back.

Owns: the tagged form of everything that a state tree has no word for: classes and functions (by reference), partials,
spaces, sets, enums, dataclasses, named tuples, dtypes. Promises: what comes back equals what went in, in value and
type. What can't be stored (code without a name, objects) is recorded as missing, with a description, and asked for when
it is needed: nothing is pickled, and no save fails because of it.

A tagged value is a dict with the key "$"; a dict that has that key itself, or keys that are no str or int, is tagged
too. `compact` makes one leaf of what is plain data throughout: a hundred policies have thousands of settings. Every
value has a place, the path of keys that leads to it, by which it is given where it is missing.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from rl_ckpt.errors import CorruptionError, InvalidInputError
from rl_ckpt.rllib.refs import class_ref, describe, resolve
from rl_ckpt.rllib.spaces import space_from, space_tree
from rl_ckpt.state.arrays import UnsupportedLeafError, kind_of, spec_of
from rl_ckpt.state.dtypes import dtype_from_name, dtype_name
from rl_ckpt.state.leaves import is_utf8
from rl_ckpt.state.paths import join

TAG = "$"
_SMALL = 6  # nodes; a text in their stead takes three
_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes))
_LISTS: dict[type, str] = {set: "set", frozenset: "frozenset", collections.deque: "deque", range: "range"}


def compact(tree: Any) -> Any:
    """An encoded value with fewer leaves: its parts that JSON holds without loss as JSON, where they are large."""
    if _nodes(tree) <= _SMALL:
        return tree
    if _is_json(tree):
        return {TAG: "json", "v": json.dumps(tree, separators=(",", ":"))}
    if type(tree) in (list, tuple):
        return type(tree)(map(compact, tree))
    if type(tree) in (dict, OrderedDict) and TAG not in tree:
        return type(tree)((key, compact(item)) for key, item in tree.items())
    if type(tree) is dict and "fields" in tree:  # of other tagged values, not all parts are values themselves
        return {**tree, "fields": {name: compact(item) for name, item in tree["fields"].items()}}
    return tree


def missing(why: str) -> dict[str, Any]:
    """Stands for what is not stored."""
    return {TAG: "missing", "v": why}


class Encoder:
    """Turns values into trees. One object for one value; `special` is for rooms that know more types."""

    def __init__(self) -> None:
        self._above: set[int] = set()

    def encode(self, value: object) -> Any:
        """A value as a tree of dicts, lists, tuples, arrays (the same objects, not copies) and plain leaves."""
        if type(value) in _PLAIN:
            return value
        if id(value) in self._above:
            return missing("a value that contains itself")
        self._above.add(id(value))
        try:
            found = self.special(value)
            return self._encode(value) if found is None else found
        except InvalidInputError as why:
            return missing(str(why))
        finally:
            self._above.discard(id(value))

    def special(self, value: Any) -> Any | None:
        """The tree of a value of a type that this class does not know; None for all others."""
        return None

    def _encode(self, value: Any) -> Any:
        kind = type(value)
        if kind in (list, tuple):
            return kind(self.encode(item) for item in value)
        if kind in (dict, OrderedDict):
            return self._dict(value)
        if kind in _LISTS:
            return self._items(value)
        if isinstance(value, enum.Enum):
            return {TAG: "enum", "class": class_ref(kind), "name": _member(value)}
        if isinstance(value, gym.Space):
            return {TAG: "space", "v": space_tree(value)}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._dataclass(value)
        if isinstance(value, functools.partial):
            return {
                TAG: "partial",
                "function": self.encode(value.func),
                "args": self.encode(value.args),
                "kwargs": self.encode(dict(value.keywords)),
            }
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            return {TAG: "namedtuple", "class": class_ref(kind), "v": [self.encode(item) for item in value]}
        return self._leaf(value)

    def _leaf(self, value: Any) -> Any:
        if isinstance(value, np.dtype):
            name = dtype_name(value)
            if name is None:
                raise InvalidInputError(f"the dtype {value}")
            return {TAG: "dtype", "v": name}
        if isinstance(value, Path):
            return {TAG: "path", "v": str(value)}
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.dtype | torch.device):
            return {TAG: f"torch.{type(value).__name__}", "v": str(value).removeprefix("torch.")}
        if _is_storable(value):
            return value
        return {TAG: "ref", "v": class_ref(value)}

    def _dict(self, value: Mapping[Any, Any]) -> Any:
        if TAG not in value and all(type(key) is int or (type(key) is str and is_utf8(key)) for key in value):
            return type(value)((key, self.encode(item)) for key, item in value.items())  # type: ignore[call-arg]
        items = [[self.encode(key), self.encode(item)] for key, item in value.items()]
        return {TAG: "dict", "ordered": isinstance(value, OrderedDict), "v": items}

    def _items(self, value: Any) -> Any:
        if isinstance(value, range):
            return {TAG: "range", "v": [value.start, value.stop, value.step]}
        # Of a set the order differs between processes; a checkpoint of the same config is the same.
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else list(value)
        more = {"maxlen": value.maxlen} if isinstance(value, collections.deque) else {}
        return {TAG: _LISTS[type(value)], "v": [self.encode(item) for item in items], **more}

    def _dataclass(self, value: Any) -> Any:
        names = [field.name for field in dataclasses.fields(value)]
        if hasattr(value, "__post_init__"):  # it is not called again; other attributes are caches, or hidden on purpose
            names += [name for name in getattr(value, "__dict__", {}) if name not in names]
        fields = {name: self.encode(getattr(value, name)) for name in names if hasattr(value, name)}
        for name, default in _field_defaults(type(value)).items():
            if name in fields and same(fields[name], Encoder().encode(default)):
                del fields[name]
        return {TAG: "dataclass", "class": self.encode(type(value)), "fields": fields}


class Decoder:
    """Turns trees into values; gathers what is missing instead of stopping at the first of it.

    Attributes:
        problems: By place, what could not be had; the values returned meanwhile are of no use.
        used: The places of `given` that were taken.
    """

    def __init__(self, given: Mapping[str, Any] | None = None) -> None:
        self.given = dict(given or {})
        self.problems: dict[str, str] = {}
        self.used: set[str] = set()

    def decode(self, tree: Any, place: str) -> Any:
        """The value at a place, as given by the caller, or as it was saved.

        Raises:
            CorruptionError: The data have a form that this release does not know.
        """
        if place in self.given:
            self.used.add(place)
            return self.given[place]
        kind = type(tree)
        if kind in (list, tuple):
            return kind(self.decode(item, join(place, i)) for i, item in enumerate(tree))
        if kind not in (dict, OrderedDict):
            return tree
        if TAG not in tree:
            return kind((key, self.decode(item, join(place, key))) for key, item in tree.items())
        try:
            return self._tagged(tree, place)
        except InvalidInputError as why:
            return self.problem(place, str(why))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptionError(f"{place}: no value is {str(tree)[:200]}: {error!r}") from error

    def problem(self, place: str, why: str) -> None:
        """Notes what could not be had."""
        self.problems[place] = why

    def special(self, tree: Mapping[str, Any], place: str) -> Any:
        """The value of a tag that this class does not know.

        Raises:
            CorruptionError: Nobody knows it.
        """
        raise CorruptionError(f"{place}: unknown tag {tree[TAG]!r}; a newer release may know it")

    def cls(self, tree: Any, place: str, base: type, what: str) -> Any:
        """A class that must be a subclass of `base`; None where there is a problem."""
        found = self.decode(tree, place)
        if place in self.problems:
            return None
        if not (isinstance(found, type) and issubclass(found, base)):
            return self.problem(place, f"{describe(found)} is given or found, but {what} is needed")
        return found

    def _tagged(self, tree: Mapping[str, Any], place: str) -> Any:
        tag = tree[TAG]
        if tag == "missing":
            return self.problem(place, str(tree["v"]))
        if tag == "ref":
            return resolve(tree["v"])
        if tag in _DECODERS:
            return _DECODERS[tag](self, tree, place)
        return self.special(tree, place)

    def _list(self, tree: Mapping[str, Any], place: str) -> list[Any]:
        return [self.decode(item, join(place, i)) for i, item in enumerate(tree["v"])]

    def _dict(self, tree: Mapping[str, Any], place: str) -> Any:
        items = [
            (self.decode(key, join(place, f"key {i}")), self.decode(item, join(place, i)))
            for i, (key, item) in enumerate(tree["v"])
        ]
        return OrderedDict(items) if tree["ordered"] else dict(items)

    def _enum(self, tree: Mapping[str, Any], place: str) -> Any:
        cls = self.cls({TAG: "ref", "v": tree["class"]}, place, enum.Enum, "an Enum")
        return None if cls is None else cls[tree["name"]]

    def _namedtuple(self, tree: Mapping[str, Any], place: str) -> Any:
        cls = self.cls({TAG: "ref", "v": tree["class"]}, join(place, "class"), tuple, "a named tuple")
        values = self._list(tree, place)
        return None if cls is None else cls._make(values)

    def _partial(self, tree: Mapping[str, Any], place: str) -> Any:
        before = len(self.problems)
        function, args, kwargs = (self.decode(tree[part], join(place, part)) for part in ("function", "args", "kwargs"))
        return functools.partial(function, *args, **kwargs) if len(self.problems) == before else None

    def _dataclass(self, tree: Mapping[str, Any], place: str) -> Any:
        cls: Any = self.cls(tree["class"], join(place, "class"), object, "a dataclass")
        fields = {name: self.decode(item, join(place, name)) for name, item in tree["fields"].items()}
        if cls is None:
            return None
        if not dataclasses.is_dataclass(cls):
            return self.problem(join(place, "class"), f"{describe(cls)} is no dataclass here")
        # Not through its constructor: that would make what it makes of its arguments once more.
        made: Any = object.__new__(cls)  # type: ignore[arg-type]  # mypy doubts that it is a class
        for name, value in {**_field_defaults(cls), **fields}.items():
            object.__setattr__(made, name, value)
        return made


def _torch_value(kind: str) -> Callable[[Decoder, Mapping[str, Any], str], Any]:
    def make(decoder: Decoder, tree: Mapping[str, Any], place: str) -> Any:
        import torch

        if kind == "device":
            return torch.device(tree["v"])
        found = getattr(torch, tree["v"])
        if not isinstance(found, torch.dtype):
            raise ValueError("no dtype of torch's")
        return found

    return make


_DECODERS: dict[str, Callable[[Decoder, Mapping[str, Any], str], Any]] = {
    "dict": Decoder._dict,
    "json": lambda d, t, p: d.decode(json.loads(t["v"]), p),
    "set": lambda d, t, p: set(d._list(t, p)),
    "frozenset": lambda d, t, p: frozenset(d._list(t, p)),
    "deque": lambda d, t, p: collections.deque(d._list(t, p), t["maxlen"]),
    "range": lambda d, t, p: range(*t["v"]),
    "enum": Decoder._enum,
    "space": lambda d, t, p: space_from(t["v"]),
    "dataclass": Decoder._dataclass,
    "partial": Decoder._partial,
    "namedtuple": Decoder._namedtuple,
    "dtype": lambda d, t, p: dtype_from_name(t["v"]),
    "path": lambda d, t, p: Path(t["v"]),
    "torch.dtype": _torch_value("dtype"),
    "torch.device": _torch_value("device"),
}


def _field_defaults(cls: Any) -> dict[str, Any]:
    """What fields of a dataclass are where nothing else is said."""
    out = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            out[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            out[field.name] = field.default_factory()
    return out


def _nodes(tree: Any) -> int:
    """How many nodes of a state tree it is, or somewhat more than `_SMALL`."""
    if type(tree) not in (dict, OrderedDict, list, tuple):
        return 1
    count = 1
    for item in tree.values() if isinstance(tree, dict) else tree:
        count += _nodes(item)
        if count > _SMALL:
            break
    return count


def _is_json(tree: Any) -> bool:
    """Whether Python's JSON gives it back as it is (infinities and integers of any size, too)."""
    if type(tree) is dict:
        return all(type(key) is str and _is_json(item) for key, item in tree.items())
    if type(tree) is list:
        return all(map(_is_json, tree))
    return type(tree) in (type(None), bool, int, float, str) and tree == tree  # one NaN is not as the other


def same(one: Any, other: Any) -> bool:
    """Whether two encoded values are equal, in types, dtypes and bits too."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(item, other[key]) for key, item in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return bool(one.hex() == other.hex())
    if isinstance(one, np.ndarray | np.generic):
        looks = one.dtype == other.dtype and one.shape == other.shape
        return bool(looks and one.tobytes() == other.tobytes())
    if type(one) in _PLAIN:
        return bool(one == other)
    return one is other  # arrays of torch and jax, which no default holds


def _member(value: enum.Enum) -> str:
    if value.name not in type(value).__members__:
        raise InvalidInputError(f"{value!r}, which has no name in its class")
    return value.name


def _is_storable(value: Any) -> bool:
    """Whether a state tree takes it as a leaf."""
    if isinstance(value, np.generic):
        return isinstance(value, np.str_ | np.bytes_) or dtype_name(value.dtype) is not None
    try:
        kind = kind_of(value)
        return kind is not None and spec_of(value, kind) is not None
    except UnsupportedLeafError as why:
        raise InvalidInputError(str(why)) from why
