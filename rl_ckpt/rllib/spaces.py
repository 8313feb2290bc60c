"""Spaces: gymnasium's and RLlib's spaces as plain data, and back.

Owns: what each space is made of. Promises: the space that comes back equals the saved one in every bound, dtype, start
and order. Does not do: a space's random generator, and spaces of classes that it does not know.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from ray.rllib.utils.spaces.flexdict import FlexDict
from ray.rllib.utils.spaces.repeated import Repeated
from ray.rllib.utils.spaces.simplex import Simplex

from rl_ckpt.errors import CorruptionError, InvalidInputError
from rl_ckpt.rllib.refs import describe
from rl_ckpt.state.dtypes import dtype_from_name, dtype_name

Space = gym.Space[Any]
Tree = dict[str, Any]

_ORIGINAL = "original_space"
"""RLlib's preprocessors leave the environment's own space on the flat one, as an attribute."""


def space_tree(space: Space) -> Tree:
    """A space as plain data.

    Args:
        space: Of a class of gymnasium's, or RLlib's Simplex, Repeated or FlexDict; nested as deep as it may be.

    Returns:
        A state tree: "type", and what that type is made of. Arrays are numpy arrays of the space's dtype.

    Raises:
        InvalidInputError: A space of another class.
    """
    known = _KNOWN.get(type(space))
    if known is None:
        raise InvalidInputError(
            f"{describe(space)}, a space that is not stored: those of gymnasium.spaces are, and RLlib's Simplex, "
            "Repeated and FlexDict"
        )
    name, take, _ = known
    original = getattr(space, _ORIGINAL, None)
    more = {_ORIGINAL: space_tree(original)} if isinstance(original, gym.Space) else {}
    return {"type": name, **take(space), **more}


def space_from(tree: Mapping[str, Any]) -> Space:
    """The space that `space_tree` described.

    Raises:
        CorruptionError: The data describe no space that this release knows.
    """
    make = _MAKERS.get(str(tree.get("type")))
    if make is None:
        raise CorruptionError(f"no space of type {tree.get('type')!r} is known; a newer release may know it")
    try:
        space: Space = make(tree)
    except (KeyError, TypeError, ValueError, AssertionError, OverflowError) as error:
        raise CorruptionError(f"these data describe no {tree['type']} space: {error!r}") from error
    if _ORIGINAL in tree:
        space.original_space = space_from(tree[_ORIGINAL])  # type: ignore[attr-defined]  # as RLlib does
    return space


def _dtype(dtype: Any) -> str:
    name = dtype_name(np.dtype(dtype))
    assert name is not None, "a space's dtype is a number's"
    return name


def _one_or_all(values: np.ndarray[Any, Any]) -> Any:
    """An array of equal values (the bounds of most images) as one number."""
    flat = values.reshape(-1)
    return flat[0].item() if flat.size and bool(np.all(flat == flat[0])) else values


def _box(space: spaces.Box) -> Tree:
    parts = {"low": space.low, "high": space.high, "below": space.bounded_below, "above": space.bounded_above}
    return {"shape": list(space.shape), "dtype": _dtype(space.dtype), **{k: _one_or_all(v) for k, v in parts.items()}}


def _make_box(tree: Mapping[str, Any]) -> spaces.Box:
    shape, dtype = tuple(tree["shape"]), dtype_from_name(tree["dtype"])
    low, high = (np.full(shape, tree[side], dtype) for side in ("low", "high"))
    box = spaces.Box(low, high, shape, dtype)  # type: ignore[arg-type]  # a dtype serves as well as its type
    # An infinite bound of an integer box is that of its dtype by now; what it was is told by these alone.
    box.bounded_below, box.bounded_above = (np.full(shape, tree[side], np.bool_) for side in ("below", "above"))
    return box


def _discrete(space: spaces.Discrete[Any]) -> Tree:
    return {"n": int(space.n), "start": int(space.start), "dtype": _dtype(space.dtype)}


def _make_discrete(tree: Mapping[str, Any]) -> spaces.Discrete[Any]:
    return spaces.Discrete(tree["n"], start=tree["start"], dtype=dtype_from_name(tree["dtype"]))  # type: ignore[arg-type]


def _multi_discrete(space: spaces.MultiDiscrete) -> Tree:
    return {"nvec": space.nvec, "start": space.start, "dtype": _dtype(space.dtype)}


def _make_multi_discrete(tree: Mapping[str, Any]) -> spaces.MultiDiscrete:
    dtype: Any = dtype_from_name(tree["dtype"])
    return spaces.MultiDiscrete(tree["nvec"], dtype=dtype, start=tree["start"])


def _text(space: spaces.Text) -> Tree:
    # In the order of this very space: indices of characters are by it, and of a set it differs between processes.
    return {"min": space.min_length, "max": space.max_length, "characters": list(space.character_list)}


def _make_text(tree: Mapping[str, Any]) -> spaces.Text:
    characters: Any = tuple(tree["characters"])
    return spaces.Text(tree["max"], min_length=tree["min"], charset=characters)


def _graph(space: spaces.Graph) -> Tree:
    edge = space.edge_space
    return {"node": space_tree(space.node_space), "edge": None if edge is None else space_tree(edge)}


def _make_graph(tree: Mapping[str, Any]) -> spaces.Graph:
    node: Any = space_from(tree["node"])
    edge: Any = None if tree["edge"] is None else space_from(tree["edge"])
    return spaces.Graph(node, edge)


def _dict(space: spaces.Dict) -> Tree:
    keys: list[Any] = list(space.spaces)
    odd = [key for key in keys if type(key) not in (str, int)]
    if odd:
        raise InvalidInputError(f"a Dict space with the key {odd[0]!r}; keys must be str or int")
    return {"keys": list(space.spaces), "spaces": [space_tree(inner) for inner in space.spaces.values()]}


def _ordered(tree: Mapping[str, Any]) -> OrderedDict[Any, Space]:
    """Of an OrderedDict the order is kept; anything else gymnasium sorts."""
    return OrderedDict(zip(tree["keys"], _all(tree), strict=True))


def _many(space: Any) -> Tree:
    return {"spaces": [space_tree(inner) for inner in space.spaces]}


def _all(tree: Mapping[str, Any]) -> list[Space]:
    return [space_from(inner) for inner in tree["spaces"]]


def _simplex(space: Simplex) -> Tree:
    return {
        "shape": list(space.shape or ()),
        "concentration": np.asarray(space.concentration),
        "dtype": _dtype(space.dtype),
    }


def _make_simplex(tree: Mapping[str, Any]) -> Simplex:
    return Simplex(tuple(tree["shape"]), tree["concentration"], dtype_from_name(tree["dtype"]))


_Take = Callable[[Any], Tree]
_Make = Callable[[Mapping[str, Any]], Any]
_KNOWN: dict[type, tuple[str, _Take, _Make]] = {
    spaces.Box: ("Box", _box, _make_box),
    spaces.Discrete: ("Discrete", _discrete, _make_discrete),
    spaces.MultiDiscrete: ("MultiDiscrete", _multi_discrete, _make_multi_discrete),
    spaces.MultiBinary: ("MultiBinary", lambda s: {"n": s.n}, lambda t: spaces.MultiBinary(t["n"])),
    spaces.Text: ("Text", _text, _make_text),
    spaces.Graph: ("Graph", _graph, _make_graph),
    spaces.Sequence: (
        "Sequence",
        lambda s: {"space": space_tree(s.feature_space), "stack": s.stack},
        lambda t: spaces.Sequence(space_from(t["space"]), stack=t["stack"]),
    ),
    spaces.OneOf: ("OneOf", _many, lambda t: spaces.OneOf(_all(t))),
    spaces.Tuple: ("Tuple", _many, lambda t: spaces.Tuple(_all(t))),
    spaces.Dict: ("Dict", _dict, lambda t: spaces.Dict(_ordered(t))),
    Simplex: ("Simplex", _simplex, _make_simplex),
    Repeated: (
        "Repeated",
        lambda s: {"space": space_tree(s.child_space), "max_len": s.max_len},
        lambda t: Repeated(space_from(t["space"]), t["max_len"]),
    ),
    FlexDict: ("FlexDict", _dict, lambda t: FlexDict(_ordered(t))),
}
_MAKERS: dict[str, _Make] = {name: make for name, _, make in _KNOWN.values()}
