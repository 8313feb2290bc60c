"""torch.distributed.checkpoint over gloo ranks: `save`, `async_save`, `load`.

As documented: https://docs.pytorch.org/tutorials/recipes/distributed_checkpoint_recipe.html (all ranks call `save`;
shards are DTensors, what is plain is taken for replicas, which the planner writes once and balances over ranks) and
https://docs.pytorch.org/tutorials/recipes/distributed_async_checkpoint_recipe.html (`async_save`: by its
defaults, and with staging memory that is kept between saves, which without CUDA is a `DefaultStager` of the caller's
without pinned memory).
`load` fills the tensors in place. `FileSystemWriter` fsyncs by itself. To S3 by `FsspecWriter` and `FsspecReader`:
https://docs.pytorch.org/docs/stable/distributed.checkpoint.html.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.alternatives import State


class TorchDcp:
    """One rank."""

    def __init__(self, state: State, variant: str) -> None:
        if not dist.is_initialized():  # both variants share the group of this process
            dist.init_process_group(
                "gloo", init_method=f"tcp://{state.address}", rank=state.rank, world_size=state.world_size
            )
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in state.arrays.items()}
        if state.kind == "sharded":
            mesh = init_device_mesh("cpu", (state.world_size,))
            tensors = {name: DTensor.from_local(tensor, mesh, [Shard(0)]) for name, tensor in tensors.items()}
        self._tensors = tensors
        self._variant = variant
        self._stager = DefaultStager(StagingOptions(False, False, False, False)) if variant == "async" else None
        self._options = dict(state.options)
        self._future: Any = None

    def save(self, place: str) -> None:
        if self._options:
            save(self._tensors, storage_writer=FsspecWriter(place, **self._options))
        elif self._variant == "sync":
            save(self._tensors, checkpoint_id=place)
        else:
            self._future = async_save(self._tensors, checkpoint_id=place, async_stager=self._stager)

    def wait(self) -> None:
        if self._future is not None:
            self._future.result()
            self._future = None

    def restore(self, place: str) -> None:
        if self._options:
            load(self._tensors, storage_reader=FsspecReader(place, **self._options))
        else:
            load(self._tensors, checkpoint_id=place)

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()
        self._tensors.clear()


def make(state: State, variant: str) -> TorchDcp:
    """See the module."""
    return TorchDcp(state, variant)
