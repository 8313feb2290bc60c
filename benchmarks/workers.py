"""The workers of the benchmarks: they hold state, know the raw ways to move it, and host the alternatives.

Alternatives are attached to the same actors and get the same arrays, so that all ways move the same bytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray

import rl_ckpt
from benchmarks import raw_s3
from benchmarks.alternatives import Rank, State, make

ARRAYS = 16
_PIECE_BYTES = 16 << 20

F32 = np.ndarray[Any, np.dtype[np.float32]]


def _values(seed: int, size_bytes: int) -> F32:
    return np.random.default_rng(seed).standard_normal(size_bytes // 4, np.float32).reshape(-1, 1024)


@ray.remote(num_cpus=1)
class BenchWorker:
    """One rank with `size_bytes` of float32 in 16 arrays.

    `kind` is "sharded" (all its own, declared), "replicated" (the same on every rank, found by digest) or "declared"
    (the same, and declared so).
    """

    def __init__(self, rank: int, world_size: int, size_bytes: int, kind: str) -> None:
        """Makes the state, and warm memory for the raw ways."""
        self._rank, self._world_size, self._kind = rank, world_size, kind
        seed = 1000 * rank if kind == "sharded" else 0
        self._arrays = {f"layer{i:02}": _values(seed + i, size_bytes // ARRAYS) for i in range(ARRAYS)}
        staged = size_bytes if kind == "sharded" else size_bytes // world_size
        self._source, self._target = np.full(size_bytes, 1, np.uint8), np.full(size_bytes, 2, np.uint8)
        self._staged = self._source.data[:staged]
        self._other: dict[str, Rank] = {}

    def get_state(self) -> Any:
        """The arrays, declared as `kind` says."""
        if self._kind == "replicated":
            return dict(self._arrays)
        if self._kind == "declared":
            return rl_ckpt.Replicated(dict(self._arrays))
        return {
            name: rl_ckpt.Sharded(a, (a.shape[0] * self._world_size, a.shape[1]), (a.shape[0] * self._rank, 0))
            for name, a in self._arrays.items()
        }

    def set_state(self, tree: dict[str, Any]) -> None:
        """Takes the arrays; they are those it has, filled in place, which the alternatives share."""
        for name, array in tree.items():
            if array is not self._arrays[name]:
                raise RuntimeError(f"{name} was not restored in place")

    def train(self, step: int) -> None:
        """Changes every value, so that nothing is stored already."""
        for array in self._arrays.values():
            np.add(array, np.float32(step % 7 + 1), out=array)

    def checksum(self) -> float:
        """Of all values."""
        return float(sum(array.sum(dtype=np.float64) for array in self._arrays.values()))

    def memcpy(self) -> float:
        """Seconds for a warm copy of as many bytes as this worker stages."""
        begun = time.perf_counter()
        np.copyto(self._target[: len(self._staged)], self._source[: len(self._staged)])
        return time.perf_counter() - begun

    def raw_write(self, folder: str) -> None:
        """Writes as many bytes as this worker stages to a new file, and fsyncs it."""
        with open(self._file(folder), "xb", buffering=0) as file:
            for start in range(0, len(self._staged), _PIECE_BYTES):
                file.write(self._staged[start : start + _PIECE_BYTES])
            os.fsync(file.fileno())

    def fill_file(self, folder: str) -> None:
        """Puts a file of this worker's whole state there, for `raw_read`."""
        self._file(folder).write_bytes(self._source.data)

    def raw_read(self, folder: str) -> None:
        """Reads that file into warm memory."""
        target = self._target.data
        with open(self._file(folder), "rb", buffering=0) as file:
            start = 0
            while start < len(target):
                start += file.readinto(target[start : start + _PIECE_BYTES]) or 0

    def raw_put(self, client: str, server: Mapping[str, str], key: str, at_once: int) -> None:
        """Uploads as many bytes as this worker stages to an object of its own, with `at_once` parts on their way."""
        raw_s3.client(client, server, at_once).put(f"{key}-{self._rank}", self._staged)

    def raw_get(self, client: str, server: Mapping[str, str], key: str, at_once: int) -> None:
        """Downloads that object into warm memory."""
        raw_s3.client(client, server, at_once).get(f"{key}-{self._rank}", self._target.data[: len(self._staged)])

    def attach(self, name: str, address: str, options: Mapping[str, Any]) -> None:
        """Sets an alternative up over this worker's arrays.

        Args:
            name: Of the alternative.
            address: `host:port` where rank 0 may listen for the others.
            options: For fsspec, where the alternative is to write to S3.
        """
        self._other[name] = make(name, State(self._arrays, self._kind, self._rank, self._world_size, address, options))

    def other_save(self, name: str, place: str) -> float:
        """Saves by an alternative; seconds until this worker may train on. `other_wait` ends it."""
        begun = time.perf_counter()
        self._other[name].save(place)
        return time.perf_counter() - begun

    def other_wait(self, name: str) -> None:
        """Waits until what `other_save` began is stored."""
        self._other[name].wait()

    def other_restore(self, name: str, place: str) -> None:
        """Restores this worker by an alternative."""
        self._other[name].restore(place)

    def detach(self, name: str) -> None:
        """Ends an alternative."""
        self._other.pop(name).close()

    def ready(self) -> int:
        """Process id, once the state is there."""
        return os.getpid()

    def _file(self, folder: str) -> Path:
        return Path(folder) / f"raw-{self._rank}"
