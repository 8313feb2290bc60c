"""safetensors: each rank its own file; of replicas, rank 0 writes and all read.

As documented: https://huggingface.co/docs/safetensors/api/torch (`save_file`, `load_file`).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from benchmarks.alternatives import State, sync


class Safetensors:
    """One rank."""

    def __init__(self, state: State) -> None:
        self._library: Any = importlib.import_module("safetensors.torch")
        self._state = state
        self._tensors = {name: torch.from_numpy(array) for name, array in state.arrays.items()}
        self._written: str | None = None

    def save(self, place: str) -> None:
        if self._state.writes:
            self._written = self._state.part(place)
            self._library.save_file(self._tensors, self._written)

    def wait(self) -> None:
        if self._written is not None:
            sync(self._written)

    def restore(self, place: str) -> None:
        loaded = self._library.load_file(self._state.part(place))
        for name, tensor in self._tensors.items():
            tensor.copy_(loaded[name])

    def close(self) -> None:
        self._tensors.clear()


def make(state: State) -> Safetensors:
    """See the module."""
    return Safetensors(state)
