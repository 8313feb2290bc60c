"""A pull on the nodes of a cluster: they share the work and the limit, and a node that dies takes nothing with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from rl_ckpt import Checkpointer, CorruptionError, Progress, pull
from rl_ckpt.format import records
from rl_ckpt.runtime import pull_nodes
from rl_ckpt.runtime.pull_nodes import _dealt, _Till
from rl_ckpt.store.copier import FileJob
from rl_ckpt.store.meter import Counts
from rl_ckpt.store.urls import open_store
from tests.ray.holders import HEALTH, several_nodes, until
from tests.s3_servers import S3Server
from tests.unit.trees import assert_same

STATE = {f"w{i}": np.random.default_rng(i).random(120_000) for i in range(12)}


@pytest.fixture(scope="module")
def nodes(_no_aws_settings_from_outside: None) -> Iterator[Any]:
    with several_nodes(3, HEALTH) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def small_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes take part in small pulls too."""
    monkeypatch.setattr(pull_nodes, "FROM_BYTES", 1)


@pytest.fixture
def src(tmp_path: Path) -> str:
    url = str(tmp_path / "src")
    with Checkpointer(url, chunk_bytes=1 << 18) as ckpt:
        for step in range(1, len(STATE) + 1):  # a file each
            ckpt.save_state(step, dict(list(STATE.items())[:step])).result(60)
    return url


def shard_bytes(url: str, options: dict[str, Any] | None = None) -> int:
    return sum(item.size_bytes for item in open_store(url, options).list(records.SHARDS))


def test_every_node_takes_part_and_each_byte_leaves_once(nodes: Any, src: str, moto_server: S3Server) -> None:
    dst, options = f"s3://{moto_server.new_bucket()}/run", moto_server.storage_options()
    told: list[Progress] = []
    report = pull(src, dst, at="all", dst_storage_options=options, progress=told.append)
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    assert set(report.bytes_by_node) == alive
    assert sum(report.bytes_by_node.values()) == report.bytes_moved == shard_bytes(src)
    assert report.files == len(open_store(src).list(records.SHARDS))
    assert told[-1].bytes == told[-1].bytes_total
    ckpt = Checkpointer(dst, storage_options=options)
    assert ckpt.verify().ok
    assert_same(ckpt.load_state(), STATE)
    again = pull(src, dst, at="all", dst_storage_options=options)
    assert again.bytes_by_node == {}


def test_a_node_that_dies_meanwhile_takes_nothing_with_it(nodes: Any, src: str, tmp_path: Path) -> None:
    lost = nodes.add_node(num_cpus=1, object_store_memory=80 << 20)
    nodes.wait_for_nodes()

    def kill(progress: Progress) -> None:
        nonlocal lost
        if progress.phase == "copying" and progress.bytes_moved and lost is not None:
            lost, node = None, lost
            nodes.remove_node(node, allow_graceful=False)

    # So slow that every node has something under way when the first bytes are told.
    report = pull(src, tmp_path / "dst", progress=kill, max_bytes_per_s=2e6)
    assert lost is None
    assert any("a node was lost" in notice for notice in report.notices)
    ckpt = Checkpointer(str(tmp_path / "dst"))
    assert ckpt.verify().ok
    assert_same(ckpt.load_state(), STATE)


def test_a_destination_that_only_this_process_reaches_is_brought_alone(nodes: Any, src: str) -> None:
    report = pull(src, "memory://only_here")
    assert report.bytes_by_node == {}
    assert_same(Checkpointer("memory://only_here").load_state(), STATE)


def test_damage_that_a_node_finds_reaches_the_caller(nodes: Any, src: str, tmp_path: Path) -> None:
    shard = open_store(src).list(records.SHARDS)[-1]
    path = Path(src, shard.name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptionError, match=f"{shard.name} is damaged"):
        pull(src, tmp_path / "dst")
    assert Checkpointer(str(tmp_path / "dst")).checkpoints() == []
    assert open_store(tmp_path / "dst").list("probe/") == []


def test_no_actor_is_left(nodes: Any, src: str, tmp_path: Path) -> None:
    pull(src, tmp_path / "dst")

    def states() -> set[str]:
        actors = ray._private.state.actors().values()
        return {actor["State"] for actor in actors if actor["ActorClassName"] in ("_Puller", "_Till")}

    until(lambda: states() == {"DEAD"}, "the actors to end")


def test_one_limit_holds_for_all_nodes() -> None:
    """The till books the reads of all nodes one after the other, by one clock."""
    till = _Till(1000.0)
    till._meter._clock = lambda: 0.0
    waits = [till.pay(f"node{i % 3}", 500, Counts(500 * i)) for i in range(30)]
    assert waits == sorted(waits)
    assert waits[-1] == pytest.approx(29 * 0.5 - 0.25)
    assert {name: counts.bytes_moved for name, counts in till.counts().items()} == {
        "node0": 13500, "node1": 14000, "node2": 14500
    }  # fmt: skip
    till.stop()
    assert till.pay("node0", 1, Counts()) < 0


def test_files_are_dealt_whole_and_once() -> None:
    jobs = [FileJob(str(i), size, ()) for i, size in enumerate([5, 900, 1, 1, 1, 400, 300, 2000, 1])]
    batches = _dealt(jobs, 2)
    assert [job for batch in batches for job in batch] == jobs
    assert len(batches) >= 4
