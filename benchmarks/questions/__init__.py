"""Questions: each module measures one and returns rows; what is not reached carries its reason here, beside the goal.

Registered by name in `QUESTIONS`, in the order of the page.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.results import Row
from benchmarks.settings import Settings


@dataclass(frozen=True)
class Question:
    """One question."""

    title: str
    """As the page heads it."""
    limit: str
    """What the limit is."""
    module: str
    """In this package."""
    function: str = "measure"
    reasons: tuple[tuple[str, str], ...] = ()
    """(start of a case, why its goal is not met on the machine that the page shows); "" is all cases."""

    def measure(self, settings: Settings) -> list[Row]:
        """The answer."""
        function: Callable[[Settings], list[Row]] = getattr(
            importlib.import_module(f"{__name__}.{self.module}"), self.function
        )
        return function(settings)

    def reason(self, case: str) -> str:
        """Why a goal of this case is not met, as far as it is known."""
        return next((why for start, why in self.reasons if case.startswith(start)), "")


_MEMCPY = "warm memcpy of the bytes that a worker stages"
_WRITE = "write + fsync of the same bytes, one file per worker at once"
_READ = "read of the page cache into warm memory, all workers at once"

QUESTIONS: dict[str, Question] = {
    "stall": Question("Stall of training per save", _MEMCPY, "saving"),
    "first": Question("Stall of the first save, after `prepare`", _MEMCPY, "first_save"),
    "frozen": Question("Stall where the state is an object that is immutable already", "none", "frozen"),
    "training": Question("Training steps while a save is written", "steps while nothing is written", "training"),
    "durable": Question("Time to durable, local disk", _WRITE, "saving"),
    "s3": Question("Save and restore, S3", "the faster raw client, same server and concurrency", "object_store"),
    "restore": Question("Restore, local disk, cached", _READ, "restoring"),
    "reads": Question("Bytes read from S3 per unique byte, N → M workers", "each byte once", "reading", "resharding"),
    "policy": Question("Restore of one policy out of 100", "its bytes", "reading", "one_policy"),
    "nodes": Question("Shards from node to node", "plain loopback TCP and sendfile, same bytes, same streams", "nodes"),
    "cpu": Question("CPU time", "memcpy + write + fsync; read of the page cache", "cpu"),
    "small": Question("Many small arrays", "one array of the same bytes", "small"),
    "memory": Question("Peak memory beside the state", "two staged generations; one window of chunks", "memory"),
    "cold": Question("Cold start", "`import ray`", "cold"),
}
