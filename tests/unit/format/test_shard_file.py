"""A shard file is an ordinary Arrow file: others open it, and values lie where `compose` says, 64-byte aligned."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_ckpt.format.shard_file import ALIGNMENT, Column, ShardFile, compose
from rl_ckpt.state.arrays import flat_bytes
from rl_ckpt.state.boxes import Box
from rl_ckpt.state.dtypes import arrow_storage, dtype_name
from tests.unit.trees import NUMPY_DTYPES, Array, array_of

STORABLE = [d for d in NUMPY_DTYPES if d.itemsize]


def column(name: str, array: Array, box: Box | None = None) -> Column:
    stored_as = dtype_name(array.dtype)
    assert stored_as is not None
    return Column(name, f"path/of/{name}", stored_as, box or Box.whole(array.shape), flat_bytes(array))


def write(columns: list[Column], path: Path) -> ShardFile:
    composed = compose(columns)
    path.write_bytes(b"".join(composed.segments))
    assert path.stat().st_size == composed.size_bytes
    return composed


@pytest.fixture
def arrays() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        "f32": rng.random((3, 5), np.float32),
        "f64": rng.random(7),
        "i8": rng.integers(-9, 9, (2, 3, 4), np.int8),
        "u64": rng.integers(0, 9, 1, np.uint64),
        "complex": (rng.random(4) + 1j * rng.random(4)).astype(np.complex64),
        "flags": rng.integers(0, 2, 9).astype(bool),
        "when": np.array(["2020-01-01", "NaT"], "M8[ns]"),
        "name": np.array([["ab", "c"]]),
    }


@pytest.mark.parametrize("mapped", [True, False])
def test_pyarrow_opens_the_file_and_finds_tensors(tmp_path: Path, arrays: dict[str, Array], mapped: bool) -> None:
    composed = write([column(name, a) for name, a in arrays.items()], tmp_path / "a.arrow")
    source = pa.memory_map(str(tmp_path / "a.arrow")) if mapped else pa.OSFile(str(tmp_path / "a.arrow"))
    with source, pa.ipc.RecordBatchFileReader(source) as reader:
        assert reader.num_record_batches == 1
        batch = reader.get_batch(0)
        batch.validate(full=True)
        assert (batch.num_rows, batch.schema.names) == (1, list(arrays))
        for i, (name, array) in enumerate(arrays.items()):
            field, values = batch.schema.field(i), batch.column(i)
            storage = arrow_storage(str(dtype_name(array.dtype)))
            assert isinstance(field.type, pa.FixedShapeTensorType)
            shape = (*array.shape, storage.per_element) if storage.per_element > 1 else array.shape
            assert tuple(field.type.shape) == shape
            assert field.metadata == {
                b"rl_ckpt.path": f"path/of/{name}".encode(),
                b"rl_ckpt.dtype": str(dtype_name(array.dtype)).encode(),
                b"rl_ckpt.shape": json.dumps(array.shape).encode(),
            }
            found = values.storage.flatten().to_numpy()
            assert found.tobytes() == array.tobytes()
            if mapped:
                buffer = values.storage.flatten().buffers()[1]
                assert buffer.address % ALIGNMENT == 0  # zero-copy: the buffer is the mapped file itself
                assert composed.offsets[i] % ALIGNMENT == 0
        tensor = batch.column(0).to_numpy_ndarray()
        np.testing.assert_array_equal(tensor[0], arrays["f32"])


def test_a_chunks_box_is_in_the_metadata(tmp_path: Path) -> None:
    part = np.arange(6.0).reshape(2, 3)
    write([column("w@4,0", part, Box((4, 0), (2, 3)))], tmp_path / "a.arrow")
    with pa.memory_map(str(tmp_path / "a.arrow")) as source:
        metadata = pa.ipc.open_file(source).schema.field(0).metadata
    assert json.loads(metadata[b"rl_ckpt.offset"]) == [4, 0]
    assert json.loads(metadata[b"rl_ckpt.shape"]) == [2, 3]


def test_polars_opens_the_file_by_itself(tmp_path: Path, arrays: dict[str, Array]) -> None:
    numbers = {name: arrays[name] for name in ("f32", "f64", "i8", "u64")} | {"f16": np.ones(3, np.float16)}
    write([column(name, a) for name, a in numbers.items()], tmp_path / "a.arrow")
    frame = polars.read_ipc(tmp_path / "a.arrow")
    assert (frame.columns, frame.height) == (list(numbers), 1)
    for name, array in numbers.items():
        assert frame[name].ext.storage()[0].to_list() == array.ravel().tolist()
        assert str(list(array.shape)).replace(" ", "") in str(frame[name].dtype)


def test_duckdb_reads_the_file(tmp_path: Path, arrays: dict[str, Array]) -> None:
    numbers = {name: arrays[name] for name in ("f32", "f64", "i8")}
    write([column(name, a) for name, a in numbers.items()], tmp_path / "a.arrow")
    with pa.memory_map(str(tmp_path / "a.arrow")) as source, duckdb.connect() as db:
        batch = pa.ipc.open_file(source).get_batch(0)
        shard = pa.table({name: batch.column(name).storage for name in numbers})  # duckdb looks the name up here
        for name, array in numbers.items():
            (found,) = db.execute(f'select "{name}" from shard').fetchall()[0]
            assert list(found) == array.ravel().tolist()
        (total,) = db.execute("select list_sum(f64::double[]) from shard").fetchall()[0]
        assert math.isclose(total, float(arrays["f64"].sum()))
        assert shard.num_rows == 1


def test_duckdb_has_no_float16(tmp_path: Path) -> None:
    """Such columns are for pyarrow and polars. When this fails, duckdb has learnt it: say so in docs/format.md."""
    write([column("h", np.ones(3, np.float16))], tmp_path / "a.arrow")
    with pa.memory_map(str(tmp_path / "a.arrow")) as source, duckdb.connect() as db:
        shard = pa.table({"h": pa.ipc.open_file(source).get_batch(0).column(0).storage})
        assert shard.num_rows == 1
        with pytest.raises(duckdb.NotImplementedException, match="e"):
            db.execute("select h from shard").fetchall()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.text(max_size=5),
            st.sampled_from(STORABLE),
            st.lists(st.integers(1, 4), min_size=0, max_size=3).map(tuple),
        ),
        min_size=1,
        max_size=8,
        unique_by=lambda item: item[0],
    )
)
def test_values_lie_where_compose_says(items: list[tuple[str, np.dtype[Any], tuple[int, ...]]]) -> None:
    rng = np.random.default_rng(0)
    columns = [column(name, array_of(dtype, shape, rng)) for name, dtype, shape in items]
    composed = compose(columns)
    data = b"".join(composed.segments)
    assert len(data) == composed.size_bytes
    ends = [0]
    for one, offset in zip(columns, composed.offsets, strict=True):
        assert offset % ALIGNMENT == 0
        assert offset >= ends[-1]
        assert data[offset : offset + len(one.data)] == one.data
        ends.append(offset + len(one.data))
    batch = pa.ipc.open_file(pa.py_buffer(data)).get_batch(0)
    batch.validate(full=True)
    assert batch.schema.names == [c.name for c in columns]
    found = [batch.column(i).storage.flatten().to_numpy().tobytes() for i in range(len(columns))]
    assert found == [bytes(c.data) for c in columns]


def test_composing_copies_no_values() -> None:
    array = np.zeros(1 << 20, np.uint8)
    composed = compose([column("a", array), column("b", array[:7])])
    held = [s for s in composed.segments if isinstance(s, memoryview)]
    array[5] = 9
    assert [s[5] for s in held] == [9, 9]
    assert sum(len(s) for s in composed.segments if isinstance(s, bytes)) < 5000


def test_very_many_columns_fit() -> None:
    columns = [column(f"c{i}", np.full(i % 5 + 1, i, np.int32)) for i in range(3000)]
    data = b"".join(compose(columns).segments)
    batch = pa.ipc.open_file(pa.py_buffer(data)).get_batch(0)
    assert [batch.column(i).storage.flatten()[0].as_py() for i in range(3000)] == list(range(3000))
