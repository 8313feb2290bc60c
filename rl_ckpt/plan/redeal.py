"""Redeal: what dead workers and lost nodes were to stage goes to other replicas, in a save that goes on.

Owns: who takes what over, and which chunks nobody has any more. What is taken over is staged into files of staging
memory of its own ("annexes", one for each rank that takes over), never into the place where it was to lie before:
a process that was given up for dead may still write there. Pure; moves nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from rl_ckpt.plan.deal import FilePlan, Place, SavePlan, Source, StageItem, Write, balance, lay_out
from rl_ckpt.plan.merge import Merged

Orphans = Mapping[str, tuple[int, ...]]
"""Paths of chunks that no live rank has, and the dead ranks that had them."""


@dataclass(frozen=True, slots=True)
class Annexed:
    """What one rank takes over."""

    lane: str
    """Under which `SavePlan.files` has it, as if it were another shard server's."""
    rank: int
    bytes: int
    """Size of the annex."""
    items: tuple[StageItem, ...]


def without(merged: Merged, dead: Collection[int]) -> tuple[Merged, Orphans]:
    """What can be dealt out when some ranks said what they have, and died before they were told what to stage.

    Args:
        merged: From `merge`; it is not changed.
        dead: Those ranks.

    Returns:
        The same without the dead as holders; and what only they had.
    """
    orphans: dict[str, tuple[int, ...]] = {}
    alive = _alive(frozenset(dead))
    arrays = []
    for array in merged.arrays:
        chunks = []
        for chunk in array.chunks:
            holders = alive(chunk.holders)
            if not holders:
                _add(orphans, array.path, chunk.holders)
            chunks.append(msgspec.structs.replace(chunk, holders=holders))
        arrays.append(msgspec.structs.replace(array, chunks=chunks))
    return dataclasses.replace(merged, arrays=arrays), orphans


def places(plan: SavePlan) -> dict[tuple[str, int], Place]:
    """Which chunk is staged where: by lane (a shard server, or an annex) and offset in it."""
    return {
        (source.server, plan.files[source.server][source.file].columns[source.column].offset): place
        for place, source in plan.sources.items()
    }


def redeal(
    plan: SavePlan,
    moved: Collection[Place],
    dead: Collection[int],
    servers: Sequence[str],
    name: Callable[[int], str],
    write_streams: int,
    file_bytes: int,
) -> tuple[SavePlan, list[Annexed], Orphans]:
    """Takes chunks away from who was to stage them, and deals them out to live ranks that hold them too.

    Args:
        plan: From `deal`, not settled; it is not changed.
        moved: Which chunks.
        dead: Ranks that stage nothing any more.
        servers: Shard server of each rank's node, by rank.
        name: Of the lane of a rank's annex; a new one.
        write_streams: As for `deal`.
        file_bytes: As for `deal`.

    Returns:
        The plan without those chunks at their old places and with the annexes'; what is taken over; and which paths
        nobody has any more: then there is no such plan.
    """
    alive, orphans, writes = _alive(frozenset(dead)), dict[str, tuple[int, ...]](), list[Write]()
    for a, c in sorted(moved):
        array = plan.merged.arrays[a]
        chunk = array.chunks[c]
        holders = alive(chunk.holders)
        if holders:
            writes.append(Write(array, msgspec.structs.replace(chunk, holders=holders), (a, c)))
        else:
            _add(orphans, array.path, chunk.holders)
    if orphans:
        return plan, [], orphans
    rest = _taken_out(plan, frozenset(moved))
    annexes, by_rank = [], dict[int, list[tuple[int, Write]]]()
    for rank, write in balance(writes, servers):
        by_rank.setdefault(rank, []).append((rank, write))
    for rank, dealt in by_rank.items():
        lane = name(rank)
        scratch = SavePlan({rank: []}, {}, {}, plan.merged)
        lay_out(scratch, lane, dealt, write_streams, file_bytes)
        rest.files[lane] = scratch.files[lane]
        rest.sources.update(scratch.sources)
        annexes.append(Annexed(lane, rank, scratch.staged_bytes[lane], tuple(scratch.stage[rank])))
    return rest, annexes, {}


def _taken_out(plan: SavePlan, moved: frozenset[Place]) -> SavePlan:
    """A plan without some chunks. Lanes and files in which nothing is left are gone."""
    at, sources = places(plan), dict(plan.sources)
    kept: dict[str, list[FilePlan]] = {}
    for lane, files in plan.files.items():
        left: list[FilePlan] = []
        for file in files:
            columns = [column for column in file.columns if at[lane, column.offset] not in moved]
            for c, column in enumerate(columns):
                sources[at[lane, column.offset]] = Source(lane, len(left), c)
            if columns:
                left.append(FilePlan(file.name, tuple(columns), file.packed))
        if left:
            kept[lane] = left
    staged_bytes = {lane: size for lane, size in plan.staged_bytes.items() if lane in kept}
    return dataclasses.replace(plan, files=kept, staged_bytes=staged_bytes, sources=sources)


def _add(orphans: dict[str, tuple[int, ...]], path: str, ranks: tuple[int, ...]) -> None:
    """Several ranks may have had arrays, or parts of one, at a path."""
    orphans[path] = tuple(sorted({*orphans.get(path, ()), *ranks}))


def _alive(dead: frozenset[int]) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
    """Takes the dead out of lists of holders: those that are one object stay one object (plan/merge.py)."""
    known: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def alive(holders: tuple[int, ...]) -> tuple[int, ...]:
        found = known.get(id(holders))
        if found is None:
            found = known[id(holders)] = (holders, tuple(rank for rank in holders if rank not in dead))
        return found[1]

    return alive


def lost_chunks(
    plan: SavePlan, ranks: Collection[int], servers: Sequence[str], lanes: Collection[str]
) -> tuple[set[Place], SavePlan]:
    """What is to be moved when ranks staged nothing, and lanes are gone with what was staged there.

    Args:
        plan: From `deal` or `redeal`.
        ranks: That staged nothing of what they were told.
        servers: Shard server of each rank's node, by rank.
        lanes: Shard servers and annexes that are gone.

    Returns:
        Which chunks; and the plan in which those ranks stage nothing.
    """
    at = places(plan)
    moved = {place for (lane, _), place in at.items() if lane in lanes}
    moved |= {at[servers[rank], item.offset] for rank in ranks for item in plan.stage[rank]}
    stage = {rank: [] if rank in ranks or servers[rank] in lanes else items for rank, items in plan.stage.items()}
    return moved, dataclasses.replace(plan, stage=stage)
