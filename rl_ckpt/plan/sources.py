"""Sources: where each node gets each chunk of a restore from.

Owns: the choice, in this order: memory held on the node itself, which its ranks read in place · a peer's held memory ·
the store: files that ranks read themselves where they can, else fetched · the same bytes in another checkpoint's file.
What turned out to be bad is never chosen again. Pure; who reads a chunk compares its digest, whatever this says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from rl_ckpt.format.manifest import Chunk, Manifest
from rl_ckpt.plan.parts import Held, Holdings
from rl_ckpt.plan.spread import ChunkId, spread

NOWHERE = "memory/"
"""How a manifest names the files of what is only in memory."""
_TAKERS_A_HOLDER = 4  # with more, they pass it on among themselves: a holder's network would be the limit
_LEVEL_BYTES = 8 << 20  # holders' loads may differ by so much: neighbours then come from one of them, and together


class InStore(msgspec.Struct, frozen=True, gc=False):
    """A chunk in an object of the store."""

    file: str
    """Its name below the run's url."""
    offset: int
    """In bytes."""


class Known:
    """What is known of where one checkpoint's chunks are."""

    def __init__(self, manifest: Manifest, holdings: Holdings | None = None) -> None:
        """As the manifest and the memory tier say."""
        self.manifest = manifest
        self.holdings = holdings
        self._bad: set[InStore] = set()
        self._bad_held: set[tuple[str, str, int]] = set()
        self._dead: set[str] = set()
        self._elsewhere: dict[ChunkId, list[InStore]] = {}
        self.alone: dict[str, set[ChunkId]] = {}
        """By server: chunks that no peer passes on to it; it brings them in itself."""

    def saved(self, chunk: ChunkId) -> Chunk:
        """The manifest's word on a chunk."""
        return self.manifest.arrays[chunk[0]].chunks[chunk[1]]

    def held(self, chunk: ChunkId) -> Sequence[Held]:
        """Its copies in memory that are not known to be bad."""
        if self.holdings is None:
            return []
        saved = self.saved(chunk)
        found = self.holdings.find(bytes.fromhex(saved.digest), saved.bytes)
        if not self._dead and not self._bad_held:
            return found
        return [
            copy
            for copy in found
            if copy.server not in self._dead and (copy.server, copy.part, copy.offset) not in self._bad_held
        ]

    def named(self, chunk: ChunkId) -> InStore:
        """Where the manifest says that it lies."""
        saved = self.saved(chunk)
        return InStore(self.manifest.files[saved.file].name, saved.offset)

    def stored(self, chunk: ChunkId) -> InStore | None:
        """The first place in the store that is not known to be bad."""
        places: list[InStore] = [self.named(chunk), *self._elsewhere.get(chunk, [])]
        for place in places:
            if place not in self._bad and not place.file.startswith(NOWHERE):
                return place
        return None

    def exclude(self, place: InStore | Held) -> None:
        """A place turned out to be bad, or not to be had."""
        if isinstance(place, Held):
            self._bad_held.add((place.server, place.part, place.offset))
        else:
            self._bad.add(place)

    def lose(self, server: str) -> None:
        """A holder is dead."""
        self._dead.add(server)

    def add(self, chunk: ChunkId, places: Iterable[InStore]) -> None:
        """Other places in the store with a chunk's bytes."""
        self._elsewhere.setdefault(chunk, []).extend(places)

    def bad(self) -> list[InStore]:
        """Places in the store that are known to be bad."""
        return list(self._bad)


@dataclass(slots=True)
class NodePlan:
    """Where one node gets its chunks from; each is in one of these."""

    here: dict[ChunkId, Held] = field(default_factory=dict)
    """Read in place by ranks, in memory that this node holds."""
    files: list[ChunkId] = field(default_factory=list)
    """Read by ranks in the store's files."""
    pulls: dict[ChunkId, Held] = field(default_factory=dict)
    """Pulled by the node's server out of a peer's held memory."""
    store: list[ChunkId] = field(default_factory=list)
    """Fetched by the node's server from the store."""
    peers: dict[str, list[ChunkId]] = field(default_factory=dict)
    """Passed on by a peer, which has them among its own `pulls` or `store`. Lists may be shared."""

    def brought(self) -> list[ChunkId]:
        """What the node's server brings into its restore memory."""
        return [*self.pulls, *self.store, *(chunk for chunks in self.peers.values() for chunk in chunks)]


@dataclass(slots=True)
class SourcePlan:
    """The sources of a restore, or of a part of it."""

    nodes: dict[str, NodePlan]
    """By server."""
    lost: set[ChunkId] = field(default_factory=set)
    """Chunks without any source; they are in no node's plan."""


def plan_sources(known: Known, needs: Mapping[str, Collection[ChunkId]], mappable: bool) -> SourcePlan:
    """Chooses a source for every chunk on every node that needs it.

    Args:
        known: Where chunks are.
        needs: Chunks (the first of their twins) that the workers on each server's node want.
        mappable: Whether workers read the store's files themselves.

    Returns:
        The plan. A chunk that is fetched leaves the store once, whoever needs it (`Known.alone` apart). Held chunks
        that few nodes need are pulled by each of them, level over the holders; what many need is pulled once and passed
        on.
    """
    out = SourcePlan({server: NodePlan() for server in needs})
    if known.holdings is None and not mappable and not known.bad() and not known.alone:
        passed = {server: chunks if isinstance(chunks, set) else set(chunks) for server, chunks in needs.items()}
    else:
        passed = {server: set() for server in needs}
        _one_by_one(known, needs, mappable, out, passed)
    load: dict[str, int] = {}
    for server, fetch in spread(known.manifest, passed).items():
        node = out.nodes[server]
        node.peers = fetch.peers
        if known.holdings is None:
            node.store = node.store + fetch.store if node.store else fetch.store
            continue
        for chunk in fetch.store:
            copies = known.held(chunk)
            if copies:
                _pull(known, node, chunk, copies, load)
            else:
                node.store.append(chunk)
    if known.holdings is None:
        return out
    for server, node in out.nodes.items():
        placed = {*node.here, *node.files, *node.store, *passed[server], *out.lost}
        for chunk in sorted(set(needs[server]) - placed):
            _pull(known, node, chunk, known.held(chunk), load)
    return out


def _one_by_one(
    known: Known,
    needs: Mapping[str, Collection[ChunkId]],
    mappable: bool,
    out: SourcePlan,
    passed: Mapping[str, set[ChunkId]],
) -> None:
    """Chunks that are read in place, that are lost, and that one server brings for many; who is left pulls alone."""
    takers: dict[ChunkId, list[str]] = {}
    for server in sorted(needs):
        for chunk in needs[server]:
            takers.setdefault(chunk, []).append(server)
    for chunk, servers in takers.items():
        copies = known.held(chunk)
        here = {copy.server: copy for copy in reversed(copies)}
        far = []
        for server in servers:
            if server in here:
                out.nodes[server].here[chunk] = here[server]
            else:
                far.append(server)
        if not far:
            continue
        if not copies and known.stored(chunk) is None:
            out.lost.add(chunk)
        elif not copies and mappable:
            for server in far:
                out.nodes[server].files.append(chunk)
        elif not copies or len(far) > _TAKERS_A_HOLDER * len(here):
            for server in far:
                if chunk not in known.alone.get(server, ()):
                    passed[server].add(chunk)
                elif not copies:
                    out.nodes[server].store.append(chunk)


def _pull(known: Known, node: NodePlan, chunk: ChunkId, copies: Sequence[Held], load: dict[str, int]) -> None:
    """Chooses a holder: the one of the chunk before, unless another has much less to send."""
    last = next(reversed(node.pulls.values())) if node.pulls else None
    best = min(copies, key=lambda copy: (load.get(copy.server, 0), copy.server, copy.part, copy.offset))
    if last is not None:
        level = load.get(best.server, 0) + _LEVEL_BYTES
        best = next((c for c in copies if c.server == last.server and load.get(c.server, 0) < level), best)
    load[best.server] = load.get(best.server, 0) + known.saved(chunk).bytes
    node.pulls[chunk] = best
