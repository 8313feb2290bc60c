"""Copying files between stores: verified, resumed, in bounded memory, below a limit that all streams share."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rl_ckpt.errors import CorruptionError, StorageError
from rl_ckpt.format.digest import digest
from rl_ckpt.plan.pulling import Place
from rl_ckpt.store import copier as copier_module
from rl_ckpt.store import partial as partial_module
from rl_ckpt.store.base import ObjectMissingError, Store
from rl_ckpt.store.copier import Copier, FileJob, missing_bytes
from rl_ckpt.store.meter import Counts, PullMeter, PullStoppedError
from rl_ckpt.store.partial import partial_path
from rl_ckpt.store.urls import open_store

NAME = "shards/1-a/s-0.arrow"
KIB = 1 << 10

_numbers = itertools.count()


@pytest.fixture
def source() -> Store:
    return open_store(f"memory://copier_source_{next(_numbers)}")


@pytest.fixture(params=["local", "memory"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(tmp_path / "to" if request.param == "local" else f"memory://copier_target_{next(_numbers)}")


@pytest.fixture
def disk(tmp_path: Path) -> Store:
    return open_store(tmp_path / "disk")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 64 KiB, so that a file of some 100 KiB has several."""
    monkeypatch.setattr(copier_module, "PIECE_BYTES", 64 * KIB)
    monkeypatch.setattr("rl_ckpt.plan.pulling._SLACK_BYTES", KIB)
    monkeypatch.setattr(copier_module, "cut", lambda size, places: copier_module_cut(size, places, 64 * KIB))


copier_module_cut = copier_module.cut


def made(source: Store, name: str = NAME, chunks: Sequence[int] = (64 * KIB,) * 5, gap: int = 100) -> FileJob:
    """A file at the source, with gaps before, between and after its chunks."""
    data = np.random.default_rng(len(chunks) + sum(chunks)).integers(
        0, 256, sum(chunks) + gap * (len(chunks) + 1), "u1"
    )
    places: list[Place] = []
    at = gap
    for size in chunks:
        places.append((at, size, digest(data[at : at + size]).hex()))
        at += size + gap
    source.put(name, [data.data])
    return FileJob(name, len(data), tuple(places))


def damage(store: Store, name: str, at: int) -> None:
    data = bytearray(store.get(name))
    data[at] ^= 1
    store.put(name, [data])


def test_files_arrive_byte_by_byte(source: Store, target: Store) -> None:
    jobs = [made(source, f"shards/1-a/s-{i}.arrow", (1000 * (i + 1), 64 * KIB, 200 * KIB)) for i in range(6)]
    meter = PullMeter()
    Copier(source, target, meter).copy(jobs, streams=4)
    for job in jobs:
        assert target.get(job.name) == source.get(job.name)
    total = sum(job.bytes for job in jobs)
    assert meter.counts() == Counts(total, 0, 6, 0)
    assert source.stats.snapshot().bytes_read - total == total  # this test's own reads; each byte left once


def test_one_file_is_read_by_several_streams(source: Store, target: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(3, timeout=30)
    read = source.read_into

    def meet(name: str, reads: Sequence[tuple[int, memoryview]]) -> None:
        together.wait()
        read(name, reads)

    monkeypatch.setattr(source, "read_into", meet)
    job = made(source, chunks=(64 * KIB,) * 6)
    Copier(source, target, PullMeter()).copy([job], streams=3)
    assert target.get(NAME) == source.get(NAME)


def test_a_chunk_that_comes_damaged_is_read_again(
    source: Store, target: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, read, turned = made(source), source.read_into, list[int]()

    def turn(name: str, reads: Sequence[tuple[int, memoryview]]) -> None:
        read(name, reads)
        if not turned:
            turned.append(1)
            reads[0][1][5000] ^= 1

    monkeypatch.setattr(source, "read_into", turn)
    Copier(source, target, PullMeter()).copy([job], streams=1)
    assert target.get(NAME) == source.get(NAME)


@pytest.mark.parametrize("chunks", [(64 * KIB,) * 5, (300 * KIB,)], ids=["pieces", "one large chunk"])
def test_a_damaged_source_is_named_and_nothing_appears(source: Store, target: Store, chunks: tuple[int, ...]) -> None:
    job = made(source, chunks=chunks)
    damage(source, NAME, 70_000)
    with pytest.raises(CorruptionError, match=r"chunk of \d+ bytes at .* of memory://.*s-0.arrow is damaged: "):
        Copier(source, target, PullMeter()).copy([job], streams=2)
    assert not target.exists(NAME)


def test_a_missing_source_is_told(source: Store, target: Store) -> None:
    with pytest.raises(ObjectMissingError):
        Copier(source, target, PullMeter()).copy([FileJob(NAME, 10, ())], streams=2)


def test_what_is_there_and_right_does_not_travel(source: Store, target: Store) -> None:
    job = made(source)
    target.put(NAME, [source.get(NAME)])
    before, meter = source.stats.snapshot().bytes_read, PullMeter()
    Copier(source, target, meter).copy([FileJob(NAME, job.bytes, job.places, job.places)], streams=2)
    assert source.stats.snapshot().bytes_read == before
    assert meter.counts() == Counts(0, job.bytes, 0, 1)


def test_what_is_there_and_damaged_travels_again(source: Store, target: Store) -> None:
    job = made(source)
    target.put(NAME, [source.get(NAME)])
    damage(target, NAME, 70_000)
    Copier(source, target, PullMeter()).copy([FileJob(NAME, job.bytes, job.places, job.places)], streams=2)
    assert target.get(NAME) == source.get(NAME)


def left_unfinished(source: Store, disk: Store, job: FileJob, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process leaves it that was killed after some pieces."""
    meter = PullMeter()
    arrived, seen = meter.arrived, list[int]()

    def stop(moved: int, kept: int) -> None:
        arrived(moved, kept)
        seen.append(moved)
        if len(seen) == pieces:
            meter.stop()

    monkeypatch.setattr(meter, "arrived", stop)
    with pytest.raises(PullStoppedError):
        Copier(source, disk, meter).copy([job], streams=1)
    assert not disk.exists(NAME)


@pytest.mark.parametrize("chunks", [(64 * KIB,) * 5, (64 * KIB, 300 * KIB, 64 * KIB)], ids=["pieces", "a large chunk"])
def test_an_unfinished_file_is_taken_up(
    source: Store, disk: Store, chunks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = made(source, chunks=chunks)
    left_unfinished(source, disk, job, 2, monkeypatch)
    assert disk.list() == []
    before, meter = source.stats.snapshot().bytes_read, PullMeter()
    Copier(source, disk, meter).copy([job], streams=2)
    assert disk.get(NAME) == source.get(NAME)
    counts = meter.counts()
    assert counts.bytes_kept >= 2 * 64 * KIB
    assert counts.bytes_moved + counts.bytes_kept == job.bytes
    assert source.stats.snapshot().bytes_read - before - job.bytes == counts.bytes_moved
    assert not os.path.exists(partial_path(disk.local_path(NAME) or ""))


def test_damage_in_an_unfinished_file_is_found(source: Store, disk: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    job = made(source)
    left_unfinished(source, disk, job, 3, monkeypatch)
    path = Path(partial_path(disk.local_path(NAME) or ""))
    with open(path, "r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    Copier(source, disk, PullMeter()).copy([job], streams=1)
    assert disk.get(NAME) == source.get(NAME)


def test_space_of_an_unfinished_file_is_not_asked_for_again(
    source: Store, disk: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = made(source)
    assert missing_bytes([job], disk) == job.bytes
    left_unfinished(source, disk, job, 3, monkeypatch)
    assert missing_bytes([job], disk) < job.bytes - 2 * 64 * KIB
    assert missing_bytes([FileJob(NAME, job.bytes, (), ())], disk) == 0


def test_an_unfinished_file_is_removed_when_nobody_goes_on_with_it(
    source: Store, disk: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_unfinished(source, disk, made(source), 2, monkeypatch)
    assert disk.clean_partial(0.0) == 0
    path = partial_path(disk.local_path(NAME) or "")
    old = os.stat(path).st_mtime - partial_module.KEPT_S
    os.utime(path, (old, old))
    assert disk.clean_partial(1e9) == 1
    assert not os.path.exists(path)


def test_two_copiers_of_one_file_do_not_harm_each_other(source: Store, disk: Store) -> None:
    job, begun = made(source, chunks=(64 * KIB,) * 8), threading.Barrier(2, timeout=30)
    failures: list[BaseException] = []

    def copy() -> None:
        begun.wait()
        try:
            Copier(source, disk, PullMeter()).copy([job], streams=2)
        except BaseException as error:  # noqa: BLE001 - shown below
            failures.append(error)

    threads = [threading.Thread(target=copy) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert disk.get(NAME) == source.get(NAME)


def test_a_full_disk_says_so(source: Store, disk: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(28, "No space left on device")

    job = made(source)
    monkeypatch.setattr(partial_module.os, "pwrite", full)
    with pytest.raises(StorageError, match="disk full"):
        Copier(source, disk, PullMeter()).copy([job], streams=2)


def test_files_on_their_way_to_an_object_store_take_bounded_memory(
    source: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = open_store(f"memory://copier_target_{next(_numbers)}")
    jobs = [made(source, f"shards/1-a/s-{i}.arrow") for i in range(8)]
    areas, most, lock, too_much = [0], [0], threading.Lock(), threading.Event()
    new_area, put = copier_module.new_area, target.put

    def count(size: int) -> memoryview:
        with lock:
            areas[0] += size
            most[0] = max(most[0], areas[0])
            if areas[0] > 2 * jobs[0].bytes:
                too_much.set()
        return new_area(size)

    def done(name: str, segments: Sequence[memoryview]) -> None:
        too_much.wait(0.1)  # a store that is slow, so that others would go on
        put(name, segments)
        with lock:
            areas[0] -= jobs[0].bytes

    monkeypatch.setattr(copier_module, "new_area", count)
    monkeypatch.setattr(target, "put", done)
    Copier(source, target, PullMeter(), room_bytes=2 * jobs[0].bytes).copy(jobs, streams=8)
    assert most[0] <= 2 * jobs[0].bytes
    for job in jobs:
        assert target.get(job.name) == source.get(job.name)


def test_all_streams_share_one_limit(source: Store, target: Store) -> None:
    """With a clock that stands still, each wait says when a read may begin: the last one after bytes / limit."""
    jobs = [made(source, f"shards/1-a/s-{i}.arrow") for i in range(6)]
    waits: list[float] = []
    meter = PullMeter(100_000.0, clock=lambda: 0.0, wait=waits.append)
    Copier(source, target, meter).copy(jobs, streams=6)
    total = sum(job.bytes for job in jobs)
    assert max(waits) == pytest.approx(total / 100_000 - 0.25, abs=1.0)
    # No two reads were let begin at the same time, whichever streams they were of.
    assert len(set(waits)) == len(waits)


def test_a_stopped_copy_ends_at_once(source: Store, target: Store) -> None:
    meter = PullMeter()
    meter.stop()
    with pytest.raises(PullStoppedError):
        Copier(source, target, meter).copy([made(source)], streams=4)
    assert not target.exists(NAME)
