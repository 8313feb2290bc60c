"""A rank's chunks in a restore: in local files of the store, in memory that its node holds, or in the restore's memory.

Owns: verifying those in files and in held memory, and bringing the values of all to their place, in as many threads as
the rank may take. Promises: every file is open, and large enough, before anything is copied: what a sweep or a lost
disk takes away later fails no rank alone. Does not decide when: nothing may be copied before the coordinator's word
(runtime/restore.py), nor what follows from a bad chunk.

Files are read and not mapped: a map of fresh pages costs more than it saves (measured: 18 ms per 256 MiB for its page
faults, against 10 for hashing them), brings a cold file in by small pieces, and ends the process where a disk fails.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import repeat

import msgspec

from rl_ckpt.errors import CheckpointError, CorruptionError, StorageError
from rl_ckpt.format import records
from rl_ckpt.format.digest import compare, digest, hasher
from rl_ckpt.format.manifest import Chunk, Manifest
from rl_ckpt.plan.spread import ChunkId
from rl_ckpt.runtime import memory
from rl_ckpt.runtime.messages import FETCHED, STORED, Flaw, Source, Sources, TryNext
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
        size = sum(self._named(chunk).bytes for chunk in needs)
        self._threads = threads if size >= len(needs) * THREADS_FROM_BYTES else 1
        self._files = LocalFiles(store, manifest)
        self._elsewhere: dict[ChunkId, Chunk] = {}
        """Chunks in another file than the manifest says."""
        self._memory: dict[ChunkId, tuple[memoryview, int]] = {}
        """Chunks in shared memory: its view, and the offset there."""
        self._mapped: dict[str, bool] = {}
        """Files of shared memory in use, and whether this process had them mapped before."""
        self._about: Sequence[ChunkId] = needs
        self._others: Collection[ChunkId] = ()
        """Of `_about`, those that are verified by others: by another rank, or by the server that brought them in."""
        self._bad: dict[ChunkId, Flaw] = {}

    def take(self, sources: Sources) -> None:
        """Takes the coordinator's answer: all that was not told before is to be verified by `verify`."""
        needs, self._bad = self._needs, {}
        about = self._about = needs if sources.needs is None else [needs[n] for n in sources.needs]
        others = self._others = {needs[n] for n in sources.others}
        if not sources.files and sources.needs is None:
            return
        views = [self._open_memory(file) for file in sources.files]
        extra = [self._files.also(file.path) if file.kind == STORED else -1 for file in sources.files]
        for chunk, at, offset in zip(about, sources.at or repeat(0), sources.offsets, strict=bool(sources.at)):
            self._memory.pop(chunk, None)
            self._elsewhere.pop(chunk, None)
            if at < 0:
                continue
            view, kind = views[at], sources.files[at].kind
            if kind == STORED:
                self._elsewhere[chunk] = msgspec.structs.replace(self._named(chunk), file=extra[at], offset=offset)
            elif view is None or offset + self._named(chunk).bytes > len(view):
                self._bad[chunk] = Flaw(StorageError.code, f"{sources.files[at].path} is gone, or too short")
            else:
                self._memory[chunk] = (view, offset)
                if kind == FETCHED:
                    others.add(chunk)

    def _open_memory(self, file: Source) -> memoryview | None:
        if file.kind == STORED:
            return None
        known = memory.is_mapped(file.path)
        try:
            view = memory.mapped(file.path)
        except StorageError:  # its server was restarted, or its node's memory given back: another source is found
            return None
        self._mapped.setdefault(file.path, known)
        return view

    def verify(
        self, answer: Callable[[], Sources | TryNext | None] | None = None, start: float = 0.0
    ) -> dict[int, Flaw]:
        """Opens all files, and verifies chunks: those that `take` was about, but for those that others verify.

        Args:
            answer: The coordinator's, where it is there already; None: `take` has it.
            start: Where among its chunks the rank begins, as a share of their bytes: the ranks of a node begin apart,
                so that little is verified twice until the answer comes.

        Returns:
            What is wrong, by index among the chunks that the rank needs; empty where all are good.

        Raises:
            StorageError: The run's folder is not there on this node, or can't be read.
        """
        skip = _Skip(self._needs, answer, self._others)
        in_files = [chunk for chunk in self._about if chunk not in self._memory and chunk not in self._bad]
        if in_files:
            self._open(in_files)
        todo = [(chunk, self._saved(chunk)) for chunk in in_files if chunk not in self._bad]
        work = [partial(self._check, run, skip) for run in batches(_from(todo, start), _size)]
        held = [(c, self._named(c)) for c in self._about if c in self._memory and c not in self._others]
        work += [partial(self._check_held, run) for run in batches(held, _size)]
        run_all(work, self._threads)
        return {n: self._bad[chunk] for n, chunk in enumerate(self._needs) if chunk in self._bad} if self._bad else {}

    def _open(self, chunks: Sequence[ChunkId]) -> None:
        """Opens the files of chunks; those of which the file is not what it should be are bad."""
        if not self._store.exists(records.RUN_FILE):
            raise StorageError(
                f"{self._store.url} is not there on this worker's node: the nodes don't share this folder. Use a "
                "shared file system or an object store (s3://...), or copy the run to every node"
            )
        try:
            self._files.open_all(self._saved(chunk) for chunk in chunks)
        except CheckpointError:
            for chunk in chunks:
                try:
                    self._files.open_all([self._saved(chunk)])
                except CheckpointError as error:
                    self._bad[chunk] = _flaw(error)

    def _check(self, run: Sequence[tuple[ChunkId, Chunk]], skip: _Skip) -> None:
        others = skip.others(sum(map(_size, run)))
        mine = [item for item in run if item[0] not in others]
        try:
            self._check_files([saved for _, saved in mine])
        except CorruptionError:
            for chunk, saved in mine:
                try:
                    self._check_files([saved])
                except CorruptionError as error:
                    self._bad[chunk] = _flaw(error)

    def _check_files(self, chunks: Sequence[Chunk]) -> None:
        for saved, view in self._files.small(chunks):
            self._compare(saved, digest(view))
        for saved in chunks:
            if saved.bytes >= PIECE_BYTES:
                running = hasher()
                for piece in self._files.pieces(saved):
                    running.update(piece)
                self._compare(saved, running.digest())

    def _compare(self, saved: Chunk, found: bytes) -> None:
        if saved.file < len(self._manifest.files):
            compare_chunk(self._store, self._manifest, saved, found)
        else:
            compare(
                f"chunk at {saved.offset} of a file that another checkpoint names", found, _digest(saved), saved.bytes
            )

    def _check_held(self, run: Sequence[tuple[ChunkId, Chunk]]) -> None:
        """Chunks in held memory."""
        for chunk, saved in run:
            view, at = self._memory[chunk]
            try:
                compare(
                    f"a chunk in memory, at {at},", digest(view[at : at + saved.bytes]), _digest(saved), saved.bytes
                )
            except CorruptionError as error:
                self._bad[chunk] = _flaw(error)

    def copy(self, targets: Sequence[tuple[int, Host, Box]]) -> int:
        """Copies what was verified: of an array of the manifest, by index, one box into memory that holds that box.

        Returns:
            Bytes copied.
        """
        copies = [
            _Copy(host, box, (index, c), self._saved((index, c)), common.size * host.itemsize)
            for index, host, box in targets
            for c, chunk in enumerate(self._manifest.arrays[index].chunks)
            if (common := overlap(chunk.box, box)) is not None
        ]
        run_all([partial(self._copy, run) for run in batches(copies, lambda copy: copy.size_bytes)], self._threads)
        return sum(copy.size_bytes for copy in copies)

    def _copy(self, run: Sequence[_Copy]) -> None:
        in_files = []
        for copy in run:
            if copy.id in self._memory:
                view, at = self._memory[copy.id]
                self._put(copy, view[at : at + copy.saved.bytes].toreadonly())
            else:
                in_files.append(copy)
        self._read(in_files)

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

    def _named(self, chunk: ChunkId) -> Chunk:
        return self._manifest.arrays[chunk[0]].chunks[chunk[1]]

    def _saved(self, chunk: ChunkId) -> Chunk:
        """A chunk, with its place in a file of the store."""
        return self._elsewhere.get(chunk) or self._named(chunk)

    def close(self) -> None:
        """Lets the files, the held memory and the restore's memory go."""
        self._files.close()
        self._memory.clear()
        for path, known in self._mapped.items():
            if not known:  # the node's own staging memory stays mapped, for the next save
                memory.forget(path)


class _Copy(msgspec.Struct, gc=False):
    """A chunk (or a part of one) that goes into `host`, which holds `box`."""

    host: Host
    box: Box
    id: ChunkId
    saved: Chunk
    size_bytes: int


def _size(item: tuple[ChunkId, Chunk]) -> int:
    return item[1].bytes


def _digest(saved: Chunk) -> bytes:
    return bytes.fromhex(saved.digest)


def _flaw(error: CheckpointError) -> Flaw:
    return Flaw(error.code, error.message)


def _from(chunks: list[tuple[ChunkId, Chunk]], start: float) -> list[tuple[ChunkId, Chunk]]:
    """Chunks as they lie in the files, those from `start` (a share of their bytes) on first."""
    ordered = sorted(chunks, key=lambda item: (item[1].file, item[1].offset, item[0]))
    before, rest = start * sum(map(_size, ordered)), 0
    while rest < len(ordered) and before >= ordered[rest][1].bytes / 2:
        before -= ordered[rest][1].bytes
        rest += 1
    return ordered[rest:] + ordered[:rest]


class _Skip:
    """Which chunks others verify, as soon as the coordinator has said so. Thread-safe."""

    def __init__(
        self,
        needs: Sequence[ChunkId],
        answer: Callable[[], Sources | TryNext | None] | None,
        others: Collection[ChunkId],
    ) -> None:
        self._needs = needs
        self._answer = answer
        self._others = others
        self._unlooked = 0
        self._lock = threading.Lock()

    def others(self, size_bytes: int) -> Collection[ChunkId]:
        """What others verify, as far as is known; `size_bytes` are verified next."""
        with self._lock:
            if self._answer is not None and self._unlooked >= _LOOK_BYTES:
                self._unlooked = 0
                self._look(self._answer())
            self._unlooked += size_bytes
            return self._others

    def _look(self, found: Sources | TryNext | None) -> None:
        if isinstance(found, TryNext):  # nobody needs this candidate any more
            self._others = set(self._needs)
        elif found is not None:
            self._others = {self._needs[i] for i in found.others}
        if found is not None:
            self._answer = None
