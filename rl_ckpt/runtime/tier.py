"""The memory tier's brain: a pure state machine, events in, instructions out. No Ray, no I/O, no clock.

Owns: which checkpoint's parts are held in memory, by whom, how many copies of each there are to be and where they go.
Promises: two copies of a part are never on one node; what is in memory of an older checkpoint is not given up before a
newer one is committed and has landed (or can't); what somebody restores from is neither given up nor written; a
generation of staging memory is given back exactly once. Never makes a save fail: what can't be held is not held.

*Landed*: every part has 1 + `replicas` holders on nodes that stay (fewer where there are not so many nodes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from rl_ckpt.plan.parts import Part, Remembered, part_name
from rl_ckpt.runtime.tier_kept import KeptCheckpoints
from rl_ckpt.runtime.tier_steps import (
    Bring,
    CannotLand,
    Copy,
    Found,
    GenerationFree,
    Hold,
    Instruction,
    Kept,
    Landed,
    Piece,
    Release,
    Remember,
)

_TOLD = 2  # holders that remember a checkpoint, and one more for each replica


class Tier(KeptCheckpoints):
    """See the module. Every method is an event and returns what is to be done about it; questions are of the base."""

    # Servers.

    def servers_are(self, servers: Mapping[str, bool]) -> list[Instruction]:
        """Which nodes are alive.

        Args:
            servers: Name of the shard server of each node (it need not run yet), and whether the node is going away.
        """
        now = dict(sorted(servers.items()))
        if now == self._servers:
            return []
        lost = self._servers.keys() - now.keys()
        self._servers = now
        self._started &= now.keys()
        return self._without(lost) if lost else self._spread_all()

    def server_lost(self, server: str) -> list[Instruction]:
        """A server's node is dead, and its memory with it."""
        self._servers.pop(server, None)
        self._started.discard(server)
        return self._without({server})

    def _without(self, lost: Iterable[str]) -> list[Instruction]:
        out: list[Instruction] = []
        for kept in self._kept.values():
            kept.told -= set(lost)
            kept.bad = [one for one in kept.bad if one.server not in lost]
            for piece in kept.pieces.values():
                for server in lost:
                    piece.holders.pop(server, None)
                    piece.asked.discard(server)
            out += self._remember(kept)
        return [*out, *self._spread_all()]

    # A save.

    def begin(
        self, checkpoint: str, generation: int | None, staged: Mapping[str, tuple[int, str]], place: int = 0
    ) -> None:
        """All of a save is staged: from here on its memory is held.

        Args:
            checkpoint: Its id.
            generation: That it is staged in.
            staged: Bytes and file, by server.
            place: In the order of the saves: the later, the higher.
        """
        pieces = {part_name(checkpoint, server): Piece(server, *found) for server, found in staged.items()}
        self._kept[checkpoint] = Kept(checkpoint, generation, pieces, place=place)
        for server in staged:
            self._servers.setdefault(server, False)
            self._started.add(server)

    def tabled(self, checkpoint: str, parts: Sequence[Part]) -> list[Instruction]:
        """The tables of a save's parts are made."""
        kept = self._kept.get(checkpoint)
        if kept is None:
            return []
        out: list[Instruction] = []
        for part in parts:
            piece = kept.pieces[part.name]
            piece.part = part
            if piece.origin not in self._servers:
                continue  # died meanwhile
            why = self._no_room(kept, piece, piece.origin)
            if why:
                piece.refused[piece.origin] = why
            else:
                piece.asked.add(piece.origin)
                out.append(Hold(piece.origin, part, piece.path))
        return [*out, *self._spread(kept)]

    def not_tabled(self, checkpoint: str, why: str) -> list[Instruction]:
        """They can't be made: nothing of the save is held, beside its generation until it is decided."""
        kept = self._kept.get(checkpoint)
        if kept is None or kept.settled:
            return []
        kept.settled = True
        return [CannotLand(checkpoint, why), *self._retire()]

    def held(self, checkpoint: str, part: str, server: str, path: str) -> list[Instruction]:
        """A server has a part, whole and verified."""
        kept = self._kept.get(checkpoint)
        if kept is None or server not in self._servers:
            return [Release(server, part)]  # given up meanwhile
        piece = kept.pieces[part]
        piece.asked.discard(server)
        piece.holders[server] = path
        return [*self._remember(kept), *self._spread(kept)]

    def not_held(self, checkpoint: str, part: str, server: str, why: str) -> list[Instruction]:
        """A server can't have a part."""
        kept = self._kept.get(checkpoint)
        if kept is None:
            return []
        kept.pieces[part].asked.discard(server)
        kept.pieces[part].refused[server] = why
        return self._spread(kept)

    def committed(self, done: Remembered) -> list[Instruction]:
        """A save is a checkpoint: in the store, or in memory alone."""
        kept = self._kept.get(done.id)
        if kept is not None:
            kept.done = done
        if not self.options.memory_tier and done.record is not None:  # switched off while it was saved
            return self.forget()
        if kept is None:
            return []
        kept.told.clear()
        # In the order of the commits, but for urgent saves: they don't wait for earlier ones.
        self._kept[done.id] = self._kept.pop(done.id)
        self._kept = dict(sorted(self._kept.items(), key=lambda item: item[1].place))
        later = [other for other in self._kept.values() if other.place > kept.place] if done.record else []
        return [*self._overtaken(later, done.after), *self._remember(kept), *self._spread(kept)]

    def _overtaken(self, later: Iterable[Kept], number: int) -> list[Instruction]:
        """An earlier save has committed: later ones that are only in memory are newer than that commit all the same."""
        out: list[Instruction] = []
        for kept in later:
            if kept.done is not None and kept.done.record is None and kept.done.after < number:
                kept.done = msgspec.structs.replace(kept.done, after=number)
                kept.told.clear()
                out += self._remember(kept)
        return out

    def aborted(self, checkpoint: str) -> list[Instruction]:
        """A save has failed; who gave it its generation has taken that back."""
        kept = self._kept.get(checkpoint)
        if kept is None or kept.done is not None:
            return []
        kept.generation = None
        return self._release(kept)

    # A prefetch.

    def prefetch(self, done: Remembered, parts: Sequence[Part], limit: int | None = None) -> list[Instruction]:
        """A checkpoint is to be brought in from the store; nothing happens where it is in memory.

        Args:
            done: The checkpoint.
            parts: What each server is to bring.
            limit: Bytes of it that a server may have, copies counted; None: as the options say.
        """
        if done.id in self._kept:
            return []
        pieces = {part.name: Piece(part.origin, part.bytes, "", part, stored=True) for part in parts}
        self._started |= self._servers.keys() & {part.origin for part in parts}
        older = [n for n, k in enumerate(self._kept.values()) if k.done is not None and k.done.after <= done.after]
        before, after = list(self._kept.values())[: max(older, default=-1) + 1], dict(self._kept)
        place = before[-1].place if before else 0
        kept = Kept(done.id, None, pieces, done, place=place, prefetched=True, limit=limit)
        self._kept = {one.id: one for one in [*before, kept]} | after
        return self._spread(kept)

    def brought(self, server: str, part: Part, path: str) -> list[Instruction]:
        """A server has brought a part in, all of it or what of it could be had."""
        kept = self._kept.get(part.checkpoint)
        piece = kept.pieces[part.name] if kept is not None else None
        if kept is not None and kept.done is not None and piece is not None and piece.part != part:
            piece.part = part
            kept.done = msgspec.structs.replace(kept.done, whole=False)
            kept.told.clear()
        return self.held(part.checkpoint, part.name, server, path)

    def not_stored(self, checkpoint: str, part: str, server: str) -> list[Instruction]:
        """Nothing of a part can be had from the store: it is not asked for again."""
        kept = self._kept.get(checkpoint)
        if kept is None:
            return []
        kept.pieces[part].stored = False
        kept.pieces[part].asked.discard(server)
        return self._spread(kept)

    # Restores.

    def use(self, checkpoint: str, token: str) -> None:
        """Somebody restores from a checkpoint in memory, until `done`."""
        if checkpoint in self._kept:
            self._kept[checkpoint].users.add(token)

    def done(self, token: str) -> list[Instruction]:
        """A restore is over."""
        out: list[Instruction] = []
        for kept in self._kept.values():
            kept.users.discard(token)
            if not kept.users:
                out += kept.bad
                kept.bad = []
        return [*out, *self._retire()]

    def bad(self, server: str, part: str, digest: bytes) -> list[Instruction]:
        """A chunk of a copy is damaged: that copy is given up, and made anew on another node where there is one."""
        for kept in self._kept.values():
            piece = kept.pieces.get(part)
            if piece is not None and piece.holders.pop(server, None) is not None:
                piece.refused[server] = f"chunk {digest.hex()} was damaged in the memory of {server}"
                kept.bad.append(Release(server, part))
                if kept.users:  # other restores read it, and find out for themselves what is damaged
                    return self._spread(kept)
                gone, kept.bad = kept.bad, []
                return [*gone, *self._spread(kept)]
        return []

    # Giving up, and taking up.

    def make_room(self) -> list[Instruction]:
        """Staging finds no memory: what the store has too, and nobody uses, is given up."""
        return self._release_all(lambda done: done.record is not None)

    def forget(self) -> list[Instruction]:
        """What is held is of no use any more: all that is not in use is given up."""
        return self._release_all(lambda _: True)

    def _release_all(self, wanted: Callable[[Remembered], bool]) -> list[Instruction]:
        over = [k for k in self._kept.values() if k.done is not None and not k.users and wanted(k.done)]
        return [instruction for kept in over for instruction in self._release(kept)]

    def adopt(self, found: Mapping[str, Found]) -> list[Instruction]:
        """What servers have, after the coordinator's restart: the newest whole checkpoint is held on.

        Their files are no generation's any more: servers have made them parts of their own.
        """
        best = _newest(found)
        out: list[Instruction] = []
        for server, one in found.items():
            self._servers.setdefault(server, False)
            self._started.add(server)
            for part, path in one.parts:
                if part.checkpoint in self._kept and (best is None or part.checkpoint != best.id):
                    continue  # of a save of this coordinator's own
                if best is None or part.checkpoint != best.id:
                    out.append(Release(server, part.name))
                    continue
                kept = self._kept.get(best.id)
                if kept is None:
                    kept = Kept(best.id, None, {}, done=best)
                    self._kept = {best.id: kept, **self._kept}
                piece = kept.pieces.setdefault(part.name, Piece(part.origin, part.bytes, path, part))
                piece.holders[server] = path
        return [*out, *self._spread_all()]

    def unknown(self, found: Mapping[str, Found]) -> list[Instruction]:
        """What servers have and nobody knows of here: it was made for a coordinator before this one, and is given up.

        Args:
            found: By server, as it is now.
        """
        return [
            Release(server, part.name)
            for server, one in found.items()
            for part, _ in one.parts
            if not self._knows(server, part)
        ]

    def _knows(self, server: str, part: Part) -> bool:
        kept = self._kept.get(part.checkpoint)
        piece = kept.pieces.get(part.name) if kept is not None else None
        return piece is not None and (server in piece.holders or server in piece.asked)

    # Where copies go.

    def _no_room(self, kept: Kept, piece: Piece, server: str) -> str:
        """Why the budget does not allow a part on a server; empty where it does."""
        limit = self.options.memory_bytes if kept.limit is None else kept.limit
        if limit is None or self._load(kept, server) + piece.bytes <= limit:
            return ""
        return (
            f"memory_bytes={limit} does not allow {piece.bytes} bytes more on {server}, which has "
            f"{self._load(kept, server)} of the same checkpoint"
        )

    def _load(self, kept: Kept, server: str) -> int:
        return sum(piece.bytes for piece in kept.pieces.values() if server in piece.holders or server in piece.asked)

    def _spread_all(self) -> list[Instruction]:
        return [instruction for kept in list(self._kept.values()) for instruction in self._spread(kept)]

    def _spread(self, kept: Kept) -> list[Instruction]:
        """Asks for copies that are missing; says so once all are there, or none more will come."""
        out: list[Instruction] = []
        for piece in kept.pieces.values():
            if piece.stored and not piece.holders:  # copies are made of what is there
                out += self._bring(kept, piece)
                continue
            # The origin will have it in a moment: who copies waits for that, and all places are chosen together.
            sources = [*self._staying(piece), *piece.holders, *({piece.origin} & piece.asked)]
            while piece.part is not None and sources and self._short(piece):
                buddy = self._buddy(kept, piece)
                if buddy is None:
                    break
                piece.asked.add(buddy)
                out.append(Copy(buddy, piece.part, sources[0]))
        return [*out, *self._settle(kept)]

    def _bring(self, kept: Kept, piece: Piece) -> list[Instruction]:
        """Has a part brought in from the store, by its origin, or where that is gone or can't, by another."""
        if piece.asked & self._servers.keys():
            return []
        own = self._servers.get(piece.origin) is False and piece.origin not in piece.refused
        server = piece.origin if own else self._buddy(kept, piece)
        if server is None or piece.part is None:
            return []
        piece.asked.add(server)
        return [Bring(server, piece.part)]

    def _short(self, piece: Piece) -> bool:
        """Whether a part has too few copies, those that are being made counted."""
        making = [server for server in piece.asked if not self._servers.get(server, True)]
        return len(self._staying(piece)) + len(making) < self._wanted()

    def _buddy(self, kept: Kept, piece: Piece) -> str | None:
        """Where a copy of a part goes: the least loaded server, then the next in the ring; one that runs, before all.

        None where there is none.
        """
        ring = list(self._servers)
        start = ring.index(piece.origin) if piece.origin in self._servers else 0
        fits = [
            server
            for server in [*ring[start:], *ring[:start]]
            if not self._servers[server]
            and server not in piece.holders
            and server not in piece.asked
            and server not in piece.refused
        ]
        best: str | None = None
        for server in sorted(fits, key=lambda server: (server not in self._started, self._load(kept, server))):
            why = self._no_room(kept, piece, server)
            if not why:
                best = server
                break
            piece.refused[server] = why
        return best

    def _settle(self, kept: Kept) -> list[Instruction]:
        if kept.settled or any(piece.part is None for piece in kept.pieces.values()):
            return self._retire()
        short = [piece for piece in kept.pieces.values() if len(self._staying(piece)) < self._wanted()]
        if any(piece.asked & self._servers.keys() for piece in short):
            return []  # not known yet
        kept.settled = True
        if kept.prefetched:  # no save waits for it
            return self._retire()
        told = CannotLand(kept.id, self._why(short[0])) if short else Landed(kept.id)
        return [told, *self._retire()]

    def _why(self, piece: Piece) -> str:
        reasons = "; ".join(dict.fromkeys(piece.refused.values())) or "there is no other node for a copy"
        return f"what {piece.origin} staged is on {len(self._staying(piece))} of {self._wanted()} nodes: {reasons}"

    def _remember(self, kept: Kept) -> list[Instruction]:
        """A few know what they hold parts of: enough to outlive some, and not a manifest for each of a thousand."""
        if kept.done is None:
            return []
        holders = {server for piece in kept.pieces.values() for server in piece.holders}
        new = sorted(holders - kept.told)[: max(0, _TOLD + self.options.replicas - len(kept.told))]
        kept.told.update(new)
        return [Remember(server, kept.done, tuple(kept.pieces)) for server in new]

    def _retire(self) -> list[Instruction]:
        """Gives up what a newer checkpoint replaces."""
        checkpoints = [kept for kept in self._kept.values() if kept.done is not None]
        # One of the store that did not come takes nobody's place.
        over = [k.settled and not (k.prefetched and not _held(k)) for k in checkpoints]
        newest = max((i for i, takes_place in enumerate(over) if takes_place), default=-1)
        out: list[Instruction] = []
        for i, kept in enumerate(checkpoints):
            nothing = kept.settled and not _held(kept)
            if (i < newest or nothing) and not kept.users:
                out += self._release(kept)
        return out

    def _release(self, kept: Kept) -> list[Instruction]:
        del self._kept[kept.id]
        out: list[Instruction] = [
            Release(server, name)
            for name, piece in kept.pieces.items()
            for server in sorted(piece.holders)
            # Of those that were asked, `held` comes later, and is answered in the same way.
        ]
        return out if kept.generation is None else [*out, GenerationFree(kept.generation)]


def _held(kept: Kept) -> bool:
    """Whether anybody has, or is to have, anything of it."""
    return any(piece.holders or piece.asked for piece in kept.pieces.values())


def _newest(found: Mapping[str, Found]) -> Remembered | None:
    """The newest checkpoint of which some server has each part."""
    there = {part.name for one in found.values() for part, _ in one.parts}
    whole = [done for one in found.values() for done, parts in one.remembered if there.issuperset(parts)]
    return max(whole, key=lambda done: (done.after, done.record is None, done.time), default=None)
