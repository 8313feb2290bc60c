"""Values as state trees and back: the same types, dtypes, order and bits."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray.rllib")
import torch

from rl_ckpt import Checkpointer
from rl_ckpt.errors import CorruptionError
from rl_ckpt.rllib.data import UnsavableError, from_data, to_data
from rl_ckpt.state.tree import flatten
from tests.rllib.same import assert_same

VALUES: dict[str, Any] = {
    "plain": [None, True, 1, 2.5, 1j, "a", b"b", np.float32(1), np.int8(2)],
    "empty": [{}, [], (), set(), deque(), defaultdict(list), OrderedDict()],
    "floats": [0.1, float("nan"), -0.0, float("inf")],
    "ints": [1, -(2**63), 2**63 - 1],
    "long ints": [1, 2**63],
    "bools": [True, False, True],
    "numbers of numpy": [np.float32(0.1), np.float32(2)],
    "one": [np.float64(0.1)],
    "mixed": [1, 2.0, True],
    "arrays": [np.arange(3), np.arange(3) + 1],
    "arrays of different shapes": [np.arange(3), np.arange(4)],
    "arrays of different dtypes": [np.zeros(2, np.float32), np.zeros(2)],
    "arrays of no size": [np.zeros((0, 2)), np.zeros((0, 2))],
    "arrays of no dimension": [np.array(1), np.array(2)],
    "dicts": [{"a": np.zeros(2), "b": {"c": 1}}, {"a": np.ones(2), "b": {"c": 2}}],
    "dicts in another order": [{"a": 1, "b": 2}, {"b": 2, "a": 1}],
    "empty dicts": [{}, {}, {}],
    "dicts by anything": [{None: 1, (0, "a"): 2}, {None: 3, (0, "a"): 4}],
    "tuples": [(1, np.zeros(2)), (2, np.ones(2))],
    "tuples of different lengths": [(1, 2), (3,)],
    "empty tuples": [(), ()],
    "keys": {None: 1, (1, 2): "x", True: 2, 1.5: 3, "$": 4},
    "key of ours": {"$": "set", "items": []},
    "defaults": defaultdict(list, {"a": [1]}),
    "defaults of none": defaultdict(None, {1: 2}),
    "deque": deque([1.0, 2.0], maxlen=5),
    "ordered": OrderedDict([("b", 1), ("a", 2)]),
    "ordered by anything": OrderedDict([((0,), 1), ("a", 2)]),
}


@pytest.mark.parametrize("name", VALUES)
def test_comes_back_from_a_checkpoint_as_it_was(name: str, tmp_path: Path) -> None:
    value = VALUES[name]
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save_state(1, {"value": to_data(value)}).result()
        assert_same(from_data(ckpt.load_state()["value"]), value)


def test_sets_come_back() -> None:
    for value in ({1, "a", (2, 3)}, frozenset((1, 2)), set()):
        back = from_data(to_data(value))
        assert type(back) is type(value)
        assert back == value


def test_arrays_of_objects_come_back() -> None:
    array = np.array([[{"a": 1}, None], [np.zeros(2), "x"]], dtype=object)
    back = from_data(to_data(array))
    assert back.shape == (2, 2)
    assert_same(back.ravel().tolist(), array.ravel().tolist())


@pytest.mark.parametrize("kind", ["MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"])
def test_generators_go_on(kind: str) -> None:
    generator = np.random.Generator(getattr(np.random, kind)(3))
    generator.random(5, np.float32)
    tree = to_data(generator)
    flatten(tree)
    assert_same(from_data(tree).standard_normal(9), generator.standard_normal(9))
    legacy = np.random.RandomState(5)
    tree = to_data(legacy)
    assert_same(from_data(tree).normal(size=3), legacy.normal(size=3))


def test_tensors_keep_dtype_and_bits() -> None:
    for dtype in (torch.bfloat16, torch.float64, torch.int64, torch.bool):
        tensor = torch.tensor([[1, 0], [3, 4]]).to(dtype)
        back = from_data(to_data({"t": tensor}))["t"]
        assert back.dtype == dtype
        assert torch.equal(back, tensor)
        assert back.data_ptr() != tensor.data_ptr()


def test_many_equal_things_are_one_array() -> None:
    observations = [{"a": np.full(4, i, np.float32), "b": float(i)} for i in range(1000)]
    flat = flatten(to_data(observations))
    assert len(flat.arrays) == 2
    assert_same(from_data(to_data(observations)), observations)


def test_what_comes_back_is_memory_of_its_own() -> None:
    array = np.zeros(3)
    back = from_data(to_data({"one": array, "many": [array, array]}))
    for got in (back["one"], *back["many"]):
        np.add(got, 1, out=got)
    assert_same(array, np.zeros(3))
    assert_same(back["many"], [np.ones(3), np.ones(3)])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": [1, {"b": object()}]}, r"root\['a'\]\[1\]\['b'\] is a builtins\.object"),
        ([{"a": object()}, {"a": object()}], r"root\[…\]\['a'\]\[0\] is a builtins\.object"),
        (defaultdict(lambda: 3), "root is a defaultdict of <function"),
        (np.arange(3).view(np.recarray), "root is a numpy.*recarray"),
        ({object(): 1}, "a key of root is a builtins.object"),
    ],
)
def test_what_has_no_form_is_named(value: Any, said: str) -> None:
    with pytest.raises(UnsavableError, match=said):
        to_data(value, "root")


@pytest.mark.parametrize(
    "tree", [{"$": "later"}, {"$": "list", "of": "later"}, {"$": "Generator", "state": '{"bit_generator": "os"}'}]
)
def test_kinds_of_later_releases_are_refused(tree: Any) -> None:
    with pytest.raises(CorruptionError, match="unknown kind"):
        from_data(tree)
