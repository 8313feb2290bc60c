"""Alternatives: other ways to save and restore, each as its own documentation recommends, behind one small interface.

A module here sets one library up over arrays that a worker has. Promises: state is mutable numpy memory that training
goes on changing, so a save must have copied or written it when `save` returns; a restore puts the values into the same
memory. What a library does not do itself (an fsync, mostly) is done for it in `wait`, outside of the stall. An
alternative whose library is missing is skipped by name, never replaced.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class State:
    """What a rank has."""

    arrays: Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]
    """Two-dimensional, float32; written to by training and by restores."""
    kind: str
    """"sharded" (rows of a global array) or "replicated"."""
    rank: int
    world_size: int
    address: str
    """`host:port` where rank 0 may listen for the others."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """For fsspec, where places are urls of an S3 server; empty where they are folders."""

    @property
    def writes(self) -> bool:
        """Whether this rank writes at all: of replicas, rank 0 does."""
        return self.kind == "sharded" or self.rank == 0

    def part(self, place: str) -> str:
        """Where this rank reads, and writes if it does: a part of its own, or that of rank 0."""
        return f"{place}/rank-{self.rank if self.kind == 'sharded' else 0}"


class Rank(Protocol):
    """One rank of an alternative."""

    def save(self, place: str) -> None:
        """Returns as soon as training may change the arrays again."""

    def wait(self) -> None:
        """Returns as soon as what `save` began is on the disk."""

    def restore(self, place: str) -> None:
        """Puts the saved values into the arrays."""

    def close(self) -> None:
        """Ends what was started."""


@dataclass(frozen=True)
class Kind:
    """How an alternative is listed."""

    module: str
    """In this package; has `make(state) -> Rank`."""
    needs: str
    """Distribution's top-level module."""
    note: str = ""
    variant: str = ""
    """Given to `make` where one module serves several."""


ALTERNATIVES: dict[str, Kind] = {
    "torch.save": Kind("torch_save", "torch", "one file per rank; fsync added"),
    "torch DCP": Kind("torch_dcp", "torch", "gloo ranks, FileSystemWriter", "sync"),
    "DCP async, defaults": Kind("torch_dcp", "torch", "gloo ranks, staging memory new at each save", "defaults"),
    "DCP async": Kind("torch_dcp", "torch", "gloo ranks, staging memory kept between saves", "async"),
    "safetensors": Kind("safetensors_", "safetensors", "one file per rank; fsync added"),
    "orbax": Kind("orbax_", "orbax.checkpoint", "one checkpointer per rank; waited for", "sync"),
    "orbax async": Kind("orbax_", "orbax.checkpoint", "one checkpointer per rank", "async"),
    "TorchRL": Kind("torchrl_", "torchrl", "memory-mapped directory per rank; fsync added"),
    "pickle + fsspec": Kind("pickle_fsspec", "fsspec", "one file per rank; fsync added"),
    "pickle + s3fs": Kind("pickle_fsspec", "s3fs", "one object per rank, s3fs by its defaults"),
    "DCP + s3fs": Kind("torch_dcp", "torch", "gloo ranks, FsspecWriter and FsspecReader", "fsspec"),
}
ON_S3 = ("pickle + s3fs", "DCP + s3fs")
ON_DISK = tuple(name for name in ALTERNATIVES if name not in ON_S3)


RLLIB = "RLlib"
"""Runs in an actor of its own (`alternatives.rllib`); the others run inside the workers."""
_RLLIB_NEEDS = ("gymnasium", "lz4", "ormsgpack", "torch", "tree")


def missing(name: str) -> str | None:
    """Why an alternative can't be run here; None if it can."""
    needs = _RLLIB_NEEDS if name == RLLIB else (ALTERNATIVES[name].needs,)
    for module in needs:
        # A dotted name is looked up only where its parent is there: find_spec would import and fail.
        if importlib.util.find_spec(module.split(".")[0]) is None or importlib.util.find_spec(module) is None:
            return "not installed"
    return None


def make(name: str, state: State) -> Rank:
    """Sets an alternative up."""
    kind = ALTERNATIVES[name]
    module = importlib.import_module(f"{__name__}.{kind.module}")
    rank: Rank = module.make(state, kind.variant) if kind.variant else module.make(state)
    return rank


def sync(place: str) -> None:
    """fsyncs a file, or all files of a folder and the folder."""
    path = Path(place)
    for each in [*path.rglob("*"), path] if path.is_dir() else [path]:
        fd = os.open(each, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
