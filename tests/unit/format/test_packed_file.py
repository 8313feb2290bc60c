"""A packed file is an ordinary Arrow file: others open it, and values lie where `compose` says, each aligned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_ckpt.format.packed_file import Rows, compose
from rl_ckpt.format.shard_file import ALIGNMENT, ShardFile
from rl_ckpt.state.arrays import flat_bytes
from rl_ckpt.state.boxes import Box
from rl_ckpt.state.dtypes import dtype_name
from tests.unit.trees import Array

WEIGHTS = {
    "layer/0": np.arange(6.0).reshape(2, 3),
    "layer/1": np.arange(4, dtype=np.float32),
    "layer/2": np.array([True, False, True]),
}


def rows_of(arrays: dict[str, Array], gap: int = 0) -> tuple[Rows, memoryview]:
    """Arrays as they are staged, with so many bytes between them that belong to nobody."""
    staged, starts = bytearray(), []
    for array in arrays.values():
        starts.append(len(staged))
        staged += bytes(flat_bytes(array)) + b"\xee" * gap
    return Rows(
        list(arrays),
        [None] * len(arrays),
        [str(dtype_name(a.dtype)) for a in arrays.values()],
        [Box.whole(a.shape) for a in arrays.values()],
        starts,
        [a.nbytes for a in arrays.values()],
    ), memoryview(staged)


def write(path: Path, arrays: dict[str, Array], gap: int = 0) -> ShardFile:
    composed = compose(*rows_of(arrays, gap))
    path.write_bytes(b"".join(composed.segments))
    assert path.stat().st_size == composed.size_bytes
    return composed


@pytest.mark.parametrize("gap", [0, 1, 64])
def test_pyarrow_opens_the_file_and_finds_a_row_a_chunk(tmp_path: Path, gap: int) -> None:
    composed = write(tmp_path / "a.arrow", WEIGHTS, gap)
    with pa.memory_map(str(tmp_path / "a.arrow")) as source, pa.ipc.RecordBatchFileReader(source) as reader:
        assert reader.num_record_batches == 1
        batch = reader.get_batch(0)
        batch.validate(full=True)
        assert batch.schema.metadata == {b"rl_ckpt.layout": b"packed"}
        assert batch.drop_columns(["values"]).to_pylist() == [
            {"path": path, "rank": None, "dtype": str(a.dtype), "offset": [0] * a.ndim, "shape": list(a.shape)}
            for path, a in WEIGHTS.items()
        ]
        values = batch.column("values").buffers()[2]
        assert values.address % ALIGNMENT == 0  # zero-copy: the buffer is the mapped file itself
        assert composed.offsets[0] % ALIGNMENT == 0
        for found, array in zip(batch.column("values"), WEIGHTS.values(), strict=True):
            assert np.frombuffer(found.as_buffer(), array.dtype).tolist() == array.ravel().tolist()


def test_ranks_and_boxes_are_columns(tmp_path: Path) -> None:
    part = Box((4, 0), (2, 3))
    composed = compose(
        Rows(["w", "rng"], [None, 3], ["uint8"] * 2, [part, Box((0,), (1,))], [0, 6], [6, 1]), memoryview(b"abcdefg")
    )
    table = pa.ipc.open_file(b"".join(composed.segments)).read_all()
    assert table.column("rank").to_pylist() == [None, 3]
    assert table.column("offset").to_pylist() == [[4, 0], [0]]
    assert table.column("shape").to_pylist() == [[2, 3], [1]]
    assert table.column("values").to_pylist() == [b"abcdef", b"g"]


def test_polars_opens_the_file_by_itself(tmp_path: Path) -> None:
    write(tmp_path / "a.arrow", WEIGHTS)
    frame = polars.read_ipc(tmp_path / "a.arrow")
    found = frame.filter(polars.col("dtype") == "float64")
    assert (found["path"].to_list(), found["shape"].to_list()) == (["layer/0"], [[2, 3]])
    assert np.frombuffer(found["values"][0]).tolist() == [0, 1, 2, 3, 4, 5]


def test_duckdb_reads_the_file(tmp_path: Path) -> None:
    write(tmp_path / "a.arrow", WEIGHTS)
    with pa.memory_map(str(tmp_path / "a.arrow")) as source, duckdb.connect() as db:
        packed = pa.ipc.open_file(source).read_all()  # duckdb looks the name up here
        found = db.execute(
            'select path, shape, octet_length("values") from packed where dtype <> $1 order by path', ["bool"]
        )
        assert found.fetchall() == [("layer/0", [2, 3], 48), ("layer/1", [4], 16)]
        assert packed.num_rows == 3


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.text(max_size=5), st.integers(1, 200), st.integers(0, 3)), min_size=1, max_size=40))
def test_values_lie_where_compose_says(items: list[tuple[str, int, int]]) -> None:
    rng = np.random.default_rng(0)
    staged, starts = bytearray(), []
    for _, size, gap in items:
        staged += b"\xee" * gap
        starts.append(len(staged))
        staged += rng.bytes(size)
    sizes = [size for _, size, _ in items]
    boxes = [Box((0,), (size,)) for size in sizes]
    rows = Rows([path for path, _, _ in items], [None] * len(items), ["uint8"] * len(items), boxes, starts, sizes)
    composed = compose(rows, memoryview(staged))
    data = b"".join(composed.segments)
    assert len(data) == composed.size_bytes
    for start, size, offset in zip(starts, sizes, composed.offsets, strict=True):
        assert data[offset : offset + size] == staged[start : start + size]
    table = pa.ipc.open_file(data).read_all()
    table.validate(full=True)
    assert table.column("path").to_pylist() == rows.paths
    assert table.column("values").to_pylist() == [
        bytes(staged[start : start + size]) for start, size in zip(starts, sizes, strict=True)
    ]


def test_composing_copies_no_values() -> None:
    rows, staged = rows_of({f"{i}": np.zeros(1000, np.uint8) for i in range(100)})
    composed = compose(rows, staged)
    np.frombuffer(staged, np.uint8)[5] = 9
    (held,) = [s for s in composed.segments if len(s) == 100_000]  # rows side by side are one segment
    assert held[5] == 9
    assert composed.size_bytes < 110_000


def test_very_many_rows_cost_little() -> None:
    count = 20_000
    box = Box((0,), (4,))
    rows = Rows(
        [f"layer/{i}" for i in range(count)],
        [None] * count,
        ["uint8"] * count,
        [box] * count,
        range(0, 4 * count, 4),
        [4] * count,
    )
    composed = compose(rows, memoryview(bytes(4 * count)))
    assert composed.size_bytes - 4 * count < 80 * count
    assert len(composed.segments) < 30
    table: Any = pa.ipc.open_file(b"".join(composed.segments)).read_all()
    assert table.num_rows == count
