"""Which files a save does not name, and which checkpoints last."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from rl_ckpt.format.records import CommitRecord
from rl_ckpt.plan.compaction import AIM, FILES_A_SAVE, LEAST_FILE_BYTES, POOR, Files, evacuate, file_target, lasting
from rl_ckpt.plan.retention import BestN, EveryNSteps, KeepRule, LatestN, NewerThan, OnePer, Said, Tagged
from rl_ckpt.state import leaves


def files(*items: tuple[int, int, bool]) -> Files:
    content, used, held = zip(*items, strict=True) if items else ((), (), ())
    return Files(np.array(content, np.int64), np.array(used, np.int64), np.array(held, bool))


def test_nothing_is_moved_while_little_is_lost() -> None:
    assert not evacuate(files((100, 85, False), (100, 90, False)), 175, 0, False).any()
    assert not evacuate(files(), 10, 0, False).any()


def test_the_poorest_files_are_moved_until_little_is_lost() -> None:
    many = files((100, 10, False), (100, 60, False), (100, 95, False), (100, 100, False))
    assert evacuate(many, 265, 0, False).tolist() == [True, False, False, False]
    assert evacuate(many, 265, 0, True).tolist() == [True, False, False, False]


def test_what_stays_anyway_is_named() -> None:
    assert not evacuate(files((100, 1, True), (100, 100, False)), 101, 0, False).any()


def test_a_checkpoint_that_lasts_answers_for_what_it_adds() -> None:
    """Beside much that stays, a little lost space is no reason to move; but it would stay with this checkpoint."""
    some = files((10_000, 10_000, True), (100, 50, False))
    assert not evacuate(some, 10_050, 0, False).any()
    assert evacuate(some, 10_050, 0, True).tolist() == [False, True]


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 100), st.booleans())), st.integers(0, 500), st.booleans())
def test_what_is_moved_is_used_poor_and_not_held_and_then_enough(
    items: list[tuple[int, int, bool]], new: int, lasts: bool
) -> None:
    items = [(content, min(used, content), held) for content, used, held in items]
    found = files(*items)
    state = int(found.used.sum()) + new
    out = evacuate(found, state, 0, lasts)
    share = found.used / found.content if items else found.used
    assert not (out & (found.held | (found.used == 0) | (share >= POOR))).any()
    left = (found.used > 0) & ~found.held & ~out
    assert not out.any() or share[out].max() <= share[left].min(initial=1.0)
    if lasts:
        stored = found.content[left].sum() + found.used[out].sum() + new
        assert stored <= AIM * (found.used[left].sum() + found.used[out].sum() + new) or share[left].min() >= POOR


def record(step: int, tag: str | None = None, time: float = 0.0, loss: float | None = None) -> CommitRecord:
    return CommitRecord(
        number=step, run="r", write_id="", epoch=1, id=f"{step}-x", step=step, manifest_bytes=0, manifest_digest="",
        bytes=0, bytes_written=0, time=time or 1000.0 * step, tag=tag,
        metrics={} if loss is None else {"loss": leaves.encode(loss)},
    )  # fmt: skip


def lasts(*rules: KeepRule, said: Said | None = None) -> set[int]:
    commits = [record(1, loss=0.5), record(2, tag="t"), record(3), record(10, loss=0.1), record(11, loss=0.2)]
    return {int(id_.split("-")[0]) for id_ in lasting(commits, rules, 11_500.0, said)}


def test_which_checkpoints_last() -> None:
    assert lasts() == {1, 2, 3, 10, 11}
    assert lasts(LatestN(3)) == lasts(NewerThan(100_000)) == lasts(Tagged()) == {2}
    assert lasts(LatestN(3), EveryNSteps(10)) == {2, 10}
    assert lasts(BestN("loss", "min")) == {2, 10}
    assert lasts(OnePer(100_000)) == {2}, "the newest of its period: the next takes its place"
    assert lasts(OnePer(10_500)) == {2, 10}
    assert lasts(LatestN(1), said=Said({"3-x": ("kept",)}, {"2-x": "somebody"})) == {3}
    assert lasting([], (LatestN(1),), 0.0) == set()


def test_incremental_saves_write_small_files() -> None:
    assert file_target(1 << 30, whole=True) == math.inf
    assert file_target(1 << 30, whole=False) == (1 << 30) // FILES_A_SAVE
    assert file_target(100, whole=False) == LEAST_FILE_BYTES
