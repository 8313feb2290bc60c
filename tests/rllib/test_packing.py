"""Many small things as a few: the same tree comes back, and large arrays are left as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("ray.rllib")
import torch

from rl_ckpt import Checkpointer
from rl_ckpt.errors import CorruptionError, InvalidInputError
from rl_ckpt.rllib.packing import pack, unpack
from rl_ckpt.state.tree import flatten
from tests.rllib.same import assert_same

TIED = np.arange(5.0)
TREE: dict[Any, Any] = {
    "plain": [None, True, 2**70, 0.1, float("nan"), "text", b"\x00", (1, "a"), np.float32(3)],
    1: {"empty": {}, "nothing": np.zeros((0, 3)), "point": np.array(4, np.int16)},
    "small": [np.arange(6, dtype=np.uint8).reshape(2, 3), np.ones(3, ml_dtypes.bfloat16), np.asfortranarray(np.eye(3))],
    "tied": [TIED, TIED],
    "large": np.random.default_rng(1).random((200, 100)),
    "long": ["x" * 5000, b"y" * 5000, "z" * 200_000],
}


def test_a_tree_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save_state(1, {"packed": pack(TREE)}).result()
        back = unpack(ckpt.load_state()["packed"])
    assert_same(back, TREE)
    assert back["tied"][0] is back["tied"][1]


def test_tensors_come_back() -> None:
    back = unpack(pack([torch.ones(2, 3, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bool)]))
    assert [tensor.dtype for tensor in back] == [torch.bfloat16, torch.bool]
    assert torch.equal(back[0], torch.ones(2, 3, dtype=torch.bfloat16))


def test_a_large_array_is_not_copied_and_thousands_of_leaves_are_few() -> None:
    array = np.zeros(100_000)
    packed = pack({"large": array, "many": [{"i": i, "a": np.full(3, i)} for i in range(2000)]})
    assert packed["large"]["large"] is array
    flat = flatten(packed)
    assert len(flat.nodes) == 5
    assert len(flat.arrays) == 3


def test_what_a_save_refuses_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="a/0"):
        pack({"a": [object()]})


@pytest.mark.parametrize("part", ["structure", "small", "large"])
def test_damage_is_told(part: str) -> None:
    packed = pack(TREE)
    for damaged in (
        {**packed, part: packed[part][:40] if part != "large" else {}},
        {k: packed[k] for k in packed if k != part},
    ):
        with pytest.raises(CorruptionError, match="can't be read"):
            unpack(damaged)
