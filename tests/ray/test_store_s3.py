"""Saves and restores through a real S3 server, from three nodes: each byte leaves the store once."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from rl_ckpt import Checkpointer
from rl_ckpt.errors import CheckpointError, CorruptionError, StorageError
from tests.ray.holders import (
    WAIT_S,
    fingerprint,
    give,
    memory_files,
    number_of_sets,
    on_nodes,
    same,
    server_stats,
    states_of,
    total,
    until,
)
from tests.s3_servers import S3Server

CHUNK = 1 << 18
OWN = 4000
SHARED = 3 << 20


def state(rank: int, step: int = 0) -> dict[str, Any]:
    weights = np.frombuffer(random.Random(step).randbytes(SHARED), "u1").copy()
    return {"w": weights, "own": np.full(OWN // 8, 1000.0 * rank + step), "step": step}


@pytest.fixture(scope="module")
def workers(three_nodes: Any) -> list[Any]:
    return on_nodes(6)


def open_run(server: S3Server, **options: Any) -> Checkpointer:
    url = f"s3://{server.new_bucket()}/some/run"
    return Checkpointer(url, storage_options=server.storage_options(), chunk_bytes=CHUNK, **options)


def again(ckpt: Checkpointer, server: S3Server) -> Checkpointer:
    """The same run, with actors that have read and written nothing yet."""
    ckpt.close()
    return Checkpointer(ckpt.url, storage_options=server.storage_options(), chunk_bytes=CHUNK)


def test_each_chunk_leaves_the_store_once_and_peers_pass_it_on(s3_server: S3Server, workers: list[Any]) -> None:
    first = open_run(s3_server)
    give(workers, [state(rank) for rank in range(6)])
    info = first.save(0, workers).result(WAIT_S)
    with again(first, s3_server) as ckpt:
        give(workers, [state(9, 9) for _ in range(6)])
        report = ckpt.restore(workers)
        stats = server_stats(ckpt)
        unique = SHARED + 6 * OWN
        assert info.bytes == unique
        assert total(stats, "store_bytes_read") <= 1.001 * unique, "but for the alignment between chunks"
        assert report.bytes_from == {"store": unique, "peers": 2 * SHARED}
        assert total(stats, "bytes_from_peers") == total(stats, "bytes_served") == 2 * SHARED
        assert max(one["store_bytes_read"] for one in stats.values()) < 0.5 * unique
        for rank, found in enumerate(states_of(workers)):
            same(found, state(rank))
        until(lambda: not any(memory_files(name, "restore-*") for name in stats), "the restore's memory is given back")


@pytest.mark.parametrize("many", [1, pytest.param(2, marks=pytest.mark.soak), 5])
def test_onto_another_number_of_workers_on_other_nodes(s3_server: S3Server, workers: list[Any], many: int) -> None:
    first = open_run(s3_server)
    three = workers[:3]
    give(three, [state(rank, 4) for rank in range(3)])
    first.save(4, three).result(WAIT_S)
    with again(first, s3_server) as ckpt:
        some = workers[-many:]
        give(some, [state(7, 7) for _ in range(many)])
        before = server_stats(ckpt)
        report = ckpt.restore(some)
        read = total(server_stats(ckpt), "store_bytes_read") - total(before, "store_bytes_read")
        assert (report.saved_world_size, report.world_size) == (3, many)
        for rank, found in enumerate(states_of(some)):
            expected = state(rank, 4)
            if rank >= 3:
                expected["own"] = state(7, 7)["own"]
            same(found, expected)
        unique = SHARED + min(many, 3) * OWN
        assert report.bytes_from["store"] == unique
        assert unique <= read <= 1.05 * unique


def test_one_policy_out_of_many_costs_its_bytes(moto_server: S3Server, workers: list[Any]) -> None:
    size, three = 200 << 10, workers[:3]

    def policies(seed: int) -> dict[str, Any]:
        return {f"p{i}": np.random.default_rng(seed + i).random(size // 8) for i in range(100)}

    first = open_run(moto_server)
    give(three, [policies(0) for _ in range(3)])
    first.save(0, three).result(WAIT_S)
    with again(first, moto_server) as ckpt:
        give(three, [policies(500) for _ in range(3)])
        report = ckpt.restore(three, select="p42")
        stats = server_stats(ckpt)
        assert report.bytes_from == {"store": size, "peers": 2 * size}
        assert size <= total(stats, "store_bytes_read") <= 1.1 * size
        for found in states_of(three):
            same(found, policies(500) | {"p42": policies(0)["p42"]})


def damage(server: S3Server, ckpt: Checkpointer, checkpoint: str) -> None:
    """Flips a bit in the middle of a checkpoint's largest shard object."""
    client = server.client()
    bucket, _, prefix = ckpt.url.removeprefix("s3://").partition("/")
    found = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/shards/{checkpoint}/")["Contents"]
    key = max(found, key=lambda item: item["Size"])["Key"]
    body = bytearray(client.get_object(Bucket=bucket, Key=key)["Body"].read())
    body[len(body) // 2] ^= 1
    client.put_object(Bucket=bucket, Key=key, Body=bytes(body))


def test_a_damaged_object_is_never_applied_and_the_restore_falls_back(s3_server: S3Server, workers: list[Any]) -> None:
    with open_run(s3_server, memory_tier=False) as ckpt:
        infos = []
        for step in (0, 1):
            give(workers, [state(rank, step) for rank in range(6)])
            infos.append(ckpt.save(step, workers).result(WAIT_S))
        damage(s3_server, ckpt, infos[1].id)
        give(workers, [state(9, 9) for _ in range(6)])
        with pytest.raises(CorruptionError, match="damaged"):
            ckpt.restore(workers, step=1)
        assert number_of_sets(workers) == [0] * 6
        assert {str(fingerprint(s)) for s in states_of(workers)} == {str(fingerprint(state(9, 9)))}
        report = ckpt.restore(workers)
        assert report.step == 0
        assert list(report.fell_back) == [infos[1].id]
        assert "damaged" in report.fell_back[infos[1].id]
        for rank, found in enumerate(states_of(workers)):
            same(found, state(rank, 0))


def test_a_missing_object_is_named_and_the_restore_falls_back(moto_server: S3Server, workers: list[Any]) -> None:
    three = workers[:3]
    with open_run(moto_server, memory_tier=False) as ckpt:
        infos = []
        for step in (0, 1):
            give(three, [state(rank, step) for rank in range(3)])
            infos.append(ckpt.save(step, three).result(WAIT_S))
        bucket, _, prefix = ckpt.url.removeprefix("s3://").partition("/")
        client = moto_server.client()
        for item in client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/shards/{infos[1].id}/")["Contents"]:
            client.delete_object(Bucket=bucket, Key=item["Key"])
        report = ckpt.restore(three)
        assert report.step == 0
        assert "is missing, though the checkpoint names it" in report.fell_back[infos[1].id]


def test_a_bucket_that_is_not_there_is_named(moto_server: S3Server, workers: list[Any]) -> None:
    give(workers[:2], [state(rank) for rank in range(2)])
    with Checkpointer("s3://no-such-bucket/run", storage_options=moto_server.storage_options()) as ckpt:
        with pytest.raises(CheckpointError, match="no-such-bucket"):
            ckpt.save(0, workers[:2])
        with pytest.raises(CheckpointError, match="no-such-bucket"):
            ckpt.restore(workers[:2])


@pytest.mark.ceph
def test_a_wrong_secret_is_said_and_not_shown(ceph_server: S3Server, workers: list[Any]) -> None:
    url = f"s3://{ceph_server.new_bucket()}/run"
    wrong = ceph_server.storage_options() | {"secret": "not-the-secret"}
    give(workers[:2], [state(rank) for rank in range(2)])
    with Checkpointer(url, storage_options=wrong) as ckpt:
        with pytest.raises(StorageError) as caught:
            ckpt.save(0, workers[:2])
        assert "403" in str(caught.value) or "SignatureDoesNotMatch" in str(caught.value)
        assert "not-the-secret" not in str(caught.value)
