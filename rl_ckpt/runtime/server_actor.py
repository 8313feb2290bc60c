"""How a shard server's actor is made: alike by ranks for their node and by the coordinator for one without ranks."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rl_ckpt.runtime.shard_server import CONCURRENCY_GROUPS, ShardServer
from rl_ckpt.runtime.spec import NAMESPACE, RunSpec


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
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        .remote(spec, name)
    )
