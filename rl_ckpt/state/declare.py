"""Declarations: what a worker says about its arrays when values alone don't tell.

Wrap an array (or, for `Replicated` and `PerRank`, a whole subtree) in what `get_state` returns. A declaration says
where values lie and does not come back: `set_state` gets the plain arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Replicated:
    """The same on every worker, by the user's word: not hashed on each, staged once, split over the replicas."""

    __slots__ = ("tree",)

    def __init__(self, tree: Any) -> None:
        """Wraps an array or a subtree."""
        self.tree = tree


class PerRank:
    """Each worker's own (a random generator, an environment), even where values happen to be equal."""

    __slots__ = ("tree",)

    def __init__(self, tree: Any) -> None:
        """Wraps an array, a plain leaf or a subtree."""
        self.tree = tree


class Sharded:
    """One worker's part of a global array.

    Attributes:
        array: The part, of any supported kind, `ndim` axes.
        global_shape: Shape of the whole array, `ndim` extents, in elements.
        offset: Where the part starts in the whole, `ndim` entries, in elements.
    """

    __slots__ = ("array", "global_shape", "offset")

    def __init__(self, array: Any, global_shape: Sequence[int], offset: Sequence[int]) -> None:
        """Declares `array` as the box at `offset` of an array of `global_shape`."""
        self.array = array
        self.global_shape = tuple(int(n) for n in global_shape)
        self.offset = tuple(int(n) for n in offset)
