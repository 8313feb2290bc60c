"""Staging memory: all of it is there when it is named, huge pages or not, and it goes when nobody has it mapped."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rl_ckpt.errors import StorageError
from rl_ckpt.runtime import huge_pages, memory

SIZE = 5 * huge_pages.HUGE_BYTES + 12345


@pytest.fixture
def owned() -> Iterator[memory.ServerMemory]:
    server = memory.ServerMemory(f"test-{uuid.uuid4().hex}")
    yield server
    server.close()


def allocated(path: str) -> int:
    return os.stat(path).st_blocks * 512


def folder_of(owned: memory.ServerMemory) -> Path:
    return Path(owned.path("x")).parent


def test_all_of_a_file_is_allocated(owned: memory.ServerMemory) -> None:
    path = owned.make("a", SIZE)
    assert os.stat(path).st_size == SIZE
    assert allocated(path) >= SIZE


def test_without_huge_pages_all_of_it_is_allocated_too(
    owned: memory.ServerMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    libc = huge_pages._libc()
    monkeypatch.setattr(huge_pages, "_libc", lambda: SimpleNamespace(mmap=libc.mmap, madvise=lambda *_: -1))
    path = owned.make("a", SIZE)
    assert allocated(path) >= SIZE
    memory.prefault(path)
    memory.mapped(path)[SIZE - 1] = 7
    assert Path(path).read_bytes() == bytes(SIZE - 1) + b"\x07"
    memory.forget(path)


def test_a_kernel_that_has_huge_pages_gives_them(owned: memory.ServerMemory) -> None:
    if tuple(map(int, os.uname().release.split(".")[:2])) < (6, 1) or not Path("/dev/shm").is_dir():
        pytest.skip("MADV_COLLAPSE of shared memory came with Linux 6.1")
    path = owned.make("a", SIZE)
    view = memory.mapped(path)
    memory.prefault(path)
    start = np.frombuffer(view, np.uint8).ctypes.data
    assert start % huge_pages.HUGE_BYTES == 0
    smaps = Path("/proc/self/smaps").read_text().split(f"{start:x}-", 1)[1]
    huge_kib = next(int(line.split()[1]) for line in smaps.splitlines() if line.startswith("ShmemPmdMapped"))
    if huge_kib == 0:
        assert huge_pages._libc().madvise(start, huge_pages.HUGE_BYTES, 25) != 0  # MADV_COLLAPSE, asked once more
        pytest.skip("no huge page is free on this machine, or they are denied")
    assert huge_kib << 10 == 5 * huge_pages.HUGE_BYTES
    memory.forget(path)


def test_processes_see_one_anothers_bytes_and_the_map_goes_with_its_last_view(owned: memory.ServerMemory) -> None:
    path = owned.make("a", SIZE)
    with open(path, "r+b") as file:
        view = huge_pages.map_file(file.fileno(), SIZE)
    assert len(view) == SIZE
    part = view[3:9]
    part[:] = b"abcdef"
    del view
    assert Path(path).read_bytes()[:12] == b"\0\0\0abcdef\0\0\0"
    assert path in Path("/proc/self/maps").read_text()
    del part
    assert path not in Path("/proc/self/maps").read_text()


def test_populating_keeps_values(owned: memory.ServerMemory) -> None:
    path = owned.make("a", SIZE)
    view = memory.mapped(path)
    view[4096:4100] = b"kept"
    huge_pages.populate(view[5000:90_000])
    memory.prefault(path)
    assert bytes(view[4096:4100]) == b"kept"
    memory.forget(path)


def test_too_much_is_an_error_that_leaves_nothing(owned: memory.ServerMemory) -> None:
    disk = os.statvfs(folder_of(owned))
    before = set(folder_of(owned).iterdir())
    with pytest.raises(StorageError, match=r"staging memory don't fit into .* give the node or container more"):
        owned.make("a", disk.f_frsize * disk.f_blocks + 1)
    assert set(folder_of(owned).iterdir()) == before


def test_a_file_is_found_by_its_name_only_when_it_is_whole(
    owned: memory.ServerMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is killed in the middle leaves a file of full size: a retry of the call must not take it."""

    class KilledError(Exception):
        pass

    def killed(fd: int, size_bytes: int) -> int:
        os.ftruncate(fd, size_bytes)
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(huge_pages, "fill", killed)
        with pytest.raises(KilledError):
            owned.renew("generation-0-", "generation-0-x", SIZE)
    assert not Path(owned.path("generation-0-x")).exists()
    left = folder_of(owned)
    assert len(list(left.glob("*generation-0-x"))) == 1
    memory.ServerMemory(left.name)  # the server comes back
    assert list(left.glob("*generation-0-x")) == []
    assert allocated(owned.renew("generation-0-", "generation-0-x", SIZE)) >= SIZE


def test_a_file_that_is_there_is_kept(owned: memory.ServerMemory) -> None:
    path = owned.renew("generation-0-", "generation-0-x", SIZE)
    memory.mapped(path)[0] = 1
    assert owned.renew("generation-0-", "generation-0-x", SIZE) == path
    assert Path(path).read_bytes()[0] == 1
    other = owned.renew("generation-0-", "generation-0-y", 100)
    assert not Path(path).exists()
    assert Path(other).stat().st_size == 100
    memory.forget(path)


def test_a_generation_that_is_renewed_takes_no_memory_though_it_is_mapped(owned: memory.ServerMemory) -> None:
    """A state that grows would not fit beside memory that only a worker between two saves still maps."""
    path = owned.renew("generation-0-", "generation-0-a", SIZE)
    held = os.open(path, os.O_RDONLY)
    view = memory.mapped(path)
    view[: SIZE // 2] = b"\1" * (SIZE // 2)
    owned.renew("generation-0-", "generation-0-b", SIZE)
    assert os.fstat(held).st_blocks == 0
    view[0] = 2  # a straggler meets no signal
    os.close(held)


def test_what_has_no_file_is_unmapped_at_the_next_save(owned: memory.ServerMemory) -> None:
    path = owned.make("a", SIZE)
    memory.mapped(path)
    owned.remove("a")
    memory.drop_gone()
    assert path not in memory._maps


def test_a_generation_that_is_renamed_while_room_is_counted_is_passed_over(
    owned: memory.ServerMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    owned.make(f"{memory.GENERATION}1-a", SIZE)
    Path(owned.path(f"{memory.GENERATION}2-b")).symlink_to("renamed since the listing")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10 * SIZE))
    assert owned.room(2) == 9 * SIZE, "for the generation that is not there"
