"""What a restore learns of its sources: where chunks are from now on, and which places turned out to be bad.

Functions on a `Restore`, which they change; runtime/restore_machine.py decides what follows.
"""

from __future__ import annotations

from rl_ckpt.errors import CorruptionError
from rl_ckpt.format.manifest import ArrayRef
from rl_ckpt.plan.parts import Held
from rl_ckpt.plan.sources import InStore, NodePlan, SourcePlan
from rl_ckpt.plan.spread import ChunkId
from rl_ckpt.runtime.messages import AT_PEER, IN_STORE, FetchDone, Flaw
from rl_ckpt.runtime.restore_steps import Damaged, Restore, Round


def note(restore: Restore, plan: SourcePlan, now: Round) -> None:
    """Keeps where chunks are from now on, and by server which are elsewhere than its ranks were told."""
    assert restore.known is not None
    known, again = restore.known, bool(restore.rounds)
    restore.rounds.append(now)
    if not again and not restore.mappable and known.holdings is None:
        restore.bytes_from = {"store": 0, "peers": 0}
    for server, node in plan.nodes.items():
        moved = dict[ChunkId, InStore | Held | Round](node.here)
        if again:
            moved.update(dict.fromkeys(now.laid.get(server, ()), now))
        for chunk in node.files:
            place = known.stored(chunk)
            assert place is not None
            if again or place != known.named(chunk):
                moved[chunk] = place
        if moved:
            restore.moved.setdefault(server, {}).update(moved)
        if restore.told_sources:
            changed = restore.changed.setdefault(server, set())
            changed.update(node.here, node.files, now.laid.get(server, ()))
        if restore.damaged or restore.unread:
            _note_repairs(restore, node, now)


def _note_repairs(restore: Restore, node: NodePlan, now: Round) -> None:
    assert restore.known is not None
    for chunk in {*restore.damaged, *restore.unread}:
        held = node.here.get(chunk) or node.pulls.get(chunk)
        place = restore.known.stored(chunk)
        if held is not None:
            restore.now_from[chunk] = f"the memory of {held.server}"
        elif place is not None and (chunk in node.files or chunk in node.store):
            now.stored[chunk] = place
            restore.now_from[chunk] = place.file


def take_failed(restore: Restore, server: str, done: FetchDone) -> None:
    """Leaves out the sources of what a server could not bring: those chunks are missing there."""
    assert restore.known is not None
    if not done.failed:
        return
    now = restore.rounds[-1]
    chunks = {offset: chunk for chunk, offset in now.laid[server].items()}
    for item in done.failed:
        chunk = chunks[item.offset]
        restore.missing.setdefault(server, set()).add(chunk)
        if item.last == AT_PEER:  # which says itself what was wrong with the place where it took it from
            now.not_passed.setdefault(server, set()).add(chunk)
            continue
        stored = now.stored.get(chunk) or restore.known.named(chunk)
        _exclude(restore, chunk, stored if item.last == IN_STORE else now.nodes[server].pulls[chunk], item.flaw)


def take_cut_off(restore: Restore) -> None:
    """After a round: who could not have a chunk from a peer that has it brings it in alone from now on.

    With another peer it might fare no better, and so with one after the other, a round for each.
    """
    assert restore.known is not None
    now = restore.rounds[-1]
    for server, chunks in now.not_passed.items():
        for peer, passed in now.nodes[server].peers.items():
            cut_off = chunks.intersection(passed) - restore.missing.get(peer, set())
            restore.known.alone.setdefault(server, set()).update(cut_off)


def take_bad(restore: Restore) -> dict[str, set[ChunkId]]:
    """Leaves out the places where ranks found chunks bad.

    Returns:
        By server, the chunks that need another source, on all nodes where that place is theirs.
    """
    assert restore.known is not None
    needs, missing = restore.needs(), dict[str, set[ChunkId]]()
    seen: set[tuple[ChunkId, InStore | Held]] = set()
    for rank, bad in restore.verified.items():
        wanted = list(restore.matched[rank].needs) if bad else []
        server = restore.matched[rank].server
        for n, flaw in bad.items():
            chunk = restore.twins[wanted[n]]
            at = restore.at(server, chunk)
            missing.setdefault(server, set()).add(chunk)
            if isinstance(at, Round) or (chunk, at) in seen:  # restore memory that is gone: only brought in again
                continue
            seen.add((chunk, at))
            _exclude(restore, chunk, at, flaw)
            if isinstance(at, Held):
                continue
            for other, chunks in needs.items():
                if chunk in chunks and restore.at(other, chunk) == at:
                    missing.setdefault(other, set()).add(chunk)
    restore.verified = {rank: {} for rank in restore.verified}
    return missing


def _exclude(restore: Restore, chunk: ChunkId, place: InStore | Held, flaw: Flaw) -> None:
    assert restore.known is not None
    restore.known.exclude(place)
    if flaw.code == CorruptionError.code:
        restore.damaged.setdefault(chunk, flaw.why)
        if isinstance(place, Held):
            digest = bytes.fromhex(restore.known.saved(chunk).digest)
            restore.damaged_copies.append(Damaged(place.server, place.part, digest))
    elif isinstance(place, InStore):
        restore.unread.setdefault(chunk, flaw.why)


def repaired(restore: Restore) -> dict[str, str]:
    """Damaged chunks by name, and where their bytes came from instead."""
    return {chunk_name(restore, chunk): restore.now_from.get(chunk, "") for chunk in sorted(restore.damaged)}


def chunk_name(restore: Restore, chunk: ChunkId) -> str:
    """A chunk, for people: by the first path of its array."""
    assert restore.manifest is not None
    for path, variants in restore.manifest.nodes.items():
        if any(isinstance(v.node, ArrayRef) and v.node.index == chunk[0] for v in variants):
            return f"chunk {chunk[1]} of {path}"
    return f"chunk {chunk[1]} of array {chunk[0]}"
