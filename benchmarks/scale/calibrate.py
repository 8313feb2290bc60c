"""The model against this machine: 1, 2 and 4 raylets, small states, local disk and an S3 server.

The model's constants for this machine are fitted at the corners: the smallest and the largest state, with one raylet
(what one node gets) and with four (what all get together). What it then says of the settings between is compared with
what they take. All raylets share the cores, the disk and the server of this machine, so this checks how steps add up
and what is shared; it says nothing of networks.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import rl_ckpt
from benchmarks.harness import call_all, reach_actors
from benchmarks.scale.model import Cluster, Load, predict_restore, predict_save
from benchmarks.workers import BenchWorker
from rl_ckpt.options import Options
from tests.ray.holders import several_nodes
from tests.s3_servers import ceph_is_installed, run_ceph, run_moto

_WORKER: Any = BenchWorker  # an actor class, which Ray's decorator types as the plain one
SIZES = (1 << 20, 32 << 20, 128 << 20)
"""Bytes in the checkpoint, whatever the number of raylets."""
RAYLETS = (1, 2, 4)
_ROUNDS = 7
_WARM_UP = 2
# What this machine has no limit of its own for.
_LOCAL = Cluster(workers_per_node=1, nic_rate=math.inf, client_rate=math.inf, connection_rate=math.inf,
                 put_rate=math.inf, get_rate=math.inf, latency_s=0.0, memory_rate=math.inf,
                 coordinator_nic_rate=math.inf, fixed_save_s=0.0, fixed_restore_s=0.0)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One setting, in seconds: the fastest of some rounds, as other programs only ever add to the time."""

    raylets: int
    size_bytes: int
    save_s: float
    restore_s: float


def measure(url: str, storage_options: Mapping[str, Any] | None, raylets: int) -> Iterator[Measured]:
    """Saves and restores sharded states of every size, one worker a raylet."""
    reach_actors()
    with several_nodes(raylets):
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        for size in SIZES:
            actors = [
                _WORKER.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                    rank, raylets, size // raylets, "sharded"
                )
                for rank, node in enumerate(nodes)
            ]
            call_all(actors, "ready")
            saves, restores = [], []
            where = f"{url}/{raylets}-{size}"
            keep = [rl_ckpt.LatestN(1)]
            with rl_ckpt.Checkpointer(where, storage_options=storage_options, keep=keep, grace_s=0) as ckpt:
                for step in range(_WARM_UP + _ROUNDS):
                    call_all(actors, "train", step)
                    begun = time.perf_counter()
                    ckpt.save(step, actors).result()
                    saves.append(time.perf_counter() - begun)
                    begun = time.perf_counter()
                    ckpt.restore(actors)
                    restores.append(time.perf_counter() - begun)
            for actor in actors:
                ray.kill(actor)
            yield Measured(raylets, size, min(saves[_WARM_UP:]), min(restores[_WARM_UP:]))


def fitted(found: list[Measured]) -> dict[int, tuple[Cluster, Cluster]]:
    """The machine as the model sees it, for saves and for restores, by raylets; from the corners of the settings."""
    out = {}
    one, four = (
        sorted((m for m in found if m.raylets == n), key=lambda m: m.size_bytes) for n in (RAYLETS[0], RAYLETS[-1])
    )
    for raylets in RAYLETS:
        both = []
        for times in (lambda m: m.save_s, lambda m: m.restore_s):
            (fixed_1, client), (fixed_4, store) = (_line(corner, times) for corner in (one, four))
            share = (raylets - RAYLETS[0]) / (RAYLETS[-1] - RAYLETS[0])
            fixed = fixed_1 + share * (fixed_4 - fixed_1)  # every raylet more is more processes on the same cores
            both.append(
                replace(
                    _LOCAL, nodes=raylets, client_rate=client, store_rate=max(client, store), fixed_save_s=fixed,
                    fixed_restore_s=fixed,
                )
            )  # fmt: skip
        out[raylets] = (both[0], both[1])
    return out


def _line(rows: list[Measured], seconds: Callable[[Measured], float]) -> tuple[float, float]:
    """Fixed seconds and bytes/s through the smallest and the largest size."""
    small, large = rows[0], rows[-1]
    rate = (large.size_bytes - small.size_bytes) / max(1e-6, seconds(large) - seconds(small))
    return max(0.0, seconds(small) - small.size_bytes / rate), rate


def inside(m: Measured) -> bool:
    """Whether a setting was not fitted to."""
    return m.raylets not in (RAYLETS[0], RAYLETS[-1]) or m.size_bytes not in (SIZES[0], SIZES[-1])


def compare(found: list[Measured]) -> list[tuple[Measured, float, float]]:
    """What was measured, and the predicted seconds of the save and of the restore."""
    machine, options = fitted(found), Options()
    out = []
    for m in found:
        (saves, restores), load = machine[m.raylets], Load(float(m.size_bytes))
        out.append((m, predict_save(saves, load, options).seconds, predict_restore(restores, load, options).seconds))
    return out


@contextmanager
def _stores() -> Iterator[dict[str, tuple[str, Mapping[str, Any] | None]]]:
    with tempfile.TemporaryDirectory() as folder, run_ceph(size_gb=2) if ceph_is_installed() else run_moto() as server:
        server.client().create_bucket(Bucket="rl-ckpt-scale")
        yield {"local disk": (folder, None), server.name: ("s3://rl-ckpt-scale/runs", server.storage_options())}


def calibrate(only: str | None = None) -> str:
    """Measures, and returns the comparison as Markdown.

    Args:
        only: One of the stores' names; None: all of them.
    """
    head = "| store | raylets | MB | save, s | predicted | off by | restore, s | predicted | off by |"
    lines = [head, "|---" * 9 + "|"]
    errors = []
    with _stores() as stores:
        for name, (url, storage_options) in stores.items():
            if only not in (None, name):
                continue
            found = [m for raylets in RAYLETS for m in measure(url, storage_options, raylets)]
            for m, save_s, restore_s in compare(found):
                if inside(m):
                    errors += [abs(save_s / m.save_s - 1), abs(restore_s / m.restore_s - 1)]
                lines.append(_row(name, m, save_s, restore_s))
    lines += [
        "",
        f"Where nothing was fitted, predictions are off by {median(errors):.0%} (median), {max(errors):.0%} at most.",
    ]
    return "\n".join(lines)


def _row(store: str, m: Measured, save_s: float, restore_s: float) -> str:
    raylets = f"{m.raylets}" if inside(m) else f"{m.raylets} (fitted)"
    save = [f"{m.save_s:.3f}", f"{save_s:.3f}", f"{save_s / m.save_s - 1:+.0%}"]
    restore = [f"{m.restore_s:.3f}", f"{restore_s:.3f}", f"{restore_s / m.restore_s - 1:+.0%}"]
    return "| " + " | ".join([store, raylets, f"{m.size_bytes / 1e6:.0f}", *save, *restore]) + " |"
