"""What comes back equals what went in, bit for bit, in kind, dtype, shape and container type: through the real path."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import rl_ckpt
from rl_ckpt.state.tree import flatten, unflatten
from tests.unit import trees
from tests.unit.trees import assert_same

AS_OFTEN = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


class Keeper:
    """Saves under increasing steps and loads what it just saved."""

    def __init__(self, url: str, **options: Any) -> None:
        self.ckpt = rl_ckpt.Checkpointer(url, keep=[rl_ckpt.LatestN(1)], grace_s=0, **options)
        self._steps = itertools.count()

    def __call__(self, tree: Any) -> Any:
        step = next(self._steps)
        self.info = self.ckpt.save_state(step, tree).result(60)
        return self.ckpt.load_state(step)


@pytest.fixture(scope="module", params=["local", "memory"])
def keeper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keeper]:
    url = str(tmp_path_factory.mktemp("run")) if request.param == "local" else "memory://test_round_trip"
    keeper = Keeper(url, chunk_bytes=64)  # small, so that arrays of a few elements are several chunks
    with keeper.ckpt:
        yield keeper


@AS_OFTEN
@given(trees.trees())
@example({0: 1, "0": 2, "": 3, "/": 4, "~": 5, -1: 6, "-1": 7})
@example(OrderedDict(z=[(), {}, OrderedDict()], a=((1,), [None])))
def test_a_tree_comes_back_as_it_was(keeper: Keeper, tree: Any) -> None:
    assert_same(keeper(tree), tree)


@AS_OFTEN
@given(st.lists(trees.numpy_arrays() | trees.numpy_scalars() | trees.string_arrays(), min_size=1, max_size=6))
def test_numpy_arrays_and_scalars_come_back_as_they_were(keeper: Keeper, arrays: list[Any]) -> None:
    assert_same(keeper(arrays), arrays)


@AS_OFTEN
@given(st.lists(trees.torch_tensors() | trees.jax_arrays(), min_size=1, max_size=6))
def test_torch_and_jax_arrays_come_back_as_they_were(keeper: Keeper, arrays: list[Any]) -> None:
    assert_same(keeper(arrays), arrays)


def test_every_numpy_dtype_comes_back(keeper: Keeper) -> None:
    rng = np.random.default_rng(0)
    tree = {
        f"{i} {shape} {how}": lay_out(trees.array_of(dtype, shape, rng))
        for i, dtype in enumerate(trees.NUMPY_DTYPES)
        for shape in [(), (0,), (2, 0), (7,), (3, 5)]
        for how, lay_out in trees.LAYOUTS.items()
    }
    assert_same(keeper(tree), tree)


def test_every_torch_dtype_comes_back(keeper: Keeper) -> None:
    rng = np.random.default_rng(0)
    tree = {}
    for dtype in trees.TORCH_DTYPES:
        tensor = trees.tensor_of(dtype, (3, 5), rng)
        tree[str(dtype)] = [tensor, tensor.T, tensor[:, ::2], tensor[1, 1], tensor[:0]]
    assert_same(keeper(tree), tree)


def test_every_jax_dtype_comes_back(keeper: Keeper) -> None:
    rng = np.random.default_rng(0)
    dtypes = [trees.dtype_from_name(name) for name in trees.JAX_DTYPES]
    tree = {d.name: [jnp.asarray(trees.array_of(d, s, rng)) for s in [(), (0,), (3, 5)]] for d in dtypes}
    assert_same(keeper(tree), tree)


def test_a_memory_mapped_array_comes_back_as_an_array(keeper: Keeper, tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "values", np.float32, "w+", shape=(5, 7))
    mapped[:] = np.arange(35).reshape(5, 7)
    assert_same(keeper({"mapped": mapped, "part": mapped[1:3, ::2]}), {"mapped": mapped, "part": mapped[1:3, ::2]})


@pytest.mark.parametrize("leaf", [np.arange(9.0), torch.ones(3), 7, None, "text", b"", {}, [], ()], ids=repr)
def test_a_tree_may_be_one_leaf(keeper: Keeper, leaf: Any) -> None:
    assert_same(keeper(leaf), leaf)


def test_what_comes_back_is_the_callers_own(keeper: Keeper) -> None:
    back = keeper({"a": np.arange(30.0), "t": torch.arange(30.0), "zero": np.float64(1), "empty": np.array(3)})
    back["a"][:] = 0
    back["t"] += 1
    back["empty"][()] = 4
    again = keeper.ckpt.load_state()
    assert again["a"][3] == 3
    assert again["t"][3] == 3
    assert again["empty"] == 3


def test_tied_arrays_are_stored_once_and_come_back_as_one_object(keeper: Keeper) -> None:
    weight, table = torch.nn.Parameter(torch.randn(50, 8)), np.random.default_rng(1).random((20, 20))
    tree = {"embed": weight, "head": {"w": weight}, "q": [table, table[:]], "view": table.T, "same bytes": table.copy()}
    back = keeper(tree)
    assert_same(back, tree)
    assert back["head"]["w"] is back["embed"]
    assert back["q"][1] is back["q"][0]
    assert back["view"] is not back["q"][0]
    assert keeper.info.bytes == 50 * 8 * 4 + 3 * 20 * 20 * 8  # ties count once; the view and the copy are their own


def test_equal_chunks_are_written_once(tmp_path: Path) -> None:
    values = np.random.default_rng(2).bytes(1 << 20)
    with rl_ckpt.Checkpointer(str(tmp_path)) as ckpt:
        arrays = [np.frombuffer(values, np.float32).copy() for _ in range(4)]
        info = ckpt.save_state(0, arrays).result(60)
    assert info.bytes == 4 << 20
    assert 1 << 20 <= info.bytes_written < (1 << 20) + 20_000
    stored = sum(f.stat().st_size for f in (tmp_path / "shards").rglob("*.arrow"))
    assert 1 << 20 <= stored < (1 << 20) + 20_000


def test_views_of_one_memory_with_another_sign_are_not_tied(keeper: Keeper) -> None:
    values = torch.randn(40, dtype=torch.complex64)
    tree = {"imag": values.imag, "minus": values.conj().imag, "c": values, "conj": values.conj()}
    assert_same(keeper(tree), tree)


@AS_OFTEN
@given(trees.trees(trees.plain_leaves, max_leaves=20))
def test_flatten_and_unflatten_are_inverse(tree: Any) -> None:
    flat = flatten(tree)
    values = {path: path for path, node in flat.nodes.items() if type(node).__name__ != "Container"}
    shape = unflatten(flat.nodes, values)
    leaves_back = _leaves(shape)
    assert leaves_back == list(values.values())
    assert len(_leaves(tree)) == len(leaves_back)


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for child in tree.values() for leaf in _leaves(child)]
    if isinstance(tree, list | tuple):
        return [leaf for child in tree for leaf in _leaves(child)]
    return [tree]


def test_select_brings_the_part_and_reads_only_its_bytes(keeper: Keeper) -> None:
    tree = {"a": {"w": np.ones(50), "b": [1, 2]}, "c": (np.zeros(5), 3), 0: "x"}
    keeper(tree)
    assert_same(keeper.ckpt.load_state(select="a"), {"a": tree["a"]})
    assert_same(keeper.ckpt.load_state(select=["a/*", "!a/w"]), {"a": {"b": [1, 2]}})
    assert_same(keeper.ckpt.load_state(select="!a"), {"c": tree["c"], 0: "x"})
    with pytest.raises(rl_ckpt.InvalidInputError, match=r"'b'.* chooses nothing.*: 0, a, c"):
        keeper.ckpt.load_state(select="b")


def test_arrays_come_as_numpy_where_asked(keeper: Keeper) -> None:
    back = (keeper({"t": torch.ones(3, dtype=torch.bfloat16), "j": jnp.ones(3), "zero": torch.tensor(2.0)}), keeper)[0]
    assert isinstance(back["t"], torch.Tensor)
    plain = keeper.ckpt.load_state(as_numpy=True)
    assert [type(leaf) for leaf in plain.values()] == [np.ndarray] * 3
    assert plain["t"].dtype.name == "bfloat16"
    assert math.isclose(float(plain["zero"]), 2)
