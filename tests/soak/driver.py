"""The driver of the storm's job, a process of its own: it may be killed like everything else.

A supervised job that saves after every step; says on stdout, a JSON line each, what it begins and what came of it. It
is told nothing of the storm, and leaves recovery to `Checkpointer.supervise`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray

from rl_ckpt import Checkpointer, LatestN, PendingSave, RestoreReport
from rl_ckpt.errors import CheckpointError, WorkerFailuresError
from tests.soak.job import team

_PATIENCE_S = 15.0
_ENDLESS = 1 << 20


def say(event: str, **more: Any) -> None:
    """One line; a whole one, whichever thread says it."""
    with _saying:
        sys.stdout.write(json.dumps({"event": event, "at": time.time(), **more}) + "\n")
        sys.stdout.flush()


_saying = threading.Lock()


class Driver:
    """One life of the driver."""

    def __init__(self, ckpt: Checkpointer, seed: int) -> None:
        self._ckpt = ckpt
        self._seed = seed

    def run(self) -> None:
        """Until it is killed."""
        self._ckpt.supervise(
            self._make_workers, self._train, max_failures=_ENDLESS, retry_on=[ray.exceptions.GetTimeoutError]
        )

    def _make_workers(self) -> list[Any]:
        nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"] and "worker" in node["Resources"])
        if not nodes:
            raise WorkerFailuresError("no node is there", lost=[0])
        workers = team(self._seed, nodes)
        say("restoring", pids=_pids(workers))
        return workers

    def _train(self, workers: Sequence[Any], restored: RestoreReport | None) -> None:
        try:
            self._check(workers, restored)
            self._steps(workers, 0 if restored is None else restored.step)
        except (ray.exceptions.RayError, CheckpointError) as error:
            say("lost", error=type(error).__name__, text=str(error)[:500])
            raise

    def _check(self, workers: Sequence[Any], restored: RestoreReport | None) -> None:
        """Every bit of every worker's state."""
        if restored is None:
            say("anew")
            return
        found = ray.get([worker.wrong.remote(restored.step) for worker in workers], timeout=_PATIENCE_S)
        say(
            "restored",
            step=restored.step,
            seconds=restored.seconds,
            bytes_from=dict(restored.bytes_from),
            fell_back=dict(restored.fell_back),
            wrong=[f"rank {rank}: {paths}" for rank, paths in enumerate(found) if paths],
        )

    def _steps(self, workers: Sequence[Any], step: int) -> None:
        while True:
            step += 1
            ray.get([worker.train.remote(step) for worker in workers], timeout=_PATIENCE_S)
            say("begun", step=step)
            try:
                pending = self._ckpt.save(step, workers)
            except CheckpointError as error:
                _say_aborted(step, error)
                raise
            say("staged", step=step)
            threading.Thread(target=_watch, args=(pending,), daemon=True).start()


def _pids(workers: Sequence[Any]) -> list[int]:
    asked = [worker.__ray_call__.remote(lambda _: os.getpid()) for worker in workers]
    return list(ray.get(asked, timeout=_PATIENCE_S))


def _watch(pending: PendingSave) -> None:
    try:
        info = pending.result(60)
    except CheckpointError as error:
        _say_aborted(pending.step, error)
    else:
        say("committed", step=info.step, durable_s=info.durable_s, in_store=info.in_store)


def _say_aborted(step: int, error: CheckpointError) -> None:
    say("aborted", step=step, error=type(error).__name__, text=str(error)[:500])


def main() -> None:
    """Arguments: one JSON object."""
    asked = json.loads(sys.argv[1])
    ray.init(address=asked["address"], log_to_driver=False)
    ckpt = Checkpointer(
        asked["url"],
        storage_options=asked["storage_options"],
        keep=[LatestN(3)],
        grace_s=5.0,
        join_timeout_s=10.0,
        write_timeout_s=60.0,
        **asked["options"],
    )
    say("up", pid=os.getpid())
    try:
        Driver(ckpt, asked["seed"]).run()
    except Exception as error:
        say("ended", error=type(error).__name__, text=str(error)[:500])
        raise


if __name__ == "__main__":
    main()
