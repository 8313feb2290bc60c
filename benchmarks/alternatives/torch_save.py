"""torch.save and torch.load: each rank its own file; of replicas, rank 0 writes and all read.

As documented: https://docs.pytorch.org/tutorials/beginner/saving_loading_models.html (state dicts),
https://docs.pytorch.org/tutorials/intermediate/ddp_tutorial.html ("save and load checkpoints": one process saves, all
load), and https://docs.pytorch.org/docs/stable/generated/torch.load.html (`mmap=True`, so that the values are copied
straight out of the file's pages).
"""

from __future__ import annotations

import torch

from benchmarks.alternatives import State, sync


class TorchSave:
    """One rank."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._tensors = {name: torch.from_numpy(array) for name, array in state.arrays.items()}
        self._written: str | None = None

    def save(self, place: str) -> None:
        if self._state.writes:
            self._written = self._state.part(place)
            torch.save(self._tensors, self._written)

    def wait(self) -> None:
        if self._written is not None:
            sync(self._written)

    def restore(self, place: str) -> None:
        loaded = torch.load(self._state.part(place), mmap=True, weights_only=True)
        for name, tensor in self._tensors.items():
            tensor.copy_(loaded[name])

    def close(self) -> None:
        self._tensors.clear()


def make(state: State) -> TorchSave:
    """See the module."""
    return TorchSave(state)
