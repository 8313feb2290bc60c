"""What callers learn about checkpoints, saves and restores. Plain data."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
    tags: tuple[str, ...] = ()
    """The tag given at save first, then those that were added later, as listings know them."""
    note: str = ""
    """As written later by `Catalog.note`, as listings know it."""
    parent: str | None = None
    """Id of the checkpoint that this one continues, also where that is gone; None: it is the first."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the retention rules say of one checkpoint."""

    id: str
    """Of the checkpoint."""
    step: int
    """Its step."""
    keep: bool
    """Whether it stays."""
    why: str
    """For people: which rule or tag keeps it, or why it goes."""


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What a sweep deleted, or would (`dry_run`)."""

    verdicts: tuple[Verdict, ...]
    """One per checkpoint, oldest first."""
    deleted: tuple[str, ...]
    """Ids of the checkpoints that went: their commit records are deleted, their files when the grace time is over."""
    pinned: Mapping[str, str] = field(default_factory=dict)
    """Checkpoints that were to go, and stay as somebody holds them: id → who."""
    requested: Mapping[str, str] = field(default_factory=dict)
    """Checkpoints that a job which owns the run was asked to remove: id → who, and when it does."""
    put_back: tuple[str, ...] = ()
    """Ids of tagged checkpoints that a sweep had begun to drop as their tag came, and that are listed again."""
    files: int = 0
    """Manifests and shard files that were deleted."""
    bytes: int = 0
    """Of these files."""
    waiting_files: int = 0
    """That no checkpoint names, and that a later sweep deletes, when the grace time is over."""
    waiting_bytes: int = 0
    """Of these files."""
    partial_uploads: int = 0
    """Uploads and temporary files of killed writers that were removed."""
    dry_run: bool = False
    """Whether nothing was changed: all the above is what a sweep would do now."""
    notices: tuple[str, ...] = ()
    """What could not be done or judged, and why."""


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


@dataclass(frozen=True, slots=True)
class PrefetchReport:
    """What a prefetch brought into the nodes' memory."""

    step: int
    """Of the checkpoint that memory has; a newer one than was found in the store, where memory had that already."""
    id: str
    """Of that checkpoint."""
    bytes: int
    """Of its chunks, each once."""
    bytes_fetched: int
    """Read from the store by this prefetch: 0 where memory had it already; more than `bytes` only where a node was lost
    with what it had brought in."""
    bytes_left: int
    """Of `bytes`, that are in no node's memory: a restore reads them from the store."""
    nodes: Mapping[str, int]
    """Bytes that each node brought in, by the name of its shard server."""
    seconds: float
    """Until the last chunk was in memory, without copies."""
    damaged: Mapping[str, str] = field(default_factory=dict)
    """Chunks that are damaged or missing in the store, and what was found: left out. A restore looks for their bytes in
    other checkpoints; `verify(repair=True)` mends them."""
    fell_back: Mapping[str, str] = field(default_factory=dict)
    """Newer checkpoints whose manifests are damaged: id → why."""
    notices: tuple[str, ...] = ()
    """What else is not as it might be: no room, nodes that took no part, copies that could not be made."""


@dataclass(frozen=True, slots=True)
class Damage:
    """Something in a run's files that is not what was committed."""

    file: str
    """Its name below the run's url."""
    found: str
    """What is there instead: another digest, a size, or why it can't be read."""
    expected: str = ""
    """Digest or size that was committed, where it is known."""
    offset: int | None = None
    """Of a chunk: where it should lie in the file, in bytes. None: the whole file, or what is around its values."""
    bytes: int = 0
    """Of the chunk."""
    paths: tuple[str, ...] = ()
    """Leaves that have their values there."""
    checkpoints: tuple[str, ...] = ()
    """Ids of those that need it; none for a damaged commit record, which could tell of one."""
    repaired_from: str | None = None
    """Where the good bytes came from that were written back; None: it is as it was found."""
    advice: str = ""
    """What to do, where it was not repaired."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` read and found."""

    checkpoints: Mapping[str, str]
    """By id, oldest first: "good"; "repaired": damaged, and whole again; or "damaged"."""
    damage: tuple[Damage, ...]
    """Everything that was found, repaired or not."""
    files: int
    """Shard files that were looked at."""
    chunks: int
    """That were read, each once, however many checkpoints share it."""
    bytes: int
    """Of those chunks."""
    seconds: float
    """That it took."""

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged (any more)."""
        return all(item.repaired_from is not None for item in self.damage)


@dataclass(frozen=True, slots=True)
class Recovery:
    """One recovery of a supervised job."""

    error: str
    """What told of the loss."""
    time: float
    """When it was noticed, in Unix seconds."""
    lost: tuple[int, ...]
    """Ranks of the workers that were found dead; empty where something else was lost, an object or a node, say."""
    failed_saves: tuple[str, ...]
    """Saves under way that did not become checkpoints, and why."""
    restored: RestoreReport | None
    """What the new workers were restored from; None: nothing had been saved yet, they began anew."""
    attempts: int
    """How often workers were made until they were restored."""
    settled_s: float
    """From the notice until what was being saved was decided and the old workers were ended, in seconds."""
    rebuilt_s: float
    """From then until new workers stood, in seconds."""
    restored_s: float
    """How long the restore took, in seconds."""


@dataclass(frozen=True, slots=True)
class SuperviseReport:
    """What a supervised job did."""

    result: Any
    """What `train` returned in the end."""
    restored: RestoreReport | None
    """What the first workers were restored from; None: nothing was there yet."""
    recoveries: tuple[Recovery, ...] = ()
    """In order."""


@dataclass(frozen=True, slots=True)
class Preemption:
    """A notice that this process or nodes of the job will soon be taken away."""

    reason: str
    """For people: the signal, or which nodes are drained."""
    deadline: float
    """When, in Unix seconds: as announced, or else the grace time after it was noticed."""
    this_process: bool
    """Whether this process has to go (a signal, or its own node): save and return. Else only `ranks`."""
    nodes: tuple[str, ...] = ()
    """Ids of the nodes that are drained, of those that concern the job."""
    ranks: tuple[int, ...] = ()
    """Which of the given workers are on these nodes."""

    @property
    def seconds_left(self) -> float:
        """Until the deadline, in seconds; 0 where it has passed."""
        return max(0.0, self.deadline - time.time())


@dataclass(frozen=True, slots=True)
class ArrayChange:
    """An array that two checkpoints have at one path, and that is not the same."""

    path: str
    """Of the leaf."""
    ranks: tuple[int, ...] | None
    """Whose it is; None: everybody's."""
    before: str
    """Dtype, shape and kind, as "float32 (3, 4) numpy"."""
    after: str
    """The same, of the later one."""
    elements: int
    """That it has now."""
    changed: int | None
    """Elements whose bits differ; None where dtype or shape are others: then nothing was read."""
    norm: float | None
    """Euclidean norm of the difference; None where `changed` is, and for text, bytes and structures."""
    max_abs: float | None
    """Greatest absolute difference of an element; None as `norm`."""
    not_finite: int = 0
    """Changed elements with a NaN or an infinity on one side: left out of `norm` and `max_abs`."""

    @property
    def share(self) -> float | None:
        """Of the elements, how many changed: from 0 to 1."""
        return None if self.changed is None else self.changed / self.elements


@dataclass(frozen=True, slots=True)
class LeafChange:
    """Plain data that is not the same in two checkpoints, or a leaf that is of another kind."""

    path: str
    """Of the leaf."""
    ranks: tuple[int, ...] | None
    """Whose it is; None: everybody's."""
    before: object
    """The value; of an array, a container or pickled data a text that describes it."""
    after: object
    """The same, of the later one."""


@dataclass(frozen=True, slots=True)
class Diff:
    """What differs between two checkpoints."""

    a: CheckpointInfo
    """The one before."""
    b: CheckpointInfo
    """The one after."""
    added: Mapping[str, tuple[int, ...] | None]
    """Paths that only `b` has → on which ranks; None: on all."""
    removed: Mapping[str, tuple[int, ...] | None]
    """Paths that only `a` has, in the same way."""
    arrays: tuple[ArrayChange, ...]
    """In the order of the tree."""
    leaves: tuple[LeafChange, ...]
    """In the order of the tree."""
    unchanged: int
    """Leaves that are the same, by their digests: none of their bytes were read."""
    bytes_read: int
    """Of chunks, from both checkpoints."""
    seconds: float
    """That it took."""

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.added or self.removed or self.arrays or self.leaves)

    def __str__(self) -> str:
        """A line for each path that differs."""
        lines = [f"{self.a.id} → {self.b.id}: {self.unchanged} leaves unchanged, {self.bytes_read} bytes read"]
        lines += [f"+ {path}{_of_ranks(ranks)}" for path, ranks in self.added.items()]
        lines += [f"- {path}{_of_ranks(ranks)}" for path, ranks in self.removed.items()]
        lines += [f"~ {leaf.path}{_of_ranks(leaf.ranks)}: {leaf.before!r} → {leaf.after!r}" for leaf in self.leaves]
        for one in self.arrays:
            text = one.after if one.before == one.after else f"{one.before} → {one.after}"
            if one.share is not None:
                text += f", {one.share:.2%} of {one.elements} elements"
            if one.norm is not None:
                text += f", norm {one.norm:.4g}, at most {one.max_abs:.4g}"
            if one.not_finite:
                text += f", {one.not_finite} not finite"
            lines.append(f"~ {one.path}{_of_ranks(one.ranks)}: {text}")
        return "\n".join(lines)


def _of_ranks(ranks: tuple[int, ...] | None) -> str:
    return "" if ranks is None else f" (ranks {', '.join(map(str, ranks))})"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a pull is."""

    phase: str
    """"checking" what is there already, "copying" files, "committing", or "done"."""
    checkpoint: str
    """Id of the newest one that is on its way."""
    bytes: int
    """Of shard files that are at the destination by now, in bytes."""
    bytes_total: int
    """Of all shard files that the checkpoints need."""
    bytes_moved: int
    """That travelled in this call; the others were there."""
    files: int
    """Shard files that are at the destination by now."""
    files_total: int
    """That the checkpoints need."""
    bytes_per_s: float
    """Over the last seconds."""
    seconds: float
    """Since the call."""
    seconds_left: float | None
    """As fast as over the last seconds; None where nothing moves."""


@dataclass(frozen=True, slots=True)
class PullReport:
    """What a pull did."""

    source: str
    """Url."""
    destination: str
    """Url."""
    checkpoints: tuple[str, ...]
    """Ids of those that this call committed at the destination, oldest first."""
    already: tuple[str, ...]
    """Ids of those that were asked for and were there."""
    files: int
    """Shard files that travelled."""
    files_kept: int
    """That were there, whole and right."""
    bytes_moved: int
    """Of shard files, read from the source."""
    bytes_kept: int
    """Of shard files, that were there: of whole files, and of unfinished ones that a killed pull had left."""
    bytes_by_node: Mapping[str, int]
    """Of `bytes_moved`, by node of the Ray cluster; empty where this process did it alone."""
    pinned: bool
    """Whether the source was held against the sweep meanwhile; it can't be where this process may not write to it."""
    seconds: float
    """That it took."""
    notices: tuple[str, ...] = ()
    """What the user should know though the pull succeeded; mostly empty."""
