"""A rank's chunks in a restore: in local files of the store, or in the restore's memory on its node.

Owns: verifying those in files, and bringing the values of both to their place, in as many threads as the rank may take.
Promises: every file is open, and large enough, before anything is copied: what a sweep or a lost disk takes away later
fails no rank alone. Does not decide when: nothing may be copied before the coordinator's word (runtime/restore.py).

Files are read and not mapped: a map of fresh pages costs more than it saves (measured: 18 ms per 256 MiB for its page
faults, against 10 for hashing them), brings a cold file in by small pieces, and ends the process where a disk fails.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from functools import partial

import msgspec

from rl_ckpt.errors import CorruptionError, StorageError
from rl_ckpt.format import records
from rl_ckpt.format.digest import digest, hasher
from rl_ckpt.format.manifest import Chunk, Manifest
from rl_ckpt.plan.spread import ChunkId
from rl_ckpt.runtime import memory
from rl_ckpt.runtime.messages import Sources, TryNext
from rl_ckpt.state import arrays
from rl_ckpt.state.arrays import Host
from rl_ckpt.state.boxes import Box, overlap
from rl_ckpt.store.base import Store
from rl_ckpt.store.local_files import PIECE_BYTES, LocalFiles
from rl_ckpt.store.parallel import run_all
from rl_ckpt.store.reader import THREADS_FROM_BYTES, as_values, batches, compare_chunk, place_in

_LOOK_BYTES = 8 << 20  # verified between two looks for the coordinator's answer, which cost some 50 µs each


class ChunkSource:
    """Where a rank finds its chunks."""

    def __init__(self, store: Store, manifest: Manifest, needs: Sequence[ChunkId], threads: int) -> None:
        """Chunks in the store's own files, until `take` says otherwise."""
        self._store = store
        self._manifest = manifest
        self._needs = needs
        size = sum(self._saved(chunk).bytes for chunk in needs)
        self._threads = threads if size >= len(needs) * THREADS_FROM_BYTES else 1
        self._files = LocalFiles(store, manifest)
        self._path = ""
        self._memory: memoryview | None = None
        self._offsets: dict[ChunkId, int] = {}

    def take(self, sources: Sources) -> None:
        """Takes the coordinator's answer."""
        if sources.memory:
            self._path, self._memory = sources.memory, memory.mapped(sources.memory)
            self._offsets = dict(zip(self._needs, sources.offsets, strict=True))

    def verify(self, answer: Callable[[], Sources | TryNext | None], start: float) -> str:
        """Opens all files, and verifies chunks: all of them, but for those of which the answer says that others do.

        Args:
            answer: The coordinator's, where it is there already.
            start: Where among its chunks the rank begins, as a share of their bytes: the ranks of a node begin apart,
                so that little is verified twice until the answer comes.

        Returns:
            What is wrong; empty where all are good.

        Raises:
            StorageError: The run's folder is not there on this node, or can't be read.
        """
        if not self._needs:
            return ""
        if not self._store.exists(records.RUN_FILE):
            raise StorageError(
                f"{self._store.url} is not there on this worker's node: the nodes don't share this folder. Use a "
                "shared file system or an object store (s3://...), or copy the run to every node"
            )
        skip = _Skip(self._needs, answer)
        try:
            self._files.open_all(self._saved(chunk) for chunk in self._needs)
            run_all([partial(self._check, run, skip) for run in batches(self._from(start), _size)], self._threads)
        except CorruptionError as error:
            return str(error)
        return ""

    def _from(self, start: float) -> list[tuple[ChunkId, Chunk]]:
        """The chunks as they lie in the files, those from `start` on first."""
        ordered = [(chunk, self._saved(chunk)) for chunk in self._needs]
        ordered.sort(key=lambda item: (item[1].file, item[1].offset, item[0]))
        before, rest = start * sum(map(_size, ordered)), 0
        while rest < len(ordered) and before >= ordered[rest][1].bytes / 2:
            before -= ordered[rest][1].bytes
            rest += 1
        return ordered[rest:] + ordered[:rest]

    def _check(self, run: Sequence[tuple[ChunkId, Chunk]], skip: _Skip) -> None:
        others = skip.others(sum(map(_size, run)))
        mine = [saved for chunk, saved in run if chunk not in others]
        for saved, view in self._files.small(mine):
            compare_chunk(self._store, self._manifest, saved, digest(view))
        for saved in mine:
            if saved.bytes >= PIECE_BYTES:
                running = hasher()
                for piece in self._files.pieces(saved):
                    running.update(piece)
                compare_chunk(self._store, self._manifest, saved, running.digest())

    def copy(self, targets: Sequence[tuple[int, Host, Box]]) -> int:
        """Copies what was verified: of an array of the manifest, by index, one box into memory that holds that box.

        Returns:
            Bytes copied.
        """
        copies = [
            _Copy(host, box, (index, c), chunk, common.size * host.itemsize)
            for index, host, box in targets
            for c, chunk in enumerate(self._manifest.arrays[index].chunks)
            if (common := overlap(chunk.box, box)) is not None
        ]
        work = self._read if self._memory is None else self._copy
        run_all([partial(work, run) for run in batches(copies, lambda copy: copy.size_bytes)], self._threads)
        return sum(copy.size_bytes for copy in copies)

    def _copy(self, run: Sequence[_Copy]) -> None:
        """Out of the restore's memory."""
        assert self._memory is not None
        for copy in run:
            at = self._offsets[copy.id]
            self._put(copy, self._memory[at : at + copy.saved.bytes].toreadonly())

    def _read(self, run: Sequence[_Copy]) -> None:
        """Out of files: a large chunk straight to its place, if it is contiguous there."""
        wanted: dict[tuple[int, int], list[_Copy]] = {}
        for copy in run:
            wanted.setdefault((copy.saved.file, copy.saved.offset), []).append(copy)
        for saved, view in self._files.small([copies[0].saved for copies in wanted.values()]):
            for copy in wanted[saved.file, saved.offset]:
                self._put(copy, view)
        for copy in run:
            if copy.saved.bytes >= PIECE_BYTES:
                place = place_in(copy.host, copy.box, copy.saved.box)
                if place is not None:
                    self._files.read(copy.saved, place)
                else:
                    values = memoryview(bytearray(copy.saved.bytes))
                    self._files.read(copy.saved, values)
                    self._put(copy, values)

    def _put(self, copy: _Copy, data: memoryview) -> None:
        entry = self._manifest.arrays[copy.id[0]]
        arrays.copy_in(copy.host, copy.box, as_values(data, entry, copy.saved.box), copy.saved.box)

    def _saved(self, chunk: ChunkId) -> Chunk:
        return self._manifest.arrays[chunk[0]].chunks[chunk[1]]

    def close(self) -> None:
        """Lets the files and the restore's memory go."""
        self._files.close()
        self._memory = None
        memory.forget(self._path)


class _Copy(msgspec.Struct, gc=False):
    """A chunk (or a part of one) that goes into `host`, which holds `box`."""

    host: Host
    box: Box
    id: ChunkId
    saved: Chunk
    size_bytes: int


def _size(item: tuple[ChunkId, Chunk]) -> int:
    return item[1].bytes


class _Skip:
    """Which chunks others verify, once the coordinator has said so. Thread-safe."""

    def __init__(self, needs: Sequence[ChunkId], answer: Callable[[], Sources | TryNext | None]) -> None:
        self._needs = needs
        self._answer = answer
        self._others: set[ChunkId] | None = None
        self._unlooked = 0
        self._lock = threading.Lock()

    def others(self, size_bytes: int) -> Collection[ChunkId]:
        """What others verify, as far as is known; `size_bytes` are verified next."""
        with self._lock:
            if self._others is None and self._unlooked >= _LOOK_BYTES:
                self._unlooked = 0
                self._look()
            self._unlooked += size_bytes
            return self._others or ()

    def _look(self) -> None:
        found = self._answer()
        if isinstance(found, TryNext):  # nobody needs this candidate any more
            self._others = set(self._needs)
        elif found is not None:
            self._others = {self._needs[i] for i in found.others}
