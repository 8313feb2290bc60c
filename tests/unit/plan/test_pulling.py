"""Pulling, the pure part: pieces, the limit of the bandwidth, the estimate, and what counts as a mirror."""

from __future__ import annotations

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.format.records import CommitRecord, EpochRecord
from rl_ckpt.plan.pulling import Estimate, LogRecords, Place, TokenBucket, cut, not_a_mirror

MIB = 1 << 20


@st.composite
def files(draw: st.DrawFn) -> tuple[int, list[Place]]:
    """A file and chunks in it, apart from each other or the same bytes, with gaps of any size."""
    at, places = 0, list[Place]()
    for number in range(draw(st.integers(0, 12))):
        at += draw(st.sampled_from([0, 1, 63, MIB - 1, MIB, 3 * MIB, 40 * MIB]))
        size = draw(st.sampled_from([1, 64, MIB, 4 * MIB, 5 * MIB, 20 * MIB]))
        places += [(at, size, f"{number}")] * draw(st.integers(1, 2))
        at += size
    return at + draw(st.sampled_from([0, 1, 700, 2 * MIB, 9 * MIB])), places


@given(files())
def test_pieces_are_the_file_and_hold_every_chunk_once(file: tuple[int, list[Place]]) -> None:
    size, places = file
    pieces = cut(size, reversed(places), 4 * MIB)
    assert [piece.offset for piece in pieces] == [sum(p.bytes for p in pieces[:i]) for i in range(len(pieces))]
    assert sum(piece.bytes for piece in pieces) == size
    assert sorted(place for piece in pieces for place in piece.places) == sorted(set(places))
    for piece in pieces:
        assert piece.bytes > 0
        for offset, length, _ in piece.places:
            assert piece.offset <= offset
            assert offset + length <= piece.offset + piece.bytes
        if len(piece.places) != 1:  # one chunk may be larger, with what is around it
            assert piece.bytes <= 4 * MIB + 2 * MIB


def test_heads_and_paddings_travel_with_the_chunks_beside_them() -> None:
    chunk = 16 * MIB
    places = [(512 + i * (chunk + 64), chunk, str(i)) for i in range(4)]
    pieces = cut(512 + 4 * (chunk + 64) + 3000, places)
    assert len(pieces) == 4


def test_chunks_that_overlap_stay_together() -> None:
    places = [(0, 10 * MIB, "a"), (5 * MIB, 20 * MIB, "b"), (50 * MIB, 14 * MIB, "c")]
    first, second, *_ = cut(64 * MIB, places, 8 * MIB)
    assert {place[2] for place in first.places} == {"a", "b"}
    assert second.places == ()


def test_a_chunk_outside_of_its_file_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="outside of a file of 10 bytes"):
        cut(10, [(5, 6, "a")])


@given(
    st.lists(st.lists(st.integers(1, 300_000), min_size=1, max_size=20), min_size=1, max_size=8),
    st.floats(1_000, 1e6),
)
def test_streams_together_stay_below_the_limit(streams: list[list[int]], rate: float) -> None:
    """Each stream books a piece, waits as it was told, reads it in no time, and books the next."""
    bucket = TokenBucket(rate, burst_s=0.5)
    turns = [(100.0, number) for number in range(len(streams))]
    heapq.heapify(turns)
    left = [list(pieces) for pieces in streams]
    read: list[tuple[float, int]] = []
    while turns:
        now, number = heapq.heappop(turns)
        size = left[number].pop()
        then = now + bucket.reserve(now, size)
        read.append((then, size))
        if left[number]:
            heapq.heappush(turns, (then, number))
    most = max(size for _, size in read)
    read.sort()
    for first in range(len(read)):
        for last in range(first, len(read)):
            window = read[last][0] - read[first][0]
            assert sum(size for _, size in read[first : last + 1]) <= rate * (window + 0.5) + most + 1e-3


def test_the_limit_is_used_up() -> None:
    bucket = TokenBucket(1000.0)
    now = 0.0
    for _ in range(100):
        now += bucket.reserve(now, 500)
    assert now == pytest.approx(50, abs=1)


def test_small_limits_are_read_in_small_steps() -> None:
    assert TokenBucket(1e6).step_bytes(16 * MIB) == 250_000
    assert TokenBucket(10.0).step_bytes(16 * MIB) == 64 << 10
    assert TokenBucket(1e12).step_bytes(16 * MIB) == 16 * MIB


def test_the_rate_is_that_of_the_last_seconds() -> None:
    estimate = Estimate(begun=0.0)
    for second in range(1, 31):
        slow = estimate.rate(float(second), 100 * second)
    assert slow == pytest.approx(100)
    for second in range(31, 51):
        fast = estimate.rate(float(second), 3000 + 1000 * (second - 30))
    assert fast == pytest.approx(1000)
    assert Estimate.seconds_left(5000, fast) == pytest.approx(5)
    assert Estimate.seconds_left(0, 0.0) == 0
    assert Estimate.seconds_left(1, 0.0) is None


def test_at_the_very_beginning_there_is_no_rate() -> None:
    assert Estimate(begun=5.0).rate(5.0, 0) == 0


def commit(number: int, epoch: int = 1, who: str = "source") -> CommitRecord:
    return CommitRecord(
        number=number, run="r", write_id=f"{who}{number}", epoch=epoch, id=f"{number}-{who}", step=number,
        manifest_bytes=1, manifest_digest="0" * 32, bytes=1, bytes_written=1, time=0.0,
    )  # fmt: skip


def epoch(number: int, epoch: int, who: str = "source") -> EpochRecord:
    return EpochRecord(number=number, run="r", write_id=f"{who}{number}", epoch=epoch, owner=who, time=0.0)


def log(*records: CommitRecord | EpochRecord) -> LogRecords:
    return LogRecords(
        max((r.number for r in records), default=0),
        [r for r in records if isinstance(r, CommitRecord)],
        [r for r in records if isinstance(r, EpochRecord)],
    )


SOURCE = log(epoch(1, 1), commit(2), commit(4), epoch(5, 2), commit(6, 2))  # 3 was swept


@pytest.mark.parametrize(
    "target",
    [
        log(),
        log(epoch(1, 1), commit(2)),
        log(commit(4)),
        log(epoch(1, 1), commit(2), commit(3)),  # brought before the source swept it
        log(epoch(1, 1), commit(2), epoch(3, 2, "a sweep")),
        log(epoch(1, 1), commit(4), epoch(7, 3, "a sweep")),
        log(epoch(1, 1), epoch(3, 2, "a sweep"), epoch(5, 2), commit(6, 2)),
    ],
    ids=["empty", "part", "one alone", "swept since", "swept there", "swept there at the end", "gone on after a sweep"],
)
def test_is_a_mirror(target: LogRecords) -> None:
    assert not_a_mirror(SOURCE, target) is None


@pytest.mark.parametrize(
    ("target", "why"),
    [
        (log(epoch(1, 1), commit(2, who="other")), "saved there"),
        (log(epoch(1, 1), commit(2), epoch(3, 2, "a job"), commit(4, 2, "a job")), "saved there"),
        (log(commit(2), epoch(7, 3, "a job"), commit(8, 3, "a job")), "saved there"),
        (log(epoch(1, 1), epoch(2, 2, "a job"), commit(3, 2, "a job")), "saved there"),
        (log(epoch(1, 1), commit(2), commit(7, 2)), "newer than everything"),
        (log(commit(5)), "saved there"),
    ],
    ids=["other commit", "went on", "went on past the end", "where the source swept", "newer", "in an epoch's place"],
)
def test_is_no_mirror(target: LogRecords, why: str) -> None:
    assert why in (not_a_mirror(SOURCE, target) or "")
