"""Leases: who may take a run over, by clocks that the test turns; and the thread that renews one."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rl_ckpt.errors import FencedError, RunOwnedError, StorageError
from rl_ckpt.format import records
from rl_ckpt.format.records import EpochRecord, LeaseRecord
from rl_ckpt.store import lease as lease_module
from rl_ckpt.store.base import Buffer, StoredObject
from rl_ckpt.store.commit_log import CommitLog
from rl_ckpt.store.committer import Committer, SaveRequest
from rl_ckpt.store.lease import Lease, Process, liveness, moment, this_process
from rl_ckpt.store.run import Run
from rl_ckpt.store.urls import open_store
from tests.unit.store.faulty import FaultyStore, Stopped, once

_names = itertools.count()
HERE = this_process()
ELSEWHERE = Process("host-b", 77, "4711", "another machine")


class Clocked(FaultyStore):
    """A store with a clock of its own, which gives the times of objects."""

    def __init__(self) -> None:
        super().__init__(open_store(f"memory://lease_{next(_names)}"))
        self.now = 5_000_000.0
        self.times: dict[str, float] = {}

    def put(self, name: str, segments: Sequence[Buffer]) -> None:
        super().put(name, segments)
        self.times[name] = self.now

    def list(self, prefix: str = "") -> list[StoredObject]:
        return [msgspec.structs.replace(o, modified=self.times.get(o.name, 0.0)) for o in super().list(prefix)]


class Bench:
    """A run with an owner on some process, and a second writer that comes."""

    def __init__(self) -> None:
        self.store = Clocked()
        self.clock = 100.0
        self.waited = 0.0
        self.meanwhile: Callable[[], object] = lambda: None
        self.owner: Lease | None = None

    def wait(self, seconds: float) -> None:
        assert seconds > 0
        self.clock += seconds
        self.waited += seconds
        self.store.now += seconds
        self.meanwhile()

    def own(self, process: Process, service: str = "", **changed: Any) -> Lease:
        """The run gets an owner that runs as `process`."""
        lease = Lease(self.store, "the first job on host-b", job="training run 7", service=service)
        changed = dataclasses.asdict(process) | changed
        lease._record = msgspec.structs.replace(lease._record, **changed)
        CommitLog(self.store, "r").claim("the first job on host-b", lease, take_over=True)
        self.owner = lease
        return lease

    def come(self, *, take_over: bool = False, service: str = "") -> Lease:
        """A second writer of this process asks for the run, up to where it would append its epoch record."""
        log = CommitLog(self.store, "r").read()
        mine = Lease(self.store, "the second job", service=service)
        mine.claim(log.last_epoch, log.epoch + 1, take_over, lambda: self.clock, self.wait)
        return mine

    def names(self) -> list[str]:
        return [item.name for item in self.store.list()]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_run_without_an_owner_is_claimed_at_once(bench: Bench) -> None:
    mine = bench.come()
    assert (bench.names(), bench.waited) == ([mine.name], 0)
    mine.close()
    assert bench.names() == []


def test_a_run_that_was_let_go_is_claimed_at_once(bench: Bench) -> None:
    bench.own(ELSEWHERE).close()
    bench.come()
    assert bench.waited == 0


def test_an_owner_that_lives_on_this_host_is_told_at_once_and_nothing_is_written(bench: Bench) -> None:
    with other_process() as process:
        owner = bench.own(process)
        before = bench.names()
        with pytest.raises(RunOwnedError) as caught:
            bench.come()
        assert (bench.names(), bench.waited) == (before, 0)
        told = str(caught.value)
        for part in (
            "memory://lease_", "is owned by another job that is alive: the first job on host-b, for training run 7",
            f"since {moment(owner._record.since)[:20]}", "s ago), last seen ", "take_over=True", "Nothing was written",
        ):  # fmt: skip
            assert part in told


@contextlib.contextmanager
def other_process() -> Iterator[Process]:
    """A process of this machine that lives while the block runs."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        state = lease_module._stat(child.pid)
        assert state is not None
        yield dataclasses.replace(HERE, pid=child.pid, started=state[1])


def test_an_owner_that_died_on_this_host_is_taken_over_from_at_once(bench: Bench) -> None:
    with other_process() as process:
        bench.own(process)
    bench.come()
    assert bench.waited == 0


def test_a_process_number_that_was_given_again_is_no_life(bench: Bench) -> None:
    with other_process() as process:
        bench.own(dataclasses.replace(process, started=str(int(process.started) - 1)))
        bench.come()
    assert bench.waited == 0


def test_an_owner_that_lives_and_has_stopped_renewing_is_over(bench: Bench) -> None:
    with other_process() as process:
        bench.own(process)
        bench.store.now += 31
        bench.come()
    assert bench.waited == 0


def test_only_a_process_of_this_machine_and_namespace_is_judged() -> None:
    gone = dataclasses.replace(HERE, pid=2**22 - 1)
    assert liveness(gone) == "dead"
    assert liveness(dataclasses.replace(gone, machine="another start")) == "unknown"
    assert liveness(dataclasses.replace(gone, machine=""), "") == "unknown"
    assert liveness(HERE) == "alive"


def test_an_owner_on_another_host_that_renews_is_told_before_its_time_is_over(bench: Bench) -> None:
    owner = bench.own(ELSEWHERE)
    bench.meanwhile = owner.beat if bench.store.inner.put("run.json", [b"x"]) is None else bool
    before = bench.names()
    with pytest.raises(RunOwnedError, match="alive: the first job on host-b"):
        bench.come()
    assert bench.names() == before
    assert 0 < bench.waited < 30


def test_an_owner_on_another_host_that_does_not_renew_is_waited_for_and_no_longer(bench: Bench) -> None:
    bench.own(ELSEWHERE)
    bench.store.now += 11
    bench.come()
    assert bench.waited == pytest.approx(30 - 10)  # a second less than its age: the store may round


def test_an_owner_that_lets_go_while_it_is_waited_for_is_waited_for_no_longer(bench: Bench) -> None:
    bench.meanwhile = bench.own(ELSEWHERE).close
    bench.come()
    assert bench.waited == pytest.approx(3)


@pytest.mark.parametrize("offset", [-1e6, 0.0, 1e6])
def test_age_is_by_the_stores_clock_whatever_the_hosts_clocks_say(bench: Bench, offset: float) -> None:
    fresh = bench.own(ELSEWHERE, since=offset, seen=offset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease_module.time, "time", lambda: 3e6 + offset)
        bench.come().close()
        assert bench.waited == pytest.approx(30)
        fresh._put()
        bench.store.now += 31.5
        bench.come()
    assert bench.waited == pytest.approx(30)


def test_where_the_store_gives_no_times_a_change_is_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.own(ELSEWHERE)
    bench.store.now += 1e6
    monkeypatch.setattr(bench.store, "times", dict[str, float]())
    monkeypatch.setattr(Clocked, "put", FaultyStore.put)
    bench.come()
    assert bench.waited == pytest.approx(30)


def test_take_over_asks_nobody(bench: Bench) -> None:
    with other_process() as process:
        bench.own(process)
        bench.come(take_over=True)
    assert bench.waited == 0


def test_the_same_process_and_the_same_service_take_over_at_once(bench: Bench) -> None:
    bench.own(HERE)
    bench.come().close()
    bench.own(ELSEWHERE, service="the coordinator")
    bench.come(service="the coordinator").close()
    assert bench.waited == 0
    bench.come(service="another coordinator")
    assert bench.waited > 0


def test_only_the_newest_owner_counts(bench: Bench) -> None:
    bench.own(ELSEWHERE)  # fenced, and its lease is still there
    bench.own(HERE).close()
    bench.come()
    assert bench.waited == 0


def test_a_damaged_lease_is_waited_for(bench: Bench) -> None:
    bench.store.put(bench.own(HERE).name, [b"garbage"])
    bench.come()
    assert bench.waited == pytest.approx(30)


def test_of_two_that_begin_at_once_one_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other's whole claim falls between this one's look and its epoch record."""
    log, mine = CommitLog(bench.store, "r"), Lease(bench.store, "the second job")
    with other_process() as process:
        bench.store.before = once(lambda *_: (bench.own(process), None)[1], "create", prefix=records.COMMITS)
        with pytest.raises(RunOwnedError, match="the first job"):
            log.claim("the second job", mine)
    assert bench.owner is not None
    assert bench.names() == ["commits/00000001.json", bench.owner.name]


def test_an_owner_that_has_only_just_come_has_a_lease(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no moment in which an epoch record stands and its lease does not."""

    def stop(*_: str) -> None:
        raise Stopped

    bench.store.after = once(stop, "create", prefix=records.COMMITS)
    with other_process() as process:
        with contextlib.suppress(Stopped):
            bench.own(process)
        with pytest.raises(RunOwnedError):
            bench.come()


def test_a_claim_that_fails_leaves_no_lease(bench: Bench) -> None:
    def fail(operation: str, name: str) -> None:
        raise StorageError("connection lost")

    run = Run(bench.store, records.RunRecord(1, "r", 0.0, "me", "probed"))
    bench.store.after = once(fail, "put", prefix=records.LEASES)
    with pytest.raises(StorageError):
        Committer(run, (), 0.0)
    bench.store.before = once(fail, "list", prefix=records.COMMITS)
    with pytest.raises(StorageError):
        Committer(run, (), 0.0)
    bench.store.before = once(fail, "create", prefix=records.COMMITS)
    with pytest.raises(StorageError):
        Committer(run, (), 0.0)
    assert bench.names() == []
    assert lease_threads() == []


# The thread.


def lease_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "rl_ckpt-lease"]


def on_disk(folder: Path, **more: Any) -> Committer:
    return Committer(Run.create(str(folder)), (), 0.0, **more)


def test_a_lease_is_renewed_and_close_leaves_neither_lease_nor_thread(tmp_path: Path) -> None:
    before = set(lease_threads())
    committer = on_disk(tmp_path, lease_s=0.03)
    store, name = committer.run.store, committer._lease.name
    assert lease_record(committer).owner == lease_record(committer).owner != ""
    while lease_record(committer).beat < 4:
        (thread,) = set(lease_threads()) - before
        thread.join(0.01)
    committer.close()
    assert not thread.is_alive()
    assert not store.exists(name)


def lease_record(committer: Committer) -> LeaseRecord:
    name = committer._lease.name
    return records.decode(name, committer.run.store.get(name), LeaseRecord)


def test_a_close_does_not_wait_for_a_store_that_hangs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "_JOIN_S", 0.01)
    lease = bench.own(ELSEWHERE)
    answer, there = threading.Event(), lease.name
    delete = bench.store.delete

    def hang(names: Sequence[str]) -> None:
        if not answer.wait(60):
            raise StorageError("close waits for this delete")
        delete(names)

    monkeypatch.setattr(bench.store, "delete", hang)
    lease.close()
    assert bench.store.exists(there), "close waited for the delete"
    answer.set()


def test_a_committer_that_nobody_has_any_more_ends_its_thread(tmp_path: Path) -> None:
    before = set(lease_threads())
    committer = on_disk(tmp_path, lease_s=300.0)
    (thread,) = set(lease_threads()) - before
    del committer
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


def test_a_beat_that_fails_is_made_up_for_by_the_next(bench: Bench) -> None:
    def fail(operation: str, name: str) -> None:
        raise StorageError("connection lost")

    bench.store.inner.put("run.json", [b"x"])
    lease = bench.come()
    bench.store.before = once(fail, "put")
    bench.store.now += 20
    assert lease.beat()
    assert bench.store.times[lease.name] == bench.store.now - 20
    assert lease.beat()
    assert bench.store.times[lease.name] == bench.store.now


def test_a_beat_that_sees_a_newer_owner_ends_the_lease_and_the_next_save_is_told(tmp_path: Path) -> None:
    older = on_disk(tmp_path, lease_s=300.0)
    assert older._lease.beat()
    assert not older.fenced()
    newer = on_disk(tmp_path, lease_s=300.0)
    assert not older._lease.beat()
    assert older.fenced()
    assert [item.name for item in older.run.store.list(records.LEASES)] == [newer._lease.name]
    with pytest.raises(FencedError, match=r"taken over by rl-ckpt .* \(epoch 2, this is 1\) at 20\d\d-.* UTC \("):
        older.attempt(SaveRequest(1))
    older.close()
    newer.close()


def test_a_beat_of_its_own_commit_is_no_newer_owner(tmp_path: Path) -> None:
    committer = on_disk(tmp_path, lease_s=300.0)
    committer.run.log._head -= 1  # as while its commit record is there and the store's answer is not
    assert committer._lease.beat()
    assert not committer.fenced()
    committer.close()


def test_a_run_that_was_removed_does_not_come_back_as_a_lease(tmp_path: Path) -> None:
    committer = on_disk(tmp_path / "run", lease_s=300.0)
    for path in sorted((tmp_path / "run").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert not committer._lease.beat()
    committer.close()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_sweep_removes_leases_that_nobody_reads_and_no_others(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    first = on_disk(tmp_path, lease_s=300.0)
    first._lease.stop()
    owner = on_disk(tmp_path, lease_s=300.0)
    coming, lost = records.lease_name(3, "claimant"), records.lease_name(2, "lost")
    for name in (coming, lost):
        store.put(name, [b"x"])
    owner.tidy()
    assert [item.name for item in store.list(records.LEASES)] == sorted([owner._lease.name, coming])
    owner.close()
    first.close()


HOLDER = """
import sys
from rl_ckpt.store.committer import Committer
from rl_ckpt.store.run import Run
held = Committer(Run.create(sys.argv[1]), (), 0.0, job="the test", lease_s=3.0)
print("held", flush=True)
input()
"""


def test_a_writer_killed_on_what_seems_another_host_is_waited_for_in_real_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "_machine", lambda: "another machine")
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunOwnedError, match=rf"process {holder.pid}, for the test, since .* last seen"):
            on_disk(tmp_path)
        holder.kill()
    committer = on_disk(tmp_path)
    assert committer.run.log.epoch == 2
    committer.close()


def test_names_and_moments() -> None:
    assert records.lease_name(12, "abc") == "leases/00000012-abc.json"
    assert [records.lease_epoch(n) for n in ("leases/00000012-abc.json", "leases/x", "pins/1-a.json")] == [
        12,
        None,
        None,
    ]
    assert moment(0.0, 30.0) == "1970-01-01 00:00:00 UTC (30 s ago)"
    assert moment(0.0, 3 * 86400.0) == "1970-01-01 00:00:00 UTC (3 d ago)"
    assert moment(50.0, 20.0).endswith("(0 s ago)")
    record = EpochRecord(number=1, run="r", write_id="w", epoch=1, owner="o", time=0.0)
    assert record.lease == ""  # as in records of writers that have no lease
