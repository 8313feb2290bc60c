"""One policy out of a hundred costs its own bytes and little else, counted at the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_ckpt import Checkpointer
from rl_ckpt.store.run import Run
from tests.s3_servers import S3Server
from tests.unit.trees import assert_same

POLICY_BYTES = 1 << 20


def policy(i: int) -> dict[str, Any]:
    values = np.random.default_rng(i).random(POLICY_BYTES // 8)
    return {"w": values[:-1000].copy(), "b": values[-1000:].copy(), "name": f"policy {i}"}


def assert_reads_only_one(ckpt: Checkpointer, monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt.save_state(0, {"policies": {f"p{i}": policy(i) for i in range(100)}}).result(60)
    opened: list[Run] = []
    open_run = Run.open

    def spy(*args: Any) -> Run:
        opened.append(open_run(*args))
        return opened[-1]

    monkeypatch.setattr("rl_ckpt.checkpointer.Run.open", spy)
    found = ckpt.load_state(select="policies/p42/*")
    assert_same(found, {"policies": {"p42": policy(42)}})
    (run,) = opened
    read = run.store.stats.snapshot().bytes_read
    assert POLICY_BYTES <= read <= 1.1 * POLICY_BYTES, "with the log and the manifest"


def test_from_a_local_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        assert_reads_only_one(ckpt, monkeypatch)


def test_from_s3(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"s3://{moto_server.new_bucket()}/run"
    with Checkpointer(url, storage_options=moto_server.storage_options()) as ckpt:
        assert_reads_only_one(ckpt, monkeypatch)
