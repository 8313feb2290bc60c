"""The memory tier on a real cluster: copies are where they should be, come back after a loss, and go when they may."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import ray

from rl_ckpt import Checkpointer
from rl_ckpt.errors import SaveTimeoutError
from rl_ckpt.format.digest import digest
from rl_ckpt.format.manifest import Manifest
from rl_ckpt.runtime.messages import FoundParts, HoldOrder, decode
from rl_ckpt.runtime.spec import NAMESPACE
from rl_ckpt.store.committer import SaveRequest
from tests.ray.gated_s3 import Gate
from tests.ray.holders import (
    HEALTH,
    MEMORY,
    WAIT_S,
    give,
    kill_process,
    link,
    memory_files,
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
from tests.s3_servers import S3Server


def state(rank: int, step: int = 0) -> dict[str, Any]:
    return {"w": np.arange(300_000) + step, "own": np.full(40_000, 100.0 * rank + step), "none": np.zeros(0)}


@pytest.fixture(scope="module")
def cluster(_no_aws_settings_from_outside: None) -> Iterator[Any]:
    with several_nodes(3, HEALTH) as made:
        yield made


@pytest.fixture(scope="module")
def workers(cluster: Any) -> list[Any]:
    return on_nodes(3)


def stats(ckpt: Checkpointer) -> dict[str, int]:
    return dict(ray.get(link(ckpt).stats.remote()))


def complete(ckpt: Checkpointer, parts: int) -> None:
    """Waits until so many parts are held and no copy is missing; if that does not come, says what is there."""
    found: dict[str, int] = {}

    def there() -> bool:
        found.update(stats(ckpt))
        return found["copies_missing"] == 0 and found["parts_held"] == parts

    try:
        until(there, f"{parts} parts are held and no copy is missing")
    except AssertionError as error:
        here = {name: sorted(held(name)) for name in servers_left(ckpt)}
        raise AssertionError(f"{error}; the coordinator counts {found}, the servers hold {here}") from error


def held(server: str) -> dict[str, HoldOrder]:
    """What a server has written down that it holds, by name of the part."""
    files = [MEMORY / server / name for name in memory_files(server, "held-*")]
    return {(one := decode(file.read_bytes(), HoldOrder)).part.name: one for file in files}


def copies(names: list[str]) -> dict[str, list[str]]:
    """Where each part is; every chunk of every copy has the digest that its rank found."""
    found: dict[str, list[str]] = {}
    for name in names:
        for part, one in held(name).items():
            values = Path(one.path).read_bytes()
            assert Path(one.path).parent.name == name
            for chunk in one.part.chunks:
                assert digest(values[chunk.offset : chunk.offset + chunk.size_bytes]) == chunk.digest
            found.setdefault(part, []).append(name)
    return found


def only(ckpt: Checkpointer, checkpoint: str, each: int = 2) -> None:
    """Waits until servers hold parts of one checkpoint alone, so many each: what is older is released later."""
    until(
        lambda: all(
            len(found := held(name)) == each and all(one.part.checkpoint == checkpoint for one in found.values())
            for name in servers(ckpt)
        ),
        f"only parts of {checkpoint} are held",
    )


def steps_in(ckpt: Checkpointer) -> list[int]:
    return [info.step for info in ckpt.checkpoints()]


def save(ckpt: Checkpointer, workers: list[Any], step: int) -> Any:
    give(workers, [state(rank, step) for rank in range(len(workers))])
    return ckpt.save(step, workers).result(WAIT_S)


def test_every_part_is_on_two_nodes_bit_for_bit(tmp_path: Path, workers: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run"), chunk_bytes=1 << 18) as ckpt:
        info = save(ckpt, workers, 0)
        complete(ckpt, 6)
        names = sorted(servers(ckpt))
        found = copies(names)
        assert set(found) == {f"part-{info.id}-{name}" for name in names}
        assert [len(holders) for holders in found.values()] == [2, 2, 2]
        assert sorted(len(held(name)) for name in names) == [2, 2, 2], "balanced"
        counted = server_stats(ckpt)
        assert total(counted, "copies_by_ray") == 0
        assert total(counted, "bytes_copied") == stats(ckpt)["bytes_held"] / 2


def only_newest(server: str) -> bool:
    """Whether a server holds two parts, and knows of what: that comes by a call of its own, before or after."""
    return len(held(server)) == 2 and len(list((MEMORY / server).glob("remembered-*"))) == 1


def test_released_memory_goes_back_and_twenty_saves_hold_no_more_than_three(tmp_path: Path, workers: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        seen: list[tuple[int, int]] = []
        for step in range(20):
            save(ckpt, workers, step)
            complete(ckpt, 6)
            until(lambda: all(only_newest(name) for name in servers(ckpt)), "older parts are released")
            files = [file for name in servers(ckpt) for file in (MEMORY / name).iterdir()]
            seen.append((len(files), sum(file.stat().st_blocks for file in files)))
        assert len({files for files, _ in seen[3:]}) == 1
        assert max(blocks for _, blocks in seen[3:]) <= 1.01 * min(blocks for _, blocks in seen[3:])


def test_of_three_saves_one_goes_to_the_store(tmp_path: Path, workers: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run"), persist_every=3) as ckpt:
        infos = [save(ckpt, workers, step) for step in range(7)]
        assert [info.in_store for info in infos] == [True, False, False, True, False, False, True]
        assert steps_in(ckpt) == [0, 3, 6]
        assert [bool(info.url) for info in infos] == [info.in_store for info in infos]
        assert infos[3].lineage[0] == infos[2].lineage[0] == infos[0].id, "the parent is in the store"
        give(workers, [state(rank, 6) for rank in range(3)])
        last = save(ckpt, workers, 7)
        complete(ckpt, 6)
        only(ckpt, last.id)
        assert set(copies(sorted(servers(ckpt)))) == {f"part-{last.id}-{name}" for name in servers(ckpt)}
        written = [folder.name for folder in (tmp_path / "run" / "shards").iterdir()]
        assert sorted(written) == sorted(info.id for info in infos if info.in_store)


def test_what_is_only_in_memory_names_every_chunk_where_it_lies(tmp_path: Path, workers: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run"), persist_every=2) as ckpt:
        save(ckpt, workers, 0)
        info = save(ckpt, workers, 1)
        memos = [decode(ray.get(one.held.remote(False)), FoundParts).remembered for one in servers(ckpt).values()]
        assert sum(memo.done.id == info.id for found in memos for memo in found) >= 2, "at once: on two nodes"
        complete(ckpt, 6)
        server = servers(ckpt)[min(servers(ckpt))]
        found = decode(ray.get(server.held.remote(False)), FoundParts)
        memo = next(memo for memo in found.remembered if memo.done.id == info.id)
        manifest = msgspec.json.decode(memo.done.manifest, type=Manifest)
        assert memo.done.record is None
        for array in manifest.arrays:
            for chunk in array.chunks:
                name = manifest.files[chunk.file].name.removeprefix("memory/")
                rows = {row.offset: row for row in held(name)[f"part-{info.id}-{name}"].part.chunks}
                assert rows[chunk.offset].digest.hex() == chunk.digest


def test_what_the_budget_does_not_allow_is_committed_all_the_same_and_said_once(
    tmp_path: Path, workers: list[Any]
) -> None:
    with Checkpointer(str(tmp_path / "run"), memory_bytes=1000, persist_every=2) as ckpt:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            infos = [save(ckpt, workers, step) for step in range(4)]
        assert all(info.in_store for info in infos), "never lost: to the store instead"
        texts = [str(one.message) for one in caught if "memory_bytes=1000" in str(one.message)]
        assert len(texts) == 1
        assert all(held(name) == {} for name in servers(ckpt))


def test_without_the_tier_nothing_is_held_and_no_third_generation_made(tmp_path: Path, workers: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run"), memory_tier=False) as ckpt:
        for step in range(4):
            save(ckpt, workers, step)
        assert stats(ckpt)["parts_held"] == 0
        for name in servers(ckpt):
            assert memory_files(name, "*part*") == []
            assert len(memory_files(name, "generation-*")) == 2


def test_a_node_without_ranks_takes_the_copy_of_the_only_one_that_has_some(tmp_path: Path, workers: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        save(ckpt, workers[:1], 0)
        complete(ckpt, 2)
        assert len(servers(ckpt)) == 2
        assert [len(holders) for holders in copies(sorted(servers(ckpt))).values()] == [2]


def test_without_any_listener_copies_go_through_ray(tmp_path: Path, workers: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        save(ckpt, workers, 0)
        complete(ckpt, 6)
        for server in servers(ckpt).values():
            ray.get(server.__ray_call__.remote(lambda server: setattr(server, "_listener", None)))
        info = save(ckpt, workers, 1)
        complete(ckpt, 6)
        only(ckpt, info.id)
        assert [len(holders) for holders in copies(sorted(servers(ckpt))).values()] == [2, 2, 2]
        assert sum(one["copies_by_ray"] for one in server_stats(ckpt).values()) == 3


def test_a_shard_server_that_was_killed_finds_what_it_held(tmp_path: Path, workers: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        save(ckpt, workers, 0)
        complete(ckpt, 6)
        before = copies(sorted(servers(ckpt)))
        name, victim = next(iter(servers(ckpt).items()))
        old = pid_of(victim)
        kill_process(old)
        until(lambda: pid_of(victim) != old, "the shard server is back")
        assert copies(sorted(servers(ckpt))) == before
        published = ray.get(victim.__ray_call__.remote(lambda server: sorted(server._shelf._entries)))
        assert published == sorted(held(name))
        info = save(ckpt, workers, 1)
        complete(ckpt, 6)
        only(ckpt, info.id)
        assert [len(holders) for holders in copies(sorted(servers(ckpt))).values()] == [2, 2, 2]


def test_a_shard_server_that_was_killed_works_with_the_credentials_of_now(
    workers: list[Any], moto_server: S3Server
) -> None:
    url, options = f"s3://{moto_server.new_bucket()}/run", moto_server.storage_options()
    with (
        Checkpointer(url, storage_options=options) as before,
        Checkpointer(url, storage_options=options | {"key": "rotated"}) as ckpt,
    ):
        save(before, workers, 0)
        save(ckpt, workers, 1)
        victim = next(iter(servers(ckpt).values()))
        old = pid_of(victim)
        kill_process(old)
        until(lambda: pid_of(victim) != old, "the shard server is back")
        used = ray.get(victim.__ray_call__.remote(lambda server: server._spec.storage_options["key"]))
        assert used == "rotated"
        save(ckpt, workers, 2)


def test_another_coordinator_takes_up_what_memory_has(tmp_path: Path, workers: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run"), persist_every=3) as ckpt:
        save(ckpt, workers, 0)
        info = save(ckpt, workers, 1)
        complete(ckpt, 6)
        only(ckpt, info.id)
        before = copies(sorted(servers(ckpt)))
        old = pid_of(link(ckpt))
        kill_process(old)
        until(lambda: pid_of(link(ckpt)) != old, "the coordinator is back")
        with pytest.raises(Exception, match="step 1 is saved already, in memory"):
            save(ckpt, workers, 1)
        complete(ckpt, 6)
        assert copies(sorted(servers(ckpt))) == before
        assert {part.rpartition("-rl_ckpt-")[0] for part in before} == {f"part-{info.id}"}
        after = save(ckpt, workers, 2)
        assert after.in_store, "the first save of a coordinator"
        complete(ckpt, 6)
        only(ckpt, after.id)
        assert set(copies(sorted(servers(ckpt)))) == {f"part-{after.id}-{name}" for name in servers(ckpt)}


def test_an_urgent_save_is_in_memory_though_the_store_is_stuck(workers: list[Any], gate: Gate) -> None:
    with gate.new_run() as ckpt:
        first = save(ckpt, workers, 0)
        gate.close()
        give(workers, [state(rank, 1) for rank in range(3)])
        info = urgently(ckpt, workers, 1, 3.0)
        assert (info.step, info.in_store, info.lineage[0]) == (1, False, first.id)
        assert set(copies(sorted(servers(ckpt)))) >= {f"part-{info.id}-{name}" for name in servers(ckpt)}
        gate.open()
        assert save(ckpt, workers, 2).in_store


def test_an_urgent_save_that_memory_has_no_room_for_is_cleanly_absent(workers: list[Any], gate: Gate) -> None:
    with gate.new_run(memory_bytes=0) as ckpt:
        with pytest.warns(UserWarning, match="memory_bytes=0"):
            save(ckpt, workers, 0)
        gate.close()
        give(workers, [state(rank, 1) for rank in range(3)])
        with pytest.raises(SaveTimeoutError, match=r"step 1( was not committed before its deadline of|:) 2\.0 s"):
            urgently(ckpt, workers, 1, 2.0)
        gate.open()
        assert save(ckpt, workers, 1).in_store
        assert steps_in(ckpt) == [0, 1]


def urgently(ckpt: Checkpointer, workers: list[Any], step: int, deadline_s: float) -> Any:
    return ckpt._running_service().save(SaveRequest(step, deadline_s=deadline_s), workers).result(WAIT_S)


def home(actor: Any) -> str:
    """Node of an actor."""
    return str(ray.get(actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()), timeout=WAIT_S))


def coordinated(folder: Path, cluster: Any, with_coordinator: bool) -> tuple[Checkpointer, Any]:
    """A run, and a node that can be killed, on which its coordinator is, or is not. Ray places it at random."""
    for number in range(30):
        ckpt = Checkpointer(str(folder / f"run{number}"))
        place = home(link(ckpt))
        for node in cluster.worker_nodes:
            if (node.node_id == place) == with_coordinator:
                return ckpt, node
        ckpt.close()
    raise AssertionError("Ray places all coordinators on the head node")


@pytest.mark.parametrize("with_coordinator", [False, True], ids=["another node", "the coordinator's"])
def test_what_a_lost_node_had_is_on_two_others_again(tmp_path: Path, cluster: Any, with_coordinator: bool) -> None:
    """Last, as it takes a node away."""
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(num_cpus=2, object_store_memory=80 << 20)
    cluster.wait_for_nodes()
    ckpt, node = coordinated(tmp_path, cluster, with_coordinator)
    with ckpt:
        team = on_nodes(3)
        info = save(ckpt, team, 0)
        complete(ckpt, 6)
        gone = spec_of(ckpt).server(node.node_id)
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            process.kill()
        cluster.remove_node(node, allow_graceful=False)
        left = sorted(name for name in servers_left(ckpt) if name != gone)
        until(lambda: all(len(held(name)) == 3 for name in left), "all three parts are on both nodes that are left")
        complete(ckpt, 6)
        found = copies(left)
        assert set(found) == {f"part-{info.id}-{name}" for name in (*left, gone)}
        assert list(found.values()) == [left, left, left]
        rest = on_nodes(2)
        give(rest, [state(9, 9)] * 2)
        assert ckpt.restore(rest).step == 0
        for rank, one in enumerate(states_of(rest)):
            same(one, state(rank))
        assert save(ckpt, rest, 1).in_store
        complete(ckpt, 4)


def servers_left(ckpt: Checkpointer) -> list[str]:
    prefix = spec_of(ckpt).server("")
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [a["name"] for a in actors if a["namespace"] == NAMESPACE and a["name"].startswith(prefix)]
