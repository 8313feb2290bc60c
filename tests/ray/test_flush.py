"""What is only in memory is in the store once the last Checkpointer is closed, or its memory stays."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from rl_ckpt import Checkpointer
from rl_ckpt.errors import SaveTimeoutError
from rl_ckpt.format.digest import digest
from tests.ray.gated_s3 import Gate
from tests.ray.holders import (
    MEMORY,
    WAIT_S,
    fingerprint,
    give,
    kill_process,
    link,
    on_nodes,
    pid_of,
    same,
    server_names,
    several_nodes,
    states_of,
    until,
)


def state(rank: int, step: int) -> dict[str, Any]:
    small = {f"s{i}": np.full(1 + i % 5, i + step, "f4") for i in range(600)}
    return {"w": np.arange(300_000) + step, "own": np.full(40_000, 100.0 * rank + step), "none": np.zeros(0), **small}


@pytest.fixture(scope="module")
def workers(_no_aws_settings_from_outside: None) -> Iterator[list[Any]]:
    with several_nodes(2):
        yield on_nodes(2)


def save(ckpt: Checkpointer, workers: list[Any], step: int, **how: Any) -> Any:
    give(workers, [state(rank, step) for rank in range(len(workers))])
    return ckpt.save(step, workers, **how).result(WAIT_S)


def look(tree: Any) -> str:
    """Digest of all of a tree's bytes, kinds and shapes."""
    return digest(repr(sorted(fingerprint(tree).items())).encode()).hex()


def alone(url: str, rank: int) -> str:
    """`look` of the newest checkpoint, as a fresh process reads it, which does not use Ray."""
    code = (
        "from rl_ckpt import Checkpointer\n"
        "from tests.ray.test_flush import look\n"
        f"print(look(Checkpointer({url!r}).load_state(rank={rank})))\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("restarted", [False, True], ids=["", "restarted coordinator"])
def test_the_newest_save_is_in_the_store_once_it_is_closed(tmp_path: Path, workers: list[Any], restarted: bool) -> None:
    url = str(tmp_path / "run")
    with Checkpointer(url, persist_every=3, chunk_bytes=1 << 18) as ckpt:
        infos = [save(ckpt, workers, step, metrics={"return": step}) for step in range(1, 6)]
        assert [info.in_store for info in infos] == [True, False, False, True, False]
        names = server_names(ckpt)
        if restarted:
            old = pid_of(link(ckpt))
            kill_process(old)
            until(lambda: pid_of(link(ckpt)) != old, "the coordinator is back")
    found = Checkpointer(url).checkpoints()
    assert [info.step for info in found] == [1, 4, 5]
    assert (found[-1].id, found[-1].in_store, found[-1].metrics) == (infos[-1].id, True, {"return": 5})
    assert found[-1].lineage == (infos[3].id, infos[0].id)
    assert Checkpointer(url).verify().ok
    for rank in range(2):
        assert alone(url, rank) == look(state(rank, 5))
    assert not any((MEMORY / name).exists() for name in names), "nothing is left in memory"


def test_with_the_store_away_its_memory_stays_and_the_next_close_stores_it(workers: list[Any], gate: Gate) -> None:
    url, options = gate.new_url(), gate.storage_options()
    ckpt = Checkpointer(url, storage_options=options, persist_every=2, write_timeout_s=3)
    save(ckpt, workers, 0)
    info = save(ckpt, workers, 1)
    names = server_names(ckpt)
    gate.close()
    with pytest.raises(SaveTimeoutError, match="step 1 is only in memory"):
        ckpt.close()
    assert all(ray.get(ray.get_actor(name, namespace="rl_ckpt").ready.remote()) for name in names)
    gate.open()
    with Checkpointer(url, storage_options=options, persist_every=2) as again:
        give(workers, [state(9, 9)] * 2)
        assert again.restore(workers).step == 1
        for rank, one in enumerate(states_of(workers)):
            same(one, state(rank, 1))
    found = Checkpointer(url, storage_options=options).checkpoints()
    assert [one.id for one in found][-1] == info.id


def test_a_run_that_was_removed_does_not_come_back(tmp_path: Path, workers: list[Any]) -> None:
    url = tmp_path / "run"
    with Checkpointer(str(url), persist_every=2) as ckpt:
        save(ckpt, workers, 0)
        save(ckpt, workers, 1)
        url.rename(tmp_path / "moved")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ckpt.close()
    assert not url.exists()
