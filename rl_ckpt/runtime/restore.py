"""A rank's part in a restore: match, verify, set.

Owns: the order of the three, and filling the worker's arrays. Promises: nothing of the worker is touched before every
rank has verified all its chunks; what is handed to `set_state` is the worker's own memory, never a view of shared
memory or of a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from rl_ckpt.errors import CorruptionError, StorageError
from rl_ckpt.format import records
from rl_ckpt.format.digest import check
from rl_ckpt.format.manifest import ArrayRef, Chunk, Manifest
from rl_ckpt.plan.match import Match, match_all, match_state, view
from rl_ckpt.plan.spread import ChunkId
from rl_ckpt.runtime import memory
from rl_ckpt.runtime.links import answer, ask, coordinator, ensure_server
from rl_ckpt.runtime.messages import (
    Apply,
    Candidate,
    Matched,
    OpenRestore,
    Sources,
    TryNext,
    Verified,
    encode,
)
from rl_ckpt.runtime.objects import open_object
from rl_ckpt.runtime.spec import Place, RunSpec
from rl_ckpt.state import arrays, leaves
from rl_ckpt.state.arrays import ArraySpec, Host
from rl_ckpt.state.boxes import Box, overlap
from rl_ckpt.state.dtypes import dtype_from_name
from rl_ckpt.state.tree import FlatTree, LocalArray, Node, Plain, Tie, flatten, unflatten
from rl_ckpt.store.base import Store
from rl_ckpt.store.reader import MappedFiles, as_values, chunk_name, make_leaf, refuse_pickles
from rl_ckpt.store.urls import open_store


@dataclass(frozen=True)
class RestoreRequest:
    """What a caller asks for."""

    step: int | None = None
    select: str | Sequence[str] | None = None
    rename: Mapping[str, str] | None = None
    strict: bool = True


class RestoredRank(msgspec.Struct, frozen=True, tag="restored"):
    """What was done on one rank."""

    id: str
    step: int
    saved_world_size: int
    bytes: int
    bytes_from: dict[str, int]
    kept: tuple[str, ...]
    ignored: tuple[str, ...]
    fell_back: dict[str, str]


def restore_rank(spec: RunSpec, place: Place, request: RestoreRequest, state: Any) -> tuple[Any, RestoredRank]:
    """Restores one rank.

    Args:
        spec: The run.
        place: Which rank of how many.
        request: What is wanted.
        state: The worker's state tree, whose arrays are filled in place where they can be; None: whatever was saved.

    Returns:
        The tree for `set_state`, and what was done.

    Raises:
        CheckpointError: As `Checkpointer.restore`.
    """
    link, flat = coordinator(spec), None if state is None else flatten(state, True, open_object)
    store = open_store(spec.url, spec.storage_options)
    mapped = store.local_path(records.RUN_FILE) is not None
    while True:
        opened = OpenRestore(place.key, place.rank, place.world_size, request.step)
        candidate = ask(link.open_restore, opened, Candidate)
        manifest = msgspec.json.decode(candidate.manifest, type=Manifest)
        match = _match(manifest, place.rank, flat, request)
        refuse_pickles(manifest, match, spec.options.allow_pickle)
        boxes = {path: _wanted_box(path, node.index, flat, manifest) for path, node in _array_fills(match).items()}
        needs = _needs(manifest, match, boxes)
        matched = Matched(place.key, candidate.token, place.rank, ensure_server(spec), match.problems, tuple(needs))
        asked = link.match.remote(encode(matched))
        # Files that this rank can map are verified while the others say what they need.
        chunks = _Chunks(store, manifest, needs, Sources()) if mapped and not match.problems else None
        damaged = chunks.verify() if chunks else ""
        sources = answer(asked, Sources | TryNext)
        if isinstance(sources, TryNext):
            continue
        chunks = chunks or _Chunks(store, manifest, needs, sources)
        verified = ask(link.verified, Verified(place.key, candidate.token, place.rank, damaged), Apply | TryNext)
        if isinstance(verified, TryNext):
            chunks.close()
            continue
        tree, size = _set(manifest, match, flat, boxes, chunks, spec.options.allow_pickle)
        link.applied.remote(place.key, place.rank)
        report = RestoredRank(
            manifest.id,
            manifest.step,
            manifest.world_size,
            size,
            verified.bytes_from,
            tuple(match.kept),
            tuple(match.ignored),
            candidate.fell_back,
        )
        return tree, report


def _match(manifest: Manifest, rank: int, flat: FlatTree | None, request: RestoreRequest) -> Match:
    seen = view(manifest, rank)
    if flat is None:
        return match_all(seen, request.select, request.rename)
    return match_state(seen, flat.nodes, manifest, request.select, request.rename, request.strict)


def _array_fills(match: Match) -> dict[str, ArrayRef]:
    return {path: node for path, node in match.fills.items() if isinstance(node, ArrayRef)}


def _here(path: str, flat: FlatTree | None) -> tuple[str, LocalArray] | None:
    """The worker's array at a path, ties followed, and the path where it stands."""
    if flat is None:
        return None
    node: Node | None = flat.nodes.get(path)
    if isinstance(node, Tie):
        path, node = node.path, flat.nodes[node.path]
    return (path, node) if isinstance(node, LocalArray) else None


def _wanted_box(path: str, index: int, flat: FlatTree | None, manifest: Manifest) -> Box:
    here, spec = _here(path, flat), manifest.arrays[index].spec
    same = here is not None and here[1].spec.shape == spec.shape
    return here[1].box if here is not None and same else Box.whole(spec.shape)


def _needs(manifest: Manifest, match: Match, boxes: Mapping[str, Box]) -> list[ChunkId]:
    out: dict[ChunkId, None] = {}
    for path, node in _array_fills(match).items():
        for c, chunk in enumerate(manifest.arrays[node.index].chunks):
            if overlap(chunk.box, boxes[path]) is not None:
                out[node.index, c] = None
    return list(out)


class _Chunks:
    """A rank's chunks as views: of the store's files, or of the restore's memory on this node."""

    def __init__(self, store: Store, manifest: Manifest, needs: Sequence[ChunkId], sources: Sources) -> None:
        self._manifest = manifest
        self._store = store
        self._mapped = MappedFiles()
        self._needs = needs
        self._memory = memory.mapped(sources.memory) if sources.memory else None
        self._path = sources.memory
        self._offsets = dict(zip(needs, sources.offsets, strict=True)) if sources.memory else {}

    def view(self, chunk: ChunkId) -> memoryview:
        """A chunk's bytes."""
        saved = self._saved(chunk)
        if self._memory is not None:
            return self._memory[self._offsets[chunk] : self._offsets[chunk] + saved.bytes].toreadonly()
        path = self._store.local_path(self._manifest.files[saved.file].name)
        assert path is not None
        return self._mapped.view(path, saved.offset, saved.bytes)

    def verify(self) -> str:
        """What is wrong with chunks of mapped files; empty where all are good. Shard servers verify what they fetch.

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
        try:
            for chunk in self._needs:
                saved = self._saved(chunk)
                check(chunk_name(self._manifest, saved, self._store), self.view(chunk), bytes.fromhex(saved.digest))
        except CorruptionError as error:
            return str(error)
        return ""

    def _saved(self, chunk: ChunkId) -> Chunk:
        return self._manifest.arrays[chunk[0]].chunks[chunk[1]]

    def close(self) -> None:
        """Lets the restore's memory go."""
        self._memory = None
        memory.forget(self._path)


def _set(
    manifest: Manifest,
    match: Match,
    flat: FlatTree | None,
    boxes: Mapping[str, Box],
    chunks: _Chunks,
    allow_pickle: bool,
) -> tuple[Any, int]:
    """Makes what the worker lacks, fills its arrays, and puts the tree together; also gives the bytes set.

    The worker's own arrays come last: whatever can go wrong in making a leaf has gone wrong by then.
    """
    values: dict[str, Any] = {} if flat is None else _present(flat)
    fills = _array_fills(match)
    for path, node in match.fills.items():
        if isinstance(node, Plain):
            values[path] = leaves.decode(node.value, path, allow_pickle)
    targets: dict[object, _Target] = {}
    places: dict[str, object] = {}
    for path, ref in fills.items():
        here = _here(path, flat)
        places[path] = here[0] if here is not None else ref.index  # tied leaves are one array, and filled once
        if places[path] not in targets:
            targets[places[path]] = _target(manifest, path, ref.index, boxes[path], here, flat)
    made: dict[object, Any] = {}
    for place in sorted(targets, key=lambda place: targets[place].in_place):
        target = targets[place]
        target.bytes = _copy(manifest, target.index, target.host, target.box, chunks)
        made[place] = target.leaf(target.host, target.path, allow_pickle)
    values |= {path: made[place] for path, place in places.items()}
    chunks.close()
    size = sum(target.bytes for target in targets.values())
    nodes = match.grown if flat is None else {**flat.nodes, **match.grown}
    return unflatten(nodes, values), size


def _present(flat: FlatTree) -> dict[str, Any]:
    """The worker's leaves as they are."""
    out: dict[str, Any] = {}
    for path, node in flat.nodes.items():
        if isinstance(node, Plain):
            out[path] = leaves.decode(node.value, path, allow_pickle=True)  # the worker's own: nothing untrusted
        elif isinstance(node, LocalArray):
            kind = node.spec.kind
            plain = kind in arrays.LONG_PLAIN
            out[path] = make_leaf(flat.arrays[path], kind, path, True, False) if plain else flat.arrays[path]
        elif isinstance(node, Tie):
            out[path] = out[node.path]
    return out


@dataclass(slots=True)
class _Target:
    """An array to be filled."""

    path: str
    index: int
    box: Box
    host: Host
    """Memory for the values: the worker's own array, or new."""
    in_place: bool
    leaf: Callable[[Host, str, bool], Any]
    """Makes what the worker gets, once `host` is filled."""
    bytes: int = 0


def _target(
    manifest: Manifest, path: str, index: int, box: Box, here: tuple[str, LocalArray] | None, flat: FlatTree | None
) -> _Target:
    spec = manifest.arrays[index].spec
    fresh: Host = np.empty(box.shape, dtype_from_name(spec.dtype))  # costs nothing until it is filled
    if here is None or flat is None or here[1].spec.kind in arrays.LONG_PLAIN:
        return _Target(
            path, index, box, fresh, False, lambda done, at, pickle: make_leaf(done, spec.kind, at, pickle, False)
        )
    leaf, kind = flat.arrays[here[0]], here[1].spec.kind
    immutable = here[0] in flat.objects  # not every library keeps a view of one from being written
    host = None if immutable else arrays.in_place(leaf, kind, ArraySpec(kind, spec.dtype, box.shape))
    if host is None:
        return _Target(path, index, box, fresh, False, lambda done, _at, _pickle: arrays.fill(leaf, kind, done))
    return _Target(path, index, box, host, True, lambda _done, _at, _pickle: arrays.filled(leaf, kind))


def _copy(manifest: Manifest, index: int, host: Host, box: Box, chunks: _Chunks) -> int:
    entry = manifest.arrays[index]
    return sum(
        arrays.copy_in(host, box, as_values(chunks.view((index, c)), entry, chunk.box), chunk.box)
        for c, chunk in enumerate(entry.chunks)
        if overlap(chunk.box, box) is not None
    )
