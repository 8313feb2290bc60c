"""Reading values: chunks of a checkpoint into arrays, verified.

Owns: getting a chunk's bytes (mapped where the file is local, else by ranged reads), checking its digest, and copying
what is wanted of it. Promises: no byte is handed out whose chunk does not have the digest that was committed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from rl_ckpt.errors import CorruptionError
from rl_ckpt.format.digest import check
from rl_ckpt.format.manifest import ArrayEntry, ArrayRef, Chunk, Manifest
from rl_ckpt.plan.match import Match
from rl_ckpt.state import arrays, leaves
from rl_ckpt.state.arrays import BYTES, DTENSOR, NUMPY, PICKLE, STR, TORCH, Host
from rl_ckpt.state.boxes import Box, slices
from rl_ckpt.state.dtypes import dtype_from_name
from rl_ckpt.state.tree import Plain
from rl_ckpt.store.base import ObjectMissingError, Store

_MADV_POPULATE_READ = 22  # Linux 5.14; Python has no name for it
_POPULATE_FROM_BYTES = 64 << 10
_THREADS = min(8, os.cpu_count() or 1)


class MappedFiles:
    """Read-only maps of local files, one a file. Thread-safe. Views handed out keep their map alive."""

    def __init__(self) -> None:
        """No files yet."""
        self._maps: dict[str, memoryview] = {}
        self._lock = threading.Lock()

    def view(self, path: str, offset: int, size_bytes: int) -> memoryview:
        """Bytes of a file, not copied.

        Raises:
            CorruptionError: The file is missing, or ends before them.
        """
        with self._lock:
            if path not in self._maps:
                self._maps[path] = _map(path)
            whole = self._maps[path]
        if offset + size_bytes > len(whole):
            raise CorruptionError(f"{path} has {len(whole)} bytes; the checkpoint names {size_bytes} at {offset}")
        _populate(whole, offset, size_bytes)
        return whole[offset : offset + size_bytes]


def _map(path: str) -> memoryview:
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError as error:
        raise CorruptionError(f"{path} is missing, though a checkpoint names it") from error


def _populate(whole: memoryview, offset: int, size_bytes: int) -> None:
    """Maps a range in one call, where the system can: a fault a page costs more than the copy itself."""
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    if size_bytes >= _POPULATE_FROM_BYTES and isinstance(whole.obj, mmap.mmap):
        with contextlib.suppress(OSError):  # an older kernel: pages then come one by one
            whole.obj.madvise(_MADV_POPULATE_READ, start, offset + size_bytes - start)


def chunk_name(manifest: Manifest, chunk: Chunk, store: Store) -> str:
    """A chunk, for messages."""
    return f"chunk at {chunk.offset} of {store.object_url(manifest.files[chunk.file].name)} (checkpoint {manifest.id})"


def as_values(data: memoryview, entry: ArrayEntry, box: Box) -> Host:
    """A chunk's bytes as an array of its box's shape; a view."""
    return np.frombuffer(data, dtype_from_name(entry.spec.dtype)).reshape(box.shape)


def load_arrays(store: Store, manifest: Manifest, wanted: Iterable[int]) -> dict[int, Host]:
    """Reads whole arrays into fresh memory.

    Args:
        store: The run's.
        manifest: The checkpoint's.
        wanted: Indices into `manifest.arrays`.

    Returns:
        By index: arrays of the saved global shape and dtype, C order, owned by the caller.

    Raises:
        CorruptionError: A chunk is missing or damaged.
        StorageError: The store failed.
    """
    out = {
        index: np.empty(manifest.arrays[index].spec.shape, dtype_from_name(manifest.arrays[index].spec.dtype))
        for index in sorted(set(wanted))
    }
    by_file: dict[int, list[tuple[int, Chunk]]] = {}
    for index in out:
        for chunk in manifest.arrays[index].chunks:
            by_file.setdefault(chunk.file, []).append((index, chunk))
    mapped = MappedFiles()
    with ThreadPoolExecutor(_THREADS, "rl_ckpt-read") as pool:
        jobs: list[Callable[[], None]] = []
        for file, chunks in by_file.items():
            path = store.local_path(manifest.files[file].name)
            if path is None:
                jobs.append(lambda f=file, c=chunks: _fetch(store, manifest, f, c, out))  # type: ignore[misc]
            else:
                jobs.extend(
                    lambda p=path, i=i, c=c: _copy_mapped(store, manifest, mapped, p, i, c, out)  # type: ignore[misc]
                    for i, c in chunks
                )
        for done in [pool.submit(job) for job in jobs]:
            done.result()
    return out


def _copy_mapped(
    store: Store, manifest: Manifest, mapped: MappedFiles, path: str, index: int, chunk: Chunk, out: Mapping[int, Host]
) -> None:
    data = mapped.view(path, chunk.offset, chunk.bytes)
    check(chunk_name(manifest, chunk, store), data, bytes.fromhex(chunk.digest))
    _place(manifest, index, chunk, data, out)


def _place(manifest: Manifest, index: int, chunk: Chunk, data: memoryview, out: Mapping[int, Host]) -> None:
    entry = manifest.arrays[index]
    arrays.copy_in(out[index], Box.whole(entry.spec.shape), as_values(data, entry, chunk.box), chunk.box)


def _fetch(
    store: Store, manifest: Manifest, file: int, chunks: Sequence[tuple[int, Chunk]], out: Mapping[int, Host]
) -> None:
    """Reads one file's chunks, straight into the arrays wherever a chunk is contiguous there."""
    name = manifest.files[file].name
    places = [_destination(manifest, index, chunk, out) for index, chunk in chunks]
    try:
        store.read_into(name, [(chunk.offset, place) for (_, chunk), (place, _) in zip(chunks, places, strict=True)])
    except ObjectMissingError as error:
        raise CorruptionError(
            f"{store.object_url(name)} is missing, though checkpoint {manifest.id} names it"
        ) from error
    for (index, chunk), (place, direct) in zip(chunks, places, strict=True):
        check(chunk_name(manifest, chunk, store), place, bytes.fromhex(chunk.digest))
        if not direct:
            _place(manifest, index, chunk, place, out)


def _destination(manifest: Manifest, index: int, chunk: Chunk, out: Mapping[int, Host]) -> tuple[memoryview, bool]:
    """Where to read a chunk to, and whether that is its place in the array."""
    whole = Box.whole(manifest.arrays[index].spec.shape)
    part = out[index][slices(chunk.box, whole)]
    if part.flags.c_contiguous:
        return part.reshape(-1).view(np.uint8).data.cast("B"), True
    return memoryview(bytearray(chunk.bytes)), False


def refuse_pickles(manifest: Manifest, match: Match, allow_pickle: bool) -> None:
    """Refuses pickled leaves among those that were chosen, before anything is read or set.

    Raises:
        UntrustedDataError: There is one, and the caller did not allow it.
    """
    for path, node in match.fills.items():
        if isinstance(node, ArrayRef):
            pickled = manifest.arrays[node.index].spec.kind == PICKLE
        else:
            pickled = leaves.kind_tag(node.value) == PICKLE
        if pickled:
            leaves.check_pickle_allowed(path, allow_pickle)


def load_leaves(store: Store, manifest: Manifest, match: Match, allow_pickle: bool, as_numpy: bool) -> dict[str, Any]:
    """Reads the leaves that a match chose.

    Args:
        store: The run's.
        manifest: The checkpoint's.
        match: From `plan.match.match_all`.
        allow_pickle: Whether pickled leaves may run code.
        as_numpy: Gives torch and jax arrays as numpy arrays.

    Returns:
        Leaves by path; arrays that were tied are one object.

    Raises:
        UntrustedDataError: A pickled leaf that the caller did not allow; nothing was read then.
        CorruptionError: A chunk is missing or damaged.
        StorageError: The store failed.
    """
    indices = {path: node.index for path, node in match.fills.items() if isinstance(node, ArrayRef)}
    refuse_pickles(manifest, match, allow_pickle)
    plain = {
        path: leaves.decode(node.value, path, allow_pickle, as_numpy)
        for path, node in match.fills.items()
        if isinstance(node, Plain)
    }
    hosts = load_arrays(store, manifest, indices.values())
    made: dict[int, Any] = {}
    for path, index in indices.items():
        if index not in made:
            made[index] = make_leaf(hosts[index], manifest.arrays[index].spec.kind, path, allow_pickle, as_numpy)
    return {path: made[indices[path]] if path in indices else plain[path] for path in match.fills}


def make_leaf(host: Host, kind: str, path: str, allow_pickle: bool, as_numpy: bool) -> Any:
    """A leaf of the saved kind from its values, which it may keep."""
    if kind == PICKLE:
        return leaves.decode_pickle(host.tobytes(), path, allow_pickle)
    if kind in (BYTES, STR):
        return arrays.from_host(host, kind)
    return arrays.from_host(host, NUMPY if as_numpy else TORCH if kind == DTENSOR else kind)
