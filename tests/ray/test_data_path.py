"""Who moves which bytes in a save of three nodes: shard servers and shared memory, never the coordinator or driver."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from rl_ckpt import Checkpointer, Replicated
from rl_ckpt.errors import SaveSkippedError
from rl_ckpt.runtime import calls, service
from rl_ckpt.runtime.messages import Failure, Restages
from rl_ckpt.runtime.spec import NAMESPACE
from rl_ckpt.store.run import Run
from tests.ray.gated_s3 import Gate
from tests.ray.holders import (
    WAIT_S,
    give,
    link,
    memory_files,
    on_nodes,
    same,
    server_stats,
    servers,
    shared_memory,
    spec_of,
    states_of,
    total,
    until,
)

CHUNK = 1 << 20
SHARED = 24 * CHUNK
OWN = 80_000
WORLD = 6


def state(rank: int, step: int = 0) -> dict[str, Any]:
    return {
        "w": np.arange(SHARED // 8, dtype="i8") + step,
        "frozen": np.arange(1000),
        "own": np.full(OWN // 8, 1000.0 * rank + step),
        "step": step,
    }


@pytest.fixture(scope="module")
def workers(three_nodes: Any) -> list[Any]:
    return on_nodes(WORLD)


@pytest.fixture(scope="module")
def saved(workers: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """One save by six workers on three nodes, and what was counted."""
    sizes: list[tuple[int, bool]] = []

    def spy(data: bytes, kind: Any) -> Any:
        sizes.append((len(data), kind == Restages | Failure))
        return decode(data, kind)

    decode = service.decode
    with Checkpointer(str(tmp_path_factory.mktemp("run") / "run"), chunk_bytes=CHUNK) as ckpt:
        give(workers, [state(rank) for rank in range(WORLD)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calls, "decode", spy)
            patch.setattr(service, "decode", spy)
            info = ckpt.save(0, workers).result(WAIT_S)
        messages = ray.get(link(ckpt).stats.remote())
        yield {"ckpt": ckpt, "info": info, "driver": sizes, "messages": messages, "servers": server_stats(ckpt)}


def test_each_node_with_workers_has_one_shard_server(saved: dict[str, Any]) -> None:
    ckpt = saved["ckpt"]
    nodes = ray.get([server.ready.remote() for server in servers(ckpt).values()])
    assert sorted(nodes) == sorted(node["NodeID"] for node in ray.nodes())
    named = [
        actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE
    ]
    assert len([name for name in named if spec_of(ckpt).key in name]) == 4, "three servers and the coordinator"


def test_a_node_without_workers_has_no_shard_server(workers: list[Any], tmp_path: Path) -> None:
    here = ray.get([worker.look.remote(lambda _: ray.get_runtime_context().get_node_id()) for worker in workers])
    chosen = [worker for worker, node in zip(workers, here, strict=True) if node != here[0]]
    give(chosen, [{"a": 1}] * 4)
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        ckpt.save(0, chosen).result(WAIT_S)
        assert sorted(ray.get([s.ready.remote() for s in servers(ckpt).values()])) == sorted(set(here) - {here[0]})


def test_replicas_share_the_work_evenly_between_nodes(saved: dict[str, Any]) -> None:
    staged = [one["bytes_staged"] for one in saved["servers"].values()]
    own = OWN * WORLD // 3
    for size in staged:
        assert abs(size - own - SHARED / 3) <= 2 * CHUNK
    written = [one["store_bytes_written"] for one in saved["servers"].values()]
    assert max(written) - min(written) <= 2 * CHUNK


def test_replicated_state_is_written_once(saved: dict[str, Any]) -> None:
    new = SHARED + 8000 + OWN * WORLD
    assert saved["info"].bytes == new
    assert total(saved["servers"], "bytes_staged") == new
    assert saved["info"].bytes_written < new * 1.01


def test_no_shard_byte_passes_the_coordinator(saved: dict[str, Any]) -> None:
    messages = saved["messages"]
    assert messages["bytes_in"] + messages["bytes_out"] < 0.002 * saved["info"].bytes
    assert messages["largest"] < 16 << 10


def test_the_driver_gets_only_small_messages(saved: dict[str, Any]) -> None:
    answers = [size for size, looked in saved["driver"] if not looked]  # it looks about every second for deaths
    assert len(answers) == WORLD + 1, "one from each worker, and the outcome"
    assert sum(size for size, _ in saved["driver"]) < 4 << 10


def test_files_lie_under_the_servers_that_wrote_them(saved: dict[str, Any]) -> None:
    run = Run.open(saved["ckpt"].url)
    manifest = run.manifest(run.find(run.log.read(), 0))
    assert {file.name.split("/")[-1].rpartition("-")[0] for file in manifest.files} == set(saved["servers"])


def test_an_unchanged_state_writes_no_shard_bytes(saved: dict[str, Any], workers: list[Any]) -> None:
    ckpt = saved["ckpt"]
    give(workers, [state(rank) for rank in range(WORLD)])
    before = server_stats(ckpt)
    info = ckpt.save(1, workers).result(WAIT_S)
    after = server_stats(ckpt)
    for count in ("bytes_staged", "store_bytes_written"):
        assert total(after, count) == total(before, count)
    assert info.bytes == saved["info"].bytes
    assert info.bytes_written < 32 << 10, "the manifest"


def test_only_what_changed_is_written(saved: dict[str, Any], workers: list[Any]) -> None:
    ckpt = saved["ckpt"]
    states = [state(rank) for rank in range(WORLD)]
    for one in states:
        one["w"][0] += 1
    give(workers, states)
    before = server_stats(ckpt)
    ckpt.save(2, workers).result(WAIT_S)
    assert total(server_stats(ckpt), "bytes_staged") - total(before, "bytes_staged") == CHUNK
    give(workers, [state(9, 9)] * WORLD)
    ckpt.restore(workers)
    for found, expected in zip(states_of(workers), states, strict=True):
        same(found, expected)


def test_declared_replicas_are_staged_once(workers: list[Any], tmp_path: Path) -> None:
    values = np.arange(SHARED // 8)
    give(workers, [{"w": Replicated(values.copy())} for _ in range(WORLD)])
    with Checkpointer(str(tmp_path / "run"), chunk_bytes=CHUNK) as ckpt:
        info = ckpt.save(0, workers).result(WAIT_S)
        stats = server_stats(ckpt)
        assert info.bytes == total(stats, "bytes_staged") == SHARED
        assert {one["bytes_staged"] for one in stats.values()} == {SHARED // 3}
        give(workers, [{"w": np.zeros_like(values)} for _ in range(WORLD)])
        ckpt.restore(workers)
        for found in states_of(workers):
            same(found, {"w": values})


def grow(holder: Any) -> None:
    """A training step, in place."""
    holder.state["w"] += 1
    holder.state["own"] += 1
    holder.state["step"] += 1


def test_save_returns_when_staged_and_training_does_not_change_what_is_saved(workers: list[Any], gate: Gate) -> None:
    with gate.new_run(chunk_bytes=CHUNK) as ckpt:
        give(workers, [state(rank) for rank in range(WORLD)])
        gate.close()
        pending = ckpt.save(0, workers)
        assert gate.waiting.wait(WAIT_S)
        assert not pending.done()
        ray.get([worker.look.remote(grow) for worker in workers])
        assert ckpt.checkpoints() == []
        gate.open()
        assert pending.result(WAIT_S).step == 0
        report = ckpt.restore(workers)
        assert report.step == 0
        for rank, found in enumerate(states_of(workers)):
            same(found, state(rank))


def test_two_generations_are_staged_and_the_third_save_waits(workers: list[Any], gate: Gate) -> None:
    three = workers[:3]
    with gate.new_run(chunk_bytes=CHUNK) as ckpt:
        gate.close()
        pending = []
        for step in (0, 1):
            give(three, [state(rank, step) for rank in range(3)])
            pending.append(ckpt.save(step, three))
        give(three, [state(rank, 2) for rank in range(3)])
        before = ray.get(link(ckpt).stats.remote())["messages"]
        returned = threading.Event()

        def third() -> None:
            pending.append(ckpt.save(2, three))
            returned.set()

        thread = threading.Thread(target=third)
        thread.start()
        until(lambda: ray.get(link(ckpt).stats.remote())["messages"] >= before + 3, "all ranks have joined")
        assert not returned.is_set()
        names = set(servers(ckpt))
        assert not any(p.done() for p in pending)
        gate.open()
        thread.join(WAIT_S)
        assert [p.result(WAIT_S).step for p in pending] == [0, 1, 2]
        assert [info.step for info in ckpt.checkpoints()] == [0, 1, 2]
        assert names <= shared_memory()
        for name in names:
            assert [file.split("-")[1] for file in memory_files(name, "generation-*")] == ["0", "1", "2"]
    assert not names & shared_memory()


def test_skip_refuses_the_third_save_and_leaves_the_others_alone(workers: list[Any], gate: Gate) -> None:
    three = workers[:3]
    with gate.new_run(chunk_bytes=CHUNK, when_busy="skip") as ckpt:
        gate.close()
        pending = []
        for step in (0, 1):
            give(three, [state(rank, step) for rank in range(3)])
            pending.append(ckpt.save(step, three))
        with pytest.raises(SaveSkippedError, match="still being written"):
            ckpt.save(2, three)
        gate.open()
        assert [p.result(WAIT_S).step for p in pending] == [0, 1]
        give(three, [state(rank, 3) for rank in range(3)])
        assert ckpt.save(3, three).result(WAIT_S).step == 3
