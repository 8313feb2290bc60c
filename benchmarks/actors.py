"""The workers of the benchmarks: they hold state, and know the raw ways to move it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray

import rl_ckpt

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_PIECE = 16 << 20


def _values(seed: int, size_bytes: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(size_bytes // 4, np.float32).reshape(-1, 1024)


@ray.remote(num_cpus=1)
class BenchWorker:
    """One rank with `size_bytes` of float32 in 16 arrays, all its own ("sharded") or the same on every rank ("replicated")."""

    def __init__(self, rank: int, world_size: int, size_bytes: int, kind: str) -> None:
        """Makes the state."""
        self._rank, self._world_size, self._kind = rank, world_size, kind
        seed = 0 if kind == "replicated" else 1000 * rank
        self._arrays = {f"layer{i}": _values(seed + i, size_bytes // 16) for i in range(16)}
        staged = size_bytes // world_size if kind == "replicated" else size_bytes
        self._source, self._target = np.full(staged, 1, np.uint8), np.full(staged, 2, np.uint8)

    def get_state(self) -> dict[str, Any]:
        """The arrays; as shards of global arrays where they are this rank's own."""
        if self._kind == "replicated":
            return dict(self._arrays)
        return {
            name: rl_ckpt.Sharded(a, (a.shape[0] * self._world_size, a.shape[1]), (a.shape[0] * self._rank, 0))
            for name, a in self._arrays.items()
        }

    def set_state(self, tree: dict[str, Any]) -> None:
        """Takes the arrays."""
        self._arrays = tree

    def train(self, step: int) -> None:
        """Changes every value, so that nothing is stored already."""
        for array in self._arrays.values():
            array += np.float32(step + 1)

    def checksum(self) -> float:
        """Of all values."""
        return float(sum(float(a[::64].sum(dtype=np.float64)) for a in self._arrays.values()))

    def memcpy(self) -> float:
        """Seconds for a warm copy of as many bytes as this worker stages."""
        begun = time.perf_counter()
        np.copyto(self._target, self._source)
        return time.perf_counter() - begun

    def raw_write(self, folder: str) -> str:
        """Writes as many bytes as this worker stages to one file, and fsyncs it."""
        path = str(Path(folder) / f"raw-{self._rank}")
        data = memoryview(self._source)
        with open(path, "wb", buffering=0) as file:
            for start in range(0, len(data), _PIECE):
                file.write(data[start : start + _PIECE])
            os.fsync(file.fileno())
        return path

    def raw_read(self, folder: str) -> None:
        """Reads that file into warm memory."""
        data = memoryview(self._target)
        with open(Path(folder) / f"raw-{self._rank}", "rb", buffering=0) as file:
            start = 0
            while start < len(data):
                start += file.readinto(data[start : start + _PIECE]) or 0

    def ready(self) -> int:
        """Process id, once the state is there."""
        return os.getpid()
