"""How a shard server's actor is made: alike by ranks for their node and by the coordinator for one without ranks."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rl_ckpt.runtime.shard_server import CONCURRENCY_GROUPS, ShardServer
from rl_ckpt.runtime.spec import NAMESPACE, RunSpec

_RETRIES = 3


def start_server(spec: RunSpec, node: str) -> Any:
    """Finds the shard server of a node, or starts it; it may not be ready yet.

    Detached and pinned to its node: it outlives whoever started it, and never comes back on another node.

    Returns:
        Its handle.
    """
    name = spec.server(node)
    grouped: Any = ray.remote
    return (
        grouped(concurrency_groups=CONCURRENCY_GROUPS)(ShardServer)
        .options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            # A call that a death of the server's process broke off runs again once it is back: its files of
            # staging memory are still there, and every method may run twice. Not for ever: a call may be the cause.
            max_task_retries=_RETRIES,
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        .remote(spec, name)
    )
