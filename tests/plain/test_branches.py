"""Going back and on: both branches stay, each knows what it continues, and their steps may be the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_ckpt import Catalog, Checkpointer, InvalidInputError, LatestN, diff
from tests.unit.trees import assert_same


def state(step: int, branch: str) -> dict[str, Any]:
    return {"w": np.full(100, step, np.float64), "branch": branch}


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Steps 1 to 4; then back to 2 in another process, and on with 3 and 5."""
    run = str(tmp_path / "run")
    with Checkpointer(run) as ckpt:
        for step in range(1, 5):
            ckpt.save_state(step, state(step, "a")).result(60)
    with Checkpointer(run) as ckpt:
        ckpt.load_state(2)
        for step in (3, 5):
            ckpt.save_state(step, state(step, "b")).result(60)
    return run


def test_both_branches_are_kept_and_every_parent_is_told(url: str) -> None:
    a1, a2, a3, a4, b3, b5 = Catalog(url).checkpoints()
    assert [info.step for info in (a1, a2, a3, a4, b3, b5)] == [1, 2, 3, 4, 3, 5]
    assert [info.parent for info in (a1, a2, a3, a4, b3, b5)] == [None, a1.id, a2.id, a3.id, a2.id, b3.id]
    assert b5.lineage == (b3.id, a2.id, a1.id)
    assert a4.lineage == (a3.id, a2.id, a1.id)
    assert_same(Checkpointer(url).load_state(), state(5, "b"))
    assert_same(Checkpointer(url).load_state(4), state(4, "a"))
    assert_same(Checkpointer(url).load_state(3), state(3, "b"))
    assert Checkpointer(url).verify().ok
    leaf, array = {c.path: c for c in diff(url, a=a3.id, b=b3.id).leaves}["branch"], diff(url, a=a4.id, b=b5.id)
    assert (leaf.before, leaf.after) == ("a", "b")
    assert array.arrays[0].max_abs == 1.0


def test_the_first_branch_is_gone_on_with_again(url: str) -> None:
    with Checkpointer(url) as ckpt:
        assert_same(ckpt.load_state(4), state(4, "a"))
        info = ckpt.save_state(5, state(5, "a")).result(60)
        with pytest.raises(InvalidInputError, match="step 3 is committed already"):
            ckpt.save_state(3, state(3, "a"))
    assert info.parent == Catalog(url).checkpoints()[3].id
    assert_same(Checkpointer(url).load_state(), state(5, "a"))


def test_rules_count_both_branches_and_a_tag_keeps_one_for_good(url: str) -> None:
    Catalog(url).tag(4, "before going back")
    with Checkpointer(url, keep=[LatestN(1)], grace_s=0) as ckpt:
        ckpt.load_state(5)
        ckpt.save_state(6, state(6, "b")).result(60)
    first, last = Catalog(url).checkpoints()
    assert (first.step, first.tags, last.step) == (4, ("before going back",), 6)
    assert_same(Checkpointer(url).load_state(4), state(4, "a"))
    assert last.lineage[0].startswith("5-"), "also of a parent that is gone"
