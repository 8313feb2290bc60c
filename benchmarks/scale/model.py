"""A model of limits: how long a save and a restore take, and which limit decides, for clusters that are not at hand.

Each step takes as long as its tightest limit; steps that wait for one another add up, as they do in
runtime/save_machine.py and runtime/restore_machine.py. What a cluster allows (`Cluster`) and what a job has (`Load`)
are the caller's; what the coordinator costs comes from `python -m benchmarks.scale growth`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from rl_ckpt.options import Options
from rl_ckpt.store.s3 import part_bytes

MB, GB, TB = 10**6, 10**9, 10**12
SPAN_BYTES = 16 << 20
"""Largest range of one GET (store/s3.py)."""
REQUESTS_AT_ONCE = 16
"""Parts or ranges of one file under way at a time (store/s3.py)."""


@dataclass(frozen=True)
class Cluster:
    """What the machines and the store allow. Rates in bytes/s, times in seconds.

    Defaults: an S3 bucket as AWS describes it, and nodes with 25 Gbit/s.
    """

    nodes: int = 8
    workers_per_node: int = 8
    memory_rate: float = 10 * GB
    """Copying and hashing on one node, all its workers together."""
    nic_rate: float = 25e9 / 8
    """Of one node, in each direction."""
    client_rate: float = 1.0 * GB
    """What one node's process gets through the store's client (its CPU), whatever the network allows."""
    connection_rate: float = 85 * MB
    """Of one connection to the store."""
    store_rate: float = math.inf
    """Of the store as a whole: one disk, one file server; S3 has none that matters here."""
    put_rate: float = 3500.0
    """PUT requests/s of one partition of the store's names."""
    get_rate: float = 5500.0
    """GET requests/s of one partition."""
    partitions: int = 1
    """Into how many parts the store has split the names of the checkpoint's folder."""
    latency_s: float = 0.15
    """Of a small request."""
    pass_rate: float = 0.8 * GB
    """Between two nodes, one pair, through Ray's object store."""
    coordinator_nic_rate: float = 25e9 / 8
    fixed_save_s: float = 0.05
    """Actor calls and the like, of a save of nothing."""
    fixed_restore_s: float = 0.05


@dataclass(frozen=True)
class Load:
    """What is saved: all bytes once, and how much of them every worker holds alike."""

    bytes: float
    replicated: float = 0.0
    """Share, 0 … 1; the rest is sharded over all workers or their own."""


@dataclass(frozen=True)
class Coordinator:
    """Seconds of the coordinator on one core, from the growth tables (docs/scaling.md)."""

    chunk_save_s: float = 16e-6
    worker_save_s: float = 100e-6
    inventory_byte_s: float = 0.4e-9
    """Of replicas' inventories, for each byte received."""
    inventory_bytes: float = 54.0
    """In an inventory, a replicated chunk."""
    chunk_restore_s: float = 9e-6
    pass_s: float = 3e-6
    """A chunk that one server takes from another."""
    manifest_bytes: float = 110.0
    """In the manifest, a chunk."""
    candidate_byte_s: float = 0.1e-9
    """Of the manifest, for each byte sent to each worker."""


@dataclass(frozen=True)
class Prediction:
    """Seconds, by step and limit. Steps add up; within a step the largest decides."""

    steps: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """In all."""
        return sum(max(limits.values()) for limits in self.steps.values())

    @property
    def limit(self) -> str:
        """The limit that takes the most time."""
        tops = [max(limits.items(), key=lambda item: item[1]) for limits in self.steps.values()]
        return max(tops, key=lambda item: item[1])[0]


def predict_save(cluster: Cluster, load: Load, options: Options, costs: Coordinator | None = None) -> Prediction:
    """Until durable.

    Args:
        cluster: What it runs on.
        load: What is saved; all of it is new.
        options: `chunk_bytes`, `file_bytes` and `write_streams` count.
        costs: Of the coordinator.

    Returns:
        Steps "plan", "stage" (these two are the stall, without the hashing), "write" and "commit".
    """
    costs = costs or Coordinator()
    workers, chunks = cluster.nodes * cluster.workers_per_node, _chunks(load.bytes, options)
    a_node = load.bytes / cluster.nodes
    size = max(1.0, min(a_node / options.write_streams, options.file_bytes))  # of a file, as plan/deal.py splits
    files = math.ceil(a_node / size) if a_node else 0
    parts = max(1, math.ceil(size / part_bytes(int(size))))
    connections = min(files, options.write_streams) * min(parts, REQUESTS_AT_ONCE)
    requests = cluster.nodes * files * (parts + (3 if parts > 1 else 0))  # create, complete, look
    messages = workers * load.replicated * chunks * costs.inventory_bytes
    plan = costs.chunk_save_s * chunks + costs.worker_save_s * workers + costs.inventory_byte_s * messages
    hashed = (
        load.bytes * load.replicated * cluster.workers_per_node + a_node
    )  # each replica, to be found; then what is staged
    manifest = chunks * costs.manifest_bytes
    return Prediction(
        {
            "fixed": {"actor calls": cluster.fixed_save_s},
            "plan": {"coordinator": plan, "coordinator's network": messages / cluster.coordinator_nic_rate},
            "stage": {"memory": hashed / cluster.memory_rate},
            "write": {
                "connections": a_node / (cluster.connection_rate * max(1, connections)) + cluster.latency_s,
                "network": a_node / cluster.nic_rate,
                "client": a_node / cluster.client_rate,
                "store": load.bytes / cluster.store_rate,
                "request rate": requests / (cluster.put_rate * cluster.partitions),
            },
            "commit": {"one connection": manifest / cluster.connection_rate + 2 * cluster.latency_s},
        }
    )


def predict_restore(cluster: Cluster, load: Load, options: Options, costs: Coordinator | None = None) -> Prediction:
    """Until every worker's state is set, onto as many workers as saved it, from the store.

    Args:
        cluster: What it runs on.
        load: What was saved.
        options: As for `predict_save`.
        costs: Of the coordinator.

    Returns:
        Steps "manifest", "plan", "fetch" (each byte leaves the store once), "pass" (what is replicated, to all other
        nodes) and "set".
    """
    costs = costs or Coordinator()
    workers, chunks = cluster.nodes * cluster.workers_per_node, _chunks(load.bytes, options)
    a_node = load.bytes / cluster.nodes
    manifest = chunks * costs.manifest_bytes
    requests = math.ceil(load.bytes / SPAN_BYTES)
    ranges = math.ceil(a_node / SPAN_BYTES) if a_node else 0
    connections = min(ranges, options.write_streams * REQUESTS_AT_ONCE)
    passes = chunks * load.replicated * (cluster.nodes - 1)
    passed = load.bytes * load.replicated * (cluster.nodes - 1) / cluster.nodes  # into each node
    wanted = (load.bytes * load.replicated + load.bytes * (1 - load.replicated) / workers) * cluster.workers_per_node
    return Prediction(
        {
            "fixed": {"actor calls": cluster.fixed_restore_s},
            "manifest": {
                "one connection": manifest / cluster.connection_rate + 2 * cluster.latency_s,
                "coordinator's network": manifest * workers / cluster.coordinator_nic_rate,
                "coordinator": manifest * workers * costs.candidate_byte_s,
            },
            "plan": {"coordinator": costs.chunk_restore_s * chunks + costs.pass_s * passes},
            "fetch": {
                "connections": a_node / (cluster.connection_rate * max(1, connections)) + cluster.latency_s,
                "network": a_node / cluster.nic_rate,
                "client": a_node / cluster.client_rate,
                "store": load.bytes / cluster.store_rate,
                "request rate": requests / (cluster.get_rate * cluster.partitions),
            },
            "pass": {"network": passed / cluster.nic_rate, "peers": passed / cluster.pass_rate},
            "set": {"memory": wanted / cluster.memory_rate},
        }
    )


def _chunks(size_bytes: float, options: Options) -> int:
    return math.ceil(size_bytes / options.chunk_bytes)


NODES = (8, 32, 128, 512, 1024)
SIZES = (1 * GB, 10 * GB, 100 * GB, 1 * TB, 10 * TB)


def tables() -> str:
    """Predicted save and restore on S3, as Markdown: seconds, and the limit that decides."""
    parts = []
    for title, predict, share in (
        ("Save, sharded", predict_save, 0.0),
        ("Save, replicated on every worker", predict_save, 1.0),
        ("Restore, sharded", predict_restore, 0.0),
        ("Restore, replicated on every worker", predict_restore, 1.0),
    ):
        lines = [f"**{title}**", "", "| nodes | " + " | ".join(_size(s) for s in SIZES) + " |", "|---" * 6 + "|"]
        for nodes in NODES:
            cells = []
            for size in SIZES:
                if share == 1.0 and size > 100 * GB:  # more than a node's memory
                    cells.append("")
                    continue
                found = predict(Cluster(nodes=nodes), Load(size, share), Options())
                cells.append(f"{found.seconds:.3g} s ({found.limit})")
            lines.append(f"| {nodes:,} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _size(size_bytes: float) -> str:
    return f"{size_bytes / GB:.0f} GB" if size_bytes < TB else f"{size_bytes / TB:.0f} TB"
