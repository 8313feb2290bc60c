"""What can't be stored is an error naming every path, before anything is written; pickle needs leave on both sides."""

from __future__ import annotations

import enum
import re
import warnings
from collections import Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import rl_ckpt

Point = namedtuple("Point", "x y")


class Colour(enum.IntEnum):
    """An int by type, not by kind."""

    RED = 1


class OwnDict(dict):  # type: ignore[type-arg]
    """A dict with a life of its own."""


class OwnArray(np.ndarray):  # type: ignore[type-arg]
    """An array of the user's own class."""


class Touch:
    """Pickles as an order to create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.path), "w")


def _contains_itself() -> list[Any]:
    inner: list[Any] = []
    inner.append({"again": inner})
    return inner


def _matrix() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        return np.matrix([[1]])


REFUSED = {
    "object array": np.array([1, None], object),
    "object field": np.zeros(2, np.dtype([("o", "O")])),
    "overlapping fields": np.zeros(2, np.dtype({"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [0, 0]})),
    "fields out of order": np.zeros(2, np.dtype({"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [4, 0]})),
    "matrix": _matrix(),
    "masked array": np.ma.masked_array([1, 2], [True, False]),
    "recarray": np.zeros(2, [("a", "i4")]).view(np.recarray),
    "own array class": np.zeros(2).view(OwnArray),
    "other missing string": np.array(["a"], np.dtypes.StringDType(na_object="None")),
    "strict strings": np.array(["a"], np.dtypes.StringDType(coerce=False)),
    "lambda": lambda: None,
    "class": dict,
    "set": {1},
    "frozenset": frozenset(),
    "namedtuple": Point(1, 2),
    "defaultdict": defaultdict(int),
    "counter": Counter(),
    "own dict class": OwnDict(),
    "int enum": Colour.RED,
    "range": range(3),
    "bytearray": bytearray(2),
    "generator": np.random.default_rng(0),
    "sparse tensor": torch.eye(2).to_sparse(),
    "meta tensor": torch.empty(2, device="meta"),
    "own tensor class": torch.nn.Buffer(torch.ones(1)).as_subclass(type("Own", (torch.Tensor,), {})),
    "packed tensor": torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "random key": jax.random.key(0),
    "tuple key": {(1, 2): 3},
    "bool key": {True: 1},
    "None key": {None: 1},
    "bytes key": OrderedDict({b"k": 1}),
    "numpy key": {np.int64(1): 1},
    "surrogate key": {"\ud800": 1},
    "self": _contains_itself(),
    "declared twice": rl_ckpt.PerRank({"in": rl_ckpt.Replicated(1)}),
    "sharded in a part": rl_ckpt.Replicated([rl_ckpt.Sharded(np.ones(2), (2,), (0,))]),
    "shard of no array": rl_ckpt.Sharded([1, 2], (2,), (0,)),
    "shard of other rank": rl_ckpt.Sharded(np.ones(2), (2, 2), (0, 0)),
    "shard outside": rl_ckpt.Sharded(np.ones(2), (3,), (2,)),
}


def listing(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture
def ckpt(tmp_path: Path) -> rl_ckpt.Checkpointer:
    ckpt = rl_ckpt.Checkpointer(str(tmp_path / "run"))
    ckpt.save_state(0, {"fine": np.ones(3)}).result(60)
    return ckpt


@pytest.mark.parametrize("what", REFUSED)
def test_a_leaf_that_cant_be_stored_is_named_and_nothing_is_written(
    ckpt: rl_ckpt.Checkpointer, tmp_path: Path, what: str
) -> None:
    before = listing(tmp_path)
    with pytest.raises(rl_ckpt.InvalidInputError, match="in/the list/1"):
        ckpt.save_state(1, {"fine": np.ones(3), "in": {"the list": [0, REFUSED[what]]}})
    assert listing(tmp_path) == before
    ckpt.close()


def test_all_bad_leaves_are_named_at_once(ckpt: rl_ckpt.Checkpointer) -> None:
    with pytest.raises(rl_ckpt.InvalidInputError) as caught:
        ckpt.save_state(1, {"a": {1}, "b/c": [lambda: 0], 0: {"ok": 1, "x": Colour.RED}, "~": {(1,): 2}})
    assert re.findall(r"^  (\S+):", str(caught.value), re.MULTILINE) == ["a", "b~1c/0", "0/x", "~0"]
    assert "(root)" not in str(caught.value)


def test_a_bad_root_is_called_root(ckpt: rl_ckpt.Checkpointer) -> None:
    with pytest.raises(rl_ckpt.InvalidInputError, match=r"\(root\): a builtins.set is neither"):
        ckpt.save_state(1, {1, 2})


def test_pickle_needs_leave_at_save_and_at_load(tmp_path: Path) -> None:
    url, tree = str(tmp_path / "run"), {"set": {1, 2}, "object": np.array([1, None], object), "plain": np.arange(3)}
    with rl_ckpt.Checkpointer(url, allow_pickle=True) as trusting:
        trusting.save_state(0, tree).result(60)
        back = trusting.load_state()
    assert back["set"] == {1, 2}
    assert list(back["object"]) == [1, None]
    careful = rl_ckpt.Checkpointer(url)
    with pytest.raises(rl_ckpt.UntrustedDataError, match=r"'(set|object)' was saved with pickle.*allow_pickle=True"):
        careful.load_state()
    assert list(careful.load_state(select="plain")["plain"]) == [0, 1, 2]


def test_pickle_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with rl_ckpt.Checkpointer(str(tmp_path), allow_pickle=True) as trusting:
        trusting.save_state(0, {"plain": np.arange(3), "set": {1, 2}}).result(60)
    for path in tmp_path.rglob("*.arrow"):
        path.unlink()
    with pytest.raises(rl_ckpt.UntrustedDataError):
        rl_ckpt.Checkpointer(str(tmp_path)).load_state()


def test_a_payload_does_not_run_without_leave(tmp_path: Path) -> None:
    url, mark = str(tmp_path / "run"), tmp_path / "mark"
    with rl_ckpt.Checkpointer(url, allow_pickle=True) as trusting:
        trusting.save_state(0, {"payload": Touch(mark)}).result(60)
    with pytest.raises(rl_ckpt.UntrustedDataError):
        rl_ckpt.Checkpointer(url).load_state()
    assert not mark.exists()
    rl_ckpt.Checkpointer(url, allow_pickle=True).load_state()["payload"].close()
    assert mark.exists()  # the payload is a live one: it was the refusal that kept it from running


def test_what_cant_be_pickled_either_is_named(tmp_path: Path) -> None:
    with (
        rl_ckpt.Checkpointer(str(tmp_path), allow_pickle=True) as trusting,
        pytest.raises(rl_ckpt.InvalidInputError, match="in/1: a function that can't be pickled either"),
    ):
        trusting.save_state(0, {"in": [0, lambda: 0]})


def test_a_tree_too_deep_to_follow_is_an_input_error(tmp_path: Path) -> None:
    tree: list[Any] = []
    for _ in range(5000):
        tree = [tree]
    with pytest.raises(rl_ckpt.InvalidInputError, match="nested deeper"), rl_ckpt.Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save_state(0, tree)
    assert list(tmp_path.iterdir()) == []
