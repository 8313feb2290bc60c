"""Pulling checkpoints to another place: what arrives, what does not travel, what is refused, what a kill leaves."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rl_ckpt
from rl_ckpt import (
    Catalog,
    Checkpointer,
    CheckpointNotFoundError,
    CommitConflictError,
    CorruptionError,
    InvalidInputError,
    LatestN,
    Progress,
    PullReport,
    RunOwnedError,
    StorageError,
    fork,
    pull,
    watch,
)
from rl_ckpt.format import records
from rl_ckpt.store import pull as pull_module
from rl_ckpt.store.base import Store
from rl_ckpt.store.run import Run
from rl_ckpt.store.urls import open_store
from tests.s3_servers import S3Server, run_moto
from tests.unit.trees import assert_same

ROOT = Path(__file__).resolve().parents[2]
_numbers = itertools.count()


def state(step: int) -> dict[str, Any]:
    """Weights that change, a table that does not, and many small leaves."""
    return {
        "w": np.random.default_rng(step).random(30_000),
        "frozen": np.arange(20_000, dtype="float32"),
        "small": {str(i): np.full(3, i + step) for i in range(20)},
        "step": step,
    }


def saved(url: str, steps: range = range(1, 4), **options: Any) -> str:
    with Checkpointer(url, **options) as ckpt:
        for step in steps:
            ckpt.save_state(step, state(step), metrics={"return": float(step)}).result(60)
    return url


def objects(store: Store) -> dict[str, bytes]:
    return {item.name: store.get(item.name) for item in store.list()}


def assert_mirror(source: str | Store, target: str | Store, step: int) -> None:
    """The checkpoint loads, and all that is at the destination is the source's, byte by byte."""
    mine, theirs = (s if isinstance(s, Store) else open_store(s) for s in (source, target))
    here, there = objects(mine), objects(theirs)
    assert {name: data for name, data in there.items() if here.get(name) != data} == {}
    run = Run.open(theirs.url, theirs.storage_options)
    ckpt = Checkpointer(theirs.url, storage_options=theirs.storage_options)
    assert_same(ckpt.load_state(step), state(step))
    assert ckpt.verify().ok
    assert run.log.read().commits[-1] in Run.open(mine.url, mine.storage_options).log.read().commits


@pytest.fixture
def src(tmp_path: Path) -> str:
    return saved(str(tmp_path / "src"))


@pytest.fixture(params=["local", "memory"])
def dst(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "dst") if request.param == "local" else f"memory://pulled_{next(_numbers)}"


# What arrives.


def test_the_newest_arrives(src: str, dst: str) -> None:
    report = pull(src, dst)
    assert_mirror(src, dst, 3)
    newest = Catalog(src).find()
    assert report.checkpoints == (newest.id,)
    assert report.already == report.notices == ()
    assert report.bytes_moved > 0 == report.bytes_kept
    assert report.pinned
    assert [info.step for info in Catalog(dst).checkpoints()] == [3]
    assert Catalog(dst).find().metrics == {"return": 3.0}


def test_nothing_is_left_of_the_way(src: str, dst: str) -> None:
    pull(src, dst, at="all")
    for url in (src, dst):
        assert [item.name for item in open_store(url).list() if item.name.startswith(("pins/", "probe/"))] == []
    assert set(objects(open_store(dst))) == set(objects(open_store(src)))


def test_all_arrive_and_what_they_share_once(src: str, dst: str) -> None:
    report = pull(src, dst, at="all")
    assert [info.step for info in Catalog(dst).checkpoints()] == [1, 2, 3]
    for step in (1, 2, 3):
        assert_mirror(src, dst, step)
    shards = open_store(src).list(records.SHARDS)
    assert report.files == len(shards)
    assert report.bytes_moved == sum(item.size_bytes for item in shards)


@pytest.mark.parametrize("at", [2, "2", "good"])
def test_one_by_step_or_tag(src: str, dst: str, at: int | str) -> None:
    Catalog(src).tag(2, "good")
    Catalog(src).note(2, "the best one")
    pull(src, dst, at=at)
    assert_mirror(src, dst, 2)
    found = Catalog(dst).find("good")
    assert (found.step, found.tags, found.note) == (2, ("good",), "the best one")


def test_one_by_id(src: str, dst: str) -> None:
    wanted = Catalog(src).find(1).id
    assert pull(src, dst, at=wanted).checkpoints == (wanted,)


def test_tags_come_later_too_but_never_over_what_was_said_there(src: str, dst: str) -> None:
    pull(src, dst)
    Catalog(src).tag(3, "good")
    pull(src, dst)
    assert Catalog(dst).find("good").step == 3
    Catalog(dst).untag(3, "good")
    pull(src, dst)
    assert Catalog(dst).find(3).tags == ()


def test_only_what_is_missing_travels(src: str, dst: str) -> None:
    pull(src, dst, at=2)
    again = pull(src, dst, at=2)
    assert (again.checkpoints, again.files, again.bytes_moved) == ((), 0, 0)
    assert again.already == (Catalog(src).find(2).id,)
    before = {item.name for item in open_store(dst).list(records.SHARDS)}
    next_one = pull(src, dst)
    added = [item for item in open_store(dst).list(records.SHARDS) if item.name not in before]
    assert next_one.bytes_moved == sum(item.size_bytes for item in added)
    assert next_one.files_kept > 0
    assert_mirror(src, dst, 3)


def test_a_mirror_can_be_gone_on_with_and_is_then_no_mirror_any_more(src: str, dst: str) -> None:
    pull(src, dst)
    with Checkpointer(dst) as ckpt:
        ckpt.load_state()
        ckpt.save_state(4, state(4)).result(60)
    saved(src, range(5, 6))
    before = objects(open_store(dst))
    with pytest.raises(CommitConflictError, match=r"no mirror of .*checkpoint 4-.* saved there.*Nothing was written"):
        pull(src, dst)
    assert objects(open_store(dst)) == before


def test_a_mirror_of_a_mirror(src: str, dst: str, tmp_path: Path) -> None:
    pull(src, dst)
    pull(dst, tmp_path / "third")
    assert_mirror(src, str(tmp_path / "third"), 3)


def test_a_fork_comes_with_what_it_was_forked_from(src: str, tmp_path: Path, dst: str) -> None:
    forked, moved = str(tmp_path / "forked"), tmp_path / "gone"
    fork(src, forked, at=2)
    with Checkpointer(forked) as ckpt:
        ckpt.load_state()
        ckpt.save_state(3, state(3)).result(60)
    pull(forked, dst, at="all")
    os.rename(src, moved)
    assert_same(Checkpointer(dst).load_state(2), state(2))
    assert_same(Checkpointer(dst).load_state(3), state(3))
    assert Checkpointer(dst).verify().ok
    assert pull(dst, tmp_path / "third").bytes_moved > 0
    assert_same(Checkpointer(str(tmp_path / "third")).load_state(3), state(3))


def test_progress_tells_how_far_it_is(src: str, dst: str) -> None:
    told: list[Progress] = []
    report = pull(src, dst, progress=told.append)
    phases = [progress.phase for progress in told]
    assert phases[0] == "checking"
    assert phases[-2:] == ["committing", "done"]
    assert [p.bytes for p in told] == sorted(p.bytes for p in told)
    last = told[-1]
    assert last.bytes == last.bytes_total == last.bytes_moved == report.bytes_moved
    assert (last.files, last.seconds_left) == (last.files_total, 0)
    assert {p.checkpoint for p in told} == set(report.checkpoints)


# What is refused, before anything is written.


def refused(src: str, dst: str, error: type[Exception], said: str, **options: Any) -> None:
    before = {url: objects(open_store(url)) for url in (src, dst)}
    with pytest.raises(error, match=said):
        pull(src, dst, **options)
    assert {url: objects(open_store(url)) for url in (src, dst)} == before


def test_onto_itself(src: str, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(src)
    for dst in (src, f"file://{src}/", os.path.relpath(src), str(link)):
        refused(src, dst, InvalidInputError, "is the source itself")
    for dst in (f"{src}/below", str(link / "below")):
        refused(src, dst, InvalidInputError, "one within the other")


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


def test_into_another_run(src: str, dst: str) -> None:
    saved(dst, range(1, 2))
    refused(src, dst, InvalidInputError, "is another run .* pull into another url")


def test_the_wrong_way_round(src: str, dst: str) -> None:
    pull(src, dst)
    saved(src, range(4, 5))
    refused(dst, src, CommitConflictError, "saved there and not in the source|newer than everything")


def test_where_a_job_saves(src: str, dst: str) -> None:
    pull(src, dst, at=2)
    with Checkpointer(dst) as ckpt:
        ckpt.load_state()
        ckpt.save_state(7, state(7)).result(60)
        with pytest.raises((RunOwnedError, CommitConflictError)):
            pull(src, dst)


def test_too_little_space(src: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl_ckpt.store.local.LocalStore.free_bytes", lambda self: 100_000)
    refused(src, str(tmp_path / "dst"), StorageError, r"too little space at .*: \d+ bytes .* 100000 are free")


def test_no_such_checkpoint(src: str, dst: str) -> None:
    refused(src, dst, CheckpointNotFoundError, "no checkpoint of step 9", at=9)
    refused(src, dst, CheckpointNotFoundError, "no checkpoint with id or tag 'best'", at="best")


def test_no_such_run(tmp_path: Path, dst: str) -> None:
    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"), dst, CheckpointNotFoundError, "no run at")


@pytest.mark.parametrize(
    "options",
    [{"streams": 0}, {"streams": True}, {"max_bytes_per_s": 0}, {"nodes": True}, {"at": ""}, {"at": True}, {"at": -1}],
    ids=str,
)
def test_wrong_arguments(src: str, dst: str, options: dict[str, Any]) -> None:
    refused(src, dst, InvalidInputError, "must|names no checkpoint", **options)


# What goes wrong on the way.


def test_a_damaged_source_commits_nothing(src: str, dst: str) -> None:
    shard = max(
        open_store(src).list(records.SHARDS), key=lambda item: (Catalog(src).find().id in item.name, item.size_bytes)
    )
    path = Path(src, shard.name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptionError, match=f"{shard.name} is damaged"):
        pull(src, dst)
    assert Checkpointer(dst).checkpoints() == []
    assert open_store(dst).list(records.PINS) == []


def drop(src: str, step: int) -> None:
    """As the source's retention rules do while this process can't hold anything there."""
    run = Run.open(src)
    named = {c.id: {file.name for file in run.manifest(c).files} for c in run.log.read().commits}
    commit = next(c for c in run.log.read().commits if c.step == step)
    mine = named.pop(commit.id).difference(*named.values())
    run.store.delete([records.commit_name(commit.number), records.manifest_name(commit.id), *mine])


def test_a_source_that_changes_and_could_not_be_held(src: str, dst: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def refuse(*_: object) -> Iterator[None]:
        raise StorageError("403: Access Denied")
        yield

    monkeypatch.setattr(pull_module, "pin", refuse)

    def change(progress: Progress) -> None:
        if progress.phase == "checking":
            drop(src, 2)

    with pytest.raises(CheckpointNotFoundError, match=r"(?s)changed meanwhile: checkpoint 2-.*403.*pins/.*Pull again"):
        pull(src, dst, at=2, progress=change)
    assert Checkpointer(dst).checkpoints() == []
    report = pull(src, dst)
    assert not report.pinned
    assert_mirror(src, dst, 3)


def test_what_arrived_whole_counts_though_the_source_has_dropped_it(
    src: str, dst: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(progress: Progress) -> None:
        if progress.phase == "committing":
            drop(src, 2)

    pull(src, dst, at=2, progress=change)
    assert_same(Checkpointer(dst).load_state(), state(2))
    assert Checkpointer(dst).verify().ok
    saved(src, range(4, 5))
    pull(src, dst)
    assert_same(Checkpointer(dst).load_state(2), state(2))
    assert_same(Checkpointer(dst).load_state(4), state(4))


def test_a_checkpoint_that_went_before_its_turn_is_passed_over(src: str, dst: str) -> None:
    def change(progress: Progress) -> None:
        if progress.phase == "checking":
            drop(src, 2)

    report = pull(src, dst, at="all", progress=change)
    assert [info.step for info in Catalog(dst).checkpoints()] == [1, 3]
    assert any("dropped at the source" in notice for notice in report.notices)
    assert_mirror(src, dst, 3)


def test_files_that_vanish_at_the_destination_are_brought_again(src: str, dst: str) -> None:
    target, gone = open_store(dst), list[str]()
    pull(src, dst, at=2)

    def sweep(progress: Progress) -> None:
        if progress.phase == "copying" and not gone:
            gone.extend(item.name for item in target.list(records.SHARDS))
            target.delete(gone)

    pull(src, dst, progress=sweep)
    assert gone
    assert_same(Checkpointer(dst).load_state(3), state(3))


def test_a_store_that_fails_leaves_what_arrived(src: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dst, commit = str(tmp_path / "dst"), pull_module.Mirror.commit

    def fail(*_: object) -> None:
        raise StorageError("503: Slow Down")

    monkeypatch.setattr(pull_module.Mirror, "commit", fail)
    with pytest.raises(StorageError, match="503"):
        pull(src, dst)
    monkeypatch.setattr(pull_module.Mirror, "commit", commit)
    report = pull(src, dst)
    assert (report.files, report.bytes_moved) == (0, 0)
    assert report.files_kept > 0
    assert_mirror(src, dst, 3)


def test_what_a_killed_pull_left_is_compared_before_it_counts(src: str, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    shard = max((item for item in open_store(src).list(records.SHARDS)), key=lambda item: item.size_bytes)
    damaged = bytearray(Path(src, shard.name).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path = dst / shard.name
    path.parent.mkdir(parents=True)
    path.write_bytes(damaged)
    pull(src, dst, at="all")
    assert path.read_bytes() == Path(src, shard.name).read_bytes()


# A process that is killed.

_PULLER = """
import json, sys, rl_ckpt
src, dst, limit, moved, phase = sys.argv[1:]
def tell(progress):
    if progress.bytes_moved >= int(moved) and phase in ("", progress.phase):
        print("there", flush=True)
        sys.stdin.read()
rl_ckpt.pull(src, dst, progress=tell, max_bytes_per_s=float(limit), streams=2, nodes=False)
"""


def killed(
    src: str, dst: str, *, limit: float = 1e9, moved: int = 0, phase: str = "", sign: int = signal.SIGKILL
) -> int:
    """Runs a pull in a process of its own, which waits when so much has moved, or at a phase, and is killed there."""
    command = [sys.executable, "-c", _PULLER, src, dst, str(limit), str(moved), phase]
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "there\n", process.stderr.read()
        process.send_signal(sign)
        process.wait(60)
    return process.returncode


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_what_arrived_before_a_kill_is_kept(tmp_path: Path, sign: signal.Signals) -> None:
    src, dst = str(tmp_path / "src"), str(tmp_path / "dst")
    big = {f"w{i}": np.random.default_rng(i).random(250_000) for i in range(4)}
    with Checkpointer(src, chunk_bytes=1 << 20) as ckpt:
        ckpt.save_state(1, big).result(60)
    code = killed(src, dst, limit=4e6, moved=3_000_000, sign=sign)
    assert code == -signal.SIGKILL if sign == signal.SIGKILL else code not in (0, -signal.SIGKILL)
    assert Checkpointer(dst).checkpoints() == []
    report = pull(src, dst)
    assert report.bytes_kept >= 2_900_000
    assert report.bytes_kept + report.bytes_moved == sum(
        item.size_bytes for item in open_store(src).list(records.SHARDS)
    )
    assert_same(Checkpointer(dst).load_state(), big)
    assert list(Path(dst).rglob(".*")) == []


@pytest.mark.parametrize("phase", ["copying", "committing"])
def test_killed_at_any_phase_it_goes_on(tmp_path: Path, phase: str) -> None:
    src, dst = saved(str(tmp_path / "src")), str(tmp_path / "dst")
    pull(src, dst, at=1)
    killed(src, dst, phase=phase)
    assert_same(Checkpointer(dst).load_state(1), state(1))
    pull(src, dst)
    for url in (src, dst):  # which end by themselves
        store = open_store(url)
        store.delete([item.name for item in store.list(records.PINS)])
    assert_mirror(src, dst, 3)


# Between S3 and disks.


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
    s3_server: S3Server, other_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = f"s3://{s3_server.new_bucket()}/run", f"s3://{other_server.new_bucket()}/run"
    mine, theirs = s3_server.storage_options(), other_server.storage_options()
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


# Following.


def test_watch_brings_every_new_one(src: str, dst: str) -> None:
    following = watch(src, dst, poll_s=0)
    assert next(following).checkpoints == (Catalog(src).find().id,)
    saved(src, range(4, 7))
    assert [next(following).checkpoints for _ in range(3)] == [(Catalog(src).find(step).id,) for step in (4, 5, 6)]
    assert [info.step for info in Catalog(dst).checkpoints()] == [3, 4, 5, 6]
    assert_mirror(src, dst, 6)


def test_watch_waits_for_the_run_and_ends_when_told(tmp_path: Path, dst: str) -> None:
    src, until = str(tmp_path / "src"), threading.Event()
    reports: list[PullReport] = []
    arrived = threading.Event()

    def follow() -> None:
        for report in watch(src, dst, poll_s=0.01, until=until):
            reports.append(report)
            arrived.set()

    thread = threading.Thread(target=follow)
    thread.start()
    saved(src, range(1, 2))
    assert arrived.wait(30)
    until.set()
    thread.join(30)
    assert not thread.is_alive()
    assert [report.checkpoints for report in reports] == [(Catalog(src).find().id,)]


def test_watch_outlasts_a_store_that_fails_for_a_while(src: str, dst: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find, failures = rl_ckpt.transfer.survey, [StorageError("503"), StorageError("503")]

    def fail(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return find(*args)

    monkeypatch.setattr("rl_ckpt.transfer.survey", fail)
    assert next(watch(src, dst, poll_s=0)).checkpoints
    failures.append(StorageError("503"))
    saved(src, range(4, 5))
    with pytest.raises(StorageError, match="503"):
        next(watch(src, dst, poll_s=0, patience_s=0))


def test_watch_keeps_what_it_is_told_to(src: str, dst: str) -> None:
    following = watch(src, dst, poll_s=0, keep=[LatestN(2)])
    next(following)
    for step in range(4, 9):
        saved(src, range(step, step + 1))
        next(following)
    assert [info.step for info in Catalog(dst).checkpoints()] == [7, 8]
    assert_mirror_but_for_sweeps(src, dst, 8)


def assert_mirror_but_for_sweeps(src: str, dst: str, step: int) -> None:
    """A sweep leaves an epoch record behind, at most one after the last pull, and what its grace still keeps."""
    assert_same(Checkpointer(dst).load_state(step), state(step))
    assert Checkpointer(dst).verify().ok
    mine, theirs = Run.open(src).log.read(), Run.open(dst).log.read()
    assert len([epoch for epoch in theirs.epochs if epoch not in mine.epochs]) <= 1


@pytest.mark.parametrize("options", [{"poll_s": -1}, {"patience_s": "long"}, {"streams": 0}], ids=str)
def test_watch_says_at_once_what_it_can_not_take(src: str, dst: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        watch(src, dst, **options)
