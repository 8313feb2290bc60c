"""Which arrays are one, and what torch is told when one is filled in place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rl_ckpt import Sharded
from rl_ckpt.state import arrays
from rl_ckpt.state.tree import LocalArray, flatten


def test_empty_shards_are_not_taken_for_one_array() -> None:
    flat = flatten({"a": Sharded(torch.empty(0, 3), (4, 3), (4, 0)), "b": Sharded(torch.empty(0, 3), (4, 3), (4, 0))})
    assert isinstance(flat.nodes["a"], LocalArray)
    assert isinstance(flat.nodes["b"], LocalArray)


def test_two_readings_of_the_same_memory_are_two_arrays() -> None:
    memory = np.zeros(4, "V8")
    one, other = memory.view([("a", "<f8")]), memory.view([("b", "<i8")])
    flat = flatten({"one": one, "other": other})
    assert isinstance(flat.nodes["other"], LocalArray)
    assert flat.nodes["other"].spec.dtype != flat.nodes["one"].spec.dtype  # type: ignore[union-attr]


def test_a_backward_pass_over_values_that_a_restore_replaced_is_an_error() -> None:
    weights = torch.nn.Parameter(torch.ones(3))
    loss = (weights**2).sum()
    host = arrays.in_place(weights, arrays.PARAMETER, np.dtype("float32"), (3,))
    assert host is not None
    host[...] = 100
    assert arrays.filled(weights, arrays.PARAMETER) is weights
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
