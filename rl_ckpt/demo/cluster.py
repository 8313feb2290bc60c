"""A Ray cluster of several nodes on this machine, one of which can be killed.

Owns the processes of the cluster it started: every node is a raylet of its own with its own workers, as far apart as
nodes of one machine can be. Killing a node is SIGKILL to its raylet and to every process under it, all of which this
object started. It touches no other process and no other cluster.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from types import TracebackType
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

# Explicit and larger than the cores at hand, so that placement never waits; the actors of the demo share what there is.
_CPUS = 8
_STORE_BYTES = 100 * 1024 * 1024
_HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
"""A dead node is known within seconds instead of 15, and a busy two-core machine still answers in time."""


class LocalCluster:
    """A head node, to which the driver is connected, and worker nodes.

    Args:
        nodes: Worker nodes beside the head.
    """

    def __init__(self, nodes: int) -> None:
        head = {
            "num_cpus": _CPUS,
            "object_store_memory": _STORE_BYTES,
            "include_dashboard": False,
            "_system_config": _HEALTH,
        }
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        # ray.cluster_utils is untyped: its nodes are held as Any, by node id.
        self._nodes: dict[str, Any] = {}
        for _ in range(nodes):
            node = self._cluster.add_node(num_cpus=_CPUS, object_store_memory=_STORE_BYTES, wait=False)
            self._nodes[node.node_id] = node
        self._cluster.wait_for_nodes()
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level=logging.ERROR)

    @property
    def nodes(self) -> list[str]:
        """Node ids of the worker nodes that were not killed."""
        return list(self._nodes)

    def kill_node(self, node_id: str) -> int:
        """SIGKILL a worker node: its raylet and every process under it, with no chance to say goodbye.

        Args:
            node_id: One of `nodes`.

        Returns:
            How many processes were killed.
        """
        node = self._nodes.pop(node_id)
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        victims = [raylet, *raylet.children(recursive=True)]
        for process in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        self._cluster.remove_node(node, allow_graceful=False)  # reaps it, and forgets it
        return len(victims)

    def close(self) -> None:
        """Disconnect and stop every node."""
        ray.shutdown()
        self._cluster.shutdown()

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
