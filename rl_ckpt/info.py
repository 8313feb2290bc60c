"""What callers learn about checkpoints, saves and restores. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A committed checkpoint."""

    step: int
    """Training step, as the caller counts."""
    id: str
    """`<step>-<attempt>`; unique in the run, also where a rolled-back run reaches a step again."""
    url: str
    """Of its manifest; empty where it is only in memory."""
    bytes: int
    """Of all arrays, each once, in bytes."""
    bytes_written: int
    """That this save wrote: less than `bytes` where chunks were stored already, plus metadata."""
    time: float
    """Of the commit, in Unix seconds."""
    metrics: Mapping[str, object]
    """As given at save."""
    tag: str | None
    """As given at save; a tagged checkpoint is never swept."""
    lineage: tuple[str, ...]
    """Ids of its ancestors, the parent first."""
    world_size: int
    """Number of workers that saved it."""
    stall_s: float | None = None
    """How long the save kept its slowest worker from training, in seconds; only known to the process that saved."""
    durable_s: float | None = None
    """From the call of `save` to the commit, in seconds; only known to the process that saved."""
    in_store: bool = True
    """False for what only the nodes' memory has (`persist_every`, or a deadline that left no time for the store)."""


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What a restore did."""

    step: int
    """The step that was restored."""
    id: str
    """Of the checkpoint."""
    world_size: int
    """Number of workers restored."""
    saved_world_size: int
    """Number of workers that saved it."""
    bytes: int
    """Put into workers' arrays, all ranks together."""
    bytes_from: Mapping[str, int]
    """Bytes of chunks by source. Read by the workers themselves: "memory" (which their node holds of the checkpoint),
    "files" (of the store). Brought in by shard servers: "peers_memory" (out of memory that another node holds), "store"
    (fetched, once per cluster) and "peers" (passed on between nodes over sockets), and where it came to that,
    "peers_ray" (passed on through Ray's object store, as a socket failed) and "store_again" (read once more, as a
    peer's were damaged or not to be had)."""
    seconds: float
    """From the call to the last worker's state being set."""
    kept: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """By rank: leaves that were left as they were (not selected, not matching, or no counterpart in the checkpoint)."""
    ignored: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """By rank: leaves of the checkpoint that the worker has no place for (`strict=False`)."""
    ranks_without_counterpart: tuple[int, ...] = ()
    """Ranks past the saved world size: they keep what belongs to a rank."""
    ranks_dropped: tuple[int, ...] = ()
    """Saved ranks past the new world size: what belonged to them was restored to nobody."""
    fell_back: Mapping[str, str] = field(default_factory=dict)
    """Newer checkpoints that could not be used: id → why."""
    repaired: Mapping[str, str] = field(default_factory=dict)
    """Chunks that were damaged or missing where they were looked for first: chunk → where the good bytes came from (a
    file of the store, or the memory of a shard server)."""
    notice: str = ""
    """What the user should know though the restore succeeded: that the store could not be read, so that there may be a
    newer checkpoint than memory had; mostly empty."""
