"""What servers and ranks of a restore are told: orders to bring chunks in, and where each rank finds its chunks.

Owns: the layout of restore memory, and who of a node's ranks verifies what is read in place: files of the store and
held memory are the same pages for all of them, so each chunk is verified by one. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain

from rl_ckpt.format.manifest import Chunk
from rl_ckpt.format.shard_file import ALIGNMENT
from rl_ckpt.plan.parts import Held
from rl_ckpt.plan.sources import InStore, Known, SourcePlan
from rl_ckpt.plan.spread import ChunkId, share
from rl_ckpt.runtime.messages import (
    FETCHED,
    HELD,
    STORED,
    FetchItem,
    FetchOrder,
    Matched,
    PartItems,
    PassItem,
    Source,
    Sources,
)
from rl_ckpt.runtime.restore_steps import At, Restore, Round

SHARE_FROM_BYTES = 32 << 10
"""A chunk, on average: to deal smaller ones out takes longer than to verify them."""


def lay_out(known: Known, plan: SourcePlan, key: str) -> Round:
    """Gives every chunk that is brought in its place in its server's restore memory.

    Chunks that lie together in a held part lie together here too, on every node alike, and so travel as one.
    """
    order: dict[ChunkId, tuple[object, ...]] = {}
    for node in plan.nodes.values():
        for chunk, held in node.pulls.items():
            order.setdefault(chunk, (held.part, held.offset, chunk))
    out = Round(key, plan.nodes)
    for server, node in plan.nodes.items():
        brought = node.brought()
        if not brought:
            continue
        brought.sort(key=(lambda chunk: order.get(chunk) or ("", 0, chunk)) if order else None)
        places, offset = dict[ChunkId, int](), 0
        for chunk in brought:
            places[chunk] = offset
            offset += -(-known.saved(chunk).bytes // ALIGNMENT) * ALIGNMENT
        out.laid[server], out.sizes[server] = places, offset
    return out


def orders(known: Known, now: Round) -> dict[str, FetchOrder]:
    """What each server has to bring in."""
    return {server: _order(known, now, server) for server in now.laid}


def _order(known: Known, now: Round, server: str) -> FetchOrder:
    node, places = now.nodes[server], now.laid[server]
    plain = not known.bad()  # all are where the manifest says
    files: dict[str, list[FetchItem]] = {}
    for chunk in node.store:
        saved = known.saved(chunk)
        name, offset = _stored(known, chunk, saved, plain)
        item = FetchItem(offset, places[chunk], saved.bytes, bytes.fromhex(saved.digest))
        files.setdefault(name, []).append(item)
    peers: dict[str, tuple[PassItem, ...]] = {}
    names: dict[str, int] = {}
    for peer, chunks in node.peers.items():
        there, pulled, passed = now.laid[peer], now.nodes[peer].pulls, []
        for chunk in chunks:
            saved, file, offset = known.saved(chunk), -1, 0
            if chunk not in pulled:
                name, offset = _stored(known, chunk, saved, plain)
                file = names.setdefault(name, len(names))
            digest = bytes.fromhex(saved.digest)
            passed.append(PassItem(there[chunk], places[chunk], saved.bytes, digest, file, offset))
        peers[peer] = tuple(passed)
    parts: dict[tuple[str, str], list[PassItem]] = {}
    for chunk, held in node.pulls.items():
        saved = known.saved(chunk)
        there_it_is = PassItem(held.offset, places[chunk], saved.bytes, bytes.fromhex(saved.digest))
        parts.setdefault((held.server, held.part), []).append(there_it_is)
    return FetchOrder(
        now.key,
        now.sizes[server],
        {name: tuple(items) for name, items in files.items()},
        peers,
        tuple(names),
        tuple([PartItems(holder, part, tuple(items)) for (holder, part), items in parts.items()]),
    )


def _stored(known: Known, chunk: ChunkId, saved: Chunk, plain: bool) -> tuple[str, int]:
    """File and offset of a chunk in the store."""
    if plain:
        return known.manifest.files[saved.file].name, saved.offset
    place = known.stored(chunk)
    assert place is not None
    return place.file, place.offset


def sources(restore: Restore) -> dict[int, Sources]:
    """What each rank is told of where its chunks are, at first."""
    out: dict[int, Sources] = {}
    known_files: dict[tuple[tuple[int, ...], ...], list[Sources]] = {}  # many nodes need the same parts
    known_places: dict[tuple[str, int], tuple[int, ...]] = {}
    assert restore.known is not None
    held = restore.known.holdings is not None
    small = restore.mappable and not held and _small(restore)
    for server, ranks in restore.neighbours().items():
        matched = [restore.matched[rank] for rank in ranks]
        if server in restore.moved or held:
            found: Iterable[Sources] = _mixed(restore, server, matched, None)
        elif not restore.mappable:
            found = [_brought(restore, m, known_places) for m in matched]
        elif small:
            found = [Sources()] * len(ranks)
        else:
            parts = tuple([tuple(map(id, m.needs.parts)) for m in matched])
            if parts not in known_files:
                known_files[parts] = _in_files(restore, matched)
            found = known_files[parts]
        out.update(zip(ranks, found, strict=True))
    return out


def changes(restore: Restore) -> dict[int, Sources]:
    """What ranks are told whose chunks have other places than they know; only those."""
    out: dict[int, Sources] = {}
    neighbours = restore.neighbours()
    for server, chunks in restore.changed.items():
        ranks = neighbours.get(server, [])
        found = _mixed(restore, server, [restore.matched[rank] for rank in ranks], chunks)
        out.update({rank: one for rank, one in zip(ranks, found, strict=True) if one.needs})
    return out


def _small(restore: Restore) -> bool:
    total, count = needed_bytes(restore)
    return total < SHARE_FROM_BYTES * count


def needed_bytes(restore: Restore) -> tuple[int, int]:
    """Bytes and number of the chunks that ranks need, each rank's."""
    if restore.needed is not None:
        return restore.needed
    assert restore.known is not None
    sizes: dict[int, int] = {}  # by part: many ranks need the same
    parts = [part for m in restore.matched.values() for part in m.needs.parts]
    for part in parts:
        if id(part) not in sizes:
            sizes[id(part)] = sum([restore.known.saved(chunk).bytes for chunk in part.chunks])
    restore.needed = sum([sizes[id(part)] for part in parts]), sum([len(part.chunks) for part in parts])
    return restore.needed


def _brought(restore: Restore, matched: Matched, known: dict[tuple[str, int], tuple[int, ...]]) -> Sources:
    """All chunks of a rank are in the first round's memory; `known` holds the offsets of parts of needs, by server."""
    if not matched.needs.parts:
        return Sources()
    first, server, twins = restore.rounds[0], matched.server, restore.twins
    places = first.laid[server]
    for part in matched.needs.parts:
        if (server, id(part)) not in known:
            known[server, id(part)] = tuple([places[twins[chunk]] for chunk in part.chunks])
    offsets = chain.from_iterable(known[server, id(part)] for part in matched.needs.parts)
    return Sources((Source(FETCHED, first.memory[server]),), offsets=tuple(offsets))


def _in_files(restore: Restore, matched: Sequence[Matched]) -> list[Sources]:
    """All chunks of a node's ranks are in the store's files."""
    assert restore.manifest is not None
    needs = [m.needs for m in matched]
    mine = share(restore.manifest, restore.twins, dict(enumerate(map(list, needs))))
    return [
        Sources(others=tuple([n for n, chunk in enumerate(need) if chunk not in mine[i]]))
        for i, need in enumerate(needs)
    ]


def _mixed(
    restore: Restore, server: str, matched: Sequence[Matched], only: Collection[ChunkId] | None
) -> list[Sources]:
    """Chunks of a node's ranks, wherever they are; `only`: about these."""
    assert restore.known is not None
    files: dict[Source, int] = {}
    twins = restore.twins
    places: dict[ChunkId, tuple[int, int]] = {}
    in_place: set[ChunkId] = set()
    moved, paths = restore.moved.get(server, {}), dict[str, int]()
    for m in matched:
        for chunk in map(twins.__getitem__, m.needs):
            if chunk not in places and (only is None or chunk in only):
                held = moved.get(chunk)
                if isinstance(held, Held):  # most are: not a call and a record for each
                    at = paths.get(held.path)
                    if at is None:
                        at = paths[held.path] = files.setdefault(Source(HELD, held.path), len(files))
                    places[chunk] = at, held.offset
                    in_place.add(chunk)
                    continue
                places[chunk], read_here = _place(restore, server, chunk, restore.at(server, chunk), files)
                if read_here:
                    in_place.add(chunk)
    wanted = [[(n, c) for n, c in enumerate(m.needs) if twins[c] in places] for m in matched]
    mine = _verifiers(restore, [[c for _, c in some if twins[c] in in_place] for some in wanted])
    table = tuple(files)
    return [
        Sources(
            table,
            tuple([places[twins[c]][0] for _, c in some]),
            tuple([places[twins[c]][1] for _, c in some]),
            tuple([n for n, c in some if twins[c] in in_place and c not in mine[i]]),
            None if only is None else tuple([n for n, _ in some]),
        )
        for i, some in enumerate(wanted)
    ]


def _place(
    restore: Restore, server: str, chunk: ChunkId, at: At, files: dict[Source, int]
) -> tuple[tuple[int, int], bool]:
    """Index of the file and offset; whether ranks read it there, and so verify it."""
    if isinstance(at, Round):
        source = Source(FETCHED, at.memory[server])
        return (files.setdefault(source, len(files)), at.laid[server][chunk]), False
    assert isinstance(at, InStore)
    assert restore.known is not None
    if at == restore.known.named(chunk):
        return (-1, at.offset), True
    return (files.setdefault(Source(STORED, at.file), len(files)), at.offset), True


def _verifiers(restore: Restore, wanted: Sequence[Sequence[ChunkId]]) -> Mapping[int, Collection[ChunkId]]:
    """By rank of a node: what it verifies of the chunks that it reads in place."""
    assert restore.manifest is not None
    assert restore.known is not None
    known = restore.known
    size = sum(known.saved(chunk).bytes for some in wanted for chunk in some)
    if size < SHARE_FROM_BYTES * sum(map(len, wanted)):
        return {i: set(some) for i, some in enumerate(wanted)}
    return share(restore.manifest, restore.twins, dict(enumerate(wanted)))


def read_in_place(restore: Restore) -> dict[str, int]:
    """Bytes that ranks read in place by kind of source, each rank's."""
    assert restore.known is not None
    if not restore.mappable and not restore.moved:
        return {}
    if not restore.rounds:
        return {"files": needed_bytes(restore)[0]}
    found: dict[tuple[str, int], dict[str, int]] = {}
    out: dict[str, int] = {}
    twins = restore.twins
    for m in restore.matched.values():
        for part in m.needs.parts:
            counts = found.get((m.server, id(part)))
            if counts is None:
                counts = found[m.server, id(part)] = {}
                moved = restore.moved.get(m.server, {})
                for chunk in part.chunks:
                    twin = twins[chunk]
                    at = moved.get(twin) or restore.at(m.server, twin)
                    if not isinstance(at, Round):
                        name = "memory" if isinstance(at, Held) else "files"
                        counts[name] = counts.get(name, 0) + restore.known.saved(chunk).bytes
            for name, size in counts.items():
                out[name] = out.get(name, 0) + size
    return out
