"""orbax-checkpoint: a `StandardCheckpointer` in each rank, over numpy arrays; of replicas, rank 0 writes and all read.

As documented: https://orbax.readthedocs.io/en/latest/guides/checkpoint/orbax_checkpoint_101.html (a tree of numpy
arrays is saved and restored against an abstract tree) and
https://orbax.readthedocs.io/en/latest/guides/checkpoint/async_checkpointing.html (`save` returns once the arrays are
copied; `wait_until_finished`). Ranks are processes without jax.distributed, as Ray workers on CPUs are, so each writes
a checkpoint of its own.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.alternatives import State, sync


class Orbax:
    """One rank."""

    def __init__(self, state: State, variant: str) -> None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        library: Any = importlib.import_module("orbax.checkpoint")
        self._state = state
        self._asynchronous = variant == "async"
        self._checkpointer: Any = library.StandardCheckpointer()
        self._abstract = {name: library.utils.to_shape_dtype_struct(array) for name, array in state.arrays.items()}
        self._written: str | None = None

    def save(self, place: str) -> None:
        if self._state.writes:
            self._written = self._state.part(place)
            self._checkpointer.save(Path(self._written), dict(self._state.arrays))
            if not self._asynchronous:
                self._checkpointer.wait_until_finished()

    def wait(self) -> None:
        if self._written is not None:
            self._checkpointer.wait_until_finished()
            sync(self._written)

    def restore(self, place: str) -> None:
        loaded = self._checkpointer.restore(Path(self._state.part(place)), self._abstract)
        for name, array in self._state.arrays.items():
            np.copyto(array, np.asarray(loaded[name]))

    def close(self) -> None:
        self._checkpointer.close()


def make(state: State, variant: str) -> Orbax:
    """See the module."""
    return Orbax(state, variant)
