"""Saves to a disk that is full, read-only, forbidden, removed or broken: what is told, and that nothing else happens.

The disks are real and small where this process may mount one.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_ckpt import Checkpointer, CheckpointError, InvalidInputError, StorageError
from rl_ckpt.store import file_writer, local
from rl_ckpt.store.local import LocalStore
from tests.unit.trees import assert_same

DISK_BYTES = 16 << 20
WEIGHTS_BYTES = 5 << 20  # past the page cache, where the file system can


def state(step: int) -> dict[str, Any]:
    return {"w": np.random.default_rng(step).integers(0, 255, WEIGHTS_BYTES, np.uint8), "step": step}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def filled(disk: Path, but_bytes: int) -> Iterator[None]:
    """Somebody else's file takes all room but so much."""
    room = os.statvfs(disk)
    file = disk / "theirs"
    file.write_bytes(bytes(room.f_bavail * room.f_frsize - but_bytes))
    yield
    file.unlink()


def temporary_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.is_file()]


def fails(ckpt: Checkpointer, told: str, kind: type[CheckpointError] = StorageError) -> None:
    """A save fails in the background, and the next call tells; the run is as before."""
    before = [info.id for info in ckpt.checkpoints()]
    failure = ckpt.save_state(2, state(2))._future.exception(60)
    with pytest.raises(kind, match=told) as caught:
        ckpt.save_state(3, state(3))
    assert caught.value is failure
    assert [info.id for info in ckpt.checkpoints()] == before
    assert_same(ckpt.load_state(), state(1))


def swept(ckpt: Checkpointer) -> None:
    """Waits until the background is done with retention and sweep, too."""
    ckpt._saver._writer.submit(lambda: None).result()  # type: ignore[union-attr]


def works(ckpt: Checkpointer, run: Path) -> None:
    ckpt.save_state(4, state(4)).result(60)
    assert_same(ckpt.load_state(), state(4))
    assert_same(ckpt.load_state(1), state(1))
    ckpt.close()
    assert temporary_files(run) == []
    assert {path.parent.name.split("-")[0] for path in run.glob("shards/*/*")} == {"1", "4"}, "orphans are swept"


@pytest.mark.parametrize("at", ["shard file", "manifests", "commits"])
def test_a_disk_that_becomes_full(disk: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """At the manifest and at the record: the disk is filled just before."""
    run = disk / "run"
    with Checkpointer(str(run), grace_s=0) as ckpt:
        ckpt.save_state(1, state(1)).result(60)
        with filled(disk, 6 << 20 if at != "shard file" else 2 << 20) as _:
            if at != "shard file":
                name = "put" if at == "manifests" else "create"
                real: Callable[..., None] = getattr(LocalStore, name)

                def fill_first(self: LocalStore, name: str, data: Any) -> None:
                    if name.startswith(at):
                        room = os.statvfs(disk)
                        (disk / "more").write_bytes(bytes(room.f_bavail * room.f_frsize))
                    real(self, name, data)

                monkeypatch.setattr(LocalStore, name, fill_first)
            fails(ckpt, rf"disk full: .* of file://{run}/{at[:5]}.* needs \d+ bytes, \d+ are free .*Free space")
            assert temporary_files(run) == []
            monkeypatch.undo()
            (disk / "more").unlink(missing_ok=True)
        works(ckpt, run)


def test_a_disk_that_becomes_read_only(disk: Path) -> None:
    run = disk / "run"
    with Checkpointer(str(run), grace_s=0) as ckpt:
        ckpt.save_state(1, state(1)).result(60)
        swept(ckpt)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        fails(ckpt, rf"Read-only file system.*Make {run} writable", InvalidInputError)
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        works(ckpt, run)


def loses_permission(run: Path) -> None:
    """As somebody who is not root: the folder of the shard files is closed between writing and renaming."""
    with Checkpointer(str(run), grace_s=0) as ckpt:
        ckpt.save_state(1, state(1)).result(60)
        real = os.rename

        def closed_before(source: str, target: str) -> None:
            if "/shards/2-" in target:
                os.chmod(os.path.dirname(target), 0o555)
            real(source, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "rename", closed_before)
            fails(ckpt, rf"put of file://{run}/shards/2-.*Permission denied.*Make {run} writable", InvalidInputError)
        swept(ckpt)
        for folder in run.glob("shards/2-*"):
            folder.chmod(0o755)
            assert len(temporary_files(folder)) == 1, "it could not be removed,"
            for file in temporary_files(folder):
                os.utime(file, (0, 0))
        with pytest.warns(UserWarning, match=r"could not be swept: .*Permission denied"):  # and is told;
            works(ckpt, run)  # it goes with the next sweep


def test_permission_that_is_lost_midway(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path)) as warm:  # whatever is imported late can't be, by somebody else
        warm.save_state(1, state(1)).result(60)
        warm.load_state()
    shared = Path(tempfile.mkdtemp(prefix="rl_ckpt-test-", dir="/tmp"))  # the test's own folder is closed to others
    shared.chmod(0o777)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        loses_permission(shared / "run")
    finally:
        if root:
            os.seteuid(0)
        shutil.rmtree(shared)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.EDQUOT, r"disk quota used up: put of .* needs \d+ bytes.*Raise the quota of uid \d+"),
        (errno.EIO, r"put of .*/shards/2-.* failed: Input/output error.*look at the system's log"),
        (errno.ESTALE, r"put of .*/shards/2-.* failed: Stale file handle.*mount it again"),
    ],
    ids=["EDQUOT", "EIO", "ESTALE"],
)
def test_what_a_disk_may_say_midway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, told: str) -> None:
    run = tmp_path / "run"
    with Checkpointer(str(run), grace_s=0) as ckpt:
        ckpt.save_state(1, state(1)).result(60)
        swept(ckpt)
        count = [0]

        def breaks(fd: int, views: Any) -> None:
            real(fd, [view[:100_000] for view in views[:1]])
            count[0] += 1
            raise OSError(number, os.strerror(number))

        real = file_writer.write_segments
        monkeypatch.setattr(local, "write_segments", breaks)
        fails(ckpt, told)
        assert count[0] >= 1
        assert temporary_files(run) == []
        monkeypatch.undo()
        works(ckpt, run)


def test_a_run_that_is_removed_midway_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a folder without run.json would hold a commit that nobody can read."""
    run = tmp_path / "run"
    with Checkpointer(str(run)) as ckpt:
        ckpt.save_state(1, state(1)).result(60)
        real = LocalStore.put

        def removed_first(self: LocalStore, name: str, segments: Any) -> None:
            if name.startswith("shards/2-"):
                shutil.rmtree(run)
            real(self, name, segments)

        monkeypatch.setattr(LocalStore, "put", removed_first)
        with pytest.raises(StorageError, match=r"was removed under this process; make a new Checkpointer"):
            ckpt.save_state(2, state(2)).result(60)
    monkeypatch.undo()
    assert not (run / "commits").exists()
    with Checkpointer(str(run)) as again:
        again.save_state(3, state(3)).result(60)
        assert_same(again.load_state(), state(3))
