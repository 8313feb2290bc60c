"""A tree of many small things as three things: what an environment runner keeps would be thousands of leaves.

Every leaf stands in the manifest, which every process reads; a hundred runners of sixteen environments would be close
to a million of them. Packed, a runner's environments, episodes and metrics are one text of the structure, one array of
the bytes of small arrays, and large arrays as they are, so that those that did not change are not written again.
Promises: as `state/tree.py`, whose nodes these are. The price: parts of it can't be selected.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from rl_ckpt.errors import CorruptionError
from rl_ckpt.state import leaves
from rl_ckpt.state.arrays import flat_bytes, from_host, to_host
from rl_ckpt.state.dtypes import dtype_from_name
from rl_ckpt.state.tree import LocalArray, Node, Plain, Tie, flatten, unflatten

_LARGE_BYTES = 65536
_LEVEL = 1  # of zlib: the structure is a tenth of its size then, and smaller by little at higher ones
_NODES = msgspec.msgpack.Decoder(list[tuple[str, Node]])


def pack(tree: Any) -> dict[str, Any]:
    """A state tree as few leaves.

    Args:
        tree: Anything that a checkpoint takes, with no declarations in it. Large arrays are not copied.

    Returns:
        "structure": bytes; "small": uint8, the bytes of small arrays one after the other; "large": arrays by path.

    Raises:
        InvalidInputError: As a save of the tree would.
    """
    flat = flatten(tree)
    large = {path: array for path, array in flat.arrays.items() if _size(flat.nodes[path]) >= _LARGE_BYTES}
    small = [
        np.frombuffer(flat_bytes(to_host(array, node.spec.kind)), np.uint8)
        for path, array in flat.arrays.items()
        if path not in large and isinstance(node := flat.nodes[path], LocalArray)
    ]
    return {
        "structure": zlib.compress(msgspec.msgpack.encode(list(flat.nodes.items())), _LEVEL),
        "small": np.concatenate([*small, np.zeros(0, np.uint8)]),
        "large": {path: _value(flat.nodes[path], array) for path, array in large.items()},
    }


def unpack(packed: Mapping[str, Any]) -> Any:
    """The tree that `pack` was given, in memory of its own.

    Raises:
        CorruptionError: It is no packed tree.
    """
    try:
        nodes = dict(_NODES.decode(zlib.decompress(packed["structure"])))
        return unflatten(nodes, _values(nodes, packed["small"], packed["large"]))
    except (KeyError, TypeError, ValueError, zlib.error, msgspec.MsgspecError) as error:
        raise CorruptionError(f"the part of an environment runner can't be read: {error!r}") from error


def _size(node: Node) -> int:
    assert isinstance(node, LocalArray)
    return node.box.size * dtype_from_name(node.spec.dtype).itemsize


def _value(node: Node, array: Any) -> Any:
    """Long text is kept as its bytes: of those the tree wants itself."""
    return (
        from_host(array, node.spec.kind)
        if isinstance(node, LocalArray) and node.spec.kind in ("bytes", "str")
        else array
    )


def _values(nodes: Mapping[str, Node], small: Any, large: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    at = 0
    for path, node in nodes.items():
        match node:
            case Plain():
                values[path] = leaves.decode(node.value, path)
            case LocalArray() if path in large:
                values[path] = large[path]
            case LocalArray():
                size = _size(node)
                host = np.array(small[at : at + size]).view(dtype_from_name(node.spec.dtype))
                values[path] = from_host(host.reshape(node.spec.shape), node.spec.kind)
                at += size
            case Tie():
                values[path] = values[node.path]
    return values
