"""The workers of the benchmarks: they hold state, and know the raw ways to move it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import ray

import rl_ckpt

_ARRAYS = 16
_PIECE_BYTES = 16 << 20
_THREADS = 4


def _values(seed: int, size_bytes: int) -> np.ndarray[Any, np.dtype[np.float32]]:
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
        self._arrays = {f"layer{i:02}": _values(seed + i, size_bytes // _ARRAYS) for i in range(_ARRAYS)}
        staged = size_bytes if kind == "sharded" else size_bytes // world_size
        self._source, self._target = np.full(size_bytes, 1, np.uint8), np.full(size_bytes, 2, np.uint8)
        self._staged = self._source.data[:staged]

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
        """Takes the arrays."""
        self._arrays = tree

    def train(self, step: int) -> None:
        """Changes every value, so that nothing is stored already."""
        for array in self._arrays.values():
            np.add(array, np.float32(step + 1), out=array)

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

    def raw_put(self, client: Mapping[str, str], bucket: str, key: str) -> None:
        """Uploads as many bytes as this worker stages by botocore, 16 MiB parts in threads."""
        s3 = _client(client)
        upload = s3.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
        starts = range(0, len(self._staged), _PIECE_BYTES)

        def part(item: tuple[int, int]) -> dict[str, Any]:
            number, start = item
            data = bytes(self._staged[start : start + _PIECE_BYTES])
            done = s3.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=data)
            return {"PartNumber": number, "ETag": done["ETag"]}

        with ThreadPoolExecutor(_THREADS) as pool:
            parts = list(pool.map(part, enumerate(starts, 1)))
        s3.complete_multipart_upload(Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts})

    def raw_get(self, client: Mapping[str, str], bucket: str, key: str) -> None:
        """Downloads that object into warm memory, 16 MiB ranges in threads."""
        s3 = _client(client)
        target = self._target.data[: len(self._staged)]

        def fetch(start: int) -> None:
            piece = target[start : start + _PIECE_BYTES]
            body = s3.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{start + len(piece) - 1}")["Body"]
            filled = 0
            while filled < len(piece):
                filled += body.readinto(piece[filled:])

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(fetch, range(0, len(target), _PIECE_BYTES)))

    def ready(self) -> int:
        """Process id, once the state is there."""
        return os.getpid()

    def _file(self, folder: str) -> Path:
        return Path(folder) / f"raw-{self._rank}"


def _client(options: Mapping[str, str]) -> Any:
    import botocore.config
    import botocore.session

    config = botocore.config.Config(
        s3={"addressing_style": "path", "payload_signing_enabled": False},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        max_pool_connections=_THREADS,
    )
    return botocore.session.get_session().create_client("s3", region_name="us-east-1", config=config, **options)
