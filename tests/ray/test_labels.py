"""Labels beside a job of Ray actors: its coordinator keeps what is tagged, and removes what it is asked to."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from rl_ckpt import Catalog, Checkpointer, LatestN, RunOwnedError
from tests.ray.holders import WAIT_S, Holder, give

pytestmark = pytest.mark.usefixtures("ray_node")


def test_a_coordinator_goes_by_labels(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    team = [Holder.remote() for _ in range(2)]  # type: ignore[attr-defined]
    catalog = Catalog(url)
    with Checkpointer(url, keep=[LatestN(2)], grace_s=0) as ckpt:

        def save(step: int, *left: int) -> None:
            give(team, [{"w": np.full(100, step), "rank": rank} for rank in range(2)])
            ckpt.save(step, team).result(WAIT_S)
            until = time.monotonic() + WAIT_S
            while [info.step for info in catalog.checkpoints()] != [*left]:  # the sweep comes after the save
                assert time.monotonic() < until, [info.step for info in catalog.checkpoints()]

        save(1, 1)
        catalog.tag(1, "first")
        save(2, 1, 2)
        save(3, 1, 2, 3)
        assert len(catalog.remove(2).requested) == 1  # the sweep after that save may be the one that does it
        with pytest.raises(RunOwnedError, match="by its own rules"):
            catalog.sweep([LatestN(1)])
        save(4, 1, 3, 4)
        catalog.untag("first", "first")
        save(5, 4, 5)
    assert catalog.sweep([LatestN(1)]).deleted
    assert catalog.verify().ok
