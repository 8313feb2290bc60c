"""Reuse: which chunks a save need not write, as a live checkpoint of the run holds them already.

Owns: what the run's committer knows of stored chunks (plan/chunk_index.py), when it reads that, and which checkpoints a
new one may lean on. Promises: none whose files are missing or cut short, none that this writer or an earlier one may be
deleting, and none that the save's line of checkpoints has left behind, as far as records tell: a restore that goes back
to an older checkpoint does so because the newer are damaged, for all that is known here. For one thread at a time.

Manifests are read when the first save asks, the newest first, as many as `FIRST_BYTES` allows: that is in the
background, after the state was staged. The others are read after its commit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from rl_ckpt.errors import CorruptionError
from rl_ckpt.format import records
from rl_ckpt.format.manifest import Manifest
from rl_ckpt.format.records import CommitRecord
from rl_ckpt.plan.chunk_index import ChunkIndex, KnownChunks
from rl_ckpt.store.based import sizes_of
from rl_ckpt.store.commit_log import LATEST_S
from rl_ckpt.store.run import Run

FIRST_BYTES = 64 << 20
"""Of manifests that are read before the first save is written: 64 MiB name some 500,000 chunks."""
MOST_CHUNKS = 1 << 20
"""So many different chunks are known, of the newest checkpoints; 80 MB. What older ones hold is written again."""
_READERS = 8


class Reuse:
    """What saves to one run need not write; kept by the run's committer."""

    def __init__(self, run: Run, read: Callable[[Mapping[str, frozenset[str]]], None], *, ended: bool = False) -> None:
        """Nothing is read yet.

        Args:
            run: The run, opened for writing.
            read: Is told which shard files an older checkpoint names, by its id, once its manifest was read.
            ended: Whether it is certain that the writer before this one asks the store for nothing any more.
        """
        self._run = run
        self._read = read
        self._index = ChunkIndex()
        self._numbers: dict[str, int] = {}  # by checkpoint in the index: its commit
        self._parents: dict[str, str | None] = {}  # by live checkpoint: what it continues, past those dropped meanwhile
        self._passed: set[str] = set()  # not in the index, and not to be read: damaged, gone, or too much
        self._newest_found: str | None = None
        self._oldest_epoch = run.log.epoch - 1 if ended else run.log.epoch
        self._alone_at: float | None = time.monotonic() + LATEST_S
        self._asked = False

    def begin(self, commits: Sequence[CommitRecord]) -> None:
        """Says which checkpoints there were when the run was opened."""
        self._newest_found = commits[-1].id if commits else None
        self._parents = {commit.id: commit.parent for commit in commits}

    def find(
        self,
        parent: str | None,
        commits: Sequence[CommitRecord],
        lasting: Collection[str] = (),
        *,
        lasts: bool = False,
        urgent: bool = False,
    ) -> KnownChunks:
        """Chunks that a save may name instead of writing them.

        Args:
            parent: Id of the checkpoint that the save continues; None: the newest.
            commits: All of the run, oldest first.
            lasting: Ids of those that stay; see plan/compaction.py.
            lasts: Whether the new one will be one of those.
            urgent: Whether there is no time to read more than one manifest.

        Raises:
            StorageError: The store failed.
        """
        start = next((c for c in commits if c.id == parent), commits[-1] if commits else None)
        if start is None:
            return self._index.view((), (), lasts)
        self._asked = True
        self._load([start] if urgent else [start, *reversed(commits)], FIRST_BYTES)
        usable = {commit.id for commit in self._safe(commits)} & line(start, commits, self._parents)
        return self._index.view(usable, lasting, lasts)

    def committed(self, manifest: Manifest, record: CommitRecord) -> None:
        """Says that `manifest` is committed, and the newest; its files were just written, or found here."""
        self._take(manifest, record.number, None)
        self._parents[record.id] = record.parent
        while self._index.chunks > MOST_CHUNKS and len(self._numbers) > 1:
            oldest = min(self._numbers, key=self._numbers.__getitem__)
            self._forget([oldest])
            self._passed.add(oldest)

    def dropped(self, checkpoints: Collection[str]) -> None:
        """Says that checkpoints are gone, or that their deletion was asked for."""
        self._forget(checkpoints)
        for checkpoint in checkpoints:  # what continued it continues, from here on, what it continued
            if checkpoint in self._parents:
                parent = self._parents.pop(checkpoint)
                self._parents |= {id_: parent for id_, above in self._parents.items() if above == checkpoint}

    def _forget(self, checkpoints: Collection[str]) -> None:
        self._index.drop(checkpoints)
        for checkpoint in checkpoints:
            self._numbers.pop(checkpoint, None)
            self._passed.discard(checkpoint)

    def load_all(self, commits: Sequence[CommitRecord]) -> None:
        """Reads what `find` has left for later.

        Raises:
            StorageError: The store failed; the rest is read the next time.
        """
        if self._asked:
            self._load(commits[::-1], None)

    def _safe(self, commits: Sequence[CommitRecord]) -> Sequence[CommitRecord]:
        """Those of which no deletes of an earlier writer may be on their way.

        It may have dropped a checkpoint before it was fenced, and its deletes arrive later. It can't have dropped what
        was the newest then, nor, long after it was fenced, what is there still; and what this writer drops it forgets.
        """
        if self._alone_at is not None and time.monotonic() >= self._alone_at:
            there = {record.id for record in self._run.log.read().commits}
            gone = {commit.id for commit in commits if commit.id not in there}
            self.dropped(gone)
            self._passed |= gone
            self._index.check(sizes_of(self._run.store, self._index.names()))
            self._alone_at, self._oldest_epoch = None, 0
        return [c for c in commits if c.epoch >= self._oldest_epoch or c.id == self._newest_found]

    def _load(self, commits: Sequence[CommitRecord], most_bytes: int | None) -> None:
        """Reads the manifests of checkpoints that are not known yet, in that order: the first whatever its size."""
        todo: dict[str, CommitRecord] = {}
        for commit in commits:
            if commit.id not in self._numbers and commit.id not in self._passed and commit.id not in todo:
                todo[commit.id] = commit
        if not todo:
            return
        sizes: dict[str, int] | None = None
        left = list(todo.values())
        with ThreadPoolExecutor(min(_READERS, len(left)), "rl_ckpt-index") as pool:
            while left and self._index.chunks < MOST_CHUNKS:
                some = _first(left, most_bytes)  # a few at a time: a manifest may have many megabytes
                if not some:
                    return
                found = list(pool.map(self._manifest, some))
                # A new checkpoint must not lean on a file that is gone or cut short.
                names = {file.name for manifest in found if manifest is not None for file in manifest.files}
                if sizes is None or any(records.split_base(name) and name not in sizes for name in names):
                    sizes = dict.fromkeys(names, -1) | (sizes or {}) | sizes_of(self._run.store, names)
                for commit, manifest in zip(some, found, strict=True):
                    if manifest is None:
                        self._passed.add(commit.id)  # nothing to refer to: what only it holds is written again
                    else:
                        self._take(manifest, commit.number, sizes)
                        self._read({manifest.id: frozenset(file.name for file in manifest.files)})
                    most_bytes = None if most_bytes is None else most_bytes - commit.manifest_bytes
                left = left[len(some) :]
        self._passed |= {commit.id for commit in left}

    def _take(self, manifest: Manifest, number: int, sizes: Mapping[str, int] | None) -> None:
        self._index.add(manifest, number, sizes)
        self._numbers[manifest.id] = number

    def _manifest(self, commit: CommitRecord) -> Manifest | None:
        try:
            return self._run.manifest(commit)
        except CorruptionError:
            return None


def _first(commits: Sequence[CommitRecord], most_bytes: int | None) -> list[CommitRecord]:
    """The first few, as far as their manifests are not larger together than `most_bytes`."""
    out: list[CommitRecord] = []
    for commit in commits[:_READERS]:
        if most_bytes is not None and most_bytes <= 0:
            break
        out.append(commit)
        most_bytes = None if most_bytes is None else most_bytes - commit.manifest_bytes
    return out


def line(start: CommitRecord, commits: Sequence[CommitRecord], parents: Mapping[str, str | None]) -> set[str]:
    """Ids of a checkpoint and its ancestors; where one of them is gone, of all that are older than its child.

    Args:
        start: The checkpoint.
        commits: All of the run.
        parents: By checkpoint: which it continues, where that is known better than by its record.
    """
    by_id = {commit.id: commit for commit in commits}
    out: set[str] = set()
    at: CommitRecord | None = start
    while at is not None and at.id not in out:
        out.add(at.id)
        parent = parents.get(at.id, at.parent)
        if parent is not None and parent not in by_id:
            out |= {commit.id for commit in commits if commit.number < at.number}
        at = by_id.get(parent) if parent is not None else None
    return out
