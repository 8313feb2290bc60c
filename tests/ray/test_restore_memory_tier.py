"""Restores on a real cluster, from whatever has the bytes: memory, peers' memory, the store, older checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rl_ckpt import Checkpointer, RestoreReport
from rl_ckpt.errors import CorruptionError
from rl_ckpt.store.run import Run
from tests.ray.holders import (
    HEALTH,
    MEMORY,
    Holder,
    give,
    kill_process,
    link,
    memory_files,
    on_nodes,
    pid_of,
    same,
    server_names,
    server_stats,
    servers,
    several_nodes,
    states_of,
    total,
    until,
)
from tests.ray.test_tier import complete, held
from tests.s3_servers import S3Server

WORLD = 3
CHUNK = 1 << 18
SHARED, OWN = 8 * 300_000, 8 * 40_000


def state(rank: int, step: int = 0) -> dict[str, Any]:
    return {"w": np.arange(300_000) + step, "own": np.full(40_000, 100.0 * rank + step)}


@pytest.fixture(scope="module")
def cluster(_no_aws_settings_from_outside: None) -> Iterator[Any]:
    with several_nodes(3, HEALTH) as made:
        yield made


@pytest.fixture(scope="module")
def workers(cluster: Any) -> list[Any]:
    return on_nodes(WORLD)


def save(ckpt: Checkpointer, workers: list[Any], step: int, *, copies: bool = True) -> Any:
    give(workers, [state(rank, step) for rank in range(len(workers))])
    info = ckpt.save(step, workers).result(60)
    if copies:
        complete(ckpt, 6)
    give(workers, [state(9, 99)] * len(workers))
    return info


def restored(ckpt: Checkpointer, workers: list[Any], expected: int, **how: Any) -> RestoreReport:
    """Restores, and checks every value and that nothing of the restore is left."""
    report = ckpt.restore(workers, **how)
    assert report.step == expected
    for rank, found in enumerate(states_of(workers)):
        same(found, state(rank, expected))
    names = [name for name in server_names(ckpt) if (MEMORY / name).exists()]
    until(lambda: not any(memory_files(name, "restore-*") for name in names), "its memory is given back")
    return report


def shards(ckpt: Checkpointer) -> Path:
    return Path(ckpt.url.removeprefix("file://")) / "shards"


def flip(path: str | Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def flip_in_memory(server: str) -> bytes:
    """Damages the first chunk of the part that a server staged, in its own memory; gives the chunk's digest."""
    (one,) = [held for name, held in held(server).items() if name.endswith(server)]
    chunk = one.part.chunks[0]
    flip(one.path, chunk.offset + chunk.size_bytes // 2)
    return chunk.digest


def flip_everywhere_in_memory(ckpt: Checkpointer, digest: bytes) -> None:
    for name in servers(ckpt):
        for one in held(name).values():
            for chunk in one.part.chunks:
                if chunk.digest == digest:
                    flip(one.path, chunk.offset + chunk.size_bytes // 2)


def flip_in_store(ckpt: Checkpointer, digest: bytes, checkpoint: str) -> str:
    """Damages a chunk in the file where a checkpoint has it; gives the file's name."""
    run = Run.open(ckpt.url)
    manifest = run.manifest(next(c for c in run.log.read().commits if c.id == checkpoint))
    for array in manifest.arrays:
        for chunk in array.chunks:
            if chunk.digest == digest.hex():
                name = manifest.files[chunk.file].name
                flip(shards(ckpt).parent / name, chunk.offset + chunk.bytes // 2)
                return name
    raise AssertionError("no such chunk")


def test_all_bytes_come_from_memory_though_the_stores_files_are_gone(tmp_path: Path, workers: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run"), chunk_bytes=CHUNK) as ckpt:
        save(ckpt, workers, 1)
        shutil.rmtree(shards(ckpt))
        before = server_stats(ckpt)
        report = restored(ckpt, workers, 1)
        assert set(report.bytes_from) == {"memory", "peers_memory"}
        assert sum(report.bytes_from.values()) == report.bytes == WORLD * (SHARED + OWN)
        assert report.bytes_from["memory"] >= WORLD * OWN, "what a node staged itself"
        assert (report.repaired, report.fell_back, report.notice) == ({}, {}, "")
        assert total(server_stats(ckpt), "store_bytes_read") == total(before, "store_bytes_read")


def test_no_shard_is_read_from_s3(moto_server: S3Server, workers: list[Any]) -> None:
    url = f"s3://{moto_server.new_bucket()}/run"
    with Checkpointer(url, storage_options=moto_server.storage_options(), chunk_bytes=CHUNK) as ckpt:
        save(ckpt, workers, 1)
        before = server_stats(ckpt)
        report = restored(ckpt, workers, 1)
        assert set(report.bytes_from) == {"memory", "peers_memory"}
        assert total(server_stats(ckpt), "store_reads") == total(before, "store_reads")


def test_after_the_loss_of_a_node_all_bytes_come_from_memory(tmp_path: Path, cluster: Any) -> None:
    node = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    pin = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    with Checkpointer(str(tmp_path / "run"), chunk_bytes=CHUNK) as ckpt:
        others = sorted(n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeID"] != node.node_id)
        pins = [NodeAffinitySchedulingStrategy(other, soft=False) for other in others[:2]]
        team = [Holder.options(scheduling_strategy=place).remote() for place in [*pins, pin]]
        save(ckpt, team, 1)
        shutil.rmtree(shards(ckpt))
        cluster.remove_node(node, allow_graceful=False)
        until(lambda: len([n for n in ray.nodes() if n["Alive"]]) == 3, "the node is known to be dead")
        until(lambda: ray.get(link(ckpt).stats.remote()), "the coordinator is back, if it was there")
        report = restored(ckpt, [*team[:2], *on_nodes(1)], 1)
        assert set(report.bytes_from) <= {"memory", "peers_memory"}
        assert (report.repaired, report.fell_back) == ({}, {})


def test_a_bit_that_flips_in_memory_is_repaired_from_the_other_copy(tmp_path: Path, workers: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run"), chunk_bytes=CHUNK) as ckpt:
        save(ckpt, workers, 1)
        shutil.rmtree(shards(ckpt))
        flip_in_memory(sorted(servers(ckpt))[0])
        report = restored(ckpt, workers, 1)
        assert len(report.repaired) == 1
        assert next(iter(report.repaired.values())).startswith("the memory of rl_ckpt-")
        assert set(report.bytes_from) == {"memory", "peers_memory"}
        assert report.fell_back == {}
        report = restored(ckpt, workers, 1)
        assert report.repaired == {}, "the damaged copy was given up"


def test_what_is_damaged_in_all_of_memory_is_read_from_the_store(tmp_path: Path, workers: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run"), chunk_bytes=CHUNK) as ckpt:
        info = save(ckpt, workers, 1)
        digest = flip_in_memory(sorted(servers(ckpt))[0])
        flip_everywhere_in_memory(ckpt, digest)
        flip_in_memory(sorted(servers(ckpt))[0])  # its own copy was flipped back by that
        report = restored(ckpt, workers, 1)
        (where,) = report.repaired.values()
        assert where.startswith(f"shards/{info.id}/")
        assert set(report.bytes_from) == {"memory", "peers_memory", "files"}
        assert 0 < report.bytes_from["files"] <= WORLD * CHUNK


def test_when_nothing_is_left_of_a_chunk_the_previous_commit_is_restored(tmp_path: Path, workers: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run"), chunk_bytes=CHUNK) as ckpt:
        save(ckpt, workers, 1)
        info = save(ckpt, workers, 2)
        digest = flip_in_memory(sorted(servers(ckpt))[0])
        flip_everywhere_in_memory(ckpt, digest)
        flip_in_memory(sorted(servers(ckpt))[0])
        flip_in_store(ckpt, digest, info.id)
        with pytest.raises(CorruptionError):
            ckpt.restore(workers, step=2)
        report = restored(ckpt, workers, 1)
        assert set(report.fell_back) == {info.id}
        assert "damaged" in report.fell_back[info.id]


@pytest.mark.parametrize("how", ["flip", "delete", "cut"])
def test_a_damaged_file_is_repaired_from_another_checkpoint_with_the_same_bytes(
    tmp_path: Path, workers: list[Any], how: str
) -> None:
    with Checkpointer(str(tmp_path / "run"), chunk_bytes=CHUNK, memory_tier=False) as ckpt:
        save(ckpt, workers, 0, copies=False)
        first = save(ckpt, workers, 1, copies=False)
        ckpt.restore(workers, step=0)
        give(workers, [state(rank, 1) for rank in range(WORLD)])
        info = ckpt.save(3, workers).result(60)  # the bytes of step 1, on another branch: they are written once more
        give(workers, [state(9, 99)] * WORLD)
        path = max((shards(ckpt) / info.id).iterdir(), key=lambda p: p.stat().st_size)
        if how == "flip":
            flip(path, path.stat().st_size // 2)
        elif how == "delete":
            path.unlink()
        else:
            with open(path, "r+b") as file:
                file.truncate(path.stat().st_size // 2)
        report = ckpt.restore(workers)
        assert (report.step, report.fell_back) == (3, {})
        for rank, found in enumerate(states_of(workers)):
            same(found, state(rank, 1))
        assert report.repaired
        assert all(where.startswith(f"shards/{first.id}/") for where in report.repaired.values())
        assert set(report.bytes_from) == {"files"}


def test_a_file_that_s3_lost_is_repaired_from_another_checkpoint(moto_server: S3Server, workers: list[Any]) -> None:
    bucket = moto_server.new_bucket()
    options = moto_server.storage_options()
    with Checkpointer(f"s3://{bucket}/run", storage_options=options, chunk_bytes=CHUNK, memory_tier=False) as ckpt:
        save(ckpt, workers, 0, copies=False)
        first = save(ckpt, workers, 1, copies=False)
        ckpt.restore(workers, step=0)
        give(workers, [state(rank, 1) for rank in range(WORLD)])
        info = ckpt.save(3, workers).result(60)
        client = moto_server.client()
        files = client.list_objects_v2(Bucket=bucket, Prefix=f"run/shards/{info.id}/")["Contents"]
        client.delete_object(Bucket=bucket, Key=max(files, key=lambda item: item["Size"])["Key"])
        give(workers, [state(9, 99)] * WORLD)
        report = ckpt.restore(workers)
        assert (report.step, report.fell_back) == (3, {})
        for rank, found in enumerate(states_of(workers)):
            same(found, state(rank, 1))
        assert report.repaired
        assert all(where.startswith(f"shards/{first.id}/") for where in report.repaired.values())


def test_what_is_only_in_memory_is_the_newest_and_is_found_by_its_step(tmp_path: Path, workers: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run"), chunk_bytes=CHUNK, persist_every=2) as ckpt:
        assert save(ckpt, workers, 1).in_store
        assert not save(ckpt, workers, 2).in_store
        assert restored(ckpt, workers, 2).fell_back == {}
        assert restored(ckpt, workers, 2, step=2).fell_back == {}
        assert restored(ckpt, workers, 1, step=1).fell_back == {}


def test_when_the_store_is_gone_memory_is_used_and_it_is_said(tmp_path: Path, workers: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run"), chunk_bytes=CHUNK) as ckpt:
        save(ckpt, workers, 1)
        run = tmp_path / "run"
        run.rename(tmp_path / "away")
        try:
            report = restored(ckpt, workers, 1)
        finally:
            (tmp_path / "away").rename(run)
        assert "could not be read" in report.notice
        assert set(report.bytes_from) == {"memory", "peers_memory"}


def test_a_manifest_that_is_damaged_in_the_store_is_taken_from_memory(tmp_path: Path, workers: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run"), chunk_bytes=CHUNK) as ckpt:
        save(ckpt, workers, 1)
        info = save(ckpt, workers, 2)
        (shards(ckpt).parent / "manifests" / f"{info.id}.json").write_bytes(b"{}")
        assert restored(ckpt, workers, 2).fell_back == {}


def test_a_restore_goes_on_where_a_holders_server_was_killed(tmp_path: Path, workers: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run"), chunk_bytes=CHUNK) as ckpt:
        save(ckpt, workers, 1)
        handles = servers(ckpt)
        kill_process(pid_of(handles[sorted(handles)[0]]))
        assert restored(ckpt, workers, 1).fell_back == {}


def test_a_verification_writes_back_what_only_memory_has_good(tmp_path: Path, workers: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run"), chunk_bytes=CHUNK) as ckpt:
        info = save(ckpt, workers, 1)
        part = next(iter(held(sorted(servers(ckpt))[0]).values())).part
        file = flip_in_store(ckpt, part.chunks[0].digest, info.id)
        with Checkpointer(ckpt.url) as other:  # one that has begun no service asks none
            assert other.verify(repair=True).checkpoints == {info.id: "damaged"}
        report = ckpt.verify(repair=True)
        assert report.checkpoints == {info.id: "repaired"}
        assert [(one.file, one.repaired_from) for one in report.damage] == [(file, "memory")]
        assert ckpt.verify().checkpoints == {info.id: "good"}


def test_a_chunk_is_read_out_of_any_holders_memory(tmp_path: Path, workers: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run"), chunk_bytes=CHUNK) as ckpt:
        save(ckpt, workers, 1)
        name = sorted(servers(ckpt))[0]
        one = next(iter(held(name).values()))
        chunk = one.part.chunks[0]
        good = Path(one.path).read_bytes()[chunk.offset : chunk.offset + chunk.size_bytes]
        flip(one.path, chunk.offset + 1)  # another copy is good
        assert ray.get(link(ckpt).held_chunk.remote(chunk.digest, chunk.size_bytes)) == good
        assert ray.get(link(ckpt).held_chunk.remote(bytes(16), chunk.size_bytes)) is None
