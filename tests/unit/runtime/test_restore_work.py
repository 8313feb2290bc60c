"""Which checkpoint a restore is given, out of a store and a memory tier, and for how long memory is held for it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from rl_ckpt import Checkpointer
from rl_ckpt.errors import CheckpointNotFoundError, CorruptionError, StorageError
from rl_ckpt.format import records
from rl_ckpt.options import Options
from rl_ckpt.plan.parts import Holdings, Remembered
from rl_ckpt.runtime import restore_work
from rl_ckpt.runtime.restore_work import Loaded, RestoreWork
from rl_ckpt.runtime.spec import RunSpec
from rl_ckpt.store.run import Run


class Tier:
    """A memory tier that remembers what a test says."""

    def __init__(self, *remembered: Remembered) -> None:
        self.kept = list(remembered)
        self.gone: set[str] = set()
        self.uses: dict[str, str] = {}
        """Token → checkpoint."""
        self.used: list[str] = []

    def remembered(self) -> Sequence[Remembered]:
        return self.kept

    def holdings(self, checkpoint: str) -> Holdings | None:
        assert checkpoint in self.uses.values(), "it is held before it is looked at"
        return None if checkpoint in self.gone else Holdings([], {})

    def use(self, checkpoint: str, token: str) -> None:
        self.uses[token] = checkpoint
        self.used.append(checkpoint)

    def done(self, token: str) -> Iterable[Any]:
        self.uses.pop(token, None)
        return []

    def bad(self, server: str, part: str, digest: bytes) -> Iterable[Any]:
        raise AssertionError


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Steps 1 and 2 are committed."""
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        for step in (1, 2):
            ckpt.save_state(step, {"w": np.full(10, step)}).result()
    return Run.open(str(tmp_path / "run"))


def memory(run: Run, commit: int, **changes: Any) -> Remembered:
    """A commit as memory has it."""
    record = run.log.read().commits[commit - 1]
    data = run.manifest_file(record)[1]
    return msgspec.structs.replace(Remembered(record.id, commit, data, record, record.number, True), **changes)


def load(run: Run, tier: Tier, step: int | None = None, tried: tuple[str, ...] = ()) -> Loaded:
    work = RestoreWork(RunSpec(run.store.url, {}, (), Options(), "get", "set"), tier, lambda _: None)
    return asyncio.run(work.load("token", step, tried))


def folder(run: Run) -> Path:
    return Path(run.store.url.removeprefix("file://"))


def test_the_newest_commit_is_loaded_with_what_memory_has_of_it(run: Run) -> None:
    tier = Tier(memory(run, 2))
    found = load(run, tier)
    assert (found.manifest.step, found.mappable, found.notice, found.damaged) == (2, True, "", {})
    assert found.holdings is not None
    assert tier.uses == {"token": found.id}, "and nothing else is kept from going"


def test_while_it_is_chosen_nothing_of_memory_may_go(run: Run) -> None:
    tier = Tier(memory(run, 2), memory(run, 1))
    found = load(run, tier)
    assert set(tier.used[:2]) == {one.id for one in tier.kept}
    assert tier.used[2:] == [found.id]


def test_a_commit_that_memory_has_not_is_loaded_without(run: Run) -> None:
    tier = Tier(memory(run, 1))
    found = load(run, tier)
    assert (found.manifest.step, found.holdings) == (2, None)
    assert tier.uses == {}


def test_a_manifest_comes_out_of_memory_only_if_it_is_what_was_committed(run: Run) -> None:
    good = memory(run, 2)
    path = folder(run) / "manifests" / f"{good.id}.json"
    other = memory(run, 2, manifest=good.manifest.replace(b'"step":2', b'"step":3'))
    assert load(run, Tier(other)).manifest.step == 2
    path.write_bytes(b"{}")
    assert load(run, Tier(good)).manifest.step == 2
    found = load(run, Tier(other))
    assert (found.manifest.step, list(found.damaged)) == (1, [good.id])
    with pytest.raises(CorruptionError):
        load(run, Tier(other), step=2)


def test_what_is_only_in_memory_comes_first_and_is_passed_over_where_it_is_not_whole(run: Run) -> None:
    alone = memory(run, 2, id="3-m", step=3, record=None)
    assert load(run, Tier(alone)).id == "3-m"
    assert load(run, Tier(alone), step=3).id == "3-m"
    found = load(run, Tier(msgspec.structs.replace(alone, whole=False)))
    assert found.manifest.step == 2
    assert "only in memory" in found.damaged["3-m"]


def test_what_was_only_in_memory_and_went_meanwhile_is_not_waited_for(run: Run) -> None:
    tier = Tier(memory(run, 2, id="3-m", step=3, record=None))
    tier.gone.add("3-m")
    assert load(run, tier).manifest.step == 2
    assert tier.uses == {}


@pytest.mark.parametrize("how", ["gone", "emptied", "older"])
def test_a_store_that_lost_what_was_committed_gives_way_to_memory_and_it_is_said(run: Run, how: str) -> None:
    whole, part = memory(run, 2), memory(run, 2, whole=False)
    if how == "older":
        (folder(run) / "commits" / "00000003.json").unlink()
    else:
        shutil.rmtree(folder(run) if how == "gone" else folder(run) / "commits")
    if how == "older":
        assert run.log.read().head == 2
    found = load(run, Tier(whole, part))
    assert found.manifest.step == 2
    assert not found.mappable
    assert "could not be read" in found.notice
    if how == "older":
        assert load(run, Tier(part)).manifest.step == 1, "what there is"
    else:
        with pytest.raises(CheckpointNotFoundError):
            load(run, Tier(part))


def test_without_memory_a_store_that_is_gone_is_an_error(run: Run) -> None:
    shutil.rmtree(folder(run))
    with pytest.raises(CheckpointNotFoundError):
        load(run, Tier())


def test_a_search_that_the_store_does_not_answer_is_an_error_and_not_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = RestoreWork(RunSpec(run.store.url, {}, (), Options(), "get", "set"), Tier(), lambda _: None)
    array = run.manifest(run.log.read().commits[0]).arrays[0].chunks[0]
    wanted = ((bytes.fromhex(array.digest), array.bytes),)
    assert list(asyncio.run(work.search(wanted, ()))) == list(wanted)

    def fail(*_: Any) -> Any:
        raise StorageError("no connection")

    monkeypatch.setattr(restore_work, "find_elsewhere", fail)
    with pytest.raises(StorageError, match="no connection"):
        asyncio.run(work.search(wanted, ()))


@pytest.mark.parametrize("how", ["no run", "damaged"])
def test_a_search_where_nothing_can_be_found_is_empty(run: Run, how: str) -> None:
    """The restore goes on with what else there is, and says itself what it lacks."""
    work = RestoreWork(RunSpec(run.store.url, {}, (), Options(), "get", "set"), Tier(), lambda _: None)
    chunk = run.manifest(run.log.read().commits[0]).arrays[0].chunks[0]
    if how == "no run":
        shutil.rmtree(folder(run))
    else:
        (folder(run) / records.RUN_FILE).write_bytes(b"garbage")
    assert asyncio.run(work.search(((bytes.fromhex(chunk.digest), chunk.bytes),), ())) == {}


def test_what_was_tried_is_not_given_again(run: Run) -> None:
    newest = load(run, Tier()).id
    assert load(run, Tier(), tried=(newest,)).manifest.step == 1
    with pytest.raises(CorruptionError, match="no good checkpoint"):
        load(run, Tier(), tried=(newest, load(run, Tier(), tried=(newest,)).id))


class TestAnotherRunAtTheUrl:
    """The run was removed and created anew: what memory has is of a run that is no more."""

    @pytest.fixture
    def old(self, run: Run) -> list[Remembered]:
        """Of the run that was removed: a commit, and a step that was only in memory."""
        kept = memory(run, 2)
        alone = memory(run, 2, id="9-alone", step=9, record=None, after=99)
        shutil.rmtree(folder(run))
        return [alone, kept]

    @pytest.mark.parametrize("again", [False, True], ids=["first", "opened before"])
    def test_what_the_new_one_has_is_restored(self, run: Run, old: list[Remembered], again: bool) -> None:
        tier = Tier(*old)
        work = RestoreWork(RunSpec(run.store.url, {}, (), Options(), "get", "set"), tier, lambda _: None)
        if again:
            work._reader = run
            assert run.log.read().commits == ()
        with Checkpointer(run.store.url) as ckpt:
            ckpt.save_state(1, {"w": np.full(10, 7)}).result()
        found = asyncio.run(work.load("token", None, ()))
        assert (found.manifest.step, found.memory, found.notice) == (1, None, "")

    def test_where_it_has_nothing_yet_nothing_is_restored(self, run: Run, old: list[Remembered]) -> None:
        Run.create(run.store.url)
        with pytest.raises(CheckpointNotFoundError, match="no checkpoint yet"):
            load(run, Tier(*old))
