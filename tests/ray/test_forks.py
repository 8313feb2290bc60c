"""Forks through Ray actors: shard servers and workers read the source's files, and saves refer to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_ckpt import Checkpointer, fork
from tests.ray.holders import WAIT_S, give, on_nodes, same, server_stats, states_of, total
from tests.s3_servers import S3Server

FROZEN = np.random.default_rng(5).random(1 << 17)  # 1 MiB


def state(rank: int, step: int) -> dict[str, Any]:
    return {"frozen": FROZEN, "own": np.full(1000, 100.0 * rank + step), "step": step}


@pytest.fixture(scope="module")
def workers(three_nodes: Any) -> list[Any]:
    return on_nodes(3)


@pytest.fixture(params=["s3", "disk"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    if request.param == "disk":
        return str(tmp_path), {}
    server: S3Server = request.getfixturevalue("moto_server")
    return f"s3://{server.new_bucket()}/runs", server.storage_options()


def test_a_fork_is_restored_and_saved_to_like_any_run(place: tuple[str, dict[str, Any]], workers: list[Any]) -> None:
    root, options = place
    give(workers, [state(rank, 1) for rank in range(3)])
    with Checkpointer(f"{root}/source", storage_options=options) as ckpt:
        whole = ckpt.save(1, workers).result(WAIT_S)
    fork(f"{root}/source", f"{root}/fork", storage_options=options)
    give(workers, [state(9, 9) | {"frozen": np.zeros(len(FROZEN))} for _ in range(3)])
    with Checkpointer(f"{root}/fork", storage_options=options) as ckpt:
        report = ckpt.restore(workers)
        for rank, found in enumerate(states_of(workers)):
            same(found, state(rank, 1))
        if root.startswith("s3"):
            assert report.bytes_from["store"] == whole.bytes, "each chunk once"
        else:
            assert set(report.bytes_from) == {"files"}, "workers read the source's files themselves"
        before = total(server_stats(ckpt), "store_bytes_written")
        give(workers, [state(rank, 2) for rank in range(3)])
        info = ckpt.save(2, workers).result(WAIT_S)
        assert info.bytes == whole.bytes
        assert total(server_stats(ckpt), "store_bytes_written") - before < 50_000 < FROZEN.nbytes
    with Checkpointer(f"{root}/fork", storage_options=options) as ckpt:  # with actors that remember nothing
        give(workers, [state(9, 9) | {"frozen": np.zeros(len(FROZEN))} for _ in range(3)])
        assert ckpt.restore(workers).step == 2
        for rank, found in enumerate(states_of(workers)):
            same(found, state(rank, 2))
        same(ckpt.load_state(1), state(0, 1))
        assert ckpt.verify().ok


def test_a_source_that_is_gone_is_named_and_what_needs_none_of_it_is_restored(
    tmp_path: Path, workers: list[Any]
) -> None:
    give(workers, [state(0, 1)] * 3)
    with Checkpointer(str(tmp_path / "source")) as ckpt:
        ckpt.save(1, workers).result(WAIT_S)
    fork(str(tmp_path / "source"), str(tmp_path / "fork"))
    with Checkpointer(str(tmp_path / "fork"), memory_tier=False) as ckpt:
        give(workers, [state(0, 2)] * 3)
        ckpt.save(2, workers).result(WAIT_S)
        give(workers, [state(0, 3) | {"frozen": FROZEN + 1}] * 3)
        ckpt.save(3, workers).result(WAIT_S)  # whole
        ckpt.restore(workers, step=2)
        give(workers, [state(0, 4)] * 3)
        leaning = ckpt.save(4, workers).result(WAIT_S)
        (tmp_path / "source").rename(tmp_path / "moved")
        report = ckpt.restore(workers)
        assert report.step == 3
        assert f"forked from the run at file://{tmp_path}/source" in report.fell_back[leaning.id]
