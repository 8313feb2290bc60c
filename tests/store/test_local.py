"""A local folder: the contract, and what only a local folder has: full disks, permissions, temporary files, races."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rl_ckpt.errors import CheckpointError, InvalidInputError, StorageError
from rl_ckpt.store.base import ObjectExistsError, Store
from rl_ckpt.store.local import LocalStore
from rl_ckpt.store.urls import open_store
from tests.store.contract import StoreContract, some_bytes


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "new" / "run")


class TestLocalStore(StoreContract):
    pass


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_opening_and_reading_make_no_folder(store: Store, tmp_path: Path):
    store.list()
    store.exists("a")
    assert store.free_bytes() == pytest.approx(os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize, rel=0.5)
    assert list(tmp_path.iterdir()) == []


def test_local_path_can_be_mapped(store: Store):
    store.put("shards/a.arrow", [b"abc"])
    path = store.local_path("shards/a.arrow")
    assert path is not None
    assert Path(path).read_bytes() == b"abc"


def test_delete_removes_empty_folders_but_not_the_run(store: LocalStore):
    store.put("a/b/c/1", [b"x"])
    store.put("a/2", [b"x"])
    store.delete(["a/b/c/1"])
    assert sorted(p.name for p in Path(store.root).rglob("*")) == ["2", "a"]
    store.delete(["a/2"])
    assert list(Path(store.root).iterdir()) == []


def test_temporary_files_are_never_listed_and_old_ones_are_cleaned(store: LocalStore):
    store.put("shards/a", [b"x"])
    left = Path(store.root, "shards", ".b.0123.rl_ckpt-tmp")
    left.write_bytes(b"half")
    assert [o.name for o in store.list()] == ["shards/a"]
    assert store.clean_partial(3600) == 0
    assert store.clean_partial(0) == 1
    assert not left.exists()


def _create(url: str, names: list[str], barrier: Any, won: Any) -> None:
    store = open_store(url)
    for name in names:
        barrier.wait()
        try:
            store.create(name, str(os.getpid()).encode())
        except ObjectExistsError:
            continue
        won.put(name)


def test_of_racing_processes_exactly_one_creates(store: Store):
    context = multiprocessing.get_context("spawn")
    names = [f"commits/{n:08d}.json" for n in range(20)]
    barrier, won = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_create, args=(store.url, names, barrier, won)) for _ in range(4)]
    for process in processes:
        process.start()
    winners = [won.get(timeout=60) for _ in names]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(winners) == names
    assert won.empty()


class TestKilledWriter:
    def test_a_killed_put_leaves_the_old_object_and_a_temporary_file(self, store: LocalStore, tmp_path: Path):
        store.put("a", [b"old"])
        pid = os.fork()
        if pid == 0:
            # Dies inside fsync's place: everything written, nothing renamed.
            os.fsync = lambda _fd: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
            store.put("a", [some_bytes(1000)])
            os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        assert store.get("a") == b"old"
        assert [o.name for o in store.list()] == ["a"]
        assert len(files_below(Path(store.root))) == 2
        assert store.clean_partial(0) == 1


class TestErrors:
    def test_storage_options_are_refused(self, tmp_path: Path):
        with pytest.raises(InvalidInputError, match="takes no storage_options, got key"):
            open_store(tmp_path, {"key": "x"})

    @pytest.mark.parametrize("below", ["", "sub"])
    def test_the_url_is_a_file(self, tmp_path: Path, below: str):
        (tmp_path / "file").write_text("x")
        store = open_store(tmp_path / "file" / below)
        for call in (lambda: store.put("a", [b"x"]), lambda: store.create("a", b"x"), lambda: store.put("b/c", [b"x"])):
            with pytest.raises(InvalidInputError, match=r"file.*is a file: give a folder"):
                call()

    @pytest.mark.parametrize("below", ["", "sub"])
    def test_listing_where_the_url_is_a_file(self, tmp_path: Path, below: str):
        (tmp_path / "file").write_text("x")
        for prefix in ("", "a/"):
            with pytest.raises(InvalidInputError, match=r"file.*is a file: give a folder"):
                open_store(tmp_path / "file" / below).list(prefix)

    def test_below_an_object_there_is_nothing(self, store: Store):
        store.put("a", [b"x"])
        assert store.list("a/") == []

    def test_the_object_is_a_folder(self, store: Store):
        store.put("a/b", [b"x"])
        with pytest.raises(InvalidInputError, match="folder"):
            store.put("a", [b"x"])

    def test_not_writable(self, store: LocalStore, tmp_path: Path):
        store.put("there", [b"x"])
        with unprivileged(tmp_path):
            for call in (
                lambda: store.put("a", [b"x"]),
                lambda: store.create("b", b"x"),
                lambda: store.delete(["there"]),
            ):
                with pytest.raises(InvalidInputError, match=rf"Permission denied.*Make {store.root} writable for uid"):
                    call()
            assert store.get("there") == b"x"
        assert files_below(tmp_path) == ["new/run/there"]

    def test_not_readable(self, store: LocalStore, tmp_path: Path):
        store.put("there", [b"x"])
        Path(store.root, "there").chmod(0)
        with unprivileged(tmp_path), pytest.raises(StorageError, match=r"get of .*there failed: Permission denied"):
            store.get("there")

    def test_name_too_long(self, store: Store):
        with pytest.raises(CheckpointError, match="File name too long"):
            store.put("x" * 300, [b"x"])

    def test_longest_name_works(self, store: Store):
        store.put("x" * 255, [b"x"])
        assert store.exists("x" * 255)

    def test_file_size_limit(self, store: LocalStore):
        """RLIMIT_FSIZE: any write may fail half-way; nothing of the object stays."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        try:
            with pytest.raises(StorageError, match=r"put of .*big failed: File too large"):
                store.put("big", [bytes(3 << 20)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert files_below(Path(store.root)) == []


class TestFullDisk:
    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[Path]:
        folder = tmp_path / "small"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode != 0:
            pytest.skip(f"cannot mount a small tmpfs: {done.stderr.strip()}")
        yield folder
        subprocess.run(["umount", "-l", str(folder)], check=True)

    def test_put_says_needed_and_free_and_leaves_nothing(self, small_disk: Path):
        store = open_store(small_disk / "run")
        store.put("earlier", [some_bytes(1000)])
        with pytest.raises(StorageError, match=r"disk full: put of .*big needs 8388608 bytes, 4\d{6} are free"):
            store.put("big", [bytes(8 << 20)])
        assert files_below(small_disk) == ["run/earlier"]
        assert store.get("earlier") == some_bytes(1000)
        store.put("fits", [bytes(2 << 20)])

    def test_create_on_a_full_disk(self, small_disk: Path):
        store = open_store(small_disk)
        free = store.free_bytes()
        assert free is not None
        store.put("filler", [bytes(free)])
        with pytest.raises(StorageError, match=r"disk full: create of .*commits/1 needs 9000 bytes"):
            store.create("commits/1", bytes(9000))
        assert [o.name for o in store.list()] == ["filler"]


@contextmanager
def unprivileged(folder: Path) -> Iterator[None]:
    """Be somebody who may read and enter all below `folder` and write nothing in it."""
    root = os.geteuid() == 0
    inside = [folder, *folder.rglob("*")]
    outside = [p for p in folder.parents if p.stat().st_mode & 0o005 != 0o005]
    modes = {path: path.stat().st_mode for path in [*inside, *outside]}
    for path in [p for p in inside if p.is_dir()]:
        path.chmod(0o555)
    for path in outside if root else []:
        path.chmod(0o755)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)
