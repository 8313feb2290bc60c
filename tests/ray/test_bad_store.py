"""A store that hangs or throttles under workers: they train on, the next call tells, and the next save works."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np
import pytest
import ray

from rl_ckpt import Checkpointer, StorageError
from tests.ray.holders import WAIT_S, give, on_nodes, same, server_stats, states_of, total, until
from tests.s3_servers import S3Server
from tests.store.faulty_proxy import Fault, on, run_proxy


def state(rank: int, step: int) -> dict[str, Any]:
    return {"w": np.full(300_000, step, np.float32), "own": np.full(100, 1000.0 * rank + step)}


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"status": 503, "code": "SlowDown"}, r"failed after \d+ tries in [\d.]+ s: .*SlowDown \(HTTP 503\): as told"),
        ({"hang": True}, r"failed after \d+ tr.* in [\d.]+ s: .*Timeout"),
    ],
    ids=["SlowDown", "never answered"],
)
def test_training_goes_on_the_next_call_tells_and_the_next_save_works(
    ray_node: None, moto_server: S3Server, fault: dict[str, Any], told: str
) -> None:
    workers = on_nodes(2)
    url = f"s3://{moto_server.new_bucket()}/{uuid.uuid4().hex}"
    with run_proxy(moto_server) as proxy:
        options = moto_server.storage_options(
            endpoint_url=proxy.url,
            retry_deadline_s=2,
            retry_throttled_s=2,
            retry_cap_s=0.2,
            config_kwargs={"read_timeout": 1.5},
        )
        with Checkpointer(url, storage_options=options) as ckpt:
            give(workers, [state(rank, 1) for rank in range(2)])
            ckpt.save(1, workers).result(WAIT_S)
            proxy.faults = [Fault(on("PUT", having="/shards/"), lasting=True, **fault)]
            give(workers, [state(rank, 2) for rank in range(2)])
            seen = len(proxy.seen)
            pending = ckpt.save(2, workers)
            until(lambda: any("/shards/" in path for _, path in proxy.seen[seen:]), "the store is asked")
            give(workers, [state(rank, 3) for rank in range(2)])  # called, and answered, while the store is not well
            assert not pending.done()
            until(pending.done, "the save is given up")
            with pytest.raises(StorageError, match=told):
                ckpt.save(3, workers)
            proxy.faults = []
            ckpt.save(3, workers).result(WAIT_S)
            assert [info.step for info in ckpt.checkpoints()] == [1, 3]
            assert total(server_stats(ckpt), "store_retries") > 0
            for step in (1, 3):
                ckpt.restore(workers, step=step)
                for rank, found in enumerate(states_of(workers)):
                    same(found, state(rank, step))
    for worker in workers:
        ray.kill(worker)
