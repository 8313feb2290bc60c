"""A rank's part in a restore: match, verify, set.

Owns: the order of the three, and which memory gets which values. Promises: nothing of the worker is touched before all
chunks of all ranks are verified; what is handed to `set_state` is the worker's own memory, never a view of shared
memory or of a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.format.manifest import ArrayRef, Manifest
from rl_ckpt.plan.match import Match, match_all, match_state, view
from rl_ckpt.plan.spread import ChunkId, Needs
from rl_ckpt.runtime.links import Asked, ask, coordinator, ensure_server
from rl_ckpt.runtime.messages import (
    Apply,
    Candidate,
    Flaw,
    Matched,
    OpenRestore,
    Sources,
    TryNext,
    Verified,
    encode,
)
from rl_ckpt.runtime.objects import open_object
from rl_ckpt.runtime.restore_chunks import ChunkSource
from rl_ckpt.runtime.spec import Place, RunSpec
from rl_ckpt.state import arrays, leaves
from rl_ckpt.state.arrays import ArraySpec, Host
from rl_ckpt.state.boxes import Box, overlap
from rl_ckpt.state.collector import paused
from rl_ckpt.state.dtypes import dtype_from_name
from rl_ckpt.state.tree import FlatTree, LocalArray, Node, Plain, Tie, flatten, unflatten
from rl_ckpt.store.based import open_run_store
from rl_ckpt.store.parallel import spare_threads
from rl_ckpt.store.reader import make_leaf, refuse_pickles


@dataclass(frozen=True)
class RestoreRequest:
    """What a caller asks for."""

    step: int | None = None
    select: str | Sequence[str] | None = None
    rename: Mapping[str, str] | None = None
    strict: bool = True
    ranks: tuple[int, ...] | None = None
    """By worker: as which of the saved ranks it is restored; None: as its own."""


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
    repaired: dict[str, str] = {}
    notice: str = ""


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
    link, server = coordinator(spec), ensure_server(spec)
    opened = encode(OpenRestore(place.key, place.rank, place.world_size, request.step, server))
    asked = Asked(link.open_restore.remote(opened), Candidate)  # which reads the manifest while the tree is walked
    flat = None if state is None else flatten(state, True, open_object)
    store = open_run_store(spec.url, spec.storage_options)
    while True:
        candidate = asked.get()
        with paused():
            manifest = msgspec.json.decode(candidate.manifest, type=Manifest)
            match = _match(manifest, _saved_rank(manifest, place, request), flat, request)
            refuse_pickles(manifest, match, spec.options.allow_pickle)
            targets = _targets(manifest, match, flat)
            needs = _needs(manifest, targets.by_place.values())
        matched = Matched(place.key, candidate.token, place.rank, server, match.problems, Needs.of(needs))
        sources = Asked(link.match.remote(encode(matched)), Sources | TryNext)
        chunks = ChunkSource(store, manifest, needs, spare_threads(candidate.neighbours))
        try:
            # Files of the store that this rank can read are verified while the others say what they need.
            bad: dict[int, Flaw] | None = None
            if candidate.early and not match.problems:
                bad = chunks.verify(sources.if_there, candidate.neighbour / candidate.neighbours)
            found = sources.get()
            while isinstance(found, Sources):  # and again, for chunks that could not be used where they were
                chunks.take(found)
                bad = chunks.verify() if bad is None else bad
                word = Verified(place.key, candidate.token, place.rank, bad)
                found, bad = ask(link.verified, word, Apply | Sources | TryNext), None
            if isinstance(found, TryNext):
                asked = Asked(link.open_restore.remote(opened), Candidate)
                continue
            with paused():
                tree, size = _set(match, flat, targets, chunks, spec.options.allow_pickle)
        finally:  # by an error too: else the restore's memory stays mapped as long as the worker lives
            chunks.close()
        link.applied.remote(place.key, place.rank, candidate.token)
        return tree, RestoredRank(
            id=manifest.id,
            step=manifest.step,
            saved_world_size=manifest.world_size,
            bytes=size,
            bytes_from=found.bytes_from,
            kept=tuple(match.kept),
            ignored=tuple(match.ignored),
            fell_back=candidate.fell_back,
            repaired=found.repaired,
            notice=candidate.notice,
        )


def _saved_rank(manifest: Manifest, place: Place, request: RestoreRequest) -> int:
    rank = place.rank if request.ranks is None else request.ranks[place.rank]
    if request.ranks is not None and rank >= manifest.world_size:
        raise InvalidInputError(
            f"ranks={list(request.ranks)}: checkpoint {manifest.id} was saved by ranks 0 … {manifest.world_size - 1}"
        )
    return rank


def _match(manifest: Manifest, rank: int, flat: FlatTree | None, request: RestoreRequest) -> Match:
    seen = view(manifest, rank)
    if flat is None:
        return match_all(seen, request.select, request.rename)
    return match_state(seen, flat.nodes, manifest, request.select, request.rename, request.strict)


def _here(path: str, flat: FlatTree | None) -> tuple[str, LocalArray] | None:
    """The worker's array at a path, ties followed, and the path where it stands."""
    if flat is None:
        return None
    node: Node | None = flat.nodes.get(path)
    if isinstance(node, Tie):
        path, node = node.path, flat.nodes[node.path]
    return (path, node) if isinstance(node, LocalArray) else None


def _wanted_box(here: tuple[str, LocalArray] | None, spec: ArraySpec) -> Box:
    """The worker's part where it has one of an array of this shape, else the whole."""
    return here[1].box if here is not None and here[1].spec.shape == spec.shape else Box.whole(spec.shape)


def _needs(manifest: Manifest, targets: Iterable[_Target]) -> list[ChunkId]:
    out: dict[ChunkId, None] = {}
    for target in targets:
        for c, chunk in enumerate(manifest.arrays[target.index].chunks):
            if overlap(chunk.box, target.box) is not None:
                out[target.index, c] = None
    return list(out)


def _set(
    match: Match, flat: FlatTree | None, targets: _Targets, chunks: ChunkSource, allow_pickle: bool
) -> tuple[Any, int]:
    """Makes what the worker lacks, fills its arrays, and puts the tree together; also gives the bytes set.

    The worker's own arrays come last: whatever can go wrong in making a leaf has gone wrong by then.
    """
    values: dict[str, Any] = {} if flat is None else _present(flat)
    for path, node in match.fills.items():
        if isinstance(node, Plain):
            values[path] = leaves.decode(node.value, path, allow_pickle)
    size, made = 0, dict[object, Any]()
    for in_place in (False, True):
        now = [(place, target) for place, target in targets.by_place.items() if target.in_place == in_place]
        size += chunks.copy([(target.index, target.host, target.box) for _, target in now])
        for place, target in now:
            made[place] = target.leaf(allow_pickle)
    values |= {path: made[place] for path, place in targets.places.items()}
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


class _Target(msgspec.Struct, gc=False):
    """An array to be filled."""

    path: str
    index: int
    box: Box
    host: Host
    """Memory for the values: the worker's own array, or new."""
    in_place: bool
    kind: str
    have: Any
    """What the worker has there; None: nothing that could be filled."""

    def leaf(self, allow_pickle: bool) -> Any:
        """What the worker gets, once `host` is filled."""
        if self.in_place:
            return arrays.filled(self.have, self.kind)
        if self.have is not None:
            return arrays.fill(self.have, self.kind, self.host)
        return make_leaf(self.host, self.kind, self.path, allow_pickle, False)


@dataclass(slots=True)
class _Targets:
    """All arrays to be filled; tied leaves are one, and filled once."""

    by_place: dict[object, _Target] = field(default_factory=dict)
    places: dict[str, object] = field(default_factory=dict)
    """By path: the key in `by_place`."""


def _targets(manifest: Manifest, match: Match, flat: FlatTree | None) -> _Targets:
    out = _Targets()
    for path, ref in match.fills.items():
        if isinstance(ref, ArrayRef):
            here = _here(path, flat)
            place = out.places[path] = here[0] if here is not None else ref.index
            if place not in out.by_place:
                box = _wanted_box(here, manifest.arrays[ref.index].spec)
                out.by_place[place] = _target(manifest, path, ref.index, box, here, flat)
    return out


def _target(
    manifest: Manifest, path: str, index: int, box: Box, here: tuple[str, LocalArray] | None, flat: FlatTree | None
) -> _Target:
    spec = manifest.arrays[index].spec
    dtype = dtype_from_name(spec.dtype)
    if here is None or flat is None or here[1].spec.kind in arrays.LONG_PLAIN:
        fresh: Host = np.empty(box.shape, dtype)  # costs nothing until it is filled
        return _Target(path, index, box, fresh, False, spec.kind, None)
    leaf, kind = flat.arrays[here[0]], here[1].spec.kind
    immutable = here[0] in flat.objects  # not every library keeps a view of one from being written
    host = None if immutable else arrays.in_place(leaf, kind, dtype, box.shape)
    if host is None:
        return _Target(path, index, box, np.empty(box.shape, dtype), False, kind, leaf)
    return _Target(path, index, box, host, True, kind, leaf)
