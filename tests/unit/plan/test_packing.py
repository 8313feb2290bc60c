"""Many small chunks go into packed files: contiguous in staging memory, each aligned for its dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_ckpt import PerRank
from rl_ckpt.errors import InvalidInputError
from rl_ckpt.format.digest import digest
from rl_ckpt.format.shard_file import ALIGNMENT
from rl_ckpt.plan import deal as deals
from rl_ckpt.plan.deal import SavePlan, StageItem, deal, settle
from rl_ckpt.plan.inventory import chunk_host, take_inventory
from rl_ckpt.plan.stage import stage
from rl_ckpt.state.arrays import flat_bytes
from rl_ckpt.state.boxes import Box
from rl_ckpt.state.dtypes import dtype_from_name
from rl_ckpt.state.tree import LocalArray, flatten
from tests.unit.plan.model import flatten_all, merge_all
from tests.unit.trees import LAYOUTS, NUMPY_DTYPES, array_of

STORABLE = [d for d in NUMPY_DTYPES if d.itemsize]


@pytest.fixture(scope="module", autouse=True)
def few_columns() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deals, "COLUMNS_BEFORE_PACKING", 4)
        patch.setattr(deals, "PACK_BELOW_BYTES", 1 << 10)
        yield


def planned(states: list[Any], streams: int = 2) -> SavePlan:
    return deal(merge_all(flatten_all(states), 1 << 20), ["s"] * len(states), streams, 1 << 30)


def test_a_few_small_chunks_are_columns() -> None:
    (file,) = planned([{f"a{i}": np.arange(8) + i for i in range(4)}]).files["s"]
    assert not file.packed


def test_many_small_chunks_are_rows_and_large_ones_are_columns() -> None:
    state = {f"a{i}": np.arange(8) + i for i in range(5)} | {"large": np.arange(128.0), "just below": np.arange(127.0)}
    columns, rows = planned([state]).files["s"]
    assert (columns.packed, [c.path for c in columns.columns]) == (False, ["large"])
    assert rows.packed
    assert {c.path for c in rows.columns} == state.keys() - {"large"}


def test_rows_know_their_rank() -> None:
    states = [{"own": {f"a{i}": PerRank(np.full(3, i + rank)) for i in range(5)}, "w": np.ones(3)} for rank in range(2)]
    (file,) = planned(states, streams=1).files["s"]
    assert {(c.path, c.rank) for c in file.columns} == {(f"own/a{i}", r) for i in range(5) for r in range(2)} | {
        ("w", None)
    }


def test_rows_are_split_into_files_by_bytes() -> None:
    files = planned([{f"a{i}": np.full(125, i) for i in range(4000)}], streams=4).files["s"]
    assert [sum(c.bytes for c in file.columns) for file in files] == 15 * [263_000] + [55_000]
    assert all(file.columns[0].offset % ALIGNMENT == 0 for file in files)


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=2).map(tuple)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(st.sampled_from(STORABLE), sizes), min_size=5, max_size=20), st.integers(1, 3), st.data())
def test_rows_lie_side_by_side_and_aligned(items: list[tuple[Any, Any]], world: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(0)
    state = {f"a{i}": array_of(dtype, shape, rng) for i, (dtype, shape) in enumerate(items)}
    plan = planned([state] * world)
    for file in plan.files["s"]:
        end = file.columns[0].offset
        for row in file.columns if file.packed else ():
            assert row.offset == end
            end += row.bytes
    # What settle drops leaves gaps in staging memory, which the file has not: rows stay aligned there all the same.
    dropped = data.draw(st.sets(st.sampled_from([c.offset for f in plan.files["s"] for c in f.columns])))
    found = {
        ("s", c.offset): digest(str((c.path, c.offset in dropped)).encode()) for f in plan.files["s"] for c in f.columns
    }
    stored = {(found["s", c.offset], c.bytes): OLD for f in plan.files["s"] for c in f.columns if c.offset in dropped}
    settled = settle(plan, "1-x", found, stored).files.get("s", [])
    assert [file.name for file in settled] == [f"shards/1-x/s-{k}.arrow" for k in range(len(settled))]
    assert {row.path for file in settled if file.packed for row in file.columns} <= {
        row.path for file in plan.files["s"] if file.packed for row in file.columns
    }
    for file in settled:
        at = 0
        for row in file.columns if file.packed else ():
            assert row.offset not in dropped
            assert at % dtype_from_name(row.dtype).alignment == 0
            at += row.bytes


OLD: Any = (None, None)  # settle asks only whether a chunk is there


def placed(state: dict[str, Any], pad: int) -> tuple[Any, list[StageItem], memoryview]:
    """A tree, and an item for each array of it, side by side or apart."""
    flat, items, at = flatten(state), [], 0
    for path in flat.arrays:
        node = flat.nodes[path]
        assert isinstance(node, LocalArray)
        size = node.box.size * dtype_from_name(node.spec.dtype).itemsize
        items.append(StageItem(path, node.box, at, size, b""))
        at += size + pad
    return flat, items, memoryview(bytearray(at))


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(st.sampled_from(STORABLE), sizes, st.sampled_from(sorted(LAYOUTS))), max_size=8),
    st.sampled_from([0, 1, 8]),
)
def test_staged_bytes_are_the_arrays_own(items: list[tuple[Any, Any, str]], pad: int) -> None:
    rng = np.random.default_rng(0)
    state = {f"a{i}": LAYOUTS[layout](array_of(dtype, shape, rng)) for i, (dtype, shape, layout) in enumerate(items)}
    flat, orders, memory = placed({k: v for k, v in state.items() if v.size}, pad)
    digests = stage(flat, orders, memory)
    for item, found in zip(orders, digests, strict=True):
        staged = memory[item.offset : item.offset + item.size_bytes]
        assert staged == flat_bytes(chunk_host(flat, item.path, item.box))
        assert found == digest(staged)


def test_runs_end_at_large_chunks_and_keep_the_order() -> None:
    state = {
        "a": np.arange(3.0),
        "b": np.arange(3.0) + 1,
        "large": np.arange(5000.0),
        "c": np.ones(2),
        "d": np.ones(2, "f4"),
    }
    flat, orders, memory = placed(state, 0)
    assert stage(flat, orders, memory) == [digest(array) for array in state.values()]
    assert bytes(memory) == b"".join(array.tobytes() for array in state.values())


def test_tiny_arrays_that_changed_since_they_were_hashed_are_named() -> None:
    state = {f"a{i}": np.arange(4) + i for i in range(6)}
    flat, orders, memory = placed(state, 0)
    hashed = [StageItem(i.path, i.box, i.offset, i.size_bytes, digest(state[i.path])) for i in orders]
    state["a2"][0] = 99
    state["a4"][3] = 99
    with pytest.raises(InvalidInputError, match=r"arrays at \['a2', 'a4'\] changed while they were being saved"):
        stage(flat, hashed, memory)


def test_parts_of_an_array_are_staged_as_runs_too() -> None:
    whole = np.arange(12.0).reshape(4, 3)
    flat = flatten({"w": whole})
    orders = [StageItem("w", Box((row, 0), (1, 3)), 24 * row, 24, b"") for row in range(4)]
    memory = memoryview(bytearray(96))
    assert stage(flat, orders, memory) == [digest(row) for row in whole]
    assert bytes(memory) == whole.tobytes()


def test_what_lies_between_fields_is_hashed_alike_every_time() -> None:
    dtype = np.dtype({"names": ["x", "y"], "formats": ["u2", "f4"], "offsets": [2, 12], "itemsize": 24})
    records = np.frombuffer(bytearray(np.random.default_rng(0).bytes(24 * 6)), dtype).reshape(2, 3)
    flat = flatten({"records": records.T})
    expected = b"".join(row.tobytes() for row in records.T.copy(order="K").T.reshape(2, 3).view("V24").T)
    assert bytes(flat_bytes(chunk_host(flat, "records", Box.whole((3, 2))))) == expected
    memory = memoryview(bytearray(b"\xee" * 144))
    assert stage(flat, [StageItem("records", Box.whole((3, 2)), 0, 144, b"")], memory) == [digest(expected)]
    assert memory == expected


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_arrays_are_known_by_their_values_in_c_order_whatever_their_layout(layout: str) -> None:
    array = LAYOUTS[layout](np.arange(12.0).reshape(3, 4))
    part = next(part for part in take_inventory(flatten({"w": array}), 1 << 20, 2).parts if "w" in part.nodes)
    found = part.identities["w"]
    assert found == digest(array.tobytes())
