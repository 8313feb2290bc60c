"""Reading values: chunks of a checkpoint into arrays, verified.

Owns: getting a chunk's bytes (out of local files, or by ranged reads), checking its digest, and copying what is wanted
of it. Promises: no byte is handed out whose chunk does not have the digest that was committed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from rl_ckpt.errors import CorruptionError, InvalidInputError
from rl_ckpt.format.digest import compare, digest, hasher
from rl_ckpt.format.manifest import ArrayEntry, ArrayRef, Chunk, Manifest
from rl_ckpt.plan.match import Match
from rl_ckpt.state import arrays, leaves
from rl_ckpt.state.arrays import BYTES, DTENSOR, NUMPY, PICKLE, STR, TORCH, Host
from rl_ckpt.state.boxes import Box, overlap, slices
from rl_ckpt.state.dtypes import dtype_from_name
from rl_ckpt.state.tree import Plain
from rl_ckpt.store.base import ObjectMissingError, Store
from rl_ckpt.store.local_files import PIECE_BYTES, LocalFiles
from rl_ckpt.store.parallel import run_all, spare_threads

THREADS_FROM_BYTES = 256 << 10
"""A chunk, on average: of smaller ones in local files, Python's own work is most, which threads don't share."""
_JOB_BYTES = 1 << 20  # of small chunks: so many that they pay a job

_Item = TypeVar("_Item")


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
    out = {index: _room(store, manifest, index) for index in sorted(set(wanted))}
    by_file: dict[int, list[tuple[int, Chunk]]] = {}
    for index in out:
        for chunk in manifest.arrays[index].chunks:
            by_file.setdefault(chunk.file, []).append((index, chunk))
    if store.is_local():
        _load_local(store, manifest, list(itertools.chain.from_iterable(by_file.values())), out)
    else:
        run_all([partial(_fetch, store, manifest, f, chunks, out) for f, chunks in by_file.items()], spare_threads())
    return out


def _room(store: Store, manifest: Manifest, index: int) -> Host:
    """Memory for a whole array.

    Raises:
        CorruptionError: There is none, for bytes that its files don't have.
        InvalidInputError: There is none.
    """
    entry = manifest.arrays[index]
    try:
        return np.empty(entry.spec.shape, dtype_from_name(entry.spec.dtype))
    except (MemoryError, ValueError) as error:
        for file in {chunk.file for chunk in entry.chunks}:
            name, claimed = manifest.files[file].name, manifest.files[file].bytes
            sizes = [item.size_bytes for item in store.list(name) if item.name == name]
            if sizes != [claimed]:
                found = f"has {sizes[0]} bytes" if sizes else "is missing"
                why = f"{store.object_url(name)} {found}; checkpoint {manifest.id} names {claimed}"
                raise CorruptionError(why) from error
        raise InvalidInputError(
            f"checkpoint {manifest.id} has a {entry.spec.dtype} array of shape {entry.spec.shape}, for which this "
            f"process gets no memory ({error}); leave it out with `select`, or load it on a larger machine"
        ) from error


def _load_local(store: Store, manifest: Manifest, chunks: list[tuple[int, Chunk]], out: Mapping[int, Host]) -> None:
    files = LocalFiles(store, manifest)
    try:
        files.open_all(chunk for _, chunk in chunks)
        chunks.sort(key=lambda item: (item[1].file, item[1].offset))
        jobs = [partial(_read_local, store, manifest, files, batch, out) for batch in batches(chunks, _size)]
        alone = len(chunks) * THREADS_FROM_BYTES > sum(map(_size, chunks))
        run_all(jobs, 1 if alone else spare_threads())
    finally:
        files.close()


def _read_local(
    store: Store, manifest: Manifest, files: LocalFiles, chunks: Sequence[tuple[int, Chunk]], out: Mapping[int, Host]
) -> None:
    # Equal bytes may be chunks of several arrays; that they are equal was checked with the manifest.
    by_place: dict[tuple[int, int], list[tuple[int, Chunk]]] = {}
    for index, chunk in chunks:
        by_place.setdefault((chunk.file, chunk.offset), []).append((index, chunk))
    for found, view in files.small([same[0][1] for same in by_place.values()]):
        compare_chunk(store, manifest, found, digest(view))
        for index, chunk in by_place[found.file, found.offset]:
            _place(manifest, index, chunk, view, out)
    for index, chunk in chunks:
        if chunk.bytes >= PIECE_BYTES:
            _read_piecewise(store, manifest, files, index, chunk, out)


def _size(item: tuple[int, Chunk]) -> int:
    return item[1].bytes


def batches(items: Sequence[_Item], size_bytes: Callable[[_Item], int]) -> Iterator[Sequence[_Item]]:
    """Chunks for one job each: so many that they pay it.

    Args:
        items: The chunks, in order.
        size_bytes: Of one of them.
    """
    start = filled = 0
    for i, item in enumerate(items):
        filled += size_bytes(item)
        if filled >= _JOB_BYTES:
            yield items[start : i + 1]
            start, filled = i + 1, 0
    if start < len(items):
        yield items[start:]


def _read_piecewise(
    store: Store, manifest: Manifest, files: LocalFiles, index: int, chunk: Chunk, out: Mapping[int, Host]
) -> None:
    """Reads a chunk to its place, and hashes each piece while it is in the core's cache: memory is read once less."""
    found = hasher()
    place, direct = _destination(manifest, index, chunk, out)
    for start in range(0, chunk.bytes, PIECE_BYTES):
        piece = place[start : start + PIECE_BYTES]
        files.read(chunk, piece, start)
        found.update(piece)
    compare_chunk(store, manifest, chunk, found.digest())
    if not direct:
        _place(manifest, index, chunk, place, out)


def compare_chunk(store: Store, manifest: Manifest, chunk: Chunk, found: bytes) -> None:
    """Checks the digest of a chunk's bytes.

    Raises:
        CorruptionError: It is another one.
    """
    expected = bytes.fromhex(chunk.digest)
    if found != expected:
        compare(chunk_name(manifest, chunk, store), found, expected, chunk.bytes)


def _missing(store: Store, manifest: Manifest, name: str) -> str:
    return f"{store.missing(name)}, though checkpoint {manifest.id} names it"


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
        raise CorruptionError(_missing(store, manifest, name)) from error
    for (index, chunk), (place, direct) in zip(chunks, places, strict=True):
        compare_chunk(store, manifest, chunk, digest(place))
        if not direct:
            _place(manifest, index, chunk, place, out)


def _destination(manifest: Manifest, index: int, chunk: Chunk, out: Mapping[int, Host]) -> tuple[memoryview, bool]:
    """Where to read a chunk to, and whether that is its place in the array."""
    place = place_in(out[index], Box.whole(manifest.arrays[index].spec.shape), chunk.box)
    return (place, True) if place is not None else (memoryview(bytearray(chunk.bytes)), False)


def place_in(host: Host, have: Box, box: Box) -> memoryview | None:
    """The memory of a box within an array that holds `have`; None where it is not one piece, or not all there."""
    if overlap(have, box) != box:
        return None
    part = host[slices(box, have)]
    return part.reshape(-1).view(np.uint8).data.cast("B") if part.flags.c_contiguous else None


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
    if kind not in (BYTES, STR):
        kind = NUMPY if as_numpy else TORCH if kind == DTENSOR else kind
    try:
        return arrays.from_host(host, kind)
    except UnicodeDecodeError as error:
        raise CorruptionError(f"{path!r} was saved as text and is none: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:  # what the libraries say
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(
            f"{path!r} is a {host.dtype} array of {kind}, and the {kind.partition('.')[0]} of this process can't make "
            f"it ({error}); load it as a numpy array with `as_numpy=True`"
        ) from error
