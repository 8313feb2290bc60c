"""Finding the bytes of a damaged chunk in other places of the run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rl_ckpt import Checkpointer
from rl_ckpt.format import records
from rl_ckpt.format.manifest import Manifest
from rl_ckpt.store.repair import Wanted, find_elsewhere
from rl_ckpt.store.run import Run

FROZEN = np.arange(1000.0)


def save_twice_apart(url: str) -> list[str]:
    """Two checkpoints that hold `FROZEN` in files of their own, as two branches do; and a third that shares a file."""
    ids = []
    with Checkpointer(url, write_streams=1) as ckpt:
        ids.append(ckpt.save_state(1, {"n": np.ones(3)}).result(60).id)
        ids.append(ckpt.save_state(2, {"n": np.full(3, 2.0), "frozen": FROZEN}).result(60).id)
        ckpt.load_state(1)  # the branch starts here, where `frozen` is not stored
        ids.append(ckpt.save_state(3, {"n": np.full(3, 3.0), "frozen": FROZEN}).result(60).id)
        ids.append(ckpt.save_state(4, {"n": np.full(3, 4.0), "frozen": FROZEN}).result(60).id)
    return ids


def chunk_of(run: Run, checkpoint: str, size_bytes: int) -> tuple[Wanted, tuple[str, int], Manifest]:
    commit = next(commit for commit in run.log.read().commits if commit.id == checkpoint)
    manifest = run.manifest(commit)
    (chunk,) = [c for array in manifest.arrays for c in array.chunks if c.bytes == size_bytes]
    return (bytes.fromhex(chunk.digest), chunk.bytes), (manifest.files[chunk.file].name, chunk.offset), manifest


def test_the_same_digest_in_another_checkpoint_is_found_newest_first(tmp_path: Path) -> None:
    ids = save_twice_apart(str(tmp_path))
    run = Run.open(str(tmp_path))
    wanted, bad, _ = chunk_of(run, ids[1], FROZEN.nbytes)
    ((found,),) = [find_elsewhere(run, [wanted], {bad})[wanted]]
    assert (found.file, found.offset) == chunk_of(run, ids[3], FROZEN.nbytes)[1]
    assert found.checkpoint == ids[3], "the newest that names the place"
    assert [place.checkpoint for place in find_elsewhere(run, [wanted], set())[wanted]] == [ids[3], ids[1]]


def test_a_place_that_is_known_to_be_bad_is_never_given(tmp_path: Path) -> None:
    ids = save_twice_apart(str(tmp_path))
    run = Run.open(str(tmp_path))
    wanted, bad, _ = chunk_of(run, ids[3], 24)
    assert find_elsewhere(run, [wanted], {bad}) == {}


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_damaged_manifests_are_passed_over(tmp_path: Path, how: str) -> None:
    ids = save_twice_apart(str(tmp_path))
    path = tmp_path / records.manifest_name(ids[3])
    path.write_bytes(path.read_bytes()[:-5]) if how == "damaged" else path.unlink()
    run = Run.open(str(tmp_path))
    wanted, bad, _ = chunk_of(run, ids[1], FROZEN.nbytes)
    assert [place.checkpoint for place in find_elsewhere(run, [wanted], {bad})[wanted]] == [ids[2]]
