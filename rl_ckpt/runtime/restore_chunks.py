"""A rank's chunks in a restore: in mapped files of the store, or in the restore's memory on its node.

Owns: verifying those that are mapped, and copying values out of them, in as many threads as the rank may take. Does not
decide when: nothing may be copied before the coordinator's word (runtime/restore.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

from rl_ckpt.errors import CorruptionError, StorageError
from rl_ckpt.format import records
from rl_ckpt.format.digest import check
from rl_ckpt.format.manifest import Chunk, Manifest
from rl_ckpt.plan.spread import ChunkId
from rl_ckpt.runtime import memory
from rl_ckpt.runtime.messages import Sources, TryNext
from rl_ckpt.state import arrays
from rl_ckpt.state.arrays import Host
from rl_ckpt.state.boxes import Box, overlap
from rl_ckpt.store.base import Store
from rl_ckpt.store.parallel import run_all
from rl_ckpt.store.reader import MappedFiles, as_values, chunk_name

_LOOK_BYTES = 8 << 20  # verified between two looks for the coordinator's answer, which cost some 50 µs each
_THREADS_FROM_BYTES = 256 << 10  # a chunk: of smaller ones, Python's own work is most, which threads don't share


class ChunkSource:
    """Where a rank finds its chunks."""

    def __init__(self, store: Store, manifest: Manifest, needs: Sequence[ChunkId], threads: int) -> None:
        """Chunks in the store's own files, until `take` says otherwise."""
        self._store = store
        self._manifest = manifest
        self._needs = needs
        size = sum(self._saved(chunk).bytes for chunk in needs)
        self._threads = threads if size >= len(needs) * _THREADS_FROM_BYTES else 1
        self._mapped = MappedFiles()
        self._path = ""
        self._memory: memoryview | None = None
        self._offsets: dict[ChunkId, int] = {}

    def take(self, sources: Sources) -> None:
        """Takes the coordinator's answer."""
        if sources.memory:
            self._path, self._memory = sources.memory, memory.mapped(sources.memory)
            self._offsets = dict(zip(self._needs, sources.offsets, strict=True))

    def verify(self, answer: Callable[[], Sources | TryNext | None], start: float) -> str:
        """Verifies chunks of mapped files: all of them, but for those of which the answer says that others do.

        Args:
            answer: The coordinator's, where it is there already.
            start: Where among its chunks the rank begins, as a share of their bytes: the ranks of a node begin apart,
                so that little is verified twice until the answer comes.

        Returns:
            What is wrong; empty where all are good.

        Raises:
            StorageError: The run's folder is not there on this node.
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
            run_all([partial(self._check, chunk, skip) for chunk in self._from(start)], self._threads)
        except CorruptionError as error:
            return str(error)
        return ""

    def _from(self, start: float) -> list[ChunkId]:
        """The chunks as they lie in the files, those from `start` on first."""
        ordered = sorted(self._needs, key=lambda c: (self._saved(c).file, self._saved(c).offset, c))
        before, rest = start * sum(self._saved(chunk).bytes for chunk in ordered), 0
        while rest < len(ordered) and before >= self._saved(ordered[rest]).bytes / 2:
            before -= self._saved(ordered[rest]).bytes
            rest += 1
        return ordered[rest:] + ordered[:rest]

    def _check(self, chunk: ChunkId, skip: _Skip) -> None:
        saved = self._saved(chunk)
        if not skip(chunk, saved.bytes):
            path = self._file(saved)
            view = self._mapped.view(path, saved.offset, saved.bytes)
            check(chunk_name(self._manifest, saved, self._store), view, bytes.fromhex(saved.digest))
            self._mapped.let_go(path, saved.offset, saved.bytes)

    def copy(self, targets: Sequence[tuple[int, Host, Box]]) -> int:
        """Copies what was verified: of an array of the manifest, by index, one box into memory that holds that box.

        Returns:
            Bytes copied.
        """
        jobs = [
            (partial(self._copy, host, box, (index, c)), common.size * host.itemsize)
            for index, host, box in targets
            for c, chunk in enumerate(self._manifest.arrays[index].chunks)
            if (common := overlap(chunk.box, box)) is not None
        ]
        run_all([job for job, _ in jobs], self._threads)
        return sum(size for _, size in jobs)

    def _copy(self, host: Host, box: Box, chunk: ChunkId) -> None:
        entry, saved = self._manifest.arrays[chunk[0]], self._saved(chunk)
        arrays.copy_in(host, box, as_values(self._view(chunk), entry, saved.box), saved.box)
        if self._memory is None:
            self._mapped.let_go(self._file(saved), saved.offset, saved.bytes)

    def _view(self, chunk: ChunkId) -> memoryview:
        saved = self._saved(chunk)
        if self._memory is not None:
            return self._memory[self._offsets[chunk] : self._offsets[chunk] + saved.bytes].toreadonly()
        return self._mapped.view(self._file(saved), saved.offset, saved.bytes)

    def _saved(self, chunk: ChunkId) -> Chunk:
        return self._manifest.arrays[chunk[0]].chunks[chunk[1]]

    def _file(self, saved: Chunk) -> str:
        path = self._store.local_path(self._manifest.files[saved.file].name)
        assert path is not None
        return path

    def close(self) -> None:
        """Lets the restore's memory go."""
        self._memory = None
        memory.forget(self._path)


class _Skip:
    """Which chunks others verify, once the coordinator has said so. Thread-safe."""

    def __init__(self, needs: Sequence[ChunkId], answer: Callable[[], Sources | TryNext | None]) -> None:
        self._needs = needs
        self._answer = answer
        self._others: set[ChunkId] | None = None
        self._unlooked = 0
        self._lock = threading.Lock()

    def __call__(self, chunk: ChunkId, size_bytes: int) -> bool:
        with self._lock:
            if self._others is None and self._unlooked >= _LOOK_BYTES:
                self._unlooked = 0
                self._look()
            self._unlooked += size_bytes
            return self._others is not None and chunk in self._others

    def _look(self) -> None:
        found = self._answer()
        if isinstance(found, TryNext):  # nobody needs this candidate any more
            self._others = set(self._needs)
        elif found is not None:
            self._others = {self._needs[i] for i in found.others}
