"""A rank that takes over from a dead one looks whether its state is the one that it staged."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from rl_ckpt import Replicated
from rl_ckpt.errors import InvalidInputError
from rl_ckpt.plan.deal import StageItem
from rl_ckpt.plan.inventory import chunk_boxes, chunk_digest
from rl_ckpt.runtime.staging import _check_same
from rl_ckpt.state.tree import LocalArray, flatten

CHUNK = 1 << 10
STATE = {"w": Replicated(np.arange(300.0)), "b": Replicated(np.arange(20.0)), "clock": np.zeros(3)}


def items(path: str) -> list[StageItem]:
    """As the rank has staged them."""
    flat = flatten(STATE)
    node = flat.nodes[path]
    assert isinstance(node, LocalArray)
    return [StageItem(path, box, 0, box.size * 8, chunk_digest(flat, path, box)) for box in chunk_boxes(node, CHUNK)]


def unknown(found: list[StageItem]) -> list[StageItem]:
    return [msgspec.structs.replace(item, digest=b"") for item in found]


def test_a_state_that_is_the_same_is_staged() -> None:
    _check_same(flatten(STATE | {"clock": np.ones(3), "more": 1}), items("w")[:1], unknown(items("w")[1:]), CHUNK)


@pytest.mark.parametrize(
    ("changed", "paths"),
    [
        ({"w": Replicated(np.arange(300.0) + 1)}, "['w']"),
        ({"w": Replicated(np.arange(301.0))}, "['w']"),
        ({"w": "gone"}, "['w']"),
        ({"b": None}, "['b']"),
        ({"b": Replicated(np.zeros(5)), "w": 1}, "['b', 'w']"),
    ],
)
def test_other_values_shapes_and_trees_are_refused_by_path(changed: dict[str, Any], paths: str) -> None:
    with pytest.raises(InvalidInputError) as refused:
        _check_same(flatten(STATE | changed), items("w")[:1], unknown(items("b")), CHUNK)
    assert paths in str(refused.value)


def test_what_a_shard_server_staged_for_the_rank_is_no_witness() -> None:
    _check_same(flatten(STATE | {"w": Replicated(np.zeros(300))}), unknown(items("w")), unknown(items("b")), CHUNK)
