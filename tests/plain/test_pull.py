"""Pulling checkpoints to another place: what arrives, and what does not travel."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

from rl_ckpt import (
    Catalog,
    Checkpointer,
    CommitConflictError,
    Progress,
    fork,
    pull,
)
from rl_ckpt.format import records
from rl_ckpt.store.urls import open_store
from tests.plain.pulls import assert_mirror, objects, saved, state
from tests.unit.trees import assert_same


@pytest.fixture
def src(tmp_path: Path) -> str:
    return saved(str(tmp_path / "src"))


@pytest.fixture(params=["local", "memory"])
def dst(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "dst") if request.param == "local" else f"memory://pulled_{uuid.uuid4().hex}"


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
