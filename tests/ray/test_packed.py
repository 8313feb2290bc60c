"""Workers with many small arrays of every sort: packed files hold them, and they come back on any number of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest

from rl_ckpt import Checkpointer, PerRank, Replicated, Sharded
from tests.ray.holders import WAIT_S, Holder, copied, give, same, states_of
from tests.s3_servers import S3Server

pytestmark = pytest.mark.usefixtures("ray_node")

COUNT = 700
DTYPES = ["f8", "f4", "i2", "?", ml_dtypes.bfloat16, "c16", "U3"]


@pytest.fixture(scope="module")
def pool(ray_node: None) -> list[Any]:
    return [Holder.remote() for _ in range(3)]


def state(rank: int, world: int, factor: int, fill: bool = True) -> dict[str, Any]:
    mine = slice(rank * 12 // world, (rank + 1) * 12 // world)
    value = factor if fill else 0
    return {
        "replicas": {f"w{i}": (np.arange(i % 9 + 1) * value + i).astype(DTYPES[i % 7]) for i in range(COUNT)},
        "declared": Replicated({f"w{i}": np.full(5, i * value) for i in range(COUNT)}),
        "own": PerRank([np.full(3, (1000 * rank + i) * value, "f4") for i in range(COUNT)]),
        "shards": [Sharded(np.arange(12.0)[mine] * (value + i), (12,), (mine.start,)) for i in range(COUNT)],
        "large": np.arange(50_000.0) * value,
    }


def rows(root: Path) -> list[dict[str, Any]]:
    out = []
    for path in root.rglob("*.arrow"):
        with pa.memory_map(str(path)) as source:
            file = pa.ipc.open_file(source)
            if file.schema.metadata:
                out += file.read_all().drop_columns("values").to_pylist()
    return out


def test_every_sort_of_small_array_comes_back_on_other_workers(tmp_path: Path, pool: list[Any]) -> None:
    give(pool[:2], [state(rank, 2, 3) for rank in range(2)])
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save(1, pool[:2]).result(WAIT_S)
        give(pool, [state(rank, 3, 3, fill=False) for rank in range(3)])
        ckpt.restore(pool)
    found = rows(tmp_path)
    assert sum(row["rank"] is not None for row in found) == 2 * COUNT
    assert sum(row["path"].startswith("shards/") for row in found) == 2 * COUNT
    for rank, tree in enumerate(states_of(pool)):
        expected = copied(state(rank, 3, 3))
        if rank == 2:  # nobody had its rank
            expected["own"] = state(rank, 3, 3, fill=False)["own"]
        for name in expected:
            same({name: tree[name]}, {name: plain(expected[name])})


def plain(tree: Any) -> Any:
    """Without declarations: those do not come back."""
    if isinstance(tree, PerRank | Replicated):
        return plain(tree.tree)
    if isinstance(tree, Sharded):
        return tree.array
    return [plain(child) for child in tree] if isinstance(tree, list) else tree


def test_packed_files_are_fetched_from_s3(pool: list[Any], moto_server: S3Server) -> None:
    url = f"s3://{moto_server.new_bucket()}/run"
    give(pool[:2], [state(rank, 2, 2) for rank in range(2)])
    with Checkpointer(url, storage_options=moto_server.storage_options()) as ckpt:
        ckpt.save(1, pool[:2]).result(WAIT_S)
        give(pool[:2], [state(rank, 2, 2, fill=False) for rank in range(2)])
        ckpt.restore(pool[:2])
    for rank, tree in enumerate(states_of(pool[:2])):
        same(tree, {name: plain(child) for name, child in copied(state(rank, 2, 2)).items()})
