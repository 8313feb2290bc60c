"""What is only in memory can be written later: its manifest is enough to plan that."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from rl_ckpt.format.digest import digest
from rl_ckpt.plan.deal import deal, settle
from rl_ckpt.plan.parts import memory_entries, plan_of_memory
from tests.unit.plan.model import flatten_all, manifest_of, merge_all


def small(rank: int) -> dict[str, Any]:
    return {
        "shared": np.arange(100.0),
        "differs": np.full(50, rank),
        "some": np.arange(rank + 1),
        "none": np.zeros(0),
        **({"only": np.ones(5)} if rank else {}),
        "same": {"a": np.ones(9), "b": np.ones(9)},
    }


def many(rank: int) -> dict[str, Any]:
    """More small chunks than are columns: packed files too."""
    return {"big": np.arange(1 << 15), **{str(i): np.full(1 + i % 3, i, "i2" if i % 2 else "f8") for i in range(3000)}}


@pytest.mark.parametrize("state", [small, many])
@pytest.mark.parametrize("servers", [["s0", "s0"], ["s0", "s1"]])
def test_the_files_are_those_that_the_save_would_have_written(state: Any, servers: list[str]) -> None:
    merged = merge_all(flatten_all([state(rank) for rank in range(2)]), 256)
    plan = deal(merged, servers, 2, 1 << 20)
    digests = {
        (server, column.offset): digest(f"{column.path} {column.box}".encode())
        for server, files in plan.files.items()
        for file in files
        for column in file.columns
    }
    manifest = manifest_of(merged, *memory_entries(plan, digests))
    again, found = plan_of_memory(manifest, 2, 1 << 20)
    assert found == digests
    assert again.files == plan.files
    assert again.sources == plan.sources
    assert not again.staged_bytes, "no memory is asked for"
    tried_again = plan_of_memory(manifest, 2, 1 << 20, ".again")[0]
    assert set(tried_again.files) == {f"{name}.again" for name in plan.files}
    first, second = settle(plan, "1-x", digests, {}), settle(again, "1-x", digests, {})
    assert dataclasses.replace(second, merged=first.merged, staged_bytes=first.staged_bytes, stage=first.stage) == first
    assert [(a.path, a.spec, a.rank, [c.box for c in a.chunks]) for a in second.merged.arrays] == [
        (a.path, a.spec, a.rank, [c.box for c in a.chunks]) for a in first.merged.arrays
    ]
