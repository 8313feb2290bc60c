"""Files past the page cache: the same bytes whatever the layout and the file system, and no copies of shard values."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rl_ckpt
from rl_ckpt.store import file_writer
from rl_ckpt.store.file_writer import DIRECT_FROM_BYTES, write_segments

PAGE = 4096
BIG = DIRECT_FROM_BYTES + 3 * PAGE
POOL = np.frombuffer(np.random.default_rng(0).bytes(2 * BIG), np.uint8)


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def written(path: Path, segments: list[np.ndarray[Any, Any]]) -> bytes:
    fd = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    try:
        write_segments(fd, [s.data.cast("B") for s in segments])
    finally:
        os.close(fd)
    return path.read_bytes()


@pytest.fixture
def direct_disk(tmp_path: Path) -> Path:
    fd = os.open(tmp_path / "probe", os.O_CREAT | os.O_WRONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
    except OSError:
        pytest.skip("the temporary folder is on a file system without direct writes")
    finally:
        os.close(fd)
    return tmp_path


@settings(max_examples=40, deadline=None)
@given(pieces=st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 300_000)), max_size=8), at=st.integers(0, 8))
def test_any_segments_come_out_in_order(tmp_path_factory: pytest.TempPathFactory, pieces: Any, at: int) -> None:
    segments = [POOL[start : start + size] for start, size in pieces]
    segments.insert(min(at, len(segments)), POOL[1 : 1 + BIG])  # large enough for direct writes, and at an odd address
    path = tmp_path_factory.getbasetemp() / "any"
    assert written(path, segments) == b"".join(s.tobytes() for s in segments)


@pytest.mark.parametrize("head_bytes", [PAGE, 100])
def test_what_lies_as_the_disk_needs_it_is_not_copied(
    direct_disk: Path, monkeypatch: pytest.MonkeyPatch, head_bytes: int
) -> None:
    room = np.zeros(BIG + 4 * PAGE, np.uint8)  # wherever it begins in a page, `values` is whole
    begin = -room.ctypes.data % PAGE + head_bytes  # at the same place in its page as in the file's
    values = room[begin : begin + BIG + 2 * PAGE - head_bytes + 100]
    sent: list[tuple[int, int, bool]] = []

    def spy(fd: int, data: memoryview) -> int:
        sent.append((np.frombuffer(data, np.uint8).ctypes.data, len(data), is_direct(fd)))
        return real(fd, data)

    real = os.write
    monkeypatch.setattr(os, "write", spy)
    head = POOL[:head_bytes]
    assert written(direct_disk / "a", [head, values]) == head.tobytes() + values.tobytes()
    first, last = values.ctypes.data, values.ctypes.data + len(values)
    assert sum(size for at, size, direct in sent if direct and first <= at < last) >= BIG
    assert [direct for _, size, direct in sent if size == 100] == [False]  # the end, no whole block


def test_small_files_stay_in_the_page_cache(direct_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def spy(fd: int, views: Any) -> int:
        seen.append(is_direct(fd))
        return real(fd, views)

    real = os.writev
    monkeypatch.setattr(os, "writev", spy)
    written(direct_disk / "a", [POOL[: DIRECT_FROM_BYTES - 1]])
    assert seen == [False]


@pytest.mark.parametrize("after", [0, 1])
def test_a_file_system_that_wants_larger_blocks(direct_disk: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    refused: list[int] = []

    def picky(fd: int, data: memoryview) -> int:
        if is_direct(fd) and len(refused) >= after:
            refused.append(0)
            raise OSError(errno.EINVAL, "Invalid argument")
        refused.append(1)
        return real(fd, data)

    real = os.write
    monkeypatch.setattr(os, "write", picky)
    assert written(direct_disk / "a", [POOL[7 : 7 + BIG]]) == POOL[7 : 7 + BIG].tobytes()
    assert refused.count(0) == 1  # and then no direct write is tried again


def test_a_disk_that_takes_part_of_a_block(direct_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def partly(fd: int, data: memoryview) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            return real(fd, data)
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        count = real(fd, data[:5000])
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        return count

    real = os.write
    monkeypatch.setattr(os, "write", partly)
    assert written(direct_disk / "a", [POOL[:BIG]]) == POOL[:BIG].tobytes()


def test_other_errors_are_not_hidden(direct_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def full(fd: int, data: memoryview) -> int:
        tries.append(fd)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        written(direct_disk / "a", [POOL[:BIG]])
    assert len(tries) == 1


def test_a_file_system_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, command: int, *flags: int) -> int:
        if command == fcntl.F_SETFL:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, command, *flags)

    real: Callable[..., int] = fcntl.fcntl
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert written(tmp_path / "a", [POOL[:BIG]]) == POOL[:BIG].tobytes()


def test_a_save_copies_no_values_on_their_way_to_the_disk(direct_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Staging memory and shard files are laid out alike: a copy here would be seen in time and processor time."""
    copied: list[int] = []

    def spy(self: Any, data: Any) -> None:
        copied.append(len(data))
        real(self, data)

    real = file_writer._DirectWriter._copy
    monkeypatch.setattr(file_writer._DirectWriter, "_copy", spy)
    rng = np.random.default_rng(1)
    state = {f"layer{i}": rng.standard_normal(999_983, np.float32) for i in range(17)}  # no power of two
    with rl_ckpt.Checkpointer(str(direct_disk / "run")) as ckpt:
        ckpt.save_state(1, state).result()
        loaded = ckpt.load_state()
    assert all(np.array_equal(loaded[name], value) for name, value in state.items())
    assert copied
    assert sum(copied) < 200_000  # headers, footers and the padding between arrays, of 68 MB
