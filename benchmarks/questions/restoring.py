"""Restores from a local disk whose files are cached: ours, raw reads, and with `workers` of them every alternative.

Replicated state: each worker gets all of it. Sharded: each gets its part. All restore into arrays that are there.
"""

from __future__ import annotations

import rl_ckpt
from benchmarks import harness
from benchmarks.alternatives import ON_DISK, RLLIB
from benchmarks.others import others
from benchmarks.results import LIMIT, Goal, Row, Series
from benchmarks.settings import Settings


def measure(settings: Settings) -> list[Row]:
    """1 to `many_workers` workers."""
    counts = sorted({1, 2, settings.workers, settings.many_workers})
    return [_case(settings, count, kind) for count in counts for kind in ("sharded", "declared")]


def _case(settings: Settings, workers: int, kind: str) -> Row:
    compared = workers == settings.workers
    mib = settings.many_mib if workers > settings.workers else settings.mib
    size_bytes = mib << 20
    names = (*ON_DISK, RLLIB) if compared else ()
    unique_bytes = size_bytes * workers if kind == "sharded" else size_bytes
    with (
        harness.cluster(4 * workers),
        harness.folder() as folder,
        harness.team(workers, size_bytes, kind) as actors,
        others(actors, str(folder), names, unique_bytes=unique_bytes) as rest,
        rl_ckpt.Checkpointer(str(folder / "run")) as ckpt,
    ):
        harness.call_all(actors, "fill_file", str(folder))
        ckpt.save(0, actors).result()
        saved = harness.call_all(actors, "checksum")
        ways: harness.Ways = {
            "ours": lambda _: {"restore": harness.timed(lambda: ckpt.restore(actors))},
            LIMIT: lambda _: {"restore": harness.timed(lambda: harness.call_all(actors, "raw_read", str(folder)))},
            **rest.restores(),
        }
        found = harness.rounds(settings.rounds, ways, lambda number: harness.call_all(actors, "train", number))
        harness.call_all(actors, "train", 0)
        ckpt.restore(actors)
        harness.expect(actors, saved, "the restore")
        goals = (Goal("at least", 0.8), *((Goal("at least", 3, "RLlib"),) if compared else ()))
        ours, limit = (Series(name, tuple(found[name]["restore"])) for name in ("ours", LIMIT))
        case = f"{workers} worker{'s' * (workers > 1)} × {mib} MiB, {kind}"
        return Row("restore", case, "s", ours, limit, rest.series(found, "restore"), goals, rest.skipped)
