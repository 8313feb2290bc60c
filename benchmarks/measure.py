"""Interleaved measurements: the raw way and ours in turn, round after round, on the same bytes; medians and ratios."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import ray

import rl_ckpt
from benchmarks.actors import BenchWorker

_WORKER: Any = BenchWorker  # an actor class, which Ray's decorator types as the plain one
_WARM_UP = 2  # rounds that don't count: the first saves start actors and allocate both generations of staging memory


@dataclass
class Row:
    """One question: seconds of the raw way and of ours, by round."""

    question: str
    limit_name: str
    goal: str
    limit: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    higher_is_better: bool = True
    """True: the ratio is limit / ours (share of the raw speed). False: ours / limit (how many times the raw time)."""

    @property
    def ratio(self) -> float:
        """Of the medians, warm-up rounds left out."""
        limit, ours = median(self.limit[_WARM_UP:]), median(self.ours[_WARM_UP:])
        return limit / ours if self.higher_is_better else ours / limit

    def spread(self) -> tuple[float, float]:
        """Quartiles of the ratio by round."""
        pairs = list(zip(self.limit[_WARM_UP:], self.ours[_WARM_UP:], strict=True))
        ratios = [a / b if self.higher_is_better else b / a for a, b in pairs]
        low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (ratios[0],) * 3
        return low, high


def _timed(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _all(workers: list[Any], method: str, *args: Any) -> list[Any]:
    found: list[Any] = ray.get([getattr(worker, method).remote(*args) for worker in workers])
    return found


def _in_turn(first: bool, a: Callable[[], None], b: Callable[[], None]) -> None:
    """Runs both, every other round in reverse, so that neither always inherits the other's cache and dirty pages."""
    for call in (a, b) if first else (b, a):
        call()


def _save(ckpt: rl_ckpt.Checkpointer, step: int, actors: list[Any], stall: Row, durable: Row) -> None:
    """One save of ours, into both rows."""
    begun = time.perf_counter()
    info = ckpt.save(step, actors).result()
    durable.ours.append(time.perf_counter() - begun)
    assert info.stall_s is not None
    stall.ours.append(info.stall_s)


def local_disk(folder: Path, kind: str, workers: int, size_bytes: int, rounds: int) -> list[Row]:
    """Stall, time to durable and restore on a local disk.

    Args:
        folder: On the disk to be measured.
        kind: See `BenchWorker`.
        workers: How many.
        size_bytes: Of each worker's state.
        rounds: Beside the warm-up.
    """
    stall = Row(f"stall, {kind}", "warm memcpy of the bytes a worker stages", "≤ 2", higher_is_better=False)
    durable = Row(f"save to durable, local disk, {kind}", "write + fsync", "≥ 0.6")
    restore = Row(f"restore, local disk, {kind}", "cached read into warm memory", "≥ 0.6")
    actors = [_WORKER.remote(rank, workers, size_bytes, kind) for rank in range(workers)]
    _all(actors, "ready")
    _all(actors, "fill_file", str(folder))
    with rl_ckpt.Checkpointer(str(folder / "run")) as ckpt:
        for step in range(_WARM_UP + rounds):
            _all(actors, "train", step)
            raw = folder / f"written-{step}"
            raw.mkdir()
            stall.limit.append(max(_all(actors, "memcpy")))

            def write(raw: Path = raw) -> None:
                durable.limit.append(_timed(lambda: _all(actors, "raw_write", str(raw))))

            _in_turn(step % 2 == 0, partial(_save, ckpt, step, actors, stall, durable), write)
            saved = _all(actors, "checksum")
            _all(actors, "train", -2 - step)
            _in_turn(
                step % 2 == 0,
                lambda: restore.ours.append(_timed(lambda: ckpt.restore(actors))),
                lambda: restore.limit.append(_timed(lambda: _all(actors, "raw_read", str(folder)))),
            )
            if _all(actors, "checksum") != saved:
                raise AssertionError("the restored values are not those that were saved")
            shutil.rmtree(raw)
    shutil.rmtree(folder / "run")
    for actor in actors:
        ray.kill(actor)
    return [stall, durable, restore]


def object_store(options: Mapping[str, str], bucket: str, workers: int, size_bytes: int, rounds: int) -> list[Row]:
    """The same three against an S3 server: botocore's client with threads is the raw way.

    Args:
        options: `endpoint_url`, `aws_access_key_id`, `aws_secret_access_key` of the server.
        bucket: That exists.
        workers: How many.
        size_bytes: Of each worker's state.
        rounds: Beside the warm-up.
    """
    stall = Row("stall, sharded, S3", "warm memcpy of the bytes a worker stages", "≤ 2", higher_is_better=False)
    durable = Row("save to durable, S3", "botocore upload, 16 MiB parts", "(shown)")
    restore = Row("restore, S3", "botocore ranged download", "(shown)")
    storage_options = {
        "key": options["aws_access_key_id"],
        "secret": options["aws_secret_access_key"],
        "endpoint_url": options["endpoint_url"],
    }
    actors = [_WORKER.remote(rank, workers, size_bytes, "sharded") for rank in range(workers)]
    _all(actors, "ready")
    keep = [rl_ckpt.LatestN(1)]
    with rl_ckpt.Checkpointer(f"s3://{bucket}/run", storage_options=storage_options, keep=keep, grace_s=0) as ckpt:
        for step in range(_WARM_UP + rounds):
            _all(actors, "train", step)
            stall.limit.append(max(_all(actors, "memcpy")))

            _in_turn(
                step % 2 == 0,
                partial(_save, ckpt, step, actors, stall, durable),
                lambda: durable.limit.append(_timed(lambda: _raw_s3(actors, "raw_put", options, bucket))),
            )
            saved = _all(actors, "checksum")
            _all(actors, "train", -2 - step)
            _in_turn(
                step % 2 == 0,
                lambda: restore.ours.append(_timed(lambda: ckpt.restore(actors))),
                lambda: restore.limit.append(_timed(lambda: _raw_s3(actors, "raw_get", options, bucket))),
            )
            if _all(actors, "checksum") != saved:
                raise AssertionError("the restored values are not those that were saved")
    for actor in actors:
        ray.kill(actor)
    return [stall, durable, restore]


def _raw_s3(actors: list[Any], method: str, options: Mapping[str, str], bucket: str) -> None:
    ray.get([getattr(a, method).remote(dict(options), bucket, f"raw/{rank}") for rank, a in enumerate(actors)])
