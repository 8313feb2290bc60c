"""Bad input to plain saves and loads: a clear error that says what to do, and nothing written, for each."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from rl_ckpt import (
    Checkpointer,
    CheckpointNotFoundError,
    CorruptionError,
    InvalidInputError,
    LatestN,
)
from rl_ckpt.format import records
from rl_ckpt.format.digest import digest
from rl_ckpt.options import Options
from tests.unit.trees import assert_same


def state(step: int) -> dict[str, Any]:
    return {"w": np.random.default_rng(step).random(300), "v": np.full(20, step), "step": step}


def listing(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with the steps 10 and 20."""
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        for step in (10, 20):
            ckpt.save_state(step, state(step)).result(60)
    return tmp_path / "run"


@pytest.fixture
def ckpt(folder: Path) -> Checkpointer:
    return Checkpointer(str(folder))


BAD_STEPS = [-1, 2**63, 1.0, 1.5, "3", None, True, np.bool_(True), np.float32(2), np.array([1, 2]), np.array(1.5), [1]]


class TestSteps:
    """What a step may be, and when it may be saved."""

    @pytest.mark.parametrize("step", BAD_STEPS, ids=repr)
    def test_a_step_that_is_no_count_is_refused(self, folder: Path, ckpt: Checkpointer, step: Any) -> None:
        before = listing(folder)
        with pytest.raises(InvalidInputError, match="must be an int from 0 to"):
            ckpt.save_state(step, state(0))
        if step is not None:  # None means the newest
            with pytest.raises(InvalidInputError, match="must be an int from 0 to"):
                ckpt.load_state(step)
        assert listing(folder) == before

    @pytest.mark.parametrize("step", [0, 2**63 - 1, np.int32(7), np.uint64(8), torch.tensor(9), np.array(11)], ids=repr)
    def test_anything_that_is_an_integer_is_a_step(self, tmp_path: Path, step: Any) -> None:
        with Checkpointer(str(tmp_path)) as ckpt:
            info = ckpt.save_state(step, {}).result(60)
        assert (type(info.step), info.step) == (int, int(step))

    def test_a_step_saved_already_is_refused(self, folder: Path, ckpt: Checkpointer) -> None:
        ckpt.save_state(30, state(30)).result(60)
        before = listing(folder)
        for step in (10, 20, 30):
            with pytest.raises(
                InvalidInputError, match=rf"step {step} is committed already as {step}-.*save a later step"
            ):
                ckpt.save_state(step, state(step))
        ckpt.close()
        assert listing(folder) == {name: data for name, data in before.items() if not name.startswith("leases/")}

    def test_a_lower_step_after_a_rollback_starts_a_branch(self, ckpt: Checkpointer) -> None:
        first, second = ckpt.checkpoints()
        ckpt.load_state(10)
        branch = ckpt.save_state(15, state(15)).result(60)
        again = ckpt.save_state(20, state(21)).result(60)
        assert branch.lineage == (first.id,)
        assert again.lineage == (branch.id, first.id)
        assert [info.step for info in ckpt.checkpoints()] == [10, 20, 15, 20]
        assert second.id not in again.lineage
        assert_same(ckpt.load_state(20), state(21))  # the newest of that step
        ckpt.close()

    def test_an_unknown_step_is_told_with_those_there_are(self, ckpt: Checkpointer) -> None:
        with pytest.raises(CheckpointNotFoundError, match="has no checkpoint of step 11; its steps are 10, 20"):
            ckpt.load_state(11)
        with pytest.raises(CheckpointNotFoundError, match="has no checkpoint of step 11"), ckpt.pin(11):
            pass


class TestRuns:
    """Places that hold no run, none yet, or one of another time."""

    def test_nothing_there(self, tmp_path: Path) -> None:
        ckpt = Checkpointer(str(tmp_path / "nothing"))
        with pytest.raises(CheckpointNotFoundError, match=r"no run at file://.*nothing is there yet"):
            ckpt.load_state()
        assert ckpt.checkpoints() == []
        assert ckpt.latest() is None
        assert listing(tmp_path) == {}

    def test_a_run_without_a_checkpoint(self, tmp_path: Path) -> None:
        ckpt = Checkpointer(str(tmp_path))
        with pytest.raises(InvalidInputError):
            ckpt.save_state(0, {"bad": object()})
        ckpt.save_state(1, {})
        ckpt.close()
        for name in listing(tmp_path):
            if name.startswith("commits/") and b'"kind":"commit"' in (tmp_path / name).read_bytes():
                (tmp_path / name).unlink()
        assert ckpt.checkpoints() == []
        with pytest.raises(CheckpointNotFoundError, match="has no checkpoint yet"):
            ckpt.load_state()

    def test_a_first_save_that_is_refused_writes_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError), Checkpointer(str(tmp_path)) as ckpt:
            ckpt.save_state(0, {"bad": object()})
        assert listing(tmp_path) == {}

    def test_a_folder_that_is_no_run(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("important")
        with pytest.raises(
            CheckpointNotFoundError, match=r"it holds \['thesis.txt'\] but no run.json: it is not a run"
        ):
            Checkpointer(str(tmp_path)).load_state()

    def test_records_that_cannot_be_read_are_not_taken_for_no_checkpoint(self, folder: Path) -> None:
        for path in (folder / "commits").iterdir():
            path.write_bytes(b"nonsense")
        with pytest.raises(CorruptionError, match=r"no record of a checkpoint that can be read.*00000002.json"):
            Checkpointer(str(folder)).load_state()

    def test_a_damaged_run_file(self, folder: Path, ckpt: Checkpointer) -> None:
        path = folder / "run.json"
        path.write_bytes(path.read_bytes().replace(b'"version":1', b'"version":2'))
        for call in (ckpt.load_state, ckpt.checkpoints, lambda: ckpt.save_state(30, {})):
            with pytest.raises(CorruptionError, match=r"run.json is damaged"):
                call()  # type: ignore[operator]

    def test_a_run_of_a_newer_release(self, folder: Path, ckpt: Checkpointer) -> None:
        body = msgspec.json.encode({"kind": "run", "version": 3, "other": "fields"})
        (folder / "run.json").write_bytes(
            msgspec.json.encode({"digest": digest(body).hex(), "record": msgspec.Raw(body)})
        )
        before = listing(folder)
        for call in (ckpt.load_state, ckpt.checkpoints, lambda: ckpt.save_state(30, {})):
            with pytest.raises(
                InvalidInputError, match="format version 3; this release reads up to 2: upgrade rl-ckpt"
            ):
                call()  # type: ignore[operator]
        assert listing(folder) == before

    def test_a_file_where_the_run_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(InvalidInputError, match="give a folder as url"):
            Checkpointer(str(tmp_path / "file")).save_state(0, {})

    @pytest.mark.parametrize("url", ["", " ", "nope://x/y", "s3://", 5])
    def test_bad_urls(self, url: Any) -> None:
        with pytest.raises((InvalidInputError, TypeError)):
            Checkpointer(url).load_state()


def shard(folder: Path, step: int) -> Path:
    return next(folder.glob(f"shards/{step}-*/*.arrow"))


def manifest(folder: Path, step: int) -> Path:
    return next(folder.glob(f"manifests/{step}-*.json"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1500])


def cut_short_by_9(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def swap_with_10(path: Path) -> None:
    other = shard(path.parents[2], 10) if path.suffix == ".arrow" else manifest(path.parents[1], 10)
    shutil.copy(other, path)


def not_json(path: Path) -> None:
    path.write_bytes(b"\x89PNG")


DAMAGES: dict[str, tuple[Callable[[Path, int], Path], Callable[[Path], None]]] = {
    "shard file flipped": (shard, flip),
    "shard file cut short": (shard, cut_short),
    "shard file empty": (shard, empty),
    "shard file missing": (shard, Path.unlink),
    "shard file swapped": (shard, swap_with_10),
    "manifest flipped": (manifest, flip),
    "manifest cut short": (manifest, cut_short_by_9),
    "manifest missing": (manifest, Path.unlink),
    "manifest swapped": (manifest, swap_with_10),
    "manifest no JSON": (manifest, not_json),
}


class TestDamage:
    """What is damaged is found, named, and passed over only where the caller did not ask for it."""

    @pytest.mark.parametrize("what", DAMAGES)
    def test_the_newest_good_one_is_loaded_with_a_warning(self, folder: Path, ckpt: Checkpointer, what: str) -> None:
        find, damage = DAMAGES[what]
        path = find(folder, 20)
        damage(path)
        with pytest.raises(CorruptionError, match=path.name):
            ckpt.load_state(20)
        with pytest.warns(UserWarning, match=rf"fell back to checkpoint 10-\w+, since checkpoint 20-.*{path.name}"):
            found = ckpt.load_state()
        assert_same(found, state(10))
        saved = ckpt.save_state(30, state(20)).result(60)  # must not lean on what is damaged
        assert_same(ckpt.load_state(), state(20))
        assert [i.split("-")[0] for i in saved.lineage] == ["10"]
        ckpt.close()

    @pytest.mark.parametrize(
        "what", ["shard file missing", "shard file cut short", "manifest missing", "manifest no JSON"]
    )
    def test_a_new_job_does_not_lean_on_files_that_are_gone(self, folder: Path, ckpt: Checkpointer, what: str) -> None:
        find, damage = DAMAGES[what]
        damage(find(folder, 20))
        ckpt.save_state(30, state(20)).result(60)
        assert_same(ckpt.load_state(30), state(20))
        ckpt.close()

    def test_all_of_them_damaged(self, folder: Path, ckpt: Checkpointer) -> None:
        for step in (10, 20):
            flip(manifest(folder, step))
        with pytest.raises(CorruptionError, match=r"no good checkpoint in file://.*checkpoint 20-.*checkpoint 10-"):
            ckpt.load_state()

    def test_a_damaged_commit_record_hides_only_its_own(self, folder: Path, ckpt: Checkpointer) -> None:
        newest = folder / records.commit_name(3)
        flip(newest)
        with pytest.warns(UserWarning, match=f"{newest.name} is damaged"):
            assert [info.step for info in ckpt.checkpoints()] == [10]
        with pytest.warns(UserWarning, match=rf"fell back to checkpoint 10-.*{newest.name} is damaged"):
            assert_same(ckpt.load_state(), state(10))

    def test_every_bit_of_a_shard_files_values_counts(self, tmp_path: Path) -> None:
        with Checkpointer(str(tmp_path)) as ckpt:
            ckpt.save_state(0, {"w": np.arange(6, dtype=np.uint8)}).result(60)
        path = shard(tmp_path, 0)
        data = path.read_bytes()
        start = data.index(bytes(range(6)))
        for i in range(start, start + 6):
            for bit in range(8):
                path.write_bytes(data[:i] + bytes([data[i] ^ (1 << bit)]) + data[i + 1 :])
                with pytest.raises(CorruptionError, match=f"{path.name}.*is damaged"):
                    ckpt.load_state(0)
        path.write_bytes(data)
        assert_same(ckpt.load_state(0), {"w": np.arange(6, dtype=np.uint8)})

    def test_a_part_that_is_whole_still_loads(self, folder: Path, ckpt: Checkpointer) -> None:
        entries = json.loads(manifest(folder, 20).read_bytes())["arrays"]
        path, data = shard(folder, 20), bytearray(shard(folder, 20).read_bytes())
        data[entries[0]["chunks"][0][2]] ^= 1  # the first value of "w"
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_same(ckpt.load_state(select=["v", "step"]), {"v": np.full(20, 20), "step": 20})
        with pytest.raises(CorruptionError):
            ckpt.load_state(20, select="w")


class TestArguments:
    """Options, rules, metrics and tags."""

    @pytest.mark.parametrize(
        "options",
        [
            {"chunk_bytes": 0},
            {"chunk_bytes": -1},
            {"chunk_bytes": 1.5},
            {"chunk_bytes": "16M"},
            {"chunk_bytes": True},
            {"write_streams": 0},
            {"write_streams": 2.0},
            {"join_timeout_s": 0},
            {"join_timeout_s": float("nan")},
            {"write_timeout_s": -1},
            {"write_timeout_s": "1"},
            {"grace_s": -0.1},
            {"grace_s": None},
            {"when_busy": "queue"},
            {"when_busy": None},
        ],
        ids=repr,
    )
    def test_bad_options_are_named(self, tmp_path: Path, options: dict[str, Any]) -> None:
        with pytest.raises(InvalidInputError, match=rf"^{next(iter(options))}="):
            Checkpointer(str(tmp_path), **options)

    def test_good_options_at_their_limits(self) -> None:
        Options(chunk_bytes=1, write_streams=1, join_timeout_s=0.001, grace_s=0, write_timeout_s=float("inf"))

    @pytest.mark.parametrize("keep", [[3], ["latest"], [LatestN(1), None], [{"n": 3}]], ids=repr)
    def test_rules_that_are_none(self, tmp_path: Path, keep: Any) -> None:
        with pytest.raises(InvalidInputError, match=r"must be a list of rules such as \[LatestN\(3\)"):
            Checkpointer(str(tmp_path), keep=keep)

    @pytest.mark.parametrize(
        "metrics", [{"a": np.ones(2)}, {"a": [1]}, {"a": {}}, {"a": object}, {1: 2}, {"ok": 1, "b": {1}}], ids=repr
    )
    def test_metrics_that_are_not_plain(self, folder: Path, ckpt: Checkpointer, metrics: Any) -> None:
        before = listing(folder)
        with pytest.raises(InvalidInputError, match="metrics"):
            ckpt.save_state(30, {}, metrics=metrics)
        assert listing(folder) == before

    def test_metrics_come_back_as_they_were(self, ckpt: Checkpointer) -> None:
        metrics = {"return": -0.0, "loss": float("inf"), "n": 2**70, "name": "ü", "np": np.float32(1.5), "none": None}
        ckpt.save_state(30, {}, metrics=metrics).result(60)
        ckpt.close()
        newest = ckpt.latest()
        assert newest is not None
        assert_same(dict(newest.metrics), metrics)

    @pytest.mark.parametrize("tag", ["", 5, b"best", ["a"], "5", "latest", "4-0123456789ab", " best"], ids=repr)
    def test_tags_that_are_none(self, folder: Path, ckpt: Checkpointer, tag: Any) -> None:
        before = listing(folder)
        with pytest.raises(InvalidInputError, match=f"tag {re.escape(repr(tag))}"):
            ckpt.save_state(30, {}, tag=tag)
        assert listing(folder) == before
