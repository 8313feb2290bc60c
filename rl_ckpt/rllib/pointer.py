"""Pointers: what Ray Tune and Ray Train keep as "the checkpoint" of ours, a file that names one.

They copy a folder to their own storage at every checkpoint. Ours holds nothing but this file; the bytes are in the run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from rl_ckpt.errors import CorruptionError
from rl_ckpt.info import CheckpointInfo

FILE = "rl_ckpt.json"
_POLL_S = 0.5


class Pointer(msgspec.Struct, frozen=True, kw_only=True):
    """Names a checkpoint."""

    url: str
    """Of its run, without secrets."""
    id: str
    """Of the checkpoint; it may not be committed yet."""
    step: int
    owner: str = ""
    """Id of the trial that wrote it; empty where there are no trials."""
    format: int = 1


class Run(Protocol):
    """A `Checkpointer` or an `AlgorithmCheckpointer`."""

    def checkpoints(self) -> Sequence[CheckpointInfo]:
        """All that are in the store."""
        ...


def write(folder: str | os.PathLike[str], pointer: Pointer) -> None:
    """Writes a pointer into a folder that Tune or Train takes for a checkpoint."""
    (Path(folder) / FILE).write_bytes(msgspec.json.encode(pointer))


def read(folder: str | os.PathLike[str]) -> Pointer:
    """The pointer of a folder.

    Raises:
        CorruptionError: It has none, or one that this release does not know.
    """
    file = Path(folder) / FILE
    try:
        pointer = msgspec.json.decode(file.read_bytes(), type=Pointer)
    except (OSError, msgspec.DecodeError) as error:
        raise CorruptionError(f"{file} names no checkpoint of rl_ckpt: {error}") from error
    if pointer.format > 1:
        raise CorruptionError(f"{file} is in format {pointer.format}; this release reads format 1")
    return pointer


def wait_for(run: Run, checkpoint: str, seconds: float) -> bool:
    """Waits until a checkpoint that somebody else is writing is committed.

    Returns:
        Whether it is.
    """
    deadline = time.monotonic() + seconds
    while not any(info.id == checkpoint for info in run.checkpoints()):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
