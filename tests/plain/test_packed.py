"""Checkpoints of many small arrays, whose values lie in packed files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from rl_ckpt import Checkpointer, CorruptionError
from rl_ckpt.plan.match import match_all, view
from rl_ckpt.store.reader import load_leaves
from rl_ckpt.store.run import Run
from tests.unit.trees import JAX_DTYPES, LAYOUTS, NUMPY_DTYPES, TORCH_DTYPES, array_of, assert_same, tensor_of

STORABLE = [d for d in NUMPY_DTYPES if d.itemsize]


def is_packed(path: Path) -> bool:
    with pa.memory_map(str(path)) as source:
        return (pa.ipc.open_file(source).schema.metadata or {}).get(b"rl_ckpt.layout") == b"packed"


def files_of(root: Path, step: int) -> dict[bool, list[Path]]:
    """Shard files that the save of a step wrote: packed and others."""
    found = sorted(root.glob(f"shards/{step}-*/*.arrow"))
    return {kind: [path for path in found if is_packed(path) is kind] for kind in (True, False)}


def small(count: int = 1500) -> dict[str, Any]:
    return {f"layer{i % 30}.w{i}": np.arange(16.0) + i for i in range(count)}


def test_every_dtype_kind_and_layout_comes_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layouts = sorted(LAYOUTS)
    shapes: list[tuple[int, ...]] = [(3,), (2, 3), (), (0, 2), (1, 1, 5)]
    state = {
        "numpy": [
            LAYOUTS[layouts[i % len(layouts)]](array_of(dtype, shape, rng))
            for i, dtype in enumerate(STORABLE * 5)
            for shape in shapes
        ],
        "torch": {str(d): [tensor_of(d, shape, rng) for shape in shapes * 3] for d in TORCH_DTYPES},
        "parameters": [torch.nn.Parameter(torch.rand(3, 4), requires_grad=i % 2 == 0) for i in range(9)],
        "strings": np.array(["a", "bc"], np.dtypes.StringDType()),
        "long": ["x" * 3000, bytes(range(256)) * 5],
        "large": np.arange(100_000.0),
    }
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save_state(1, state).result()
        assert_same(ckpt.load_state(), state)
    files = files_of(tmp_path, 1)
    assert (len(files[True]), len(files[False])) == (1, 1)  # the large one is a column


def test_arrays_in_many_chunks_come_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    state = {dtype.str + str(i): array_of(dtype, (20, 9), rng) for i, dtype in enumerate(STORABLE)}
    with Checkpointer(str(tmp_path), chunk_bytes=64) as ckpt:
        ckpt.save_state(1, state).result()
        assert_same(ckpt.load_state(), state)
    assert files_of(tmp_path, 1)[False] == []


def test_rows_that_did_not_change_are_not_written_again(tmp_path: Path) -> None:
    state = small()
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save_state(1, state).result()
        changed = state | {name: -state[name] for name in ("layer7.w7", "layer0.w600", "layer29.w1499")}
        info = ckpt.save_state(2, changed).result()
        assert_same(ckpt.load_state(2), changed)
        assert_same(ckpt.load_state(1), state)
    (file,) = files_of(tmp_path, 2)[True]
    with pa.memory_map(str(file)) as source:
        assert sorted(pa.ipc.open_file(source).read_all().column("path").to_pylist()) == [
            "layer0.w600",
            "layer29.w1499",
            "layer7.w7",
        ]
    manifest = (tmp_path / "manifests" / f"{info.id}.json").stat().st_size
    assert info.bytes_written - manifest < 4000


def test_equal_rows_are_written_once(tmp_path: Path) -> None:
    state = {f"a{i}": np.full(16, i % 10) for i in range(2000)}
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save_state(1, state).result()
        assert_same(ckpt.load_state(), state)
    (file,) = files_of(tmp_path, 1)[True]
    with pa.memory_map(str(file)) as source:
        assert pa.ipc.open_file(source).read_all().num_rows == 10


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = data.index((np.arange(16.0) + 1234.5).tobytes()) + 77
    data[at] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100_000])


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip, cut_short, remove])
def test_a_damaged_packed_file_is_named_and_passed_over(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    first, second = small(), {name: array + 0.5 for name, array in small().items()}
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save_state(1, first).result()
        ckpt.save_state(2, second).result()
        (file,) = files_of(tmp_path, 2)[True]
        damage(file)
        with pytest.raises(CorruptionError, match=file.name):
            ckpt.load_state(2)
        with pytest.warns(UserWarning, match="fell back to checkpoint 1-"):
            assert_same(ckpt.load_state(), first)
        if damage is flip:  # only the one row is bad
            found = ckpt.load_state(2, select=["layer4.*", "!layer4.w1234"])
            assert len(found) == 49
            assert_same(found, {name: second[name] for name in found})


def test_a_part_reads_its_own_bytes(tmp_path: Path) -> None:
    url = f"memory://{tmp_path}"
    state = {
        f"policy{k}": {f"w{i}": np.random.default_rng(100 * k + i).random(64) for i in range(50)} for k in range(40)
    }
    with Checkpointer(url) as ckpt:
        ckpt.save_state(1, state).result()
    run = Run.open(url)
    manifest = run.manifest(run.candidates(1)[0][0])
    before = run.store.stats.snapshot()
    match = match_all(view(manifest, 0), "policy17", None)
    found = load_leaves(run.store, manifest, match, False, False)
    after = run.store.stats.snapshot()
    assert_same(found, {f"policy17/{name}": array for name, array in state["policy17"].items()})
    assert after.bytes_read - before.bytes_read <= 1.05 * 50 * 64 * 8
    assert after.reads - before.reads <= 2  # rows that lie together are one request


def test_jax_arrays_come_back(tmp_path: Path) -> None:
    import jax.numpy as jnp

    state = {name: [jnp.arange(i % 5 + 1).astype(name) for i in range(90)] for name in JAX_DTYPES}
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save_state(1, state).result()
        assert_same(ckpt.load_state(), state)
