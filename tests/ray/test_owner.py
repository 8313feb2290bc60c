"""One owner a run: two clusters, two drivers of one cluster, drivers and coordinators that are killed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import ray

from rl_ckpt import Checkpointer, FencedError, InvalidInputError, RunOwnedError, SaveTimeoutError
from rl_ckpt.format import records
from rl_ckpt.format.records import CommitRecord, LeaseRecord
from rl_ckpt.runtime.links import begin
from rl_ckpt.runtime.service import _close, _Patience
from rl_ckpt.runtime.spec import NAMESPACE
from rl_ckpt.store.base import Store
from rl_ckpt.store.run import Run
from rl_ckpt.store.urls import open_store
from tests.ray.gated_s3 import Gate
from tests.ray.holders import ROOT, WAIT_S, Holder, give, kill_process, link, pid_of, several_nodes, spec_of, until
from tests.s3_servers import S3Server

DRIVER = """
import json, sys
import ray
from rl_ckpt import Checkpointer, CheckpointError
from tests.ray.holders import Holder, give
from tests.ray.test_owner import state
address, url, options = sys.argv[1:]
options = json.loads(options)
more = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 << 20} if address == "local" else {}
ray.init(address, log_to_driver=False, **more)
team = [Holder.remote()]
made = [Checkpointer(url, storage_options=options)]
print("ready", flush=True)
for line in sys.stdin:
    word, *step = line.split()
    try:
        if word == "save":
            give(team, [state(int(step[0]))])
            print("saved", made[-1].save(int(step[0]), team).result(60).step, flush=True)
        elif word == "new":
            made.append(Checkpointer(url, storage_options=options))
            print("new", flush=True)
        elif word == "restore":
            print("restored", made[-1].restore(team).step, flush=True)
        else:
            for ckpt in made:
                ckpt.close()
            print("closed", flush=True)
    except CheckpointError as error:
        print(type(error).__name__, str(error).replace(chr(10), " "), flush=True)
"""


def state(step: int) -> dict[str, Any]:
    return {"w": np.arange(1000) + step, "step": step}


class OtherJob:
    """A driver in a process of its own, which does as it is told."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def __call__(self, order: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        """The driver and all that it started, a cluster of its own included."""
        family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(WAIT_S)
        psutil.wait_procs(family, WAIT_S)


@contextlib.contextmanager
def other_job(address: str, url: str, options: dict[str, Any]) -> Iterator[OtherJob]:
    command = [sys.executable, "-c", DRIVER, address, url, json.dumps(options)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as process:
        job = OtherJob(process)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield job
        finally:
            if process.poll() is None:
                job.kill()


@pytest.fixture(scope="module")
def cluster(_no_aws_settings_from_outside: None) -> Iterator[Any]:
    with several_nodes(1) as made:
        yield made


@pytest.fixture(scope="module")
def workers(cluster: Any) -> list[Any]:
    return [Holder.remote()]


def save(ckpt: Checkpointer, workers: list[Any], step: int) -> int:
    give(workers, [state(step)])
    return ckpt.save(step, workers).result(WAIT_S).step


def names(store: Store) -> list[str]:
    return [item.name for item in store.list()]


def actors(ckpt: Checkpointer) -> set[str]:
    listed = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE]
    return {name for name in listed if spec_of(ckpt).key in name}


def never_over(store: Store) -> None:
    """The owner's lease will not run out: whoever waits for that, waits for ever."""
    (name,) = [item.name for item in store.list(records.LEASES)]
    lease = records.decode(name, store.get(name), LeaseRecord)
    store.put(name, [records.encode(msgspec.structs.replace(lease, lease_s=1e6))])


def as_of_another_machine(store: Store) -> None:
    """Nobody can see any more whether the owner's process is alive."""
    (name,) = [item.name for item in store.list(records.LEASES)]
    lease = records.decode(name, store.get(name), LeaseRecord)
    store.put(name, [records.encode(msgspec.structs.replace(lease, machine="another", lease_s=1e6))])


@pytest.mark.parametrize("kind", ["local", pytest.param("s3", marks=pytest.mark.soak)])
def test_two_clusters_on_one_url(kind: str, tmp_path: Path, workers: list[Any], moto_server: S3Server) -> None:
    """The second is told, then takes over; the first still serves, and learns at its next save by whom."""
    url = str(tmp_path / "run") if kind == "local" else f"s3://{moto_server.new_bucket()}/run"
    options = {} if kind == "local" else moto_server.storage_options()
    with other_job("local", url, options) as first:
        assert first("save 1") == "saved 1"
        store = open_store(url, options)
        before = names(store)
        ckpt = Checkpointer(url, storage_options=options)
        for _ in range(2):
            with pytest.raises(
                RunOwnedError, match=rf"alive: .*process \d+, for .*process {first.process.pid} \(Ray job "
            ):
                save(ckpt, workers, 2)
        with pytest.raises(RunOwnedError):
            ckpt.prepare(workers)
        assert ckpt.restore(workers).step == 1, "who reads asks nobody"
        ckpt.close()
        assert names(store) == before
        assert first("save 2") == "saved 2"
        with Checkpointer(url, storage_options=options, take_over=True) as ckpt:
            assert save(ckpt, workers, 3) == 3
            for _ in range(2):
                told = first("save 4")
                assert told.startswith("FencedError ")
                assert f"process {pid_of(link(ckpt))} (epoch 2, this is 1) at 20" in told
            assert save(ckpt, workers, 4) == 4
            with pytest.raises(RunOwnedError):
                Checkpointer(url, storage_options=options).save_state(9, {"n": 1})
            assert first("new") == "new"
            assert first("save 5").startswith("RunOwnedError "), "its coordinator asks again for a new Checkpointer"
            assert save(ckpt, workers, 5) == 5
        assert first("save 6") == "saved 6"
        assert first("close") == "closed"
        log = Run.open(url, options).log.read()
        assert [(c.step, c.epoch, c.parent) for c in log.commits] == line_of(
            log.commits, [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3)]
        )
        assert store.list(records.LEASES) == []


def line_of(commits: tuple[CommitRecord, ...], expected: list[tuple[int, int]]) -> list[tuple[int, int, str | None]]:
    parents = [None, *(commit.id for commit in commits[:-1])]
    return [(step, epoch, parent) for (step, epoch), parent in zip(expected, parents, strict=True)]


def test_a_job_whose_cluster_is_killed_starts_again_at_once(tmp_path: Path, workers: list[Any]) -> None:
    url = str(tmp_path / "run")
    with other_job("local", url, {}) as first:
        assert first("save 1") == "saved 1"
        first.kill()
    never_over(open_store(url))
    with Checkpointer(url, write_timeout_s=30) as ckpt:
        assert save(ckpt, workers, 2) == 2


def save_inside(holder: Any, handle: Any, step: int) -> int:
    return int(handle.save(step, holder.state).result(WAIT_S).step)


def test_two_drivers_of_one_cluster_on_one_url(tmp_path: Path, cluster: Any, workers: list[Any]) -> None:
    url = str(tmp_path / "run")
    with other_job(cluster.address, url, {}) as first:
        assert first("save 1") == "saved 1"
        ckpt = Checkpointer(url)
        process = pid_of(link(ckpt))
        told = rf"this cluster that is alive: .* process {first.process.pid} \(Ray job \d+\), since 20"
        with pytest.raises(RunOwnedError, match=told):
            save(ckpt, workers, 2)
        with pytest.raises(ray.exceptions.RayTaskError, match=told):
            ray.get(workers[0].look.remote(save_inside, ckpt.worker(0, 1), 2))
        assert ckpt.restore(workers).step == 1
        ckpt.close()
        assert first("save 2") == "saved 2"
        with Checkpointer(url, take_over=True) as ckpt:
            handle = ckpt.worker(0, 1)
            give(workers, [state(3)])
            assert ray.get(workers[0].look.remote(save_inside, handle, 3), timeout=WAIT_S) == 3
            for _ in range(2):
                assert first("save 4").startswith(f"FencedError {Run.open(url).store.url} was taken over by rl-ckpt ")
            assert first("restore") == "restored 3"
            assert first("close") == "closed"
            assert save(ckpt, workers, 4) == 4
            assert pid_of(link(ckpt)) == process, "they shared the coordinator all the time"


def test_the_next_driver_goes_on_at_once_where_the_last_one_was_killed(
    tmp_path: Path, cluster: Any, workers: list[Any]
) -> None:
    url = str(tmp_path / "run")
    with other_job(cluster.address, url, {}) as first:
        assert first("save 1") == "saved 1"
        first.process.kill()
        with Checkpointer(url) as ckpt:
            assert save(ckpt, workers, 2) == 2


def test_a_run_whose_driver_was_killed_is_let_go_though_its_cluster_lives(
    tmp_path: Path, cluster: Any, workers: list[Any]
) -> None:
    url = str(tmp_path / "run")
    store = open_store(url)
    with other_job(cluster.address, url, {}) as first:
        assert first("save 1") == "saved 1"
        assert store.list(records.LEASES)
        first.process.kill()
    until(lambda: not store.list(records.LEASES), "the coordinator, which lives, lets go of the lease")
    with Checkpointer(url) as other:
        other.save_state(2, {"n": 2}).result(WAIT_S)
    with Checkpointer(url) as ckpt:  # of the same cluster: the same coordinator opens the run again
        assert save(ckpt, workers, 3) == 3
        assert store.list(records.LEASES)
        assert [c.step for c in Run.open(url).log.read().commits] == [1, 2, 3]


def test_a_coordinator_that_is_killed_goes_on_at_once_and_remembers_whose_the_run_is(
    tmp_path: Path, cluster: Any, workers: list[Any]
) -> None:
    url = str(tmp_path / "run")
    with Checkpointer(url, write_timeout_s=30) as ckpt, other_job(cluster.address, url, {}) as other:
        assert save(ckpt, workers, 1) == 1
        old = pid_of(link(ckpt))
        kill_process(old)
        as_of_another_machine(open_store(url))
        until(lambda: pid_of(link(ckpt)) != old, "the coordinator is back")
        assert other("restore") == "restored 1"
        mine = actors(ckpt)
        assert other("save 2").startswith("RunOwnedError ")
        assert other("close") == "closed"
        assert actors(ckpt) == mine, "the coordinator knows of this driver, which has not spoken since"
        assert save(ckpt, workers, 2) == 2
        assert Run.open(url).log.read().epoch == 2


def is_ended(ckpt: Checkpointer) -> bool:
    try:
        begin(spec_of(ckpt), False)
    except InvalidInputError as error:
        return "was ended" in str(error)
    return False


def test_a_coordinator_that_is_being_started_anew_is_asked_again(tmp_path: Path, workers: list[Any]) -> None:
    url = str(tmp_path / "run")
    with Checkpointer(url) as ckpt:
        kill_process(pid_of(link(ckpt)))
        with Checkpointer(url) as again:  # attaches to it
            kill_process(pid_of(link(again)))
            assert save(ckpt, workers, 1) == 1  # asks it whether it may
            ray.kill(link(again))
            until(lambda: is_ended(again), "who asks a service that does not come back is told, and waits for nothing")


def test_a_new_start_of_the_service_finds_no_users_of_the_last_one(tmp_path: Path, workers: list[Any]) -> None:
    url = str(tmp_path / "run")
    left = Checkpointer(url)
    assert save(left, workers, 1) == 1
    ray.kill(link(left))
    again = Checkpointer(url)
    assert save(again, workers, 2) == 2
    mine = actors(again)
    again.close()
    assert not mine & actors(left) - {spec_of(left).coordinator}
    left.close()


def test_a_close_that_would_wait_too_long_says_what_it_leaves(workers: list[Any], gate: Gate) -> None:
    with gate.new_run() as ckpt:
        save(ckpt, workers, 1)
        give(workers, [state(2)])
        gate.close()
        pending = ckpt.save(2, workers)
        assert gate.waiting.wait(WAIT_S)
        impatient = dataclasses.replace(spec_of(ckpt).options, write_timeout_s=0.01)
        with pytest.raises(
            SaveTimeoutError, match=r"was not closed: not done within 0.01 s: .*: writing.*Its actors stay"
        ):
            _close(dataclasses.replace(spec_of(ckpt), options=impatient), _Patience())
        gate.open()
        assert pending.result(WAIT_S).step == 2


def test_a_checkpointer_takes_over_once(tmp_path: Path, workers: list[Any]) -> None:
    """What took over and was taken over from does not take over again by itself."""
    url = str(tmp_path / "run")
    first = Checkpointer(url, take_over=True)
    first.save_state(1, {"n": 1}).result(WAIT_S)
    with Checkpointer(url, take_over=True) as second:
        second.save_state(2, {"n": 2}).result(WAIT_S)
        for _ in range(2):
            with pytest.raises(FencedError):
                first.save_state(3, {"n": 3}).result(WAIT_S)
        with pytest.raises(RunOwnedError):  # now through a coordinator, which is told of no take-over
            save(first, workers, 3)
    first.close()
