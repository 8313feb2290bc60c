"""Catalog: finding checkpoints by what people call them, tags and notes, removal, sweeps by hand and dry runs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from rl_ckpt import (
    BestN,
    Catalog,
    Checkpointer,
    CheckpointNotFoundError,
    CorruptionError,
    EveryNSteps,
    InvalidInputError,
    KeepRule,
    LatestN,
    RunOwnedError,
    StorageError,
    fork,
)
from rl_ckpt.format import records
from rl_ckpt.format.records import LabelRecord, PinRecord
from rl_ckpt.store.base import Store
from rl_ckpt.store.committer import Committer, SaveRequest
from rl_ckpt.store.run import Run
from rl_ckpt.store.sweep import Sweeper
from rl_ckpt.store.urls import open_store
from tests.unit.trees import assert_same

_names = itertools.count()


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"memory://catalog_{next(_names)}"


@pytest.fixture
def store(url: str) -> Store:
    return open_store(url)


def state(step: int) -> dict[str, Any]:
    return {"w": np.random.default_rng(step).random(50), "frozen": np.arange(100.0), "step": step}


def save(url: str, *steps: int, tags: dict[int, str] | None = None, **options: Any) -> None:
    with Checkpointer(url, grace_s=0, **options) as ckpt:
        for step in steps:
            tag = (tags or {}).get(step)
            ckpt.save_state(step, state(step), metrics={"score": step % 3}, tag=tag).result(60)


def steps(url: str) -> list[int]:
    infos = Catalog(url).checkpoints()
    for info in infos:
        assert_same(Checkpointer(url).load_state(info.step), state(info.step))
    return [info.step for info in infos]


def names(store: Store) -> set[str]:
    return {item.name for item in store.list()}


def assert_nothing_left_over(url: str, store: Store) -> None:
    run = Run.open(url)
    commits = run.log.read().commits
    shards = {file.name for commit in commits for file in run.manifest(commit).files}
    found = {name for name in names(store) if not name.startswith((records.COMMITS, records.LABELS))}
    assert found == {records.RUN_FILE, *shards, *(records.manifest_name(commit.id) for commit in commits)}


def test_a_checkpoint_is_found_by_step_id_tag_and_as_the_latest(url: str) -> None:
    save(url, 1, 2, 3, tags={1: "first", 2: "twice", 3: "twice"})
    with Checkpointer(url) as ckpt:  # a second branch reaches step 3 again
        ckpt.load_state(2)
        ckpt.save_state(3, state(3)).result(60)
    catalog = Catalog(url)
    infos = catalog.checkpoints()
    assert [info.step for info in infos] == [1, 2, 3, 3]
    assert catalog.find(3) == catalog.find("3") == catalog.find("latest") == catalog.find() == infos[-1]
    assert catalog.find(infos[2].id) == infos[2]
    assert catalog.find("first") == infos[0]
    assert catalog.find("twice") == infos[2], "of several with the same tag the newest"
    assert [info.parent for info in infos] == [None, infos[0].id, infos[1].id, infos[1].id]
    assert [info.lineage for info in infos] == [
        (), (infos[0].id,), (infos[1].id, infos[0].id), (infos[1].id, infos[0].id)
    ]  # fmt: skip
    assert infos == Checkpointer(url).checkpoints()


@pytest.mark.parametrize("ref", [7, "7", "no such", "3-abcdef", "٣"])
def test_what_is_not_there_is_said(url: str, ref: int | str) -> None:
    save(url, 1, 2, tags={1: "first"})
    with pytest.raises(CheckpointNotFoundError, match=r"\[1, 2\]|1, 2|first"):
        Catalog(url).find(ref)


@pytest.mark.parametrize("ref", ["", -1, 1.5, None, True])
def test_what_is_no_reference_is_said(url: str, ref: Any) -> None:
    save(url, 1)
    with pytest.raises(InvalidInputError, match=r"step|id"):
        Catalog(url).find(ref)


def test_a_run_that_is_not_there_or_empty_is_said(url: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no run at"):
        Catalog(url).checkpoints()
    Run.create(url)
    assert Catalog(url).checkpoints() == []
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint yet"):
        Catalog(url).find()
    assert Catalog(url).sweep().deleted == ()


def test_tags_and_notes_are_told_and_taken_back(url: str, store: Store) -> None:
    save(url, 1, 2, tags={1: "given"})
    catalog = Catalog(url)
    assert catalog.tag(1, "later").tags == ("given", "later")
    assert catalog.tag(1, "later").tags == ("given", "later"), "once is enough"
    assert catalog.note("later", "the good one").note == "the good one"
    assert [(info.tags, info.note, info.tag) for info in catalog.checkpoints()] == [
        (("given", "later"), "the good one", "given"), ((), "", None)
    ]  # fmt: skip
    assert catalog.untag(1, "given").tags == ("later",)
    assert catalog.tag(1, "given").tags == ("given", "later")
    assert catalog.untag(1, "later").tags == ("given",)
    assert catalog.note(1, "").note == ""
    with pytest.raises(InvalidInputError, match="has no tag 'later'"):
        catalog.untag(1, "later")
    assert_same(Checkpointer(url).load_state(1), state(1))
    assert len([name for name in names(store) if name.startswith(records.LABELS)]) == 1


@pytest.mark.parametrize("name", ["", " ", " x", "x\n", "12", "latest", "3-abc", "x" * 201, 3, None, "\ud800"])
def test_what_can_not_be_a_tag_is_refused(url: str, store: Store, name: Any) -> None:
    save(url, 1)
    with pytest.raises(InvalidInputError, match="tag"):
        Catalog(url).tag(1, name)
    assert not any(name.startswith(records.LABELS) for name in names(store))


@pytest.mark.parametrize("text", [None, 3, b"x", "\ud800"])
def test_what_can_not_be_a_note_is_refused(url: str, text: Any) -> None:
    save(url, 1)
    with pytest.raises(InvalidInputError, match="note"):
        Catalog(url).note(1, text)


def test_a_job_keeps_what_is_tagged_and_drops_what_is_tagged_no_more(url: str, store: Store) -> None:
    save(url, 1, 2, 3, tags={2: "given"})
    catalog = Catalog(url)
    catalog.tag(1, "keep")
    save(url, 4, keep=[LatestN(1)])
    assert steps(url) == [1, 2, 4]
    catalog.untag(1, "keep")
    catalog.untag(2, "given")
    save(url, 5, keep=[LatestN(1)])
    assert steps(url) == [5]
    assert not any(name.startswith(records.LABELS) for name in names(store)), "labels go with their checkpoints"
    assert_nothing_left_over(url, store)


def test_a_tag_given_while_the_job_runs_counts_at_its_next_save(url: str) -> None:
    with Checkpointer(url, keep=[LatestN(2)], grace_s=0) as ckpt:
        for step in range(6):
            ckpt.save_state(step, state(step)).result(60)
            if step in (1, 3):
                Catalog(url).tag(step, "odd")
    assert steps(url) == [1, 3, 4, 5]


def test_a_label_that_can_not_be_read_keeps_its_checkpoint(url: str, store: Store) -> None:
    save(url, 1, 2, 3)
    info = Catalog(url).tag(1, "x")
    store.put(records.label_name(info.id), [b"rotten"])
    with pytest.warns(UserWarning, match="label|damaged"):
        assert Catalog(url).checkpoints()[0].tags == ()
    save(url, 4, keep=[LatestN(1)])
    with pytest.warns(UserWarning, match="damaged"):
        assert [info.step for info in Catalog(url).checkpoints()] == [1, 4]
    with pytest.warns(UserWarning, match="damaged"):
        assert Catalog(url).tag(1, "y").tags == ("y",)
    assert steps(url) == [1, 4]


def test_a_label_of_another_run_or_checkpoint_says_nothing(url: str, store: Store) -> None:
    save(url, 1, 2)
    one, two = Run.open(url).log.read().commits
    other = LabelRecord(checkpoint=one.id, commit=msgspec.structs.replace(one, run="other"), tags=("x",))
    store.put(records.label_name(one.id), [records.encode(other)])
    store.put(records.label_name(two.id), [records.encode(LabelRecord(checkpoint=one.id, commit=one, tags=("x",)))])
    with pytest.warns(UserWarning, match=r"another run.*another checkpoint"):
        assert [info.tags for info in Catalog(url).checkpoints()] == [(), ()]


def test_a_checkpoint_is_removed(url: str, store: Store) -> None:
    save(url, 1, 2, 3, 4, tags={2: "x"})
    report = Catalog(url).remove([1, "3"], grace_s=0)
    assert (len(report.deleted), report.files, report.requested) == (2, 3, {}), "of the two files of 1, one is shared"
    assert steps(url) == [2, 4]
    assert Catalog(url).remove("x", force=True, grace_s=0).deleted
    assert steps(url) == [4]
    assert_nothing_left_over(url, store)


def test_what_must_stay_is_not_removed(url: str, store: Store) -> None:
    save(url, 1, 2, 3, 4, tags={1: "given"})
    catalog = Catalog(url)
    catalog.tag(2, "later")
    before = names(store)
    for ref, said in [("latest", "is the newest"), (1, "tagged given"), ("later", "tagged later"), ([3, 4], "newest")]:
        with pytest.raises(InvalidInputError, match=said):
            catalog.remove(ref)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="is the newest"):
        catalog.remove(4, force=True)
    with catalog.pin(3), pytest.raises(InvalidInputError, match=r"held by rl-ckpt .* process \d+"):
        catalog.remove(3, force=True)
    with pytest.raises(CheckpointNotFoundError):
        catalog.remove([3, 99])
    with pytest.raises(InvalidInputError, match="empty"):
        catalog.remove([])
    assert names(store) == before
    assert steps(url) == [1, 2, 3, 4]


def test_a_job_that_is_alive_is_asked_to_remove(url: str, store: Store) -> None:
    with Checkpointer(url, grace_s=0) as ckpt:
        for step in range(4):
            ckpt.save_state(step, state(step)).result(60)
        report = Catalog(url).remove([0, 1])
        assert report.deleted == ()
        assert len(report.requested) == 2
        assert all("after its next save" in text for text in report.requested.values())
        assert steps(url) == [0, 1, 2, 3]
        Catalog(url).tag(1, "not yet")  # takes the request back
        with pytest.raises(RunOwnedError, match="by its own rules"):
            Catalog(url).sweep([LatestN(1)])
        ckpt.save_state(4, state(4)).result(60)
    assert steps(url) == [1, 2, 3, 4]


def test_a_request_that_nobody_carried_out_is_carried_out_by_the_next_sweep(url: str, store: Store) -> None:
    with Checkpointer(url, grace_s=0) as ckpt:
        for step in range(3):
            ckpt.save_state(step, state(step)).result(60)
        ckpt._saver._writer.submit(int).result(60)  # type: ignore[union-attr]  # its last sweep is done
        assert Catalog(url).remove(0).requested
    assert steps(url) == [0, 1, 2]
    dry = Catalog(url).sweep(dry_run=True)
    assert len(dry.deleted) == 1
    assert "asked to remove it" in dry.verdicts[0].why
    Catalog(url).sweep(grace_s=0)
    assert steps(url) == [1, 2]
    assert_nothing_left_over(url, store)


def store_clock_ahead(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    real = Sweeper.store_now

    def ahead(self: Sweeper) -> float:
        now = real(self)
        assert now is not None
        return now + seconds

    monkeypatch.setattr(Sweeper, "store_now", ahead)


def test_a_sweep_does_what_its_dry_run_said(url: str, store: Store) -> None:
    save(url, *range(10), tags={1: "x"})
    keep: list[KeepRule] = [LatestN(2), EveryNSteps(4), BestN("score", "max", 1)]
    before = names(store)
    dry = Catalog(url).sweep(keep, dry_run=True, grace_s=0)
    assert names(store) == before
    assert dry.dry_run
    done = Catalog(url).sweep(keep, grace_s=0)
    assert (done.verdicts, set(done.deleted), done.files, done.bytes) == (
        dry.verdicts, set(dry.deleted), dry.files, dry.bytes
    )  # fmt: skip
    assert not done.dry_run
    assert steps(url) == [0, 1, 4, 8, 9]
    assert done.bytes == 0 or done.files
    assert_nothing_left_over(url, store)


def test_a_dry_run_beside_a_job_leaves_its_saves_under_way_alone(url: str, store: Store) -> None:
    save(url, 1, 2)
    committer = Committer(Run.open(url), [], 0.0)
    store.put(f"{records.SHARDS}{committer.attempt(SaveRequest(3))}/s-0.arrow", [b"x" * 1000])
    dry = Catalog(url).sweep([LatestN(1)], dry_run=True, grace_s=0)
    assert (dry.files, "owns the run" in dry.notices[0]) == (1, True), "the manifest of the first"
    committer.close()
    assert Catalog(url).sweep([LatestN(1)], dry_run=True, grace_s=0).files == 2
    assert Catalog(url).sweep([LatestN(1)], grace_s=0).files == 2


def test_files_go_when_their_grace_is_over_though_sweeps_are_short(
    url: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(url, *range(4))
    first = Catalog(url).sweep([LatestN(1)], grace_s=100)
    assert (len(first.deleted), first.files) == (3, 0)
    assert first.waiting_files > 3
    assert first.waiting_bytes > 0
    again = Catalog(url).sweep([LatestN(1)], grace_s=100)
    assert (again.deleted, again.files, again.waiting_files) == ((), 0, first.waiting_files)
    store_clock_ahead(monkeypatch, 101)
    last = Catalog(url).sweep([LatestN(1)], grace_s=100)
    assert (last.files, last.bytes, last.waiting_files) == (first.waiting_files, first.waiting_bytes, 0)
    assert steps(url) == [3]
    assert_nothing_left_over(url, store)


def test_a_store_clock_that_went_back_begins_the_grace_anew(
    url: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(url, *range(3))
    store_clock_ahead(monkeypatch, 1e8)
    waiting = Catalog(url).sweep([LatestN(1)], grace_s=100).waiting_files
    monkeypatch.undo()
    assert Catalog(url).sweep(grace_s=100).waiting_files == waiting
    store_clock_ahead(monkeypatch, 101)
    assert Catalog(url).sweep(grace_s=100).files == waiting
    assert steps(url) == [2]


def test_a_sweep_with_nothing_to_do_leaves_no_trace(url: str, store: Store) -> None:
    save(url, 1, 2)
    before = names(store)
    report = Catalog(url).sweep([LatestN(2)])
    assert report.deleted == ()
    assert names(store) == before


def test_who_may_not_look_for_half_written_objects_sweeps_all_else(
    url: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(url, 1, 2, 3)

    def refuse(*_: object) -> int:
        raise StorageError("AccessDenied")

    monkeypatch.setattr(type(store), "clean_partial", refuse)
    for dry_run in (True, False):
        report = Catalog(url).sweep([LatestN(1)], dry_run=dry_run, grace_s=0)
        assert "half-written objects" in report.notices[0]
        assert "AccessDenied" in report.notices[0]
        assert (len(report.deleted), report.files) == (2, 3)
    assert steps(url) == [3]


def test_a_store_that_fails_a_sweep_is_told_of_and_the_next_one_goes_on(
    url: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(url, 1, 2, 3)
    real = type(store).delete

    def refuse(self: Store, wanted: list[str]) -> None:
        if any(name.startswith(records.MANIFESTS) for name in wanted):
            raise StorageError("no more")
        real(self, wanted)

    monkeypatch.setattr(type(store), "delete", refuse)
    with pytest.raises(StorageError, match="no more"):
        Catalog(url).sweep([LatestN(1)], grace_s=0)
    monkeypatch.undo()
    assert steps(url) == [3]
    assert Catalog(url).sweep(grace_s=0).files == 3
    assert_nothing_left_over(url, store)


def test_a_pinned_checkpoint_is_told_of_and_stays(url: str, store: Store) -> None:
    save(url, 1, 2, 3)
    info = Catalog(url).find(1)
    fork = PinRecord(checkpoint=info.id, by="fork file:///elsewhere", expires=253402300799.0)
    store.create(records.pin_name("one"), records.encode(fork))
    for dry_run in (True, False):
        report = Catalog(url).sweep([LatestN(1)], dry_run=dry_run, grace_s=0)
        assert report.pinned == {info.id: "fork file:///elsewhere"}
        assert len(report.deleted) == 1
    assert steps(url) == [1, 3]


def test_what_was_forked_stays_until_the_fork_needs_it_no_more(tmp_path: Path) -> None:
    url, other = str(tmp_path / "run"), str(tmp_path / "fork")
    save(url, 1, 2)
    fork(url, other, at=1)
    with pytest.raises(InvalidInputError, match="held by fork file://"):
        Catalog(url).remove(1, force=True)
    assert list(Catalog(url).sweep([LatestN(1)], grace_s=0).pinned) == [Catalog(url).find(1).id]
    assert_same(Checkpointer(other).load_state(), state(1))
    with Checkpointer(other, grace_s=0) as ckpt:
        ckpt.save_state(5, {"new": 1}).result(60)
    dry = Catalog(other).sweep([LatestN(1)], dry_run=True)
    assert (len(dry.deleted), dry.files) == (1, 1), "its manifest; no file is its own"
    assert Catalog(other).sweep([LatestN(1)], grace_s=0).files == 1
    assert Catalog(url).remove(1, grace_s=0).deleted
    assert steps(url) == [2]
    assert_same(Checkpointer(other).load_state(), {"new": 1})


def test_rules_that_keep_nothing_delete_nothing(url: str, store: Store) -> None:
    save(url, 1, 2, 3)
    before = names(store)
    with pytest.raises(InvalidInputError, match="keep none of the 3"):
        Catalog(url).sweep([EveryNSteps(1000)])
    for wrong in (LatestN(1), [LatestN], "x"):
        with pytest.raises(InvalidInputError, match="list of rules"):
            Catalog(url).sweep(wrong)  # type: ignore[arg-type]
    for grace in (-1, "1", None, True, float("inf")):
        with pytest.raises(InvalidInputError, match="grace_s"):
            Catalog(url).sweep([LatestN(1)], grace_s=grace)  # type: ignore[arg-type]
    assert names(store) == before


def test_nothing_is_deleted_while_records_or_manifests_can_not_be_read(url: str, store: Store) -> None:
    save(url, 1, 2, 3)
    first = Run.open(url).log.read().commits[0]
    store.put(records.manifest_name(first.id), [b"rotten"])
    report = Catalog(url).sweep([EveryNSteps(1)], dry_run=True)
    assert "manifests can't be read" in report.notices[0]
    store.put(records.commit_name(first.number), [b"rotten"])
    before = {name for name in names(store) if name.startswith(records.SHARDS)}
    with pytest.warns(UserWarning, match="can't be read"):
        report = Catalog(url).sweep([LatestN(1)], grace_s=0)
    assert report.files == 0
    with pytest.warns(UserWarning, match="can't be read"):
        assert "records can't be read" in str(Catalog(url).sweep(dry_run=True).notices)
    assert {name for name in names(store) if name.startswith(records.SHARDS)} == before


def test_no_checkpoint_goes_while_the_newest_can_not_be_read(url: str, store: Store) -> None:
    save(url, 1, 2, 3)
    first, _, newest = Run.open(url).log.read().commits
    good = store.get(records.manifest_name(newest.id))
    store.delete([records.manifest_name(newest.id)])
    before = names(store)
    for action in (
        lambda: Catalog(url).sweep([LatestN(1)], grace_s=0),
        lambda: Catalog(url).sweep([LatestN(1)], dry_run=True),
        lambda: Catalog(url).remove([2], grace_s=0),
    ):
        with pytest.raises(CorruptionError, match=r"while the newest can't be read.* is missing"):
            action()
    assert names(store) == before
    store.put(records.manifest_name(newest.id), [good])
    store.put(records.manifest_name(first.id), [b"rotten"])
    Catalog(url).tag(1, "kept")
    report = Catalog(url).sweep([LatestN(1)], grace_s=0)
    assert "no files are deleted while manifests can't be read" in report.notices[0]
    assert (len(report.deleted), report.files) == (1, 0)


def test_one_checkpoint_is_verified_by_what_it_is_called(url: str) -> None:
    save(url, 1, 2, tags={1: "x"})
    assert list(Catalog(url).verify("x").checkpoints) == [Catalog(url).find(1).id]
    assert len(Catalog(url).verify().checkpoints) == 2
    with pytest.raises(CheckpointNotFoundError):
        Catalog(url).verify("y")


def test_the_url_is_that_of_the_run(url: str) -> None:
    assert Catalog(url).url == Checkpointer(url).url
