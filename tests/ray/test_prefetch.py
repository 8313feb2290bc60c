"""Prefetch on a real cluster: the store is read once, before the restore; what fails there is left to the restore."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import ray

from rl_ckpt import Catalog, Checkpointer, Prefetch, PrefetchReport, prefetch
from rl_ckpt.errors import CheckpointError, CheckpointNotFoundError, InvalidInputError, SaveTimeoutError
from rl_ckpt.runtime.spec import NAMESPACE
from rl_ckpt.runtime.status import ServiceStatus, run_status
from tests.ray.holders import (
    HEALTH,
    WAIT_S,
    give,
    kill_process,
    link,
    on_nodes,
    pid_of,
    same,
    server_stats,
    servers,
    several_nodes,
    spec_of,
    states_of,
    total,
    until,
)
from tests.ray.test_store_s3 import damage
from tests.ray.test_tier import complete
from tests.s3_servers import S3Server
from tests.store.faulty_proxy import Fault, Proxy, run_proxy

CHUNK = 1 << 18
WORLD = 3
SHARED, OWN = 8 * 300_000, 8 * 40_000


def common(step: int) -> dict[str, Any]:
    """What all ranks share, and an array without values."""
    return {"w": np.arange(300_000) + 7 * step, "none": np.zeros(0), "step": step}


def state(rank: int, step: int = 0) -> dict[str, Any]:
    """And what is each rank's own."""
    return common(step) | {"own": np.full(40_000, 100.0 * rank + step) + np.arange(40_000)}


@pytest.fixture(scope="module")
def cluster(_no_aws_settings_from_outside: None) -> Iterator[Any]:
    with several_nodes(3, HEALTH) as made:
        yield made


@pytest.fixture(scope="module")
def workers(cluster: Any) -> list[Any]:
    return on_nodes(WORLD)


class Store:
    """A run on an S3 server, every request to which is counted; reads of shard files wait while the gate is closed."""

    def __init__(self, server: S3Server, proxy: Proxy) -> None:
        self.server = server
        self.proxy = proxy
        self.options = S3Server("counted", proxy.url, server.key, server.secret).storage_options()
        self.url = f"s3://{server.new_bucket()}/run"
        self.gate = threading.Event()
        self.gate.set()
        self.reading = threading.Event()
        self.free = 1 << 30
        """Reads of shard files that pass the closed gate."""
        take = proxy.take

        def hold(method: str, path: str) -> Fault | None:
            if method == "GET" and "/shards/" in path and not self.gate.is_set():
                self.reading.set()
                self.free -= 1
                if self.free < 0:
                    self.gate.wait(WAIT_S)
            return take(method, path)

        setattr(proxy, "take", hold)  # noqa: B010 - one proxy is told, not the class

    @contextmanager
    def closed(self, *, after: int = 0) -> Iterator[None]:
        """Reads of shard files wait, after so many; let go at the end of the block even where the test fails."""
        self.free = after
        self.reading.clear()
        self.gate.clear()
        try:
            yield
        finally:
            self.gate.set()

    def reads(self) -> int:
        """Requests for shard files' bytes so far."""
        return sum(1 for method, path in self.proxy.seen if method == "GET" and "/shards/" in path)

    def run(self, **options: Any) -> Checkpointer:
        return Checkpointer(self.url, storage_options=self.options, chunk_bytes=CHUNK, **options)

    def service(self) -> ServiceStatus:
        """What the run's coordinator says."""
        found = run_status(self.url, storage_options=self.options).service
        assert found is not None
        return found

    def prefetch(self, **how: Any) -> Prefetch:
        return prefetch(self.url, storage_options=self.options, **how)


def actors() -> list[str]:
    return [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE]


@pytest.fixture
def store(moto_server: S3Server) -> Iterator[Store]:
    with run_proxy(moto_server) as proxy:
        made = Store(moto_server, proxy)
        yield made
        if actors():  # of a prefetch that nobody restored from, or of a test that failed
            with made.run() as ckpt:
                spec_of(ckpt)


def saved(store: Store, workers: list[Any], *steps: int) -> list[str]:
    """Checkpoints that another cluster made, say, of what all ranks share: nothing of them is in memory."""
    with store.run() as ckpt:
        ids = [ckpt.save_state(step, common(step)).result(WAIT_S).id for step in steps or (1,)]
    give(workers, [common(99)] * WORLD)
    return ids


def saved_by_ranks(store: Store, workers: list[Any]) -> str:
    """The same of what the ranks have, saved by this cluster and let go."""
    with store.run() as ckpt:
        give(workers, [state(rank, 1) for rank in range(WORLD)])
        checkpoint = ckpt.save(1, workers).result(WAIT_S).id
    assert not actors()
    give(workers, [state(9, 99)] * WORLD)
    return checkpoint


def restored(ckpt: Checkpointer, workers: list[Any], expected: int = 1, **how: Any) -> Any:
    report = ckpt.restore(workers, **how)
    assert report.step == expected
    for found in states_of(workers):
        same(found, common(expected))
    give(workers, [common(99)] * WORLD)
    return report


def whole(report: PrefetchReport) -> None:
    """All of it is in memory, and nothing went wrong."""
    assert (report.bytes, report.bytes_left) == (SHARED, 0)
    assert (dict(report.damaged), dict(report.fell_back), report.notices) == ({}, {}, ())


def test_a_restore_after_a_prefetch_reads_nothing_from_the_store(store: Store, workers: list[Any]) -> None:
    checkpoint = saved_by_ranks(store, workers)
    unique = SHARED + WORLD * OWN
    before = store.reads()
    handle = store.prefetch()
    assert (handle.step, handle.checkpoint) == (1, checkpoint)
    report = handle.result(WAIT_S)
    assert (report.bytes, report.bytes_left, report.damaged, report.notices) == (unique, 0, {}, ())
    assert report.bytes_fetched == sum(report.nodes.values()) == unique
    assert len(report.nodes) == 3
    assert max(report.nodes.values()) <= unique / 3 + CHUNK, "level, but for a chunk"
    assert store.reads() > before
    with store.run() as ckpt:
        stats = server_stats(ckpt)
        assert unique <= total(stats, "store_bytes_read") <= 1.01 * unique, "each chunk left the store once"
        complete(ckpt, 6)
        before = store.reads()
        back = ckpt.restore(workers)
        for rank, found in enumerate(states_of(workers)):
            same(found, state(rank, 1))
        assert set(back.bytes_from) == {"memory", "peers_memory"}
        assert sum(back.bytes_from.values()) == WORLD * (SHARED + OWN)
        assert store.reads() == before
        assert total(server_stats(ckpt), "store_bytes_read") == total(stats, "store_bytes_read")
        assert (back.repaired, back.fell_back) == ({}, {})
        # Training goes on as after any restore, and a newer checkpoint takes the place of this one.
        give(workers, [common(2)] * WORLD)
        newer = ckpt.save(2, workers).result(WAIT_S)
        until(lambda: store.service().in_memory == (newer.id,), "the older one went")
        assert restored(ckpt, workers, 2).fell_back == {}
    assert not actors()


def test_a_restore_during_a_prefetch_waits_for_it_and_each_chunk_leaves_the_store_once(
    store: Store, workers: list[Any]
) -> None:
    saved(store, workers)
    with store.run() as ckpt:
        with store.closed(after=1):
            handle = store.prefetch()
            assert store.reading.wait(WAIT_S)
            reports: list[Any] = []
            restoring = threading.Thread(target=lambda: reports.append(ckpt.restore(workers)))
            restoring.start()
            until(lambda: [one.phase for one in store.service().restores] == ["awaiting"], "the restore waits")
            with pytest.raises(SaveTimeoutError, match="still being brought in"):
                handle.result(0.01)
            assert not handle.done()
            progress = handle.progress()
            assert progress is not None
            assert (progress.step, progress.bytes, progress.under_way) == (1, SHARED, True)
            assert progress.bytes_in_memory < SHARED
        restoring.join(WAIT_S)
        assert set(reports[0].bytes_from) == {"memory", "peers_memory"}
        for found in states_of(workers):
            same(found, common(1))
        whole(handle.result(WAIT_S))
        assert SHARED <= total(server_stats(ckpt), "store_bytes_read") <= 1.01 * SHARED


def test_a_damaged_chunk_is_left_out_and_said_and_the_restore_deals_with_it(store: Store, workers: list[Any]) -> None:
    first, second = saved(store, workers, 1, 2)
    with store.run() as ckpt:
        damage(store.server, ckpt, second)
        report = store.prefetch().result(WAIT_S)
        assert (report.step, report.fell_back, report.notices) == (2, {}, ())
        ((name, why),) = report.damaged.items()
        assert name.startswith("chunk ")
        assert "damaged" in why
        assert 0 < report.bytes_left <= CHUNK
        back = restored(ckpt, workers, 1)
        assert set(back.fell_back) == {second}, "no other checkpoint has those bytes"
        report = store.prefetch().result(WAIT_S)
        assert (report.id, report.bytes_fetched) == (second, 0)
        assert "already" in report.notices[0]
    assert first


def test_what_has_no_room_is_left_to_the_store(store: Store, workers: list[Any]) -> None:
    saved(store, workers)
    limit = 2 * CHUNK
    report = store.prefetch(memory_bytes=limit).result(WAIT_S)
    assert report.bytes - report.bytes_left == report.bytes_fetched <= 3 * limit
    assert report.bytes_fetched > 2 * limit, "all that fits"
    assert f"{report.bytes_left} of {SHARED} bytes have no room" in report.notices[0]
    with store.run() as ckpt:
        read = total(server_stats(ckpt), "store_bytes_read")
        assert all(one["bytes_held"] <= limit for one in server_stats(ckpt).values()), "copies counted"
        back = restored(ckpt, workers)
        assert back.bytes_from["store"] == report.bytes_left
        assert total(server_stats(ckpt), "store_bytes_read") - read <= 1.05 * report.bytes_left


def test_a_run_that_is_not_there_or_has_no_checkpoint_starts_nothing(store: Store, workers: list[Any]) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no run at"):
        store.prefetch()
    saved(store, workers)
    for at, said in ((5, "no checkpoint of step 5"), ("best", "no checkpoint with id or tag 'best'")):
        with pytest.raises(CheckpointNotFoundError, match=said):
            store.prefetch(at=at)
    with pytest.raises(InvalidInputError, match="memory_bytes=-1"):
        store.prefetch(memory_bytes=-1)
    with pytest.raises(InvalidInputError, match="no live node"):
        store.prefetch(nodes=["0" * 56])
    assert not actors()


def test_what_is_newer_and_in_memory_already_is_not_replaced(store: Store, workers: list[Any]) -> None:
    with store.run(persist_every=2) as ckpt:
        for step in (1, 2):
            give(workers, [common(step)] * WORLD)
            info = ckpt.save(step, workers).result(WAIT_S)
        assert not info.in_store
        before = store.reads()
        report = store.prefetch().result(WAIT_S)
        assert (report.step, report.id, report.bytes_fetched, report.bytes_left) == (2, info.id, 0, 0)
        with pytest.raises(InvalidInputError, match=r"step 2 \(.*\) is newer and in the nodes' memory"):
            store.prefetch(at=1)
        assert restored(ckpt, workers, 2).bytes_from.keys() <= {"memory", "peers_memory"}
        assert store.reads() == before


@pytest.mark.soak
def test_a_prefetch_of_an_older_one_is_of_use_to_a_restore_of_that_step(store: Store, workers: list[Any]) -> None:
    first, _ = saved(store, workers, 1, 2)
    Catalog(store.url, storage_options=store.options).tag(first, "shipped")
    handle = store.prefetch(at="shipped")
    assert (handle.step, handle.checkpoint) == (1, first)
    whole(handle.result(WAIT_S))
    with store.run() as ckpt:
        before = store.reads()
        restored(ckpt, workers, 1, step=1)
        assert store.reads() == before
        whole(store.prefetch().result(WAIT_S))
        before = store.reads()
        restored(ckpt, workers, 2)
        assert store.reads() == before


def test_a_node_that_is_lost_after_a_prefetch_costs_no_read_of_the_store(
    store: Store, cluster: Any, workers: list[Any]
) -> None:
    saved(store, workers)
    node = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    report = store.prefetch().result(WAIT_S)
    whole(report)
    assert len(report.nodes) == 4
    with store.run() as ckpt:
        before = store.reads()
        cluster.remove_node(node, allow_graceful=False)
        until(lambda: len([n for n in ray.nodes() if n["Alive"]]) == 3, "the node is known to be dead")
        back = restored(ckpt, workers)
        assert set(back.bytes_from) == {"memory", "peers_memory"}
        assert store.reads() == before


def test_what_a_node_was_to_bring_that_is_lost_meanwhile_is_brought_by_another(
    store: Store, cluster: Any, workers: list[Any]
) -> None:
    saved(store, workers)
    node = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    with store.closed():
        handle = store.prefetch()
        assert store.reading.wait(WAIT_S)
        cluster.remove_node(node, allow_graceful=False)
        until(lambda: len([n for n in ray.nodes() if n["Alive"]]) == 3, "the node is known to be dead")
    report = handle.result(WAIT_S)
    assert (report.bytes_left, report.damaged) == (0, {})
    assert len(report.nodes) == 3
    with store.run() as ckpt:
        before = store.reads()
        assert set(restored(ckpt, workers).bytes_from) == {"memory", "peers_memory"}
        assert store.reads() == before


def test_a_close_of_the_runs_actors_meanwhile_ends_it_for_good(store: Store, workers: list[Any]) -> None:
    saved(store, workers)
    with store.closed():
        handle = store.prefetch()
        assert store.reading.wait(WAIT_S)
        with store.run() as ckpt:
            assert len(servers(ckpt)) == 3
    with pytest.raises(CheckpointError, match="were ended by a Checkpointer's close"):
        handle.result(WAIT_S)
    assert not actors(), "nobody has started them anew"


@pytest.mark.soak
def test_a_shard_server_that_is_killed_on_the_way_begins_again(store: Store, workers: list[Any]) -> None:
    saved(store, workers)
    with store.run() as ckpt:
        with store.closed():
            handle = store.prefetch()
            assert store.reading.wait(WAIT_S)
            kill_process(pid_of(next(iter(servers(ckpt).values()))))
        report = handle.result(WAIT_S)
        assert (report.bytes_left, report.damaged) == (0, {})
        before = store.reads()
        restored(ckpt, workers)
        assert store.reads() == before


@pytest.mark.parametrize("reads", [0, 4])
def test_a_coordinator_that_is_killed_on_the_way_is_asked_again(store: Store, workers: list[Any], reads: int) -> None:
    saved(store, workers)
    with store.run() as ckpt:
        with store.closed(after=reads):
            handle = store.prefetch()
            assert store.reading.wait(WAIT_S)
            there = servers(ckpt)  # by now: another coordinator knows none of them at first

            def held() -> int:
                return sum(ray.get(server.stats.remote())["parts_held"] for server in there.values())

            if reads:
                until(held, "of three parts of two reads each, one at least is all there")
            kill_process(pid_of(link(ckpt)))
            until(lambda: held() == 0, "another coordinator begins anew")
        report = handle.result(WAIT_S)
        whole(report)
        assert len(report.nodes) == 3
        until(lambda: total(server_stats(ckpt), "parts_held") == 6, "what was on its way for the first is not kept")
        before = store.reads()
        restored(ckpt, workers)
        assert store.reads() == before
