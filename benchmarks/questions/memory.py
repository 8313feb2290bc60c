"""Peak memory beside the state: anonymous memory of all processes and /dev/shm, on one node.

Saves: above what was in use before there was a Checkpointer, so that coordinator, shard server and both generations of
staging memory count; three saves without waiting. Restores: above what a service that has restored once keeps, so that
what counts is the memory through which the bytes pass.
"""

from __future__ import annotations

from typing import Any

import rl_ckpt
from benchmarks import harness
from benchmarks.processes import Peak, children, peak
from benchmarks.results import LIMIT, Goal, Row, Series
from benchmarks.servers import bucket
from benchmarks.settings import Settings
from rl_ckpt.options import Options

_SAVES = 3
_FIXED_BYTES = 256 << 20
_WINDOW_BYTES = Options.write_streams * Options.chunk_bytes


def measure(settings: Settings) -> list[Row]:
    """Local disk and S3."""
    with harness.folder() as folder:
        rows = _case(settings, "local disk", settings.mib, str(folder / "run"), {})
    with bucket() as place:
        rows += _case(settings, place.server.name, settings.s3_mib, f"{place.url}/run", place.options)
    return rows


def _case(settings: Settings, where: str, mib: int, url: str, options: dict[str, Any]) -> list[Row]:
    size_bytes, servers = mib << 20, children()
    with harness.cluster(4 * settings.workers), harness.team(settings.workers, size_bytes, "sharded") as actors:
        saving = _saves(actors, url, options, servers)
        restoring = _restore(actors, url, options, servers)
    staged = settings.workers * size_bytes
    case = f"{settings.workers} workers × {mib} MiB, sharded, {where}"
    return [
        _row(f"save, {case}", saving, 2 * staged + _FIXED_BYTES),
        _row(f"restore, {case}", restoring, _WINDOW_BYTES),
    ]


def _row(case: str, found: Peak, allowed: int) -> Row:
    ours, limit = Series("ours", (max(0, found.above_bytes),)), Series(LIMIT, (allowed,))
    return Row("memory", case, "bytes", ours, limit, goals=(Goal("at most", 1),))


def _saves(actors: list[Any], url: str, options: dict[str, Any], servers: frozenset[int]) -> Peak:
    with peak(servers) as found, rl_ckpt.Checkpointer(url, storage_options=options) as ckpt:
        pending = []
        for step in range(_SAVES):
            harness.call_all(actors, "train", step)
            pending.append(ckpt.save(step, actors))
        for each in pending:
            each.result()
    return found


def _restore(actors: list[Any], url: str, options: dict[str, Any], servers: frozenset[int]) -> Peak:
    with rl_ckpt.Checkpointer(url, storage_options=options) as ckpt:
        ckpt.restore(actors)
        harness.call_all(actors, "train", 0)
        with peak(servers) as found:
            ckpt.restore(actors)
    return found
