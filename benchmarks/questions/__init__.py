"""Questions: each module measures one and returns rows; what is not reached carries its reason here, beside the goal.

Registered by name in `QUESTIONS`, in the order of the page.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.results import LIMIT, Row
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
    reasons: tuple[tuple[str, str, str], ...] = ()
    """(part of a case, what the goal compares with, why it is not met on the page's machine); "" is any."""

    def measure(self, settings: Settings) -> list[Row]:
        """The answer."""
        function: Callable[[Settings], list[Row]] = getattr(
            importlib.import_module(f"{__name__}.{self.module}"), self.function
        )
        return function(settings)

    def reason(self, case: str, against: str) -> str:
        """Why a goal of this case is not met, as far as it is known."""
        fitting = (why for part, other, why in self.reasons if part in case and other in ("", against))
        return next(fitting, "")


_MEMCPY = "warm memcpy of the bytes that a worker stages"
_WRITE = "write + fsync of the same bytes, one file per worker at once"
_READ = "read of the page cache into warm memory, all workers at once"

_REPLICAS = (
    "replicated",
    "",
    "each worker reads and hashes all its bytes at every save, to see that they still are replicas: as many times what "
    "it stages as there are workers. Declared `Replicated`, this falls away",
)
_STALL = (
    (
        "sharded",
        "DCP async",
        "with staging memory that is kept, DCP's stall is one warm memcpy of the same bytes: nothing that copies them "
        "can take a third of it. Where state is replicated, less is copied",
    ),
    _REPLICAS,
    (
        "",
        LIMIT,
        "what comes on top of copying are two messages between a worker and the coordinator: 3 to 5 ms, as they wait "
        "for one of the 4 cores beside the workers that copy",
    ),
)
_DURABLE = (
    (
        "",
        "",
        "about 20 ms do not depend on the size: messages, then the manifest and the commit record, each with an fsync. "
        "Writing itself takes 40 to 80 ms here",
    ),
)
_S3 = (
    ("save", "", "staging goes before the upload, manifest and commit record come after it, each a request of its own"),
    (
        "restore",
        "",
        "fetching and verifying takes as long as the raw client; before it, commit log and manifest are read (15 ms) "
        "and shared memory for the chunks is made (7 to 170 ms, as the kernel finds huge pages), after it workers copy",
    ),
)
_RESTORE = (
    (
        "",
        LIMIT,
        "every byte is read twice: all ranks verify before any rank is touched. Where memory is the limit, that alone "
        "is 1.4 times the read; some 10 ms more are messages",
    ),
)
_CPU = (("restore", "", "every byte is read twice: all ranks verify before any rank is touched"),)
_MEMORY = (
    (
        "save",
        "",
        "the memory tier keeps the newest checkpoint in a third generation; with `memory_tier=False` there are two",
    ),
    (
        "restore",
        "",
        "a node's chunks stay in shared memory until every rank has verified its own, so that a restore that fails "
        "touches no worker",
    ),
)
_TRAINING = (
    (
        "on all cores,",
        "",
        "no core is free: what writing costs (the kernel's copies, digests, Ray's processes) is taken from trainers",
    ),
)

QUESTIONS: dict[str, Question] = {
    "stall": Question("Stall of training per save", _MEMCPY, "saving", reasons=_STALL),
    "first": Question("Stall of the first save, after `prepare`", _MEMCPY, "first_save", reasons=(_REPLICAS,)),
    "frozen": Question("Stall where the state is an object that is immutable already", "none", "frozen"),
    "training": Question(
        "Training steps while a save is written", "steps while nothing is written", "training", reasons=_TRAINING
    ),
    "replication": Question(
        "Training steps while a save is written and copied to other nodes",
        "steps while nothing is written",
        "replication",
        reasons=(
            (
                "p99",
                "",
                "all nodes share one machine of 4 cores: trainers, writing, and both ends of every copy. On "
                "machines of their own, a node has its own end alone",
            ),
        ),
    ),
    "durable": Question("Time to durable, local disk", _WRITE, "saving", reasons=_DURABLE),
    "s3": Question(
        "Save and restore, S3", "the faster raw client, same server and concurrency", "object_store", reasons=_S3
    ),
    "pull": Question(
        "A checkpoint brought from S3 to disk, and from disk to S3",
        "the raw client, into warm memory",
        "pulling",
        reasons=(
            (
                "",
                "",
                "some 20 requests that do not depend on the size (0.3 s: log, manifest, pins, connections), and an "
                "fsync of every file, which the others leave out",
            ),
        ),
    ),
    "restore": Question("Restore, local disk, cached", _READ, "restoring", reasons=_RESTORE),
    "reads": Question("Bytes read from S3 per unique byte, N → M workers", "each byte once", "reading", "resharding"),
    "policy": Question("Restore of one policy out of 100", "its bytes", "reading", "one_policy"),
    "nodes": Question("Shards from node to node", "plain loopback TCP and sendfile, same bytes, same streams", "nodes"),
    "cpu": Question("CPU time", "memcpy + write + fsync; read of the page cache", "cpu", reasons=_CPU),
    "small": Question("Many small arrays", "one array of the same bytes", "small"),
    "memory": Question(
        "Peak memory beside the state", "two staged generations; one window of chunks", "memory", reasons=_MEMORY
    ),
    "cold": Question("Cold start", "`import ray`", "cold"),
}
