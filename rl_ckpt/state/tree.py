"""State trees: nested containers of leaves, taken apart into nodes by path and put together again.

Owns: walking a tree, naming every node, finding tied arrays, and the reverse. Promises: what comes back equals what
went in, in container type, key order, kind, dtype, shape and bits. Does not know: bytes on storage, other workers.

A tree is dict (string and int keys), OrderedDict, list and tuple, nested, of leaves: arrays (state/arrays.py), plain
data (state/leaves.py) and, where the user allows it, pickled objects.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.state import arrays, leaves
from rl_ckpt.state.arrays import ArraySpec, UnsupportedLeafError
from rl_ckpt.state.boxes import Box
from rl_ckpt.state.collector import paused
from rl_ckpt.state.declare import PerRank, Replicated, Sharded
from rl_ckpt.state.dtypes import dtype_from_name
from rl_ckpt.state.leaves import Json
from rl_ckpt.state.paths import Key, escape

CONTAINERS = frozenset(("dict", "OrderedDict", "list", "tuple"))
AUTO, REPLICATED, PER_RANK, SHARDED = "auto", "replicated", "per_rank", "sharded"

_INLINE_BYTES = 1024  # longer bytes, strings and pickles are kept as chunks, shorter ones in the manifest


# `gc=False`: 100,000 of these must not make Python's collector walk the user's heap; none of them can be in a cycle.
class Container(msgspec.Struct, frozen=True, gc=False, tag_field="node", tag="container", omit_defaults=True):
    """An inner node: its type ("dict", "OrderedDict", "list", "tuple") and its keys in order."""

    type: str
    keys: tuple[Key, ...] = ()
    replicated: bool = False
    """As `Plain`'s: what a worker said, not stored."""


class Plain(msgspec.Struct, frozen=True, gc=False, tag_field="node", tag="plain", omit_defaults=True):
    """A leaf of plain data, encoded by state/leaves.py; `per_rank` or `replicated` where it was declared so."""

    value: Json
    per_rank: bool = False
    replicated: bool = False


class Tie(msgspec.Struct, frozen=True, gc=False, tag_field="node", tag="tie"):
    """The very array (the same object or memory) that stands at `path` too."""

    path: str


class LocalArray(msgspec.Struct, frozen=True, tag_field="node", tag="array", gc=False):
    """A worker's array: the spec with its *global* shape, the box the worker holds, and how it was declared."""

    spec: ArraySpec
    box: Box
    declared: str = AUTO


Node = Container | Plain | Tie | LocalArray


@dataclass(slots=True)
class FlatTree:
    """A tree taken apart: nodes by path in the order of the walk (a container before its children), and the arrays."""

    nodes: dict[str, Node] = field(default_factory=dict)
    arrays: dict[str, Any] = field(default_factory=dict)
    """By path, the user's own objects (not copies) for every `LocalArray`; bytes for long plain leaves."""
    objects: dict[str, InObject] = field(default_factory=dict)
    """By path, those of the arrays that lie in an immutable object."""


@dataclass(frozen=True, slots=True)
class InObject:
    """An array's place in an object that can't change any more (a Ray object), which is part of the tree."""

    handle: Any
    """What stands in the user's tree."""
    key: str
    """Names the object: equal on every worker that has it."""
    path: str
    """Within the object."""

    @property
    def identity(self) -> bytes:
        """Equal for the same array of the same object, and for nothing else."""
        return f"{self.key}:{self.path}".encode()


Opener = Callable[[Any], tuple[str, Any] | None]
"""Opens a leaf that stands for an immutable object: its key and the tree in it; None for any other leaf."""


def flatten(tree: Any, allow_pickle: bool = False, opener: Opener | None = None) -> FlatTree:
    """Takes a tree apart.

    Args:
        tree: See the module's docstring; `Replicated`, `PerRank` and `Sharded` may wrap parts of it.
        allow_pickle: Whether leaves that are neither arrays nor plain data are pickled.
        opener: See `Opener`; the object's tree takes the leaf's place.

    Returns:
        Nodes and arrays by path. Arrays are referenced, not copied.

    Raises:
        InvalidInputError: A leaf, key or container that can't be stored; all of them are named by path.
    """
    walker = _Walker(allow_pickle, opener)
    try:
        with paused():
            walker.walk("", tree, AUTO)
    except RecursionError as error:
        raise InvalidInputError(
            "the state is nested deeper than Python can follow; flatten it (nothing was written)"
        ) from error
    if walker.problems:
        lines = "\n  ".join(walker.problems)
        raise InvalidInputError(f"the state can't be saved (nothing was written):\n  {lines}")
    return walker.flat


_INNER = frozenset((dict, OrderedDict, list, tuple, Replicated, PerRank, Sharded))
_SCALARS = frozenset((type(None), bool, int, float, str, bytes, np.ndarray))  # these stand for no object


class _Walker:
    def __init__(self, allow_pickle: bool, opener: Opener | None) -> None:
        self.flat = FlatTree()
        self._opener = opener
        self._object: tuple[Any, str, str] | None = None  # handle, key and path of the object that is being walked
        self.problems: list[str] = []
        self._allow_pickle = allow_pickle
        self._seen: dict[tuple[object, ...], str] = {}
        self._known: dict[tuple[object, ...], LocalArray] = {}  # nodes of numpy arrays by dtype, shape, declaration
        self._above: set[int] = set()

    def walk(self, path: str, value: Any, declared: str) -> None:
        try:
            self._node(path, value, declared)
        except UnsupportedLeafError as why:
            self.problems.append(f"{path or '(root)'}: {why}")

    def _node(self, path: str, value: Any, declared: str) -> None:
        kind = type(value)
        if kind not in _INNER:
            self._open_or_leaf(path, value, declared)
        elif kind in (Replicated, PerRank):
            inner = REPLICATED if kind is Replicated else PER_RANK
            if declared not in (AUTO, inner):
                raise UnsupportedLeafError(f"declared {inner} inside a part that is declared {declared}")
            self._node(path, value.tree, inner)
        elif kind is Sharded:
            self._sharded(path, value, declared)
        elif kind in (dict, OrderedDict):
            bad = [key for key in value if type(key) not in (str, int)]
            if bad:
                raise UnsupportedLeafError(f"key {bad[0]!r} of type {type(bad[0]).__name__}; keys must be str or int")
            broken = [key for key in value if type(key) is str and not leaves.is_utf8(key)]
            if broken:
                raise UnsupportedLeafError(f"key {broken[0]!r} holds a lone surrogate; keys must be valid Unicode text")
            self._container(path, value, kind.__name__, dict(value), declared)
        else:
            self._container(path, value, kind.__name__, dict(enumerate(value)), declared)

    def _open_or_leaf(self, path: str, value: Any, declared: str) -> None:
        asked = self._opener is not None and self._object is None and type(value) not in _SCALARS
        opened = self._opener(value) if asked and self._opener is not None else None
        if opened is None:
            self._leaf(path, value, declared)
        else:
            self._object = (value, opened[0], path)
            self.walk(path, opened[1], declared)
            self._object = None

    def _container(self, path: str, value: Any, name: str, children: Mapping[Key, Any], declared: str) -> None:
        if id(value) in self._above:
            raise UnsupportedLeafError("a container that contains itself")
        self.flat.nodes[path] = Container(name, tuple(children), declared == REPLICATED)
        self._above.add(id(value))
        above = f"{path}/" if path else ""
        for key, child in children.items():
            if type(child) is np.ndarray:  # the many: the long way costs three times as much
                self._ndarray(above + escape(key), child, declared)
            else:
                self.walk(above + escape(key), child, declared)
        self._above.discard(id(value))

    def _ndarray(self, path: str, value: np.ndarray[Any, np.dtype[Any]], declared: str) -> None:
        """As `walk`, which it asks once for each dtype and shape."""
        looks = (value.dtype, value.shape, declared)
        known = self._known.get(looks)
        if known is None:
            self.walk(path, value, declared)
            node = self.flat.nodes.get(path)
            if isinstance(node, LocalArray) and node.spec.kind == arrays.NUMPY:
                self._known[looks] = node
        else:
            self._place(path, value, known)

    def _sharded(self, path: str, value: Sharded, declared: str) -> None:
        if declared != AUTO:
            raise UnsupportedLeafError(f"declared sharded inside a part that is declared {declared}")
        kind = arrays.kind_of(value.array)
        if kind is None:
            raise UnsupportedLeafError("Sharded takes an array")
        spec = arrays.spec_of(value.array, kind)
        if not len(spec.shape) == len(value.global_shape) == len(value.offset) or not spec.shape:
            raise UnsupportedLeafError(
                f"a shard of shape {spec.shape} with global_shape {value.global_shape} and offset {value.offset}; "
                "all three need one entry per axis, and at least one axis"
            )
        if any(o < 0 or o + n > g for o, n, g in zip(value.offset, spec.shape, value.global_shape, strict=True)):
            raise UnsupportedLeafError(
                f"a shard of shape {spec.shape} at offset {value.offset} lies outside global_shape {value.global_shape}"
            )
        whole = ArraySpec(kind, spec.dtype, value.global_shape)
        self._array(path, value.array, whole, Box(value.offset, spec.shape), SHARDED)

    def _leaf(self, path: str, value: Any, declared: str) -> None:
        if isinstance(value, np.ndarray) and value.dtype.kind == "T":
            self._plain(path, leaves.encode_strings(value), declared)
            return
        if isinstance(value, np.ndarray) and value.dtype.hasobject and self._allow_pickle:
            self._long(path, leaves.encode_pickle(value), arrays.PICKLE, declared)
            return
        try:
            kind = arrays.kind_of(value)
            spec = arrays.spec_of(value, kind) if kind else None
        except UnsupportedLeafError:
            if not self._allow_pickle:
                raise
            kind = spec = None
        if kind == arrays.DTENSOR:
            assert spec is not None
            box, shape = arrays.dtensor_box(value)
            self._array(path, value, ArraySpec(kind, spec.dtype, shape), box, SHARDED)
        elif kind is not None and spec is not None:
            if not spec.shape or 0 in spec.shape or not dtype_from_name(spec.dtype).itemsize:
                self._plain(path, leaves.encode_array(value, spec), declared)
            else:
                self._array(path, value, spec, Box.whole(spec.shape), declared)
        else:
            self._data(path, value, declared)

    def _data(self, path: str, value: Any, declared: str) -> None:
        if type(value) is bytes and len(value) > _INLINE_BYTES:
            self._long(path, value, arrays.BYTES, declared)
        elif type(value) is str and len(value) > _INLINE_BYTES:
            self._long(path, value.encode("utf-8", "surrogatepass"), arrays.STR, declared)
        else:
            try:
                self._plain(path, leaves.encode(value), declared)
            except UnsupportedLeafError:
                if not self._allow_pickle:
                    raise
                self._long(path, leaves.encode_pickle(value), arrays.PICKLE, declared)

    def _long(self, path: str, data: bytes, kind: str, declared: str) -> None:
        spec = ArraySpec(kind, "uint8", (len(data),))
        self._array(path, np.frombuffer(data, np.uint8), spec, Box.whole(spec.shape), declared)

    def _plain(self, path: str, value: Json, declared: str) -> None:
        self.flat.nodes[path] = Plain(value, declared == PER_RANK, declared == REPLICATED)

    def _array(self, path: str, value: Any, spec: ArraySpec, box: Box, declared: str) -> None:
        self._place(path, value, LocalArray(spec, box, declared))

    def _place(self, path: str, value: Any, node: LocalArray) -> None:
        key: tuple[object, ...] = (arrays.memory_key(value, node.spec.kind), node.declared)
        if node.declared == SHARDED:  # of all others, the array's own shape says box and global shape
            key = (*key, node.box, node.spec.shape)
        first = self._seen.setdefault(key, path)
        if first != path:
            self.flat.nodes[path] = Tie(first)
            return
        self.flat.nodes[path] = node
        self.flat.arrays[path] = value
        if self._object is not None:
            handle, name, root = self._object
            self.flat.objects[path] = InObject(handle, name, path[len(root) :].removeprefix("/"))


_MISSING = object()


def unflatten(nodes: Mapping[str, Node], values: Mapping[str, Any]) -> Any:
    """Puts a tree together.

    Args:
        nodes: By path; only containers are looked at, so any mapping with the right containers will do.
        values: Leaves by path. Children of a container without a value are left out (a subset of a checkpoint); list
            positions then close up.

    Returns:
        The tree. The same object in `values` under several paths comes back as one object (ties).
    """
    try:
        tree = _build("", nodes, values)
    except RecursionError as error:
        raise InvalidInputError(
            "the state is nested deeper than Python can follow here; raise `sys.setrecursionlimit`, or choose a part "
            "of it with `select`"
        ) from error
    return {} if tree is _MISSING else tree


def _build(path: str, nodes: Mapping[str, Node], values: Mapping[str, Any]) -> Any:
    node = nodes.get(path)
    if not isinstance(node, Container):
        return values.get(path, _MISSING)
    above = f"{path}/" if path else ""
    kept: list[tuple[Key, Any]] = []
    for key in node.keys:
        below = above + escape(key)
        child = _build(below, nodes, values) if isinstance(nodes.get(below), Container) else values.get(below, _MISSING)
        if child is not _MISSING:
            kept.append((key, child))
    if node.keys and not kept:
        return _MISSING
    match node.type:
        case "list":
            return [child for _, child in kept]
        case "tuple":
            return tuple(child for _, child in kept)
        case "OrderedDict":
            return OrderedDict(kept)
        case _:
            return dict(kept)
