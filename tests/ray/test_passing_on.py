"""Chunks on their way from node to node, on a real cluster: by socket, by Ray where that fails, repaired if damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from rl_ckpt import Checkpointer
from rl_ckpt.runtime.messages import Failure, FetchDone, FetchOrder, decode, encode
from rl_ckpt.runtime.transport.wire import DATA, Line, Reply
from tests.ray.holders import (
    WAIT_S,
    give,
    memory_files,
    on_nodes,
    same,
    server_stats,
    servers,
    states_of,
    total,
    until,
)
from tests.s3_servers import S3Server

CHUNK = 1 << 18
SHARED = 6 << 20
WORLD = 3


def state(step: int) -> dict[str, Any]:
    return {"w": np.random.default_rng(step).integers(0, 256, SHARED, np.uint8), "small": np.arange(3.0) + step}


UNIQUE = SHARED + 24


@pytest.fixture(scope="module")
def workers(three_nodes: Any) -> list[Any]:
    return on_nodes(WORLD)


@pytest.fixture
def saved(moto_server: S3Server, workers: list[Any]) -> Any:
    """A run with one checkpoint, whose shard servers are there and have counted what they did."""
    url = f"s3://{moto_server.new_bucket()}/run"
    options = moto_server.storage_options()
    with Checkpointer(url, storage_options=options, chunk_bytes=CHUNK, memory_tier=False) as ckpt:
        give(workers, [state(1)] * WORLD)
        ckpt.save(1, workers).result(WAIT_S)
        give(workers, [state(2)] * WORLD)
        yield ckpt


def restored(ckpt: Checkpointer, workers: list[Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Restores and checks every worker; gives what the report says and what the servers counted."""
    before = server_stats(ckpt)
    report = ckpt.restore(workers)
    after = server_stats(ckpt)
    assert report.step == 1
    assert report.fell_back == {}
    for found in states_of(workers):
        same(found, state(1))
    until(lambda: not any(memory_files(name, "restore-*") for name in after), "the restore's memory is given back")
    return dict(report.bytes_from), {
        name: total(after, name) - total(before, name) for name in next(iter(after.values()))
    }


def test_chunks_leave_the_store_once_and_travel_by_socket(saved: Checkpointer, workers: list[Any]) -> None:
    told, counted = restored(saved, workers)
    assert told == {"store": UNIQUE, "peers": 2 * UNIQUE}
    assert UNIQUE <= counted["store_bytes_read"] <= 1.01 * UNIQUE
    assert counted["connections"] == WORLD * (WORLD - 1)
    assert 2 * UNIQUE <= counted["bytes_served"] <= 2 * UNIQUE + 64 * WORLD * WORLD, "the values and their padding"
    assert counted["refused"] == counted["bytes_served_by_ray"] == 0


def test_a_listener_that_nobody_can_reach_makes_chunks_go_through_ray(saved: Checkpointer, workers: list[Any]) -> None:
    closed = sorted(servers(saved))[0]
    ray.get(servers(saved)[closed].__ray_call__.remote(lambda server: server._listener.close()))
    told, counted = restored(saved, workers)
    assert set(told) == {"store", "peers", "peers_ray"}
    assert told["store"] == UNIQUE
    assert told["peers"] + told["peers_ray"] == 2 * UNIQUE
    assert counted["connections"] == (WORLD - 1) ** 2
    assert counted["bytes_served_by_ray"] == told["peers_ray"] > 0
    assert UNIQUE <= counted["store_bytes_read"] <= 1.01 * UNIQUE


def test_without_any_listener_all_chunks_go_through_ray(saved: Checkpointer, workers: list[Any]) -> None:
    for server in servers(saved).values():
        ray.get(server.__ray_call__.remote(lambda server: setattr(server, "_listener", None)))
    told, counted = restored(saved, workers)
    assert told == {"store": UNIQUE, "peers": 0, "peers_ray": 2 * UNIQUE}
    assert UNIQUE <= counted["store_bytes_read"] <= 1.01 * UNIQUE


def damage_in_transit(server: Any) -> None:
    """From now on this server sends the second half of every range with its bits turned round."""

    def send(line: Line, path: str, ranges: dict[int, tuple[int, int]]) -> None:
        with open(path, "rb") as file:
            for number, (offset, size) in ranges.items():
                file.seek(offset)
                good = file.read(size)
                half = size // 2
                line.send_reply(Reply(DATA, number, size), good[:half] + bytes(255 - byte for byte in good[half:]))

    server._listener._send = send


def test_chunks_damaged_on_their_way_are_read_from_the_store_again(saved: Checkpointer, workers: list[Any]) -> None:
    bad = sorted(servers(saved))[0]
    ray.get(servers(saved)[bad].__ray_call__.remote(damage_in_transit))
    told, counted = restored(saved, workers)
    assert set(told) == {"store", "peers", "store_again"}
    assert told["store"] == UNIQUE
    assert told["peers"] + told["store_again"] == 2 * UNIQUE
    assert 0 < told["store_again"] <= UNIQUE
    assert counted["store_bytes_read"] >= UNIQUE + told["store_again"]


def test_a_fetch_that_comes_after_forget_makes_no_memory(saved: Checkpointer) -> None:
    name, server = next(iter(servers(saved).items()))
    order = encode(FetchOrder("late#1", 1 << 20))
    assert isinstance(decode(ray.get(server.fetch.remote(order)), FetchDone | Failure), FetchDone)
    assert memory_files(name, "restore-late*") != []
    ray.get(server.forget.remote("late#1"))
    late = decode(ray.get(server.fetch.remote(order)), FetchDone | Failure)
    assert isinstance(late, Failure)
    assert "came late" in late.message
    assert memory_files(name, "restore-late*") == []
    other = encode(FetchOrder("late#2", 1 << 20))
    assert isinstance(decode(ray.get(server.fetch.remote(other)), FetchDone | Failure), FetchDone)
    ray.get(server.forget.remote("late#2"))


def test_the_secret_of_a_listener_is_in_no_file(saved: Checkpointer, moto_server: S3Server) -> None:
    doors = [ray.get(server.door.remote()) for server in servers(saved).values()]
    assert len({door.secret for door in doors}) == WORLD
    client = moto_server.client()
    bucket = saved.url.removeprefix("s3://").partition("/")[0]
    stored = b"".join(
        client.get_object(Bucket=bucket, Key=item["Key"])["Body"].read()
        for item in client.list_objects_v2(Bucket=bucket)["Contents"]
    )
    logs = Path(ray._private.worker.global_worker.node.get_session_dir_path()) / "logs"
    stored += b"".join(file.read_bytes() for file in logs.rglob("*") if file.is_file())
    assert b"rl_ckpt" in stored
    for door in doors:
        assert door.secret not in stored
        assert door.secret.hex().encode() not in stored
