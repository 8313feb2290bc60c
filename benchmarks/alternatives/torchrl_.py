"""TorchRL: its `Checkpoint` coordinator over a component with a state dict, in the default directory format.

As documented: https://docs.pytorch.org/rl/stable/reference/checkpoint.html (named components, `save`, `load`), which
writes tensordict's memory-mapped layout, https://docs.pytorch.org/tensordict/stable/saving.html. Each rank its own
folder; of replicas, rank 0 writes, all read.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.alternatives import State, sync


class _Policy:
    """A component, as TorchRL takes them: what a module would be, without the layers."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._tensors

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in self._tensors.items():
            tensor.copy_(state[name])


class TorchRl:
    """One rank."""

    def __init__(self, state: State) -> None:
        library: Any = importlib.import_module("torchrl.checkpoint")
        policy = _Policy({name: torch.from_numpy(array) for name, array in state.arrays.items()})
        self._checkpoint: Any = library.Checkpoint(policy=policy)
        self._state = state
        self._written: str | None = None

    def save(self, place: str) -> None:
        if self._state.writes:
            self._written = self._state.part(place)
            self._checkpoint.save(self._written)

    def wait(self) -> None:
        if self._written is not None:
            sync(self._written)

    def restore(self, place: str) -> None:
        self._checkpoint.load(self._state.part(place))

    def close(self) -> None:
        self._written = None


def make(state: State) -> TorchRl:
    """See the module."""
    return TorchRl(state)
