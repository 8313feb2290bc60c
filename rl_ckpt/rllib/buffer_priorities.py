"""Priorities: the segment trees of a prioritised replay buffer as arrays, and back.

A tree of RLlib's is a list of Python objects, the leaves in its second half. Only leaves that a sample has are stored;
everything above them is computed again by the same operations on the same objects, so that it is equal to the last bit
(the two trees have the same leaves where they have any). Priorities are scattered over the leaves by every update, so
they are written again whenever there was one, a segment at a time.
"""

from __future__ import annotations

import operator
from collections import deque
from typing import Any

import numpy as np
from ray.rllib.execution.segment_tree import MinSegmentTree, SumSegmentTree

from rl_ckpt.rllib.columns import Array, Columns, decode, encode, narrowed

SEGMENT_LEAVES = 1 << 16
_WHERE = "the replay buffer's priorities"

Tree = dict[str, Any]


def leaves_tree(tree: SumSegmentTree, nodes: Array) -> Tree:
    """The leaves of a sum tree, up to the last one that a sample has.

    Args:
        tree: A sum tree.
        nodes: Leaves that samples have, any order.

    Returns:
        Columns by number of the segment; a free leaf among them is 0.0.
    """
    used = int(nodes.max()) + 1 if len(nodes) else 0
    leaves = tree.value[tree.capacity : tree.capacity + used]
    parts = [leaves[start : start + SEGMENT_LEAVES] for start in range(0, used, SEGMENT_LEAVES)]
    return {"used": used, "segments": [columns_tree(encode(part, _WHERE)) for part in parts]}


def leaves_from(saved: Tree) -> list[Any]:
    """The leaves again, from the first on."""
    return [leaf for part in saved["segments"] for leaf in decode(columns_from(part), _WHERE)]


def set_leaves(sums: SumSegmentTree, mins: MinSegmentTree, leaves: list[Any], nodes: Array) -> None:
    """Fills both trees.

    Args:
        sums: The sum tree.
        mins: The min tree, of the same capacity.
        leaves: From the first on; the others are free.
        nodes: Those that samples have.
    """
    size = sums.capacity
    low: list[Any] = [mins.neutral_element] * size
    for node in nodes.tolist():
        low[node] = leaves[node]
    sums.value = _grown(leaves + [sums.neutral_element] * (size - len(leaves)), operator.add, sums.neutral_element)
    mins.value = _grown(low, min, mins.neutral_element)


def _grown(leaves: list[Any], operation: Any, neutral: float) -> list[Any]:
    """The list of a whole tree: place i has what its children 2i and 2i + 1 give; place 0 is not used."""
    levels = [leaves]
    while len(levels[-1]) > 1:
        below = levels[-1]
        levels.append(list(map(operation, below[0::2], below[1::2])))
    return [neutral, *(value for level in reversed(levels) for value in level)]


def free_tree(free: deque[int]) -> Tree:
    """The queue of free leaves, as runs that go up or down by one: at first one run, later one for each gap."""
    array = np.fromiter(free, np.int64, len(free))
    steps = np.diff(array)
    breaks = np.ones(len(array), np.bool_)
    breaks[1:] = np.abs(steps) != 1
    breaks[2:] |= steps[1:] != steps[:-1]
    starts = np.flatnonzero(breaks)
    lengths = np.diff(starts, append=len(array))
    signs = np.ones(len(starts), np.int8)
    longer = lengths > 1
    signs[longer] = steps[starts[longer]]
    return {"first": narrowed(array[starts]), "length": narrowed(lengths), "step": signs}


def free_from(saved: Tree, capacity_before: int, capacity: int) -> deque[int]:
    """The queue again; leaves that the tree has beyond those of the saved one come last."""
    runs = zip(saved["first"].tolist(), saved["length"].tolist(), saved["step"].tolist(), strict=True)
    free = deque((node for first, n, step in runs for node in range(first, first + n * step, step)), maxlen=capacity)
    free.extend(range(capacity_before, capacity))
    return free


def columns_tree(columns: Columns) -> Tree:
    """Columns as a part of a state tree."""
    return {"rows": columns.rows, "schema": columns.schema, "columns": columns.arrays}


def columns_from(saved: Tree) -> Columns:
    """And back."""
    return Columns(saved["rows"], saved["schema"], saved["columns"])
