"""docs/format.md is enough for others: its reader in 40 lines with pyarrow alone, and its query in duckdb's SQL."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import ml_dtypes
import numpy as np
import pytest
import ray
import torch

import rl_ckpt
from rl_ckpt.state.paths import join
from tests.project.doc_blocks import python_blocks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "format.md"
Leaves = Callable[..., dict[str, Any]]


def _block(having: str) -> str:
    (code,) = [block.code for block in python_blocks(PAGE.read_text()) if having in block.code]
    return code


@pytest.fixture(scope="module")
def leaves() -> Leaves:
    code = _block("def leaves(")
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    imported = [
        alias.name.partition(".")[0]
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    assert {name for name in imported if name not in sys.stdlib_module_names} == {"pyarrow"}
    namespace: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), namespace)
    return namespace["leaves"]  # type: ignore[no-any-return]


def _state(step: int) -> dict[Any, Any]:
    weights = np.random.default_rng(0).random((300, 200))
    return {
        "weights": weights,
        "tied": weights,
        "half": torch.arange(10, dtype=torch.bfloat16) + step,
        "a/b~": {3: np.arange(5), "3": np.arange(6, dtype="<i2"), "": np.float32(1.5)},
        "float8": np.ones((2, 3, 4), ml_dtypes.float8_e4m3fn),
        "scalar": np.array(3 + step),
        "nothing": np.zeros((0, 3)),
        "lr": 0.5,
        "names": ["x", None, True],
    }


def _arrays(tree: Any, path: str = "") -> dict[str, np.ndarray[Any, Any]]:
    if isinstance(tree, np.ndarray):
        return {path: tree}
    if not isinstance(tree, dict):
        return {}
    return {name: found for key, value in tree.items() for name, found in _arrays(value, join(path, key)).items()}


def _saved(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Two checkpoints, of which the second refers to the first; the arrays of that by path, but inline ones."""
    with rl_ckpt.Checkpointer(str(folder), chunk_bytes=64 << 10) as ckpt:
        ckpt.save_state(1, _state(1)).result()
        ckpt.save_state(2, _state(2)).result()
        found = _arrays(ckpt.load_state(as_numpy=True))
    return {path: array for path, array in found.items() if array.ndim and array.size}


def test_forty_lines_read_every_leaf(tmp_path: Path, leaves: Leaves) -> None:
    expected = _saved(tmp_path)
    found = leaves(tmp_path.as_uri())
    assert {path: leaf[2] for path, leaf in found.items() if isinstance(leaf, tuple)} == {
        path: array.tobytes() for path, array in expected.items()
    }
    assert all((found[path][0], found[path][1]) == (a.dtype.name, list(a.shape)) for path, a in expected.items())
    assert found["scalar"] == {"$": "array", "kind": "numpy", "dtype": "int64", "shape": [], "v": "BQAAAAAAAAA="}
    assert (found["lr"], found["names/0"], found["names/1"], found["names/2"]) == (0.5, "x", None, True)


def test_forty_lines_put_boxes_of_two_axes_together(tmp_path: Path, leaves: Leaves) -> None:
    whole = np.arange(24.0).reshape(4, 6)

    class Worker:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def get_state(self) -> dict[str, Any]:
            row, column = divmod(self.rank, 2)
            box = whole[2 * row : 2 * row + 2, 3 * column : 3 * column + 3].copy()
            return {"table": rl_ckpt.Sharded(box, (4, 6), (2 * row, 3 * column)), "rank": self.rank}

    ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    try:
        with rl_ckpt.Checkpointer(str(tmp_path)) as ckpt:
            ckpt.save(1, [ray.remote(Worker).remote(rank) for rank in range(4)]).result()
    finally:
        ray.shutdown()
    assert leaves(tmp_path.as_uri(), 3) == {"table": ("float64", [4, 6], whole.tobytes()), "rank": 3}


def test_sql_gives_every_chunk(tmp_path: Path) -> None:
    expected = _saved(tmp_path)
    namespace: dict[str, Any] = {}
    query = next(n for n in ast.parse(_block("CHUNKS = ")).body if isinstance(n, ast.Assign))
    exec(compile(ast.Module([query], []), str(PAGE), "exec"), namespace)
    rows = duckdb.execute(namespace["CHUNKS"].format(run=tmp_path)).fetchall()
    found = {path: np.zeros(array.shape, array.dtype) for path, array in expected.items() if path != "tied"}
    for path, name, shape, first, box, values in rows:
        assert (name, tuple(shape)) == (found[path].dtype.name, found[path].shape)
        part = np.frombuffer(values, found[path].dtype).reshape(box)
        found[path][tuple(slice(o, o + n) for o, n in zip(first, box, strict=True))] = part
    assert {path: array.tobytes() for path, array in found.items()} == {
        path: array.tobytes() for path, array in expected.items() if path != "tied"
    }
    assert sum(path == "weights" for path, *_ in rows) > 2, "several chunks"
