"""The nodes that the demo trains on, one of which is killed: of a cluster of its own, or of one that is there.

`LocalCluster` starts several raylets on this machine, as far apart as nodes of one machine can be, and owns them.
`ExistingCluster` uses the nodes of a cluster that somebody else started. Killing a node is SIGKILL to its raylet and to
every process under it, and to no other process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from types import TracebackType
from typing import Any, Protocol

import psutil
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rl_ckpt.errors import InvalidInputError

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


class Nodes(Protocol):
    """What the job needs of a cluster."""

    @property
    def nodes(self) -> list[str]:
        """Ids of the living nodes that actors go to; the first one is to be killed."""

    def kill_node(self, node_id: str) -> int:
        """Kill one of them, and tell how many processes that were."""

    def describe(self, node_id: str) -> str:
        """What a person calls it."""


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

    def describe(self, node_id: str) -> str:
        """Its id, shortened: nobody else kills it."""
        return f"node {node_id[:8]}"

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


class ExistingCluster:
    """The worker nodes of a cluster that is running: all with CPUs, but the head's and the driver's.

    Args:
        address: As for `ray.init`: `auto`, or host and port of the head. This machine must be a node of the cluster.

    Raises:
        InvalidInputError: There are fewer than two such nodes: none would be left.
        ConnectionError: There is no cluster at the address.
    """

    def __init__(self, address: str) -> None:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        self._killed: set[str] = set()
        try:
            if len(self.nodes) < 2:
                raise InvalidInputError(
                    f"the cluster at {address} has {len(self.nodes)} worker node(s) with CPUs beside its head; "
                    "the demo kills one and needs two or more"
                )
        except InvalidInputError:
            ray.shutdown()
            raise

    @property
    def nodes(self) -> list[str]:
        """Ids of the nodes that Ray takes for alive; a node that was killed just now may still be among them."""
        mine = ray.get_runtime_context().get_node_id()
        usable = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        others = [node for node in usable if "node:__internal_head__" not in node["Resources"]]
        return [node["NodeID"] for node in others if node["NodeID"] not in {mine, *self._killed}]

    def kill_node(self, node_id: str) -> int:
        """SIGKILL a node from within: its raylet and every process under it.

        Args:
            node_id: One of `nodes`.

        Returns:
            How many processes were killed.
        """
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}
        pids: list[int] = ray.get(ray.remote(_processes_of_this_node).options(**options).remote())
        self._killed.add(node_id)
        with contextlib.suppress(ray.exceptions.RayError):  # it cannot answer: it goes with its node
            ray.get(ray.remote(_kill).options(**options).remote(pids))
        return len(pids)

    def describe(self, node_id: str) -> str:
        """Its name, host and address: a container's host is its short id, a pod's its name."""
        node = next(node for node in ray.nodes() if node["NodeID"] == node_id)
        return f"node {node['NodeName']} (host {node['NodeManagerHostname']}, address {node['NodeManagerAddress']})"

    def __enter__(self) -> ExistingCluster:
        return self

    def __exit__(self, *_: object) -> None:
        """Disconnect; the cluster stays."""
        ray.shutdown()


def _processes_of_this_node() -> list[int]:
    """In a task: the raylet above it and everything under that, the raylet first."""
    raylet = psutil.Process().parent()
    assert raylet is not None, "a worker's parent is its raylet"
    return [raylet.pid, *(process.pid for process in raylet.children(recursive=True))]


def _kill(pids: list[int]) -> None:
    """In a task of the same node: SIGKILL, the task's own process last."""
    for pid in sorted(pids, key=lambda pid: pid == os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
