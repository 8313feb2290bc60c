"""Small runs with all that a checkpoint may hold, as files in memory, and where to damage them."""

from __future__ import annotations

import functools
import shutil
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from rl_ckpt import Checkpointer
from rl_ckpt.format import records
from rl_ckpt.format.records import PinRecord
from tests.unit import trees

Tree = dict[str, Any]


@dataclass(repr=False)
class SavedRun:
    """A run: its files by name, and what was saved by step."""

    files: dict[str, bytes]
    saved: dict[int, Tree]
    kinds: dict[str, list[str]] = field(default_factory=dict)
    """Names of the files, by class."""

    def __post_init__(self) -> None:
        """Sorts the files into classes."""
        for name in sorted(self.files):
            self.kinds.setdefault(name.split("/")[0], []).append(name)


def save(folder: Path, saved: dict[int, Tree], back_to: dict[int, int], chunk_bytes: int) -> SavedRun:
    """Saves states; `back_to`: before this step, the job restores that one, so that the two are branches."""
    with Checkpointer(str(folder), chunk_bytes=chunk_bytes, write_streams=2) as ckpt:
        for step, tree in saved.items():
            if step in back_to:
                ckpt.load_state(back_to[step])
            ckpt.save_state(step, tree, metrics={"loss": 0.5 * step}, tag="best" if step == 2 else None).result(60)
        newest = ckpt.latest()
    assert newest is not None
    pin = PinRecord(checkpoint=newest.id, by="a reader", expires=4e9)
    (folder / "pins").mkdir()
    (folder / "pins/1.json").write_bytes(records.encode(pin))
    (folder / "leases").mkdir()
    (folder / "leases/1.json").write_bytes(records.encode(PinRecord(checkpoint="-", by="an owner", expires=1.0)))
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    shutil.rmtree(folder)
    return SavedRun(files, saved)


def every_kind(step: int) -> Tree:
    """A state of all kinds and dtypes: half of it as in every step, half of this one only."""
    frozen, fresh = np.random.default_rng(0), np.random.default_rng(step)
    rng = [frozen, fresh]
    numpy = {f"{i}": trees.array_of(d, (3, 2), rng[i % 2]) for i, d in enumerate(trees.NUMPY_DTYPES)}
    torch = {f"{i}": trees.tensor_of(d, (5,), rng[i % 2]) for i, d in enumerate(trees.TORCH_DTYPES)}
    jax = [jnp.asarray(trees.array_of(trees.dtype_from_name(d), (2, 2), fresh)) for d in trees.JAX_DTYPES]
    plain = [None, True, 2**70, float("nan"), -0.0, 1j, "a\ud800", b"\0", np.float32(step), np.str_("x")]
    return {
        "step": step,
        "numpy": numpy,
        "torch": torch,
        "jax": jax,
        "plain": OrderedDict(enumerate([*plain, np.empty((0, 2)), np.array(step)])),
        "long": ("text " * 500, b"bytes" * 500, f"{step} " * 600),
        "frozen": frozen.random((40, 7)),
        "fresh": fresh.random((7, 40)),
        "strings": np.array(["a", "bc"], np.dtypes.StringDType()),
    }


def many_small(step: int) -> Tree:
    """So many small arrays that they are packed; a third of them new in every step."""
    return {"step": step, "w": [np.full(4, step * 10_000 + i if i % 3 == 0 else i) for i in range(1100)]}


def make_runs(folder: Path) -> tuple[SavedRun, SavedRun, SavedRun]:
    """One of every kind of leaf, with two branches that hold the same bytes; one of packed files; a stranger."""
    kinds = {step: every_kind(step) for step in (2, 3, 4)}
    first = save(folder / "a", {1: {"step": 1, "n": np.ones(3)}, **kinds}, {3: 1}, 256)
    packed = save(folder / "b", {1: many_small(1), 2: many_small(2)}, {}, 1 << 20)
    stranger = save(folder / "c", {2: {"step": -2, "frozen": np.zeros(9)}, 3: {"step": -3}}, {}, 256)
    return first, packed, stranger


@functools.cache
def zones(name: str, data: bytes) -> list[tuple[int, int]]:
    """Parts of a file that mean different things, as ranges of bytes; of a shard file: head, values, end."""
    if not name.endswith(".arrow"):
        return [(0, len(data)), (0, min(64, len(data))), (max(0, len(data) - 64), len(data))]
    source = pa.BufferReader(data)
    batch = pa.ipc.open_file(source).get_batch(0)
    base = pa.py_buffer(data).address
    buffers = [b for column in batch.columns for b in _storage(column).buffers() if b is not None and b.size]
    low, high = min(b.address for b in buffers) - base, max(b.address + b.size for b in buffers) - base
    return [(0, 8), (8, low), (low, high), (high, len(data) - 10), (len(data) - 10, len(data))]


def _storage(column: pa.Array) -> pa.Array:
    return column.storage if isinstance(column, pa.ExtensionArray) else column
