"""What a restore reads from S3, in bytes, as the shard servers' stores count it: N → M workers, and a part only.

Replicated state is wanted by every worker, sharded state is cut anew; each byte has to leave the store once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

import rl_ckpt
from benchmarks import harness
from benchmarks.results import LIMIT, Goal, Row, Series
from benchmarks.servers import Bucket, bucket
from benchmarks.settings import Settings
from rl_ckpt.runtime.spec import NAMESPACE

_POLICIES = 100
_POLICY_BYTES = 256 << 10


def resharding(settings: Settings) -> list[Row]:
    """From `workers` to fewer, as many, and more."""
    counts = sorted({1, max(1, settings.workers - 1), settings.workers, settings.many_workers})
    rows = []
    with harness.cluster(8 * settings.many_workers), bucket() as place:
        for kind in ("sharded", "declared"):
            # In whole rows of every count, so that any number of workers can cut the arrays evenly.
            size_bytes = _divisible(settings.s3_mib << 20, counts) if kind == "sharded" else settings.s3_mib << 20
            unique_bytes = size_bytes * settings.workers if kind == "sharded" else size_bytes
            url = f"{place.url}/{kind}"
            with _run(url, place) as ckpt, harness.team(settings.workers, size_bytes, kind) as actors:
                ckpt.save(0, actors).result()
            rows += [_reshard(settings, place, url, kind, unique_bytes, count) for count in counts]
    return rows


def _divisible(size_bytes: int, counts: Sequence[int]) -> int:
    """At least one row per array for the largest number of workers, whatever the number is."""
    unit = 16 * 4096 * int(np.lcm.reduce(list(counts)))
    return max(1, size_bytes // unit) * unit


def _run(url: str, place: Bucket) -> rl_ckpt.Checkpointer:
    return rl_ckpt.Checkpointer(url, storage_options=place.options)


def _reshard(settings: Settings, place: Bucket, url: str, kind: str, unique_bytes: int, count: int) -> Row:
    """A restore by a service of its own: nothing is in any memory."""
    size_bytes = unique_bytes // count if kind == "sharded" else unique_bytes
    with harness.team(count, size_bytes, kind) as actors, _run(url, place) as ckpt:
        report = ckpt.restore(actors)
        read = store_bytes_read()
    if report.bytes_from.get("store", 0) > read:
        raise RuntimeError(f"the report says {report.bytes_from}, the stores counted {read} bytes")
    case = f"{settings.workers} → {count} workers, {kind}"
    goals = (Goal("at most", 1.05),)
    return Row("reads", case, "bytes", Series("ours", (read,)), Series(LIMIT, (unique_bytes,)), goals=goals)


def store_bytes_read() -> int:
    """By all shard servers of this cluster since they started."""
    names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE]
    servers: list[Any] = [ray.get_actor(n, namespace=NAMESPACE) for n in names if n.startswith("rl_ckpt-")]
    if not servers:
        raise RuntimeError("there are no shard servers to ask")
    counts: list[dict[str, int]] = ray.get([server.stats.remote() for server in servers], timeout=30)
    return sum(count["store_bytes_read"] for count in counts)


@ray.remote(num_cpus=1)
class League:
    """A worker with many policies."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self._policies = {
            f"p{i:02}": {"w": random.standard_normal(_POLICY_BYTES // 4, np.float32)} for i in range(_POLICIES)
        }

    def get_state(self) -> Any:
        """All policies, the same on every worker."""
        return rl_ckpt.Replicated({"policies": self._policies})

    def set_state(self, tree: Any) -> None:
        """Takes them."""
        self._policies = tree["policies"]

    def policy(self, name: str) -> float:
        """Sum of one policy's values."""
        return float(self._policies[name]["w"].sum(dtype=np.float64))


def one_policy(settings: Settings) -> list[Row]:
    """Out of 100, onto all workers."""
    kind: Any = League
    with harness.cluster(4 * settings.workers), bucket() as place:
        url = f"{place.url}/league"
        first = [kind.remote(0) for _ in range(settings.workers)]
        with _run(url, place) as ckpt:
            ckpt.save(0, first).result()
        second = [kind.remote(1) for _ in range(settings.workers)]
        with _run(url, place) as ckpt:
            ckpt.restore(second, select="policies/p42")
            read = store_bytes_read()
        name = ["p42"]
        if harness.call_all(second, "policy", *name) != harness.call_all(first, "policy", *name):
            raise RuntimeError("the policy that was restored is not the one that was saved")
    case = f"{_POLICY_BYTES >> 10} KiB of {_POLICIES * _POLICY_BYTES >> 20} MiB, {settings.workers} workers"
    goals = (Goal("at most", 1.1),)
    return [Row("policy", case, "bytes", Series("ours", (read,)), Series(LIMIT, (_POLICY_BYTES,)), goals=goals)]
