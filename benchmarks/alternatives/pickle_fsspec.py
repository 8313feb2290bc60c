"""pickle through fsspec: what many training scripts do by hand, protocol 5 into one file per rank.

As documented: https://filesystem-spec.readthedocs.io/en/latest/usage.html (`fsspec.open`) and
https://docs.python.org/3/library/pickle.html.
"""

from __future__ import annotations

import pickle

import fsspec
import numpy as np

from benchmarks.alternatives import State, sync


class PickleFsspec:
    """One rank."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._written: str | None = None

    def save(self, place: str) -> None:
        if self._state.writes:
            self._written = self._state.part(place)
            with fsspec.open(self._written, "wb", **self._state.options) as file:
                pickle.dump(dict(self._state.arrays), file, protocol=5)

    def wait(self) -> None:
        if self._written is not None and not self._state.options:
            sync(self._written)

    def restore(self, place: str) -> None:
        with fsspec.open(self._state.part(place), "rb", **self._state.options) as file:
            loaded = pickle.load(file)
        for name, array in self._state.arrays.items():
            np.copyto(array, loaded[name])

    def close(self) -> None:
        self._written = None


def make(state: State) -> PickleFsspec:
    """See the module."""
    return PickleFsspec(state)
