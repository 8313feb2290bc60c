"""Which arrays are one, and what torch is told when one is filled in place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rl_ckpt import PerRank, Replicated, Sharded
from rl_ckpt.state import arrays
from rl_ckpt.state.tree import LocalArray, Tie, flatten


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


def test_ties_are_found_by_memory_shape_strides_and_dtype_whatever_came_before() -> None:
    w = np.arange(6, dtype=np.int32).reshape(2, 3)
    tree = {
        "w": w,
        "same": w.view(),
        "other": w.copy(),
        "turned": w.T,
        "square": np.arange(9, dtype=np.int32).reshape(3, 3),
        "floats": w.view(np.float32),
        "own": PerRank(w),
        "all": Replicated([w, w]),
    }
    nodes = flatten(tree).nodes
    ties = {path: node.path for path, node in nodes.items() if isinstance(node, Tie)}
    assert ties == {"same": "w", "all/1": "all/0"}
    declared = {path: node.declared for path, node in nodes.items() if isinstance(node, LocalArray)}
    assert (declared["w"], declared["own"], declared["all/0"]) == ("auto", "per_rank", "replicated")
    assert {path: nodes[path].spec.shape for path in ("other", "turned")} == {"other": (2, 3), "turned": (3, 2)}  # type: ignore[union-attr]
