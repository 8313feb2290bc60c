"""Restaging: what becomes of a save in which workers, or whole nodes, die after they have joined.

Owns: which chunks are lost, who takes them over (plan/redeal.py), and what the driver is told to ask for. Functions on
a `Save`, for `save_machine`. Pure. A chunk that only the dead had ends the save: the error names ranks and paths.

What is taken over is staged by another call of the driver: the ranks have returned from theirs, or will. In worker mode
there is nobody to call them, and the save ends with its time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec

from rl_ckpt.errors import WorkerFailuresError
from rl_ckpt.options import Options
from rl_ckpt.plan.deal import SavePlan, StageItem, deal
from rl_ckpt.plan.merge import Merged
from rl_ckpt.plan.redeal import Orphans, lost_chunks, redeal, without
from rl_ckpt.runtime.messages import Restage, Restages
from rl_ckpt.runtime.save_steps import JOINING, RESERVING, STAGING, WAITING, Annex, Instruction, ReserveAnnex, Save

SAVE_AGAIN = "nothing was saved; save again with the workers that are left, or with new ones in place of the dead"
_PATHS_NAMED = 5


def deal_out(save: Save, merged: Merged, options: Options) -> SavePlan | WorkerFailuresError:
    """The plan of a save in which ranks may have died since they joined."""
    if save.dead:
        merged, orphans = without(merged, save.dead)
        if orphans:
            return _only_theirs(save, orphans)
    return deal(merged, save.servers, options.write_streams, options.file_bytes)


def take_over(save: Save, gone: Collection[str], options: Options) -> WorkerFailuresError | None:
    """Gives what dead ranks have not staged, and what was staged on nodes that are gone, to others.

    Args:
        save: Planned, and nothing of it written.
        gone: Shard servers of nodes that are lost.
        options: Of the run.

    Returns:
        Why it can't go on, if so.
    """
    assert save.plan is not None
    lost = {annex.lane for annex in save.annexes.values() if annex.rank in save.dead and not annex.digests}
    lost |= {lane for lane in save.plan.files if save.server(lane) in gone}
    silent = {rank for rank in save.dead if rank not in save.whole | save.staged.keys()}
    moved, plan = lost_chunks(save.plan, silent, save.servers, lost)
    for rank in range(save.world_size):
        if rank in silent or save.servers[rank] in lost:
            save.staged.pop(rank, None)
            save.objects.pop(rank, None)
            save.whole.add(rank)  # nothing of it is waited for
    save.annexes = {lane: annex for lane, annex in save.annexes.items() if lane not in lost}
    save.plan = plan
    if not moved:
        return None
    names = iter(range(len(save.at), len(save.at) + save.world_size))
    redealt, annexes, orphans = redeal(
        plan,
        moved,
        save.dead,
        save.servers,
        lambda rank: f"{save.servers[rank]}.{next(names)}",
        options.write_streams,
        options.file_bytes,
    )
    if orphans:
        return _only_theirs(save, orphans)
    save.plan = redealt
    for annexed in annexes:
        save.at[annexed.lane] = save.servers[annexed.rank]
        items = annexed.items
        if save.repeats:  # the plan knows the digests of an earlier save
            items = tuple(msgspec.structs.replace(item, digest=b"") for item in items)
        save.annexes[annexed.lane] = Annex(annexed.lane, annexed.rank, annexed.bytes, items)
    return None


def reserve_annexes(save: Save) -> list[Instruction]:
    """Asks for the memory of what is taken over; for a save that has begun to stage."""
    out: list[Instruction] = []
    for annex in save.annexes.values():
        if annex.lane not in save.memory:
            save.memory[annex.lane] = ""
            server = save.server(annex.lane)
            out.append(ReserveAnnex(save.token, annex.lane, server, save.generations[0], annex.size_bytes))
    return out


def to_restage(save: Save) -> Restages:
    """What the driver has to know; see `Restages`."""
    if save.state not in (JOINING, WAITING, RESERVING, STAGING):
        return Restages(save.checkpoint, False)
    orders = []
    for annex in save.annexes.values():
        # Not before the rank has staged its own part: only then does it know by what to tell whether it moved on.
        if annex.path and not annex.told and annex.rank in save.whole:
            annex.told = True
            witness = tuple(_witness(save, annex))
            orders.append(Restage(annex.rank, save.checkpoint, annex.path, annex.items, witness))
    return Restages(save.checkpoint, bool(save.dead or save.annexes), tuple(orders))


def _witness(save: Save, annex: Annex) -> Iterable[int]:
    """What of its own part a rank looks at again: nothing where the digests of what it takes over are known.

    Else what it staged of the same arrays; else of what others have too; else all: an array of its own may change at
    every look (a clock, say) without a training step.
    """
    assert save.plan is not None
    if all(item.digest for item in annex.items):
        return ()
    own = save.plan.stage[annex.rank]
    paths, many = {item.path for item in annex.items}, _shared_paths(save.plan)
    for looked_at in (paths, many):
        found = _of(own, looked_at)
        if found:
            return found
    return range(len(own))


def _of(items: Iterable[StageItem], paths: Collection[str]) -> list[int]:
    return [index for index, item in enumerate(items) if item.path in paths]


def _shared_paths(plan: SavePlan) -> set[str]:
    return {array.path for array in plan.merged.arrays if all(len(chunk.holders) > 1 for chunk in array.chunks)}


def _only_theirs(save: Save, orphans: Orphans) -> WorkerFailuresError:
    by_rank: dict[int, list[str]] = {}
    for path, ranks in orphans.items():
        for rank in ranks:
            by_rank.setdefault(rank, []).append(path)
    said = {rank: f"rank {rank} died, and only it had {_named(paths)}" for rank, paths in sorted(by_rank.items())}
    return WorkerFailuresError(f"step {save.request.step}: {'; '.join(said.values())}; {SAVE_AGAIN}", said, said)


def _named(paths: list[str]) -> str:
    more = f" and {len(paths) - _PATHS_NAMED} more" if len(paths) > _PATHS_NAMED else ""
    return ", ".join(map(repr, paths[:_PATHS_NAMED])) + more
