"""Storage: how much a run takes over many saves, beside what its live checkpoints hold. Nothing is written.

The parts that decide are the real ones: the plan of a save, the index of what is stored, compaction, retention. States
are shapes alone; which chunk a save finds changed is drawn by pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rl_ckpt.format.digest import digest
from rl_ckpt.format.manifest import Manifest
from rl_ckpt.format.records import CommitRecord
from rl_ckpt.plan.chunk_index import ChunkIndex
from rl_ckpt.plan.compaction import lasting
from rl_ckpt.plan.deal import SavePlan, Written, deal, entries, settle
from rl_ckpt.plan.inventory import take_inventory
from rl_ckpt.plan.merge import merge
from rl_ckpt.plan.retention import EveryNSteps, KeepRule, LatestN, decide
from rl_ckpt.state.tree import flatten

CHUNK_BYTES = 256 << 10
CHUNKS = 100
_STREAMS, _FILE_BYTES = 4, 256 << 20
_OVERHEAD_BYTES = 600  # of a shard file, and as many of each column in it

Pattern = Callable[[int, int, np.random.Generator], Sequence[int]]
"""Which of so many chunks a step has changed."""


def _ring(step: int, chunks: int, rng: np.random.Generator) -> Sequence[int]:
    return [(5 * step + k) % chunks for k in range(5)]


def _churn(share: float) -> Pattern:
    return lambda step, chunks, rng: np.flatnonzero(rng.random(chunks) < share).tolist()


def _mixed(step: int, chunks: int, rng: np.random.Generator) -> Sequence[int]:
    """A tenth always, a third at random, a ring, and the rest never."""
    tenth = chunks // 10
    some = [tenth + k for k in np.flatnonzero(rng.random(3 * tenth) < 0.1)]
    return [*range(tenth), *some, *(4 * tenth + (2 * step + k) % (2 * tenth) for k in range(2))]


PATTERNS: dict[str, Pattern] = {
    "unchanged": lambda step, chunks, rng: [],
    "90 % frozen": lambda step, chunks, rng: range(chunks - chunks // 10, chunks),
    "ring buffer": _ring,
    "growing": lambda step, chunks, rng: [chunks - 1],
    "random 2 %": _churn(0.02),
    "random 10 %": _churn(0.1),
    "random 30 %": _churn(0.3),
    "mixed": _mixed,
}

RULES: dict[str, tuple[KeepRule, ...]] = {
    "LatestN(1)": (LatestN(1),),
    "LatestN(3)": (LatestN(3),),
    "LatestN(10)": (LatestN(10),),
    "LatestN(2), EveryNSteps(20)": (LatestN(2), EveryNSteps(20)),
    "LatestN(2), tags": (LatestN(2),),
}


@dataclass(frozen=True, slots=True)
class Course:
    """What came of many saves."""

    written: tuple[float, ...]
    """Of each save: bytes written to bytes of the state; the first is the whole state."""
    stored: tuple[float, ...]
    """After each save: bytes of all shard files to bytes of the chunks that live checkpoints hold, each once."""


class _Run:
    """A run of which only sizes are kept."""

    def __init__(self, rules: tuple[KeepRule, ...]) -> None:
        self._rules = rules
        self._index = ChunkIndex()
        self._commits: list[CommitRecord] = []
        self._manifests: dict[str, Manifest] = {}

    def save(self, step: int, plan: SavePlan, versions: Sequence[int], tag: str | None) -> float:
        """Bytes written, to those of the state."""
        checkpoint = f"{step}-x"
        digests = {
            ("s", item.offset): digest(f"{item.path} {versions[int(item.path[1:])]}".encode()) for item in plan.stage[0]
        }
        commit = _record(step, checkpoint, tag)
        stays = lasting([*self._commits, commit], self._rules, step)
        known = self._index.view({c.id for c in self._commits}, stays, checkpoint in stays)
        plan = settle(plan, checkpoint, digests, known)
        written = {
            server: [
                Written(
                    _OVERHEAD_BYTES * (1 + len(file.columns)) + sum(c.bytes for c in file.columns),
                    tuple(CHUNK_BYTES * k for k in range(len(file.columns))),
                )
                for file in files
            ]
            for server, files in plan.files.items()
        }
        files, arrays = entries(plan, written, digests)
        manifest = Manifest(
            run="r", id=checkpoint, step=step, world_size=1, time=0.0, writer="", parent=None, metrics={}, tag=tag,
            files=files, arrays=arrays, nodes={},
        )  # fmt: skip
        self._index.add(manifest, step)
        self._commits.append(commit)
        self._manifests[checkpoint] = manifest
        gone = {verdict.id for verdict in decide(self._commits, self._rules, step) if not verdict.keep}
        self._index.drop(gone)
        self._commits = [c for c in self._commits if c.id not in gone]
        self._manifests = {c.id: self._manifests[c.id] for c in self._commits}
        return sum(w.bytes for done in written.values() for w in done) / manifest.array_bytes

    def stored(self) -> float:
        """Bytes of files that live checkpoints name, to bytes of chunks that they hold."""
        files = {file for manifest in self._manifests.values() for file in manifest.files}
        chunks = {
            (chunk.digest, chunk.bytes)
            for manifest in self._manifests.values()
            for array in manifest.arrays
            for chunk in array.chunks
        }
        return sum(file.bytes for file in files) / sum(size for _, size in chunks)


def course(pattern: str, rules: str, saves: int = 1000, seed: int = 0) -> Course:
    """Many saves.

    Args:
        pattern: One of `PATTERNS`.
        rules: One of `RULES`.
        saves: How many.
        seed: Of what is drawn.
    """
    rng = np.random.default_rng(seed)
    run, versions, plan = _Run(RULES[rules]), [0] * CHUNKS, _plan(CHUNKS)
    written, stored = [], []
    for step in range(1, saves + 1):
        if pattern == "growing" and step % 10 == 0:
            versions.append(0)
            plan = _plan(len(versions))
        for chunk in PATTERNS[pattern](step, len(versions), rng) if step > 1 else ():
            versions[chunk] = step
        tag = "kept" if rules.endswith("tags") and rng.random() < 0.05 else None
        written.append(run.save(step, plan, versions, tag))
        stored.append(run.stored())
    return Course(tuple(written), tuple(stored))


def table(saves: int = 1000) -> str:
    """Every pattern with every set of rules, as Markdown."""
    lines = [
        "| State | Rules | Written, median | Written, mean | Stored, mean | Stored, at most |",
        "|---|---|---|---|---|---|",
    ]
    for pattern in PATTERNS:
        for rules in RULES:
            found = course(pattern, rules, saves)
            written = found.written[1:]
            lines.append(
                f"| {pattern} | {rules} | {np.median(written):.1%} | {np.mean(written):.1%} | "
                f"{np.mean(found.stored):.2f} | {max(found.stored):.2f} |"
            )
    return "\n".join(lines)


def _plan(chunks: int) -> SavePlan:
    state = {f"c{number}": np.empty(CHUNK_BYTES, np.uint8) for number in range(chunks)}
    merged = merge([take_inventory(flatten(state), CHUNK_BYTES, 1)], CHUNK_BYTES)
    return deal(merged, ["s"], _STREAMS, _FILE_BYTES)


def _record(step: int, checkpoint: str, tag: str | None) -> CommitRecord:
    return CommitRecord(
        number=step, run="r", write_id="", epoch=1, id=checkpoint, step=step, manifest_bytes=0, manifest_digest="",
        bytes=0, bytes_written=0, time=0.0, tag=tag,
    )  # fmt: skip
