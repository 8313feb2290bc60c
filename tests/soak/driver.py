"""The driver of the storm's job, a process of its own: it may be killed like everything else.

Trains, saves after every step, and recovers; says on stdout, a JSON line each, what it begins and what came of it. It
is told nothing of the storm.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

import ray

from rl_ckpt import Checkpointer, LatestN, PendingSave
from rl_ckpt.errors import CheckpointError, SaveTimeoutError, WorkerFailuresError
from tests.soak.job import team

LOST = (ray.exceptions.RayError, WorkerFailuresError, SaveTimeoutError)
_PATIENCE_S = 15.0


def say(event: str, **more: Any) -> None:
    """One line; a whole one, whichever thread says it."""
    with _saying:
        sys.stdout.write(json.dumps({"event": event, "at": time.time(), **more}) + "\n")
        sys.stdout.flush()


_saying = threading.Lock()


class Driver:
    """One life of the driver."""

    def __init__(self, ckpt: Checkpointer, seed: int, pause_s: float) -> None:
        self._ckpt = ckpt
        self._seed = seed
        self._pause_s = pause_s

    def run(self) -> None:
        """Until it is killed."""
        while True:
            workers: list[Any] = []
            try:
                workers = self._build()
                self._train(workers, self._restore(workers))
            except LOST as error:
                say("lost", error=type(error).__name__, text=str(error)[:500])
                for worker in workers:
                    ray.kill(worker)

    def _build(self) -> list[Any]:
        nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"] and "worker" in node["Resources"])
        if not nodes:
            time.sleep(0.2)
            raise WorkerFailuresError("no node is there", {})
        workers = team(self._seed, nodes)
        ray.get([worker.wrong.remote(0) for worker in workers], timeout=_PATIENCE_S)
        return workers

    def _restore(self, workers: list[Any]) -> int:
        say("restoring", pids=self._pids(workers))
        if self._ckpt.latest() is None:
            return 0
        report = self._ckpt.restore(workers)
        found = ray.get([worker.wrong.remote(report.step) for worker in workers], timeout=_PATIENCE_S)
        say(
            "restored",
            step=report.step,
            seconds=report.seconds,
            bytes_from=dict(report.bytes_from),
            fell_back=dict(report.fell_back),
            wrong=[f"rank {rank}: {paths}" for rank, paths in enumerate(found) if paths],
        )
        return int(report.step)

    def _train(self, workers: list[Any], step: int) -> None:
        pending: list[PendingSave] = []
        say("training", pids=self._pids(workers))
        while True:
            step += 1
            ray.get([worker.train.remote(step) for worker in workers], timeout=_PATIENCE_S)
            say("begun", step=step)
            try:
                pending.append(self._ckpt.save(step, workers))
            except CheckpointError as error:
                say("aborted", step=step, error=type(error).__name__, text=str(error)[:500])
                if isinstance(error, LOST):
                    raise
                continue
            threading.Thread(target=_watch, args=(pending[-1],), daemon=True).start()
            time.sleep(self._pause_s)

    def _pids(self, workers: list[Any]) -> list[int]:
        return list(ray.get([worker.__ray_call__.remote(lambda _: os.getpid()) for worker in workers], timeout=15))


def _watch(pending: PendingSave) -> None:
    try:
        info = pending.result(60)
    except CheckpointError as error:
        say("aborted", step=pending.step, error=type(error).__name__, text=str(error)[:500])
    else:
        say("committed", step=info.step, durable_s=info.durable_s)


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
    Driver(ckpt, asked["seed"], asked["pause_s"]).run()


if __name__ == "__main__":
    main()
