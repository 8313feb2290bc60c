"""Save and restore against an S3 server: ours, and two raw clients with the same concurrency in the same processes.

The raw clients move as many bytes as each worker stages, from and to warm memory. Where S3 clients of the workers run
beside ours, the server (which shares this machine's cores) gets the same work from each.
"""

from __future__ import annotations

from typing import Any

import rl_ckpt
from benchmarks import harness, raw_s3
from benchmarks.alternatives import ON_S3
from benchmarks.others import others
from benchmarks.results import LIMIT, Goal, Row, Series
from benchmarks.servers import Bucket, bucket
from benchmarks.settings import Settings

AT_ONCE = 16
"""Requests on their way, of all workers together: what our store keeps on its way per node."""


def measure(settings: Settings) -> list[Row]:
    """One row for each direction; the limit is the raw client that is faster in that direction."""
    workers, size_bytes = settings.workers, settings.s3_mib << 20
    clients = [name for name in raw_s3.CLIENTS if raw_s3.missing(name) is None]
    with (
        harness.cluster(4 * workers),
        bucket() as place,
        harness.team(workers, size_bytes, "sharded") as actors,
        others(actors, place.url, ON_S3, options=place.options) as rest,
        rl_ckpt.Checkpointer(
            f"{place.url}/run", storage_options=place.options, keep=[rl_ckpt.LatestN(1)], grace_s=0
        ) as ckpt,
    ):
        raw = _Raw(place, actors, max(1, AT_ONCE // workers))
        saving: harness.Ways = {
            "ours": lambda _: harness.save(ckpt, harness.next_step(), actors),
            **{f"raw {name}": raw.way("raw_put", name) for name in clients},
            **rest.saves(),
        }
        saves = harness.rounds(settings.rounds, saving, raw.before)
        harness.save(ckpt, harness.next_step(), actors)  # a round may end with another way's, of other values
        saved = harness.call_all(actors, "checksum")
        restoring: harness.Ways = {
            "ours": lambda _: {"restore": harness.timed(lambda: ckpt.restore(actors))},
            **{f"raw {name}": raw.way("raw_get", name) for name in clients},
            **rest.restores(),
        }
        restores = harness.rounds(settings.rounds, restoring, raw.before)
        harness.call_all(actors, "train", 0)
        ckpt.restore(actors)
        harness.expect(actors, saved, "the restore")
    case = f"{workers} workers × {settings.s3_mib} MiB, {place.server.name}"
    skipped = {f"raw {name}": why for name in raw_s3.CLIENTS if (why := raw_s3.missing(name))} | rest.skipped
    rows = []
    for direction, found, measure in (("save", saves, "durable"), ("restore", restores, "restore")):
        raws = [Series(f"raw {name}", tuple(found[f"raw {name}"][measure])) for name in clients]
        best = min(raws, key=lambda way: way.median)
        limit = Series(LIMIT, best.values, best.name)
        ours = Series("ours", tuple(found["ours"][measure]))
        ways = (*raws, *rest.series(found, measure))
        rows.append(Row("s3", f"{direction}, {case}", "s", ours, limit, ways, (Goal("at least", 0.85),), skipped))
    return rows


class _Raw:
    def __init__(self, place: Bucket, actors: list[Any], at_once: int) -> None:
        self._place, self._actors, self._at_once = place, actors, at_once

    def before(self, number: int) -> None:
        """Other values, and a server that lives."""
        harness.call_all(self._actors, "train", number)
        self._place.check_alive()

    def way(self, method: str, client: str) -> harness.Way:
        """One raw transfer of all workers."""

        def transfer() -> None:
            key = f"raw-{client}"
            harness.call_all(self._actors, method, client, self._place.raw, key, self._at_once)

        return lambda _: {"durable" if method == "raw_put" else "restore": harness.timed(transfer)}
