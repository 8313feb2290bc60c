"""Pulls that are refused before anything is written, that go wrong on the way, and that are killed."""

from __future__ import annotations

import os
import signal
import uuid
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from rl_ckpt import (
    Catalog,
    Checkpointer,
    CheckpointNotFoundError,
    CommitConflictError,
    CorruptionError,
    InvalidInputError,
    Progress,
    RunOwnedError,
    StorageError,
    pull,
)
from rl_ckpt.format import records
from rl_ckpt.store import pull as pull_module
from rl_ckpt.store.run import Run
from rl_ckpt.store.urls import open_store
from tests.plain.pulls import assert_mirror, killed, objects, saved, state
from tests.unit.trees import assert_same


@pytest.fixture
def src(tmp_path: Path) -> str:
    return saved(str(tmp_path / "src"))


@pytest.fixture(params=["local", "memory"])
def dst(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "dst") if request.param == "local" else f"memory://pulled_{uuid.uuid4().hex}"


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
    [
        {"streams": 0},
        {"streams": True},
        {"max_bytes_per_s": 0},
        {"max_bytes_per_s": float("inf")},
        {"nodes": True},
        {"at": ""},
        {"at": True},
        {"at": -1},
        {"at": None},
        {"at": 1.5},
        {"at": ["1-a"]},
    ],
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
    def refuse(*_: object) -> NoReturn:
        raise StorageError("403: Access Denied")

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
