"""Chunk index: the chunks that a run's live checkpoints hold, and where, so that a save need not write them again.

Owns: which place (file, offset) holds which bytes, how many checkpoints name it, and what a save may refer to. Pure:
reads nothing, and takes on trust what it is told. Memory: 40 bytes a chunk, each once for all checkpoints that name
it, half a kilobyte a file, and a bit for each chunk of each file that a checkpoint names; `find` needs 37 bytes a
chunk more. Not for several threads at once; what `view` returns does not change any more and is.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rl_ckpt.format.manifest import Chunk, Manifest, ShardFileEntry
from rl_ckpt.format.records import BASES
from rl_ckpt.plan.compaction import Files, evacuate
from rl_ckpt.state.boxes import Box

Array = np.ndarray[Any, np.dtype[Any]]
Wanted = tuple[bytes, int]
"""A chunk's digest (16 bytes) and size in bytes."""
Found = tuple[ShardFileEntry, Chunk]
"""Where a chunk lies: its file, and its offset there."""

# fmt: off
_ROW = np.dtype([("hi", "<u8"), ("lo", "<u8"), ("bytes", "<i8"), ("offset", "<i8"), ("usable", "<i4"),
                 ("lasting", "<i4")])
# fmt: on
_FILE_OVERHEAD, _CHUNK_OVERHEAD = 2048, 1024  # at most, of what is no values in a shard file
_NOWHERE = Box((), ())


@dataclass(slots=True)
class _File:
    """A shard file that a live checkpoint names."""

    entry: ShardFileEntry
    rows: Array
    """Of `_ROW`, a place each; new ones come last. `usable` and `lasting` count the checkpoints that name it."""
    born: int
    """Number of the oldest commit that is known to name it."""
    whole: bool
    named: int = 0
    """How many checkpoints name it."""


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """Which places a checkpoint names: for each of `files` a bit for each of its first `counts` rows."""

    files: Array
    counts: Array
    bits: bytes


class KnownChunks:
    """What one save may refer to. Immutable."""

    def __init__(self, files: list[_File], lasts: bool = False) -> None:
        """Of files, as they are now.

        Args:
            files: All that live checkpoints name; those that are not whole count, but nothing is found in them.
            lasts: Whether the checkpoint that is saved lasts; see plan/compaction.py.
        """
        self.lasts = lasts
        self._entries = [file.entry for file in files]
        self._content = np.array([_content(file) for file in files], np.int64)
        # What lies in a fork's base takes nothing of this run's storage, and nothing is won by moving it here.
        self._outer = np.array([file.entry.name.startswith(BASES) for file in files], bool)
        self._held = np.array([bool((file.rows["lasting"] > 0).any()) for file in files], bool) & ~self._outer
        mine = [file for file, outer in zip(files, self._outer, strict=True) if not outer]
        self._lasting_bytes = sum(int(f.rows["bytes"][f.rows["lasting"] > 0].sum()) for f in mine)
        parts = [file.rows[file.rows["usable"] > 0] if file.whole else file.rows[:0] for file in files]
        rows = np.concatenate(parts) if parts else np.zeros(0, _ROW)
        number = np.repeat(np.arange(len(files), dtype=np.uint32), [len(part) for part in parts])
        born = np.array([file.born for file in files], np.int64)
        # Of several places with the same bytes the first is taken: one that stays anyway, else the newest, to which a
        # file that is given up was moved.
        order = (
            np.lexsort((-born[number], ~(self._held | self._outer)[number], rows["hi"]))
            if len(rows)
            else np.zeros(0, np.int64)
        )
        self._hi, self._lo = rows["hi"][order], rows["lo"][order]
        self._bytes, self._offset = rows["bytes"][order], rows["offset"][order]
        self._file = number[order]
        self._lasting = (rows["lasting"][order] > 0) & ~self._outer[self._file] if len(rows) else np.zeros(0, bool)
        self.names = frozenset(self._entries[n].name for n in np.unique(number).tolist())

    def __len__(self) -> int:
        """How many places there are."""
        return len(self._hi)

    def find(self, wanted: Collection[Wanted]) -> dict[Wanted, Found]:
        """Chunks that need not be written; those that are to be written again for compaction are left out.

        Args:
            wanted: The chunks of the whole state, each once.

        Returns:
            By chunk; of the `Chunk` only offset, bytes and digest mean anything.
        """
        keys = list(wanted)
        place = self._places(keys)
        hit = np.flatnonzero(place >= 0)
        rows = place[hit]
        used = np.zeros(len(self._entries), np.int64)
        np.add.at(used, self._file[rows], self._bytes[rows])
        used[self._outer] = 0
        state_bytes = sum(size for _, size in keys) - int(self._bytes[rows[self._outer[self._file[rows]]]].sum())
        others = self._lasting_bytes - int(self._bytes[rows[self._lasting[rows]]].sum())
        leave = evacuate(Files(self._content, used, self._held), state_bytes, others, self.lasts)
        out: dict[Wanted, Found] = {}
        stay = ~leave[self._file[rows]]
        for k, row in zip(hit[stay].tolist(), rows[stay].tolist(), strict=True):
            digest, size = key = keys[k]
            entry = self._entries[self._file[row]]
            out[key] = (entry, Chunk(_NOWHERE, 0, int(self._offset[row]), size, digest.hex()))
        return out

    def _places(self, keys: list[Wanted]) -> Array:
        """The place of each chunk, as a number of the sorted rows; -1 where there is none."""
        place = np.full(len(keys), -1, np.int64)
        if not keys or not len(self._hi):
            return place
        digests = np.frombuffer(b"".join(digest for digest, _ in keys), "<u8").reshape(-1, 2)
        sizes = np.array([size for _, size in keys], np.int64)
        at = np.searchsorted(self._hi, digests[:, 0])
        open_ = np.arange(len(keys))
        while len(open_):  # once for most; more often where several places hold the same bytes
            open_ = open_[at[open_] < len(self._hi)]
            open_ = open_[self._hi[at[open_]] == digests[open_, 0]]
            right = (self._lo[at[open_]] == digests[open_, 1]) & (self._bytes[at[open_]] == sizes[open_])
            place[open_[right]] = at[open_[right]]
            open_ = open_[~right]
            at[open_] += 1
        return place


NOTHING_KNOWN = KnownChunks([])


class ChunkIndex:
    """The chunks of a run's live checkpoints; see the module."""

    def __init__(self) -> None:
        """Knows no checkpoint."""
        self._checkpoints: dict[str, _Checkpoint] = {}
        self._files: dict[int, _File] = {}  # by number, which is not given twice
        self._numbers: dict[str, int] = {}  # by name
        self._next = 0
        self._usable: set[str] = set()
        self._lasting: set[str] = set()
        self._view: KnownChunks | None = None
        self.chunks = 0
        """Places that it knows."""

    def names(self) -> set[str]:
        """All files that it knows."""
        return {*self._numbers}

    def add(self, manifest: Manifest, commit: int, sizes: Mapping[str, int] | None = None) -> None:
        """Takes a live checkpoint up.

        Args:
            manifest: Its manifest.
            commit: Its number in the commit log.
            sizes: Of the files that are there, in bytes, by name: nothing is found in one that has another size. None:
                those that are new here were just written, and are whole.
        """
        self._view = None
        chunks = [chunk for array in manifest.arrays for chunk in array.chunks]
        rows = np.zeros(len(chunks), _ROW)
        digests = np.frombuffer(bytes.fromhex("".join(chunk.digest for chunk in chunks)), "<u8").reshape(-1, 2)
        rows["hi"], rows["lo"] = digests[:, 0], digests[:, 1]
        rows["bytes"] = [chunk.bytes for chunk in chunks]
        rows["offset"] = [chunk.offset for chunk in chunks]
        file = np.array([chunk.file for chunk in chunks], np.int64)
        order = np.lexsort((_key(rows), file))
        rows, file = rows[order], file[order]
        starts = np.flatnonzero(np.diff(file, prepend=-1)).tolist()
        numbers, counts, bits = [], [], []
        for start, stop in itertools.pairwise([*starts, len(rows)]):
            entry = manifest.files[file[start]]
            number, mask = self._take(entry, rows[start:stop], commit, sizes)
            numbers.append(number)
            counts.append(len(mask))
            bits.append(np.packbits(mask).tobytes())
        checkpoint = _Checkpoint(np.array(numbers, np.uint32), np.array(counts, np.uint32), b"".join(bits))
        self._checkpoints[manifest.id] = checkpoint

    def _take(
        self, entry: ShardFileEntry, rows: Array, commit: int, sizes: Mapping[str, int] | None
    ) -> tuple[int, Array]:
        """A file's number, and which of its rows these are; `rows` are sorted, and may hold a place twice."""
        rows = rows[np.flatnonzero(np.diff(_key(rows), prepend=-1))]
        number = self._numbers.get(entry.name)
        if number is None:
            number = self._numbers[entry.name] = self._next
            self._next += 1
            whole = sizes is None or sizes.get(entry.name) == entry.bytes
            self._files[number] = _File(entry, rows[:0], commit, whole)
        file = self._files[number]
        file.named += 1
        file.born = min(file.born, commit)
        there = _key(file.rows)
        order = np.argsort(there, kind="stable")
        at = np.searchsorted(there[order], _key(rows))
        known = np.zeros(len(rows), bool)
        inside = at < len(there)
        known[inside] = there[order[at[inside]]] == _key(rows)[inside]
        mask = np.zeros(len(there) + int((~known).sum()), bool)
        mask[order[at[known]]] = True
        mask[len(there) :] = True
        if not known.all():
            file.rows = np.concatenate([file.rows, rows[~known]])
            self.chunks += int((~known).sum())
        return number, mask

    def check(self, sizes: Mapping[str, int]) -> None:
        """Nothing is found any more in files that have another size by now, or are gone; `sizes` as in `add`."""
        self._view = None
        for file in self._files.values():
            file.whole = file.whole and sizes.get(file.entry.name) == file.entry.bytes

    def drop(self, checkpoints: Collection[str]) -> None:
        """Forgets checkpoints: nothing that they alone name is found any more, from the next view on."""
        for checkpoint in checkpoints:
            if checkpoint not in self._checkpoints:
                continue
            self._view = None
            self._count(checkpoint, "usable", self._usable, False)
            self._count(checkpoint, "lasting", self._lasting, False)
            for number in self._checkpoints.pop(checkpoint).files.tolist():
                file = self._files[number]
                file.named -= 1
                if not file.named:
                    self.chunks -= len(file.rows)
                    del self._files[number], self._numbers[file.entry.name]

    def view(self, usable: Collection[str], lasting: Collection[str], lasts: bool) -> KnownChunks:
        """What a save may refer to.

        Args:
            usable: Checkpoints whose chunks may be named again; those that it does not know count for nothing.
            lasting: Checkpoints that stay; see plan/compaction.py.
            lasts: Whether the checkpoint that is saved will be one of those.
        """
        for column, counted, now in (("usable", self._usable, usable), ("lasting", self._lasting, lasting)):
            for checkpoint in counted.symmetric_difference(self._checkpoints.keys() & set(now)):
                self._view = None
                self._count(checkpoint, column, counted, checkpoint in now)
        if self._view is None or self._view.lasts != lasts:
            self._view = KnownChunks(list(self._files.values()), lasts)
        return self._view

    def _count(self, checkpoint: str, column: str, counted: set[str], counts: bool) -> None:
        """Counts a checkpoint in a column of all that it names, or does so no more."""
        if counts == (checkpoint in counted):
            return
        (counted.add if counts else counted.discard)(checkpoint)
        named, start = self._checkpoints[checkpoint], 0
        for number, count in zip(named.files.tolist(), named.counts.tolist(), strict=True):
            stop = start + -(-count // 8)
            mask = np.unpackbits(np.frombuffer(named.bits, np.uint8, stop - start, start), count=count)
            self._files[number].rows[column][:count] += mask if counts else -mask.astype(np.int32)
            start = stop


def _key(rows: Array) -> Array:
    """Tells the places of a file apart: an empty chunk may lie where another begins."""
    return rows["offset"] * 2 + (rows["bytes"] > 0)


def _content(file: _File) -> int:
    """Bytes of values in a file. Where the checkpoint that wrote it is gone, its size tells of what nobody names."""
    rest = file.entry.bytes - _FILE_OVERHEAD - _CHUNK_OVERHEAD * len(file.rows)
    return max(int(file.rows["bytes"].sum()), rest)
