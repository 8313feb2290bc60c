"""A checkpoint brought from S3 to a local disk, and from there to S3: ours, and tools that copy the same files.

Ours verifies every chunk on its way and makes every file durable; the others do neither, which their names say. The
limit of a pull is the raw client that reads the same bytes into warm memory, without a disk.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import rl_ckpt
from benchmarks import harness, raw_s3
from benchmarks.results import LIMIT, Goal, Row, Series
from benchmarks.servers import Bucket, bucket
from benchmarks.settings import Settings
from rl_ckpt.store.urls import open_store

Ways = Mapping[str, Callable[[int], None]]
"""By name: brings the files, in a given round."""

_AT_ONCE = 16
_FILES_AT_ONCE = 4
_PART_BYTES = 16 << 20
_ARRAYS = 8
_UNSAFE = "no digests, no fsync"
_AWS = "aws s3 cp's s3transfer"


def measure(settings: Settings) -> list[Row]:
    """One row for each direction."""
    size_bytes = 2 * settings.workers * settings.s3_mib << 20
    with bucket() as place, harness.folder() as folder:
        url = f"{place.url}/run"
        with rl_ckpt.Checkpointer(url, storage_options=place.options) as ckpt:
            ckpt.save_state(1, _state(size_bytes)).result()
        files = {item.name: item.size_bytes for item in open_store(url, place.options).list("shards/")}
        case = f"{size_bytes >> 20} MiB, {place.server.name}"
        return [
            _row(f"S3 to disk, {case}", settings, place, _pulls(place, folder, files), partial(_read, place, files)),
            _row(f"disk to S3, {case}", settings, place, _pushes(place, folder, files), None),
        ]


def _state(size_bytes: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {f"w{i}": rng.integers(0, 256, size_bytes // _ARRAYS, "u1") for i in range(_ARRAYS)}


def _row(
    case: str,
    settings: Settings,
    place: Bucket,
    ways: Ways,
    limit: Callable[[int], None] | None,
) -> Row:
    every = {**ways, **({LIMIT: limit} if limit is not None else {})}
    timed: harness.Ways = {
        name: (lambda number, way=way: {"s": harness.timed(partial(way, number))})  # type: ignore[misc]
        for name, way in every.items()
    }
    found = harness.rounds(settings.rounds, timed, lambda _: place.check_alive())
    rest = [Series(name, tuple(found[name]["s"]), _UNSAFE) for name in ways if name != "ours"]
    skipped = {} if importlib.util.find_spec("boto3") else {_AWS: "not installed"}
    bound = Series(LIMIT, tuple(found[LIMIT]["s"]), "raw client") if limit is not None else None
    ours = Series("ours", tuple(found["ours"]["s"]))
    return Row("pull", case, "s", ours, bound, tuple(rest), (Goal("at most", 1.5, "s3fs get, put", plus=0.5),), skipped)


def _pulls(place: Bucket, folder: Path, files: dict[str, int]) -> Ways:
    def ours(number: int) -> None:
        to = harness.empty(folder / "to") / f"ours-{number}"
        rl_ckpt.pull(f"{place.url}/run", to, storage_options=place.options, nodes=False)

    def s3fs_get(number: int) -> None:
        fs = _fs(place)
        fs.get(f"{place.name}/run", str(harness.empty(folder / "to") / f"s3fs-{number}"), recursive=True)

    def aws(number: int) -> None:
        to = harness.empty(folder / "to")
        _transfer(place, files, to, "download_file")

    return {"ours": ours, "s3fs get, put": s3fs_get, **({_AWS: aws} if importlib.util.find_spec("boto3") else {})}


def _pushes(place: Bucket, folder: Path, files: dict[str, int]) -> Ways:
    source = folder / "source"
    rl_ckpt.pull(f"{place.url}/run", source, storage_options=place.options, nodes=False)

    def ours(number: int) -> None:
        _clean(place, "pushed")
        rl_ckpt.pull(source, f"{place.url}/pushed", dst_storage_options=place.options, nodes=False)

    def s3fs_put(number: int) -> None:
        _clean(place, "pushed")
        _fs(place).put(f"{source}/", f"{place.name}/pushed/", recursive=True)

    def aws(number: int) -> None:
        _clean(place, "pushed")
        _transfer(place, files, source, "upload_file")

    return {"ours": ours, "s3fs get, put": s3fs_put, **({_AWS: aws} if importlib.util.find_spec("boto3") else {})}


def _clean(place: Bucket, prefix: str) -> None:
    store = open_store(f"{place.url}/{prefix}", place.options)
    store.delete([item.name for item in store.list()])


def _fs(place: Bucket) -> Any:
    return importlib.import_module("s3fs").S3FileSystem(**place.options, use_listings_cache=False)


def _transfer(place: Bucket, files: dict[str, int], folder: Path, method: str) -> None:
    boto3, transfer = importlib.import_module("boto3"), importlib.import_module("boto3.s3.transfer")
    raw = place.raw
    client = boto3.client(
        "s3",
        endpoint_url=raw["endpoint_url"],
        aws_access_key_id=raw["key"],
        aws_secret_access_key=raw["secret"],
        region_name="us-east-1",
        config=importlib.import_module("botocore.config").Config(max_pool_connections=_FILES_AT_ONCE * _AT_ONCE),
    )
    config = transfer.TransferConfig(
        multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=_AT_ONCE // _FILES_AT_ONCE
    )

    def one(name: str) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if method == "download_file":
            client.download_file(raw["bucket"], f"run/{name}", str(path), Config=config)
        else:
            client.upload_file(str(path), raw["bucket"], f"pushed/{name}", Config=config)

    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        list(pool.map(one, files))


def _read(place: Bucket, files: dict[str, int], number: int) -> None:
    name = next(name for name in raw_s3.CLIENTS if raw_s3.missing(name) is None)
    client = raw_s3.client(name, place.raw, _AT_ONCE)
    for file, size in files.items():
        client.get(f"run/{file}", _room(size))


_rooms: dict[int, memoryview] = {}


def _room(size_bytes: int) -> memoryview:
    """Memory that is warm after the first round."""
    return _rooms.setdefault(size_bytes, memoryview(bytearray(size_bytes)))
