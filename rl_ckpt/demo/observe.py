"""The observation filter that learner and rollout workers share, and digests of state trees.

Owns the running mean and deviation by which observations are scaled, and a digest that two processes can compare to
know that they hold the same state. Both are pure numpy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from rl_ckpt import PerRank
from rl_ckpt.demo.policy import Floats

State = dict[str, Any]


class ObservationFilter:
    """Scales observations to mean 0 and deviation 1 by everything seen so far.

    Args:
        size: Length of an observation.
    """

    def __init__(self, size: int) -> None:
        self._mean = np.zeros(size, dtype=np.float64)
        self._var = np.ones(size, dtype=np.float64)
        self._count = 0

    def apply(self, observations: Floats) -> Floats:
        """Observations (…, size) scaled and cut at ten deviations, as float32."""
        scaled = (observations - self._mean) / np.sqrt(self._var + 1e-8)
        result: Floats = np.clip(scaled, -10.0, 10.0).astype(np.float32)
        return result

    def update(self, observations: Floats) -> None:
        """Take in a batch (n, size) of observations as they came from the environment.

        Source: merging of means and sums of squares, Chan, Golub and LeVeque 1979.
        """
        n = len(observations)
        mean = observations.mean(axis=0, dtype=np.float64)
        var = observations.var(axis=0, dtype=np.float64)
        total = self._count + n
        shift = mean - self._mean
        squares = self._var * self._count + var * n + shift**2 * (self._count * n / total)
        self._mean = self._mean + shift * (n / total)
        self._var = squares / total
        self._count = total

    def get_state(self) -> State:
        """Mean and variance, (size,) float64, and the number of observations seen."""
        return {"mean": self._mean.copy(), "var": self._var.copy(), "count": self._count}

    def set_state(self, state: State) -> None:
        """Go on from what `get_state` gave."""
        self._mean = np.array(state["mean"], dtype=np.float64)
        self._var = np.array(state["var"], dtype=np.float64)
        self._count = state["count"]


def tree_digest(tree: object) -> str:
    """Digest of a tree of dicts, arrays and plain leaves.

    Args:
        tree: Nested mappings with str keys; leaves are arrays or have a `repr` that tells their value. A declaration
            counts as what it wraps.

    Returns:
        16 hex digits, equal for trees that are equal in names, order, dtypes, shapes and values.
    """
    digest = hashlib.blake2b(digest_size=8)
    _feed(digest, "", tree)
    return digest.hexdigest()


def _feed(digest: hashlib.blake2b, path: str, node: object) -> None:
    if isinstance(node, PerRank):
        _feed(digest, path, node.tree)
    elif isinstance(node, Mapping):
        for key, child in node.items():
            _feed(digest, f"{path}/{key}", child)
    elif isinstance(node, np.ndarray):
        digest.update(f"{path} {node.dtype.str} {node.shape}".encode())
        digest.update(np.ascontiguousarray(node).tobytes())
    else:
        digest.update(f"{path} {node!r}".encode())
