"""Forks: a run that begins with a checkpoint of another one, without a copy of its bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from rl_ckpt import (
    Catalog,
    Checkpointer,
    CheckpointNotFoundError,
    CorruptionError,
    InvalidInputError,
    LatestN,
    StorageError,
    fork,
)
from rl_ckpt.format import records
from rl_ckpt.format.records import RunRecord
from rl_ckpt.store import forks as forks_module
from rl_ckpt.store.based import self_contained
from rl_ckpt.store.pins import create
from rl_ckpt.store.run import Run
from rl_ckpt.store.urls import open_store
from tests.s3_servers import S3Server
from tests.unit.store.faulty import faulty, once
from tests.unit.store.forked import FROZEN, files, in_memory, load, newest, pins, run_of, save, state
from tests.unit.trees import assert_same


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else in_memory()


def test_a_fork_holds_the_checkpoint_and_none_of_its_bytes(root: str) -> None:
    source, url = f"{root}/source", f"{root}/fork"
    save(source, range(3))
    before = {name: open_store(source).get(name) for name in files(source)}
    info = fork(source, url, at=1)
    first = Checkpointer(source).checkpoints()[1]
    assert (info.step, info.bytes, info.lineage, info.tag) == (1, first.bytes, (first.id,), None)
    assert Checkpointer(url).checkpoints() == [info]
    assert info.bytes_written < 2000, "the manifest"
    assert files(url, records.SHARDS) == set()
    assert_same(load(url), state(1))
    after = {name: open_store(source).get(name) for name in files(source)}
    assert {name: data for name, data in after.items() if not name.startswith("pins/")} == before
    (pin,) = pins(source).values()
    assert (pin.checkpoint, pin.by) == (first.id, f"fork {open_store(url).url}")
    assert pin.expires > 2e11


def test_a_fork_goes_on_and_writes_only_what_changed(root: str) -> None:
    source, url = f"{root}/source", f"{root}/fork"
    save(source, range(2))
    fork(source, url)
    with Checkpointer(url) as ckpt:
        ckpt.load_state()
        info = ckpt.save_state(2, state(2)).result(60)
    assert info.bytes_written < 4000 + 6000 < FROZEN.nbytes
    assert info.lineage == (Checkpointer(url).checkpoints()[0].id, newest(source))
    assert_same(load(url, 1), state(1))
    assert_same(load(url, 2), state(2))
    report = Checkpointer(url).verify()
    assert report.ok
    assert report.bytes == FROZEN.nbytes + 2 * 4000
    assert [c.step for c in Checkpointer(source).checkpoints()] == [0, 1]


@pytest.mark.parametrize("ref", [1, "1", "latest", None, "good", "id"])
def test_which_checkpoint_is_forked(root: str, ref: int | str | None) -> None:
    source = f"{root}/source"
    save(source, range(2))
    if ref == "good":
        Catalog(source).tag(0, "good")
    info = fork(source, f"{root}/fork", at=Checkpointer(source).checkpoints()[0].id if ref == "id" else ref)
    assert info.step == (0 if ref in ("good", "id") else 1)


def test_the_sources_sweep_spares_what_a_fork_holds(root: str) -> None:
    source, url = f"{root}/source", f"{root}/fork"
    save(source, range(2))
    fork(source, url, at=0)
    save(source, range(2, 5), keep=[LatestN(1)], grace_s=0)
    assert [c.step for c in Checkpointer(source).checkpoints()] == [0, 4]
    assert_same(load(url), state(0))


def test_the_pin_goes_with_the_last_checkpoint_that_needs_the_source(root: str) -> None:
    source, url = f"{root}/source", f"{root}/fork"
    save(source, range(2))
    fork(source, url)
    save(url, range(2, 4), keep=[LatestN(1)], grace_s=0)
    assert [c.step for c in Checkpointer(url).checkpoints()] == [3]
    assert list(pins(source)) == [run_of(url)], "what is frozen still lies in the source"
    save(url, range(4, 6), FROZEN + 1, keep=[LatestN(2)], grace_s=3600)
    assert list(pins(source)) == [run_of(url)], "within the grace time somebody may be reading"
    save(url, range(6, 7), FROZEN + 1, keep=[LatestN(2)], grace_s=0)
    assert list(pins(source)) == []
    save(source, range(2, 4), FROZEN - 1, keep=[LatestN(1)], grace_s=0)
    assert [c.step for c in Checkpointer(source).checkpoints()] == [3]
    assert_same(load(url), state(6, FROZEN + 1))
    assert Checkpointer(url).verify().ok


def test_a_writer_that_finds_the_pin_of_one_before_it_removes_it(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, url = f"{root}/source", f"{root}/fork"
    save(source, range(2))
    fork(source, url)
    with monkeypatch.context() as patch:
        patch.setattr(forks_module, "let_go", lambda run, base: None)  # it was killed before
        save(url, range(2, 4), FROZEN + 1, keep=[LatestN(1)], grace_s=0)
    assert list(pins(source)) == [run_of(url)]
    save(url, range(4, 5), FROZEN + 1, keep=[LatestN(1)], grace_s=0)
    assert list(pins(source)) == []


def test_a_pin_that_cannot_be_removed_keeps_no_sweep_from_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, url = str(tmp_path / "source"), str(tmp_path / "fork")
    save(source, range(2))
    fork(source, url)
    save(url, range(2, 4), FROZEN + 1)

    def refuse(run: Run, base: str) -> None:
        raise StorageError("403")

    monkeypatch.setattr(forks_module, "let_go", refuse)
    first = Catalog(url).sweep([LatestN(1)], grace_s=0)
    assert [notice for notice in first.notices if "was not removed: 403" in notice]
    assert first.files > 0
    save(url, range(4, 5), FROZEN + 1)
    later = Catalog(url).sweep([LatestN(1)], grace_s=3600)
    assert later.waiting_files > 0
    assert files(url, records.WAITING_FILE), "the next sweep knows since when they wait"


def test_what_little_a_fork_needs_of_a_large_file_is_not_moved(root: str) -> None:
    source, url = f"{root}/source", f"{root}/fork"
    save(source, range(1), np.concatenate([FROZEN, np.arange(40_000.0)]), chunk_bytes=FROZEN.nbytes, write_streams=1)
    fork(source, url)
    with Checkpointer(url, chunk_bytes=FROZEN.nbytes, write_streams=1, keep=[LatestN(1)], grace_s=0) as ckpt:
        for step in range(1, 5):
            info = ckpt.save_state(step, state(step)).result(60)
    assert info.bytes_written < 10_000 < FROZEN.nbytes
    assert list(pins(source)) == [run_of(url)]


@pytest.mark.parametrize("how", ["tagged", "pinned"])
def test_the_pin_stays_where_a_checkpoint_is_claimed_in_the_moment_when_it_goes(
    root: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, url = f"{root}/source", f"{root}/fork"
    save(source, range(2))
    first = fork(source, url)
    with Checkpointer(url) as ckpt:
        ckpt.save_state(2, state(2, FROZEN + 1)).result(60)

    def claim(operation: str, name: str) -> None:
        if how == "tagged":
            Catalog(url).tag(first.id, "mine")
        else:
            create(Run.open(url), first.id, "a reader", 3600.0)

    with faulty(monkeypatch, url) as store:
        store.before = once(claim, "delete", prefix=records.COMMITS)
        save(url, range(3, 4), FROZEN + 1, keep=[LatestN(1)], grace_s=0)
        save(url, range(4, 5), FROZEN + 1, keep=[LatestN(1)], grace_s=0)
    assert list(pins(source)) == [run_of(url)]
    if how == "tagged":
        assert_same(load(url, 1), state(1))
    else:
        open_store(url).delete(sorted(files(url, records.PINS)))
        save(url, range(5, 6), FROZEN + 1, keep=[LatestN(1)], grace_s=0)
        assert list(pins(source)) == []


def test_tags_of_the_source_stay_there(root: str) -> None:
    source, url = f"{root}/source", f"{root}/fork"
    with Checkpointer(source) as ckpt:
        ckpt.save_state(1, state(1), tag="best", metrics={"score": 2.5}).result(60)
    Catalog(source).tag(1, "shown")
    assert fork(source, url, at="shown").metrics == {"score": 2.5}
    (info,) = Catalog(url).checkpoints()
    assert (info.tag, info.tags) == (None, ())
    run = Run.open(url)
    assert run.manifest(run.log.read().commits[0]).tag is None
    save(url, range(2, 4), FROZEN + 1, keep=[LatestN(1)], grace_s=0)
    assert pins(source) == {}


def test_a_sweep_of_the_fork_takes_nothing_of_the_source(root: str) -> None:
    source, url = f"{root}/source", f"{root}/fork"
    save(source, range(2))
    fork(source, url)
    before = files(source, records.SHARDS)
    save(url, range(2, 6), FROZEN + 1, keep=[LatestN(1)], grace_s=0)
    assert files(source, records.SHARDS) == before
    assert Checkpointer(source).verify().ok
    run = Run.open(url)
    (commit,) = run.log.read().commits
    assert files(url, records.SHARDS) == {file.name for file in run.manifest(commit).files}


def test_forks_of_forks_read_each_file_where_it_lies(root: str) -> None:
    a, b, c, d = (f"{root}/{name}" for name in "abcd")
    save(a, range(2))
    fork(a, b)
    save(b, range(2, 3))
    fork(b, c)
    fork(c, d)
    assert Run.open(c).record.bases == ("../a", "../b")
    assert Run.open(d).record.bases == ("../a", "../b"), "of c itself it needs nothing"
    assert set(pins(a)) == {run_of(b), run_of(c), run_of(d)}
    assert {pin.checkpoint for pin in pins(a).values()} == {newest(a)}
    assert set(pins(b)) == {run_of(c), run_of(d)}
    assert pins(c) == {}
    save(b, range(3, 5), FROZEN + 1, keep=[LatestN(1)], grace_s=0)
    save(a, range(2, 4), FROZEN + 1, keep=[LatestN(1)], grace_s=0)
    for url in (c, d):
        assert_same(load(url), state(2))
        assert Checkpointer(url).verify().ok


def test_a_fork_of_a_copy_that_stands_by_itself(root: str) -> None:
    source, url, copy, last = (f"{root}/{name}" for name in ("source", "fork", "copy", "last"))
    save(source, range(2))
    fork(source, url)
    save(url, range(2, 3))
    copied(url, copy)
    assert_same(load(copy), state(2))
    fork(copy, last)
    assert Run.open(last).record.bases == ("../copy",)
    remove(source)
    remove(url)
    assert_same(load(last), state(2))
    assert Checkpointer(last).verify().ok
    save(copy, range(3, 5), FROZEN + 1, keep=[LatestN(1)], grace_s=0)
    assert_same(load(last), state(2))
    save(last, range(3, 5), FROZEN + 1, keep=[LatestN(1)], grace_s=0)
    save(copy, range(5, 6), FROZEN + 1, keep=[LatestN(1)], grace_s=0)
    assert files(copy, "base/") == set(), "its own sweep took what nobody needs any more"
    assert Checkpointer(copy).verify().ok


def copied(url: str, to: str) -> None:
    """What a pull of a fork makes of it."""
    run, there = Run.open(url), open_store(to)
    for name in files(url):
        there.put(name, [run.store.get(name)])
    for commit in run.log.read().commits:
        for file in run.manifest(commit).files:
            there.put(file.name, [run.store.get(file.name)])
    there.put(records.RUN_FILE, [records.encode(self_contained(run.record))])


def remove(url: str) -> None:
    open_store(url).delete(sorted(files(url)))


def test_both_moved_together_are_found_and_one_alone_is_named(tmp_path: Path) -> None:
    save(str(tmp_path / "source"), range(2))
    fork(str(tmp_path / "source"), str(tmp_path / "fork"))
    (tmp_path / "new").mkdir()
    for name in ("source", "fork"):
        shutil.move(tmp_path / name, tmp_path / "new" / name)
    assert_same(load(str(tmp_path / "new/fork")), state(1))
    shutil.move(tmp_path / "new/source", tmp_path / "away")
    url = str(tmp_path / "new/fork")
    with pytest.raises(CorruptionError, match=r"forked from the run at file://.*/new/source, which is not there"):
        load(url)
    damage = Checkpointer(url).verify().damage
    assert {item.found for item in damage} == {"the file is missing"}
    assert all("it belongs to the run at" in item.advice for item in damage)
    save(url, range(2, 3))  # whole, as nothing of the source can be leant on
    assert_same(load(url), state(2))


def test_damage_in_the_source_is_told_by_the_fork_and_mended_in_the_source(tmp_path: Path) -> None:
    source, url = str(tmp_path / "source"), str(tmp_path / "fork")
    save(source, range(1))
    small = np.arange(100.0)
    with Checkpointer(source) as ckpt:
        ckpt.load_state(0)
        ckpt.save_state(1, {"small": small}).result(60)
    fork(source, url)
    (path,) = (tmp_path / "source/shards" / newest(source)).iterdir()
    data = bytearray(path.read_bytes())
    data[data.index(small.tobytes()) + 9] ^= 4
    path.write_bytes(data)
    (row,) = Checkpointer(url).verify(repair=True).damage
    assert row.repaired_from is None
    assert row.file == f"base/0/shards/{newest(source)}/{path.name}"
    assert f"the run at file://{tmp_path}/source" in row.advice
    assert path.read_bytes() == data
    assert Checkpointer(source).verify(repair=True).ok
    assert Checkpointer(url).verify().ok


def test_a_chunk_damaged_in_the_source_is_read_from_the_fork_where_it_has_the_same(tmp_path: Path) -> None:
    source, url = str(tmp_path / "source"), str(tmp_path / "fork")
    save(source, range(1))
    fork(source, url)
    (tmp_path / "source").rename(tmp_path / "away")
    save(url, range(1, 2))  # whole, as nothing can be leant on
    (tmp_path / "away").rename(tmp_path / "source")
    (path,) = (tmp_path / "source/shards").rglob("*.arrow")
    data = bytearray(path.read_bytes())
    data[data.index(FROZEN.tobytes()) + 9] ^= 4
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="was read whole"):
        assert_same(load(url, 0), state(0))


@pytest.mark.parametrize("how", ["lost", "damaged", "a copy's, lost"])
def test_a_forks_lost_run_json_is_made_anew_with_its_bases(root: str, how: str) -> None:
    source, url = f"{root}/source", f"{root}/fork"
    save(source, range(2))
    fork(source, url)
    save(url, range(2, 3))
    if how.startswith("a copy"):
        copied(url, f"{root}/copy")
        open_store(f"{root}/copy").delete([records.FORK_FILE])
        remove(source)
        url = f"{root}/copy"
    store = open_store(url)
    before = Run.open(url).record
    if how == "damaged":
        store.put(records.RUN_FILE, [b"nothing"])
    else:
        store.delete([records.RUN_FILE])
    assert Checkpointer(url).verify(repair=True).ok
    assert (Run.open(url).record.run, Run.open(url).record.bases) == (before.run, before.bases)
    assert_same(load(url), state(2))


def test_a_fork_of_which_nothing_tells_the_bases_is_not_made_a_plain_run(root: str) -> None:
    source, url = f"{root}/source", f"{root}/fork"
    save(source, range(2))
    fork(source, url)
    open_store(url).delete([records.RUN_FILE, records.FORK_FILE])
    with pytest.raises(CorruptionError, match=r"run.json is missing, though there is a commit log"):
        Checkpointer(url).verify(repair=True)
    assert not open_store(url).exists(records.RUN_FILE)


# Calls that can't be carried out: nothing is written, to either.


def wrong(call: Callable[[], object], error: type[Exception], match: str | None, *urls: str) -> None:
    before = [files(url) for url in urls]
    with pytest.raises(error, match=match):
        call()
    assert [files(url) for url in urls] == before


def test_a_missing_run_or_step(root: str) -> None:
    source, url = f"{root}/source", f"{root}/fork"
    wrong(lambda: fork(source, url), CheckpointNotFoundError, "no run at", source, url)
    save(source, range(2))
    for ref in (7, "nobody", "7"):
        wrong(partial(fork, source, url, at=ref), CheckpointNotFoundError, "has no checkpoint", source, url)
    for bad in (-1, True, "", 1.5):
        wrong(partial(fork, source, url, at=cast(int, bad)), InvalidInputError, None, source, url)


def test_where_something_is_already(root: str) -> None:
    source, url, other = f"{root}/source", f"{root}/fork", f"{root}/other"
    save(source, range(2))
    save(url, range(1))
    open_store(other).put("notes.txt", [b"mine"])
    wrong(lambda: fork(source, url), InvalidInputError, "is a run already, of 1 checkpoints", source, url)
    wrong(lambda: fork(source, other), InvalidInputError, "is not empty, it holds .*notes.txt", source, other)
    wrong(lambda: fork(source, source), InvalidInputError, "is the run that is to be forked", source)
    wrong(lambda: fork(source, f"{source}/x"), InvalidInputError, "lies within", source)
    remove(url)
    Run.create(url)
    wrong(lambda: fork(source, url), InvalidInputError, "is a run already, of 0 checkpoints", source, url)


@pytest.mark.parametrize("damage", ["missing file", "short file", "manifest", "flipped bit"])
def test_a_damaged_checkpoint(tmp_path: Path, damage: str) -> None:
    source, url = str(tmp_path / "source"), str(tmp_path / "fork")
    save(source, range(2))
    (path,) = (tmp_path / "source/shards" / newest(source)).iterdir()
    data = bytearray(path.read_bytes())
    if damage == "missing file":
        path.unlink()
    elif damage == "short file":
        path.write_bytes(data[:-1])
    elif damage == "flipped bit":
        data[data.index(np.full(500, 1, np.float64).tobytes())] ^= 1
        path.write_bytes(data)
    else:
        (tmp_path / "source/manifests" / f"{newest(source)}.json").write_bytes(b"{}")
    for verify in (False, True):
        if (damage, verify) != ("flipped bit", False):
            wrong(partial(fork, source, url, verify=verify), CorruptionError, newest(source), source, url)
    assert fork(source, url, at=0).step == 0


def test_a_source_that_the_forks_readers_could_not_read(moto_server: S3Server, tmp_path: Path) -> None:
    source, options = f"s3://{moto_server.new_bucket()}/source", moto_server.storage_options()
    with Checkpointer(source, storage_options=options) as ckpt:
        ckpt.save_state(1, state(1)).result(60)
    url = str(tmp_path / "fork")
    with pytest.raises(InvalidInputError, match=r"storage_options=\{'bases'"):
        fork(source, url, source_storage_options=options)
    assert not (tmp_path / "fork").exists()
    with_bases = {"bases": options}
    fork(source, url, storage_options=with_bases, source_storage_options=options)
    assert Run.open(url, with_bases).record.bases == (source,)
    with Checkpointer(url, storage_options=with_bases) as ckpt:
        assert_same(ckpt.load_state(), state(1))
        assert ckpt.save_state(2, state(2)).result(60).bytes_written < 10_000
        assert ckpt.verify().ok
    with pytest.raises((StorageError, InvalidInputError), match="s3://"):
        load(url)


def test_on_s3_nothing_is_copied(s3_server: S3Server) -> None:
    bucket, options = s3_server.new_bucket(), s3_server.storage_options()
    source, url = f"s3://{bucket}/pbt/source", f"s3://{bucket}/pbt/fork"
    with Checkpointer(source, storage_options=options) as ckpt:
        ckpt.save_state(1, state(1)).result(60)
    info = fork(source, url, storage_options=options)
    assert Run.open(url, options).record.bases == ("../source",)
    stored = open_store(url, options).list()
    assert sum(item.size_bytes for item in stored) < 5000 < info.bytes
    with Checkpointer(url, storage_options=options, keep=[LatestN(1)], grace_s=0) as ckpt:
        assert_same(ckpt.load_state(), state(1))
        assert ckpt.save_state(2, state(2)).result(60).bytes_written < 10_000
        assert ckpt.verify().ok
        ckpt.save_state(3, state(3, FROZEN + 1)).result(60)
    assert open_store(source, options).list("pins/") == []


def test_runs_without_bases_are_written_byte_for_byte_as_before() -> None:
    path = Path(__file__).resolve().parents[2] / "data/v1/run/run.json"
    record = records.decode("run.json", path.read_bytes(), RunRecord)
    assert records.encode(record) == path.read_bytes()
    url = in_memory()
    save(url, range(1))
    run = Run.open(url)
    assert (run.record.version, run.manifest(run.log.read().commits[0]).version) == (1, 1)
