"""Pulls between S3 servers and disks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_ckpt import (
    Checkpointer,
    InvalidInputError,
    pull,
)
from rl_ckpt.format import records
from rl_ckpt.store.base import Store
from rl_ckpt.store.run import Run
from rl_ckpt.store.urls import open_store
from tests.plain.pulls import assert_mirror, saved, state
from tests.s3_servers import S3Server, run_moto


@pytest.fixture(scope="module")
def other_server() -> Iterator[S3Server]:
    """A second S3 server, with other credentials and other contents."""
    with run_moto() as server:
        yield S3Server(server.name, server.endpoint_url, "other-key", "other-secret")


def test_from_s3_to_disk_and_back(s3_server: S3Server, tmp_path: Path) -> None:
    url, options = f"s3://{s3_server.new_bucket()}/run", s3_server.storage_options()
    saved(url, storage_options=options)
    report = pull(url, tmp_path / "here", at="all", storage_options=options)
    source = open_store(url, options)
    assert_mirror(source, str(tmp_path / "here"), 3)
    assert report.bytes_moved == sum(item.size_bytes for item in source.list(records.SHARDS))
    back = f"s3://{s3_server.new_bucket()}/back"
    pull(tmp_path / "here", back, at="all", dst_storage_options=options)
    assert_mirror(source, open_store(back, options), 2)


def test_between_two_servers_with_their_own_credentials(
    moto_server: S3Server, other_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = f"s3://{moto_server.new_bucket()}/run", f"s3://{other_server.new_bucket()}/run"
    mine, theirs = moto_server.storage_options(), other_server.storage_options()
    saved(src, storage_options=mine)
    pull(src, dst, storage_options=mine, dst_storage_options=theirs)
    assert_mirror(open_store(src, mine), open_store(dst, theirs), 3)
    saved(src, range(4, 5), storage_options=mine)
    report = pull(src, dst, storage_options=mine, dst_storage_options=theirs)
    assert report.files_kept > 0
    assert_mirror(open_store(src, mine), open_store(dst, theirs), 4)


def test_every_byte_leaves_the_source_once(
    moto_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, options = f"s3://{moto_server.new_bucket()}/run", moto_server.storage_options()
    big = {f"w{i}": np.random.default_rng(i).random(5_000_000) for i in range(2)}  # 80 MB, in chunks of 16 MiB
    with Checkpointer(url, storage_options=options) as ckpt:
        ckpt.save_state(1, big).result(60)
    stores: list[Store] = []
    opened = Run.open

    def remember(*args: Any) -> Run:
        run = opened(*args)
        stores.append(run.store)
        return run

    monkeypatch.setattr("rl_ckpt.transfer.Run.open", staticmethod(remember))
    report = pull(url, tmp_path / "here", storage_options=options)
    (store,) = stores
    sizes = {item.name: item.size_bytes for item in store.list()}
    small = sum(size for name, size in sizes.items() if not name.startswith(records.SHARDS))
    read = store.stats.snapshot().bytes_read
    assert report.bytes_moved == sum(sizes.values()) - small
    assert report.bytes_moved <= read <= report.bytes_moved + 4 * small


def test_onto_itself_by_another_name_of_the_server(moto_server: S3Server) -> None:
    url, options = f"s3://{moto_server.new_bucket()}/run", moto_server.storage_options()
    with Checkpointer(url, storage_options=options) as ckpt:
        ckpt.save_state(1, state(1)).result(60)
    other = options | {"endpoint_url": moto_server.endpoint_url.replace("127.0.0.1", "localhost")}
    assert other != options
    with pytest.raises(InvalidInputError, match="is the source itself"):
        pull(url, url, storage_options=options, dst_storage_options=other)
    store = open_store(url, options)
    assert store.list("probe/") == store.list("pins/") == []
