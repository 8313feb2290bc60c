"""docs/format.md is enough: the reader on that page, run from the page itself, reads what the package wrote."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

import rl_ckpt
from tests.project.doc_blocks import python_blocks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "format.md"
Reader = Callable[..., Any]


@pytest.fixture(scope="module")
def read() -> Reader:
    (code,) = [block.code for block in python_blocks(PAGE.read_text()) if "def read(" in block.code]
    assert "rl_ckpt" not in code
    assert len([line for line in code.splitlines() if line.strip()]) <= 60
    namespace: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), namespace)
    reader: Reader = namespace["read"]
    return reader


def _same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            _same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            _same(one, other)
    elif isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()
    elif isinstance(expected, float) and math.isnan(expected):
        assert math.isnan(found)
    else:
        assert found == expected


def _state() -> dict[Any, Any]:
    rng = np.random.default_rng(0)
    weights = rng.random((300, 200))
    tensor = torch.arange(10, dtype=torch.bfloat16)
    return {
        "weights": weights,
        "tied": weights,
        "torch": {"bf16": tensor, "param": torch.nn.Parameter(torch.ones(3)), "flag": torch.tensor([True, False])},
        "dtypes": [
            np.arange(4).astype(name)
            for name in ("int8", "uint64", "float16", "complex64", ">f4", "<M8[ns]", ml_dtypes.float8_e4m3fn, "g")
        ],
        "text": np.array(["ab", "c"]),
        "records": np.zeros(2, [("x", "i4"), ("y", "f8")]),
        0: (1, 2**60, -(2**70), float("nan"), -0.0, float("-inf"), 1.5, None, True, "ü", "\ud800", b"\x00", 2 - 1j),
        "0": OrderedDict([("b", np.float32(1.5)), ("a", np.int64(3))]),
        "a/b~": {"": [], -3: {}, "-3": ()},
        "small": [np.array(3), np.zeros((0, 3))],
        "long": ["x" * 5000, bytes(5000)],
        "numpy text": [np.str_("a\0"), np.bytes_(b"b\0")],
    }


def test_the_reader_gives_what_load_state_gives(tmp_path: Path, read: Reader) -> None:
    with rl_ckpt.Checkpointer(str(tmp_path), chunk_bytes=64 << 10) as ckpt:
        ckpt.save_state(1, {"older": 1}).result()
        ckpt.save_state(2, _state()).result()
        found = read(tmp_path.as_uri())
        _same(found, ckpt.load_state(as_numpy=True))
    assert found["tied"] is found["weights"]


def test_the_reader_reads_packed_files(tmp_path: Path, read: Reader) -> None:
    state = {f"layer{i}": {"w": np.arange(i % 7 + 1.0) + i, "b": np.arange(3).astype("<i2") - i} for i in range(1000)}
    state["mixed"] = {"large": np.arange(30_000.0), "bf16": np.arange(5).astype(ml_dtypes.bfloat16)}
    with rl_ckpt.Checkpointer(str(tmp_path), write_streams=1) as ckpt:
        ckpt.save_state(1, state).result()
        _same(read(tmp_path.as_uri()), state)
    layouts = [pa.ipc.open_file(file).schema.metadata for file in sorted(tmp_path.rglob("*.arrow"))]
    assert layouts == [None, {b"rl_ckpt.layout": b"packed"}]


def test_the_reader_follows_chunks_of_older_checkpoints(tmp_path: Path, read: Reader) -> None:
    state = {"frozen": np.arange(1000.0), "step": np.zeros(4)}
    with rl_ckpt.Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save_state(1, state).result()
        info = ckpt.save_state(2, {**state, "step": np.ones(4)}).result()
        assert info.bytes_written < info.bytes
        _same(read(tmp_path.as_uri()), ckpt.load_state())


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    yield
    ray.shutdown()


def test_the_reader_sees_each_rank(tmp_path: Path, read: Reader, cluster: None) -> None:
    class Worker:  # inside the function, so that Ray sends it by value
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def get_state(self) -> dict[str, Any]:
            return {
                "weights": np.arange(6.0),
                "rng": np.arange(3) + self.rank,
                "steps": self.rank,
                "table": rl_ckpt.Sharded(np.full((2, 3), self.rank, "f4"), (4, 3), (2 * self.rank, 0)),
                **({"leader": "yes"} if self.rank == 0 else {}),
            }

    with rl_ckpt.Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save(1, [ray.remote(Worker).remote(rank) for rank in range(2)]).result()
        for rank in range(2):
            found = read(tmp_path.as_uri(), rank)
            assert (found["steps"], "leader" in found) == (rank, rank == 0)
            assert found["table"][:, 0].tolist() == [0, 0, 1, 1]
            _same(found, ckpt.load_state(rank=rank))


def test_the_reader_notices_a_flipped_bit(tmp_path: Path, read: Reader) -> None:
    with rl_ckpt.Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save_state(1, {"w": np.full(64, 7, np.uint8)}).result()
    (shard_file,) = tmp_path.rglob("*.arrow")
    data = shard_file.read_bytes()
    shard_file.write_bytes(data.replace(b"\x07" * 64, b"\x07" * 63 + b"\x06"))
    with pytest.raises(AssertionError, match="damaged"):
        read(tmp_path.as_uri())
