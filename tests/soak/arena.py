"""The arena: a cluster of several raylets, the driver's process, and SIGKILL for any part of it.

Kills by pid only, and only what it started: a raylet, or a process below one of its raylets.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from tests.ray.holders import HEALTH, LEAN, importable

ROOT = Path(__file__).parents[2]
_STORE_BYTES = 100 << 20

NODE, DRIVER, COORDINATOR, SERVER, LEARNER, WORKER = (
    "node", "driver", "coordinator", "shard server", "learner", "rollout worker",
)  # fmt: skip
KINDS = (WORKER, LEARNER, SERVER, COORDINATOR, DRIVER, NODE)


class Arena:
    """See the module."""

    def __init__(self, nodes: int) -> None:
        head = {"num_cpus": 1, "object_store_memory": _STORE_BYTES, **LEAN, "_system_config": HEALTH}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes: list[Any] = []
        self._driver: subprocess.Popen[str] | None = None
        self._asked: dict[str, Any] = {}
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        self.workers: list[int] = []
        """Process ids by rank, as the driver last said."""
        for _ in range(nodes):
            self.add_node(wait=False)
        self._cluster.wait_for_nodes()

    def add_node(self, wait: bool = True) -> None:
        """One more raylet for workers."""
        node = self._cluster.add_node(
            num_cpus=2, resources={"worker": 1000}, object_store_memory=_STORE_BYTES, wait=False
        )
        self._nodes.append(node)
        if wait:
            self._cluster.wait_for_nodes()

    def start_driver(self, **asked: Any) -> None:
        """Starts the driver, or starts it again with what it was asked before."""
        self._asked = {**self._asked, **asked}
        command = [sys.executable, "-m", "tests.soak.driver", json.dumps({**self._asked, "address": self.address})]
        self._driver = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1
        )
        threading.Thread(target=self._listen, args=(self._driver,), daemon=True).start()

    @property
    def address(self) -> str:
        """Of the cluster."""
        return str(self._cluster.address)

    def driver_is_gone(self) -> bool:
        """Whether it ended, killed or by itself."""
        return self._driver is None or self._driver.poll() is not None

    def _listen(self, driver: subprocess.Popen[str]) -> None:
        assert driver.stdout is not None
        for line in driver.stdout:
            with contextlib.suppress(json.JSONDecodeError):  # cut off by the kill
                self.events.put(json.loads(line))
        driver.stdout.close()

    def kill(self, kind: str, pick: float) -> bool:
        """SIGKILL to one process of a kind, or to a whole node.

        Args:
            kind: Of `KINDS`.
            pick: 0 to 1: which of them, where there are several.

        Returns:
            Whether there was one.
        """
        if kind == DRIVER:
            assert self._driver is not None
            self._driver.kill()
            self._driver.wait()
            return True
        if kind == NODE:
            self._kill_node(self._nodes.pop(int(pick * len(self._nodes))))
            return True
        found = self._processes(kind)
        if not found:
            return False
        return _kill(found[int(pick * len(found))])

    def _processes(self, kind: str) -> list[psutil.Process]:
        if kind in (LEARNER, WORKER):
            pids = self.workers[:1] if kind == LEARNER else self.workers[1:]
            return [process for process in self._below() if process.pid in pids]
        title = {COORDINATOR: "ray::Coordinator", SERVER: "ray::ShardServer"}[kind]
        return [process for process in self._below() if _title(process).startswith(title)]

    def _below(self) -> list[psutil.Process]:
        """Processes below the cluster's raylets, in an order that the seed alone decides."""
        raylets = [self._cluster.head_node, *self._nodes]
        out = [child for node in raylets for child in _raylet(node).children(recursive=True)]
        return sorted(out, key=lambda process: process.pid)

    def _kill_node(self, node: Any) -> None:
        raylet = _raylet(node)
        for process in [raylet, *raylet.children(recursive=True)]:
            _kill(process)
        self._cluster.remove_node(node, allow_graceful=False)  # reaps it, and forgets it

    def kill_all(self) -> list[psutil.Process]:
        """SIGKILL to everything there is: driver, head with the cluster's own services, nodes, all below them.

        Returns:
            What was killed.
        """
        assert self._driver is not None
        victims = [psutil.Process(self._driver.pid)]
        for node in [self._cluster.head_node, *self._nodes]:
            for kind in node.all_processes.values():
                victims += [psutil.Process(info.process.pid) for info in kind if info.process.poll() is None]
            victims += _raylet(node).children(recursive=True)
        for process in victims:
            _kill(process)
        self._driver.wait()
        psutil.wait_procs(victims, timeout=30)
        return victims

    def close(self) -> None:
        """Ends driver and cluster."""
        if self._driver is not None and self._driver.poll() is None:
            self._driver.kill()
        if self._driver is not None:
            self._driver.wait()
        self._cluster.shutdown()


@contextlib.contextmanager
def arena(nodes: int) -> Iterator[Arena]:
    """A cluster with so many nodes for workers, beside the head; ended afterwards."""
    with importable():
        made = Arena(nodes)
        try:
            yield made
        finally:
            made.close()


def _raylet(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def _kill(process: psutil.Process) -> bool:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True
