"""The order in which checkpoints of the log and of memory are tried."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rl_ckpt.format.records import CommitRecord
from rl_ckpt.plan.candidates import candidates
from rl_ckpt.plan.parts import Remembered


def commit(number: int, step: int | None = None, write: str = "") -> CommitRecord:
    step = number if step is None else step
    return CommitRecord(
        number=number,
        run="r",
        write_id=write or f"w{number}",
        epoch=1,
        id=f"{step}-c{number}",
        step=step,
        manifest_bytes=1,
        manifest_digest="",
        bytes=1,
        bytes_written=1,
        time=0.0,
    )


def memory(name: str, after: int, *, whole: bool = True, record: CommitRecord | None = None) -> Remembered:
    return Remembered(name, int(name.partition("-")[0]), b"", record, after, whole)


def ids(*args: object) -> list[str]:
    return [one.id for one in candidates(*args)]  # type: ignore[arg-type]


def test_what_is_only_in_memory_stands_after_the_commit_before_it() -> None:
    log = [commit(1), commit(3), commit(5)]
    alone = [memory("9-m", 5), memory("8-m", 3), memory("7-m", 3), memory("6-m", 0)]
    assert ids(log, alone) == ["9-m", "5-c5", "8-m", "7-m", "3-c3", "1-c1", "6-m"]


def test_a_commit_of_somebody_else_since_then_comes_first() -> None:
    assert ids([commit(1), commit(7, 2)], [memory("100-m", 1)]) == ["2-c7", "100-m", "1-c1"]


def test_memory_of_a_commit_stands_beside_it_even_before_it_has_heard_of_the_commit() -> None:
    log = [commit(1), commit(2)]
    one, two = candidates(log, [memory("2-c2", 1), memory("1-c1", 1, record=log[0])])
    assert (one.record, one.memory is not None) == (log[1], True)
    assert (two.record, two.memory is not None) == (log[0], True)


def test_memory_of_another_commit_of_the_same_name_counts_for_nothing() -> None:
    (one,) = candidates([commit(1)], [memory("1-c1", 1, record=commit(1, write="other"))])
    assert one.memory is None


def test_a_commit_that_the_log_lost_is_no_candidate() -> None:
    assert ids([commit(2)], [memory("1-c1", 1, record=commit(1))]) == ["2-c2"]


def test_of_a_step_the_newest_is_taken_wherever_it_is() -> None:
    log = [commit(1, 5), commit(2, 6)]
    assert ids(log, [memory("5-m", 2)], 5) == ["5-m"]
    assert ids(log, [memory("5-m", 0)], 5) == ["5-c1"]
    assert ids(log, [], 7) == []


def test_without_a_log_only_what_memory_has_whole_is_used() -> None:
    found = [memory("3-m", 1, whole=False), memory("2-c2", 1, record=commit(2)), memory("1-m", 1)]
    assert ids(None, found) == ["2-c2", "1-m"]


@given(st.lists(st.integers(0, 6), max_size=6), st.sets(st.integers(1, 6)))
def test_commits_keep_their_order_and_nothing_is_there_twice(after: list[int], numbers: set[int]) -> None:
    log = [commit(n) for n in sorted(numbers)]
    alone = [memory(f"{i}-m", n) for i, n in enumerate(sorted(after, reverse=True))]
    found = ids(log, alone)
    assert len(found) == len(set(found)) == len(log) + len(alone)
    assert [name for name in found if "-c" in name] == [c.id for c in reversed(log)]
    for place, one in enumerate(candidates(log, alone)):
        if one.record is None and one.memory is not None:
            newer = [c for c in log if c.number > one.memory.after]
            assert {c.id for c in newer} == {name for name in found[:place] if "-c" in name}
