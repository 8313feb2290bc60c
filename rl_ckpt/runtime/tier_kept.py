"""What the memory tier knows: checkpoints in memory, who has which part of them, and which servers there are. Pure.

The state of `tier`, and the questions that others ask about it; nothing changes here.
"""

from __future__ import annotations

import msgspec

from rl_ckpt.options import Options
from rl_ckpt.plan.parts import Holdings, Remembered, part_name
from rl_ckpt.runtime.tier_steps import Kept, Piece


class KeptCheckpoints:
    """See the module. A part of `Tier`."""

    def __init__(self, options: Options) -> None:
        """Holds nothing; knows no server."""
        self.options = options
        self._servers: dict[str, bool] = {}
        """Of the nodes that are alive, in the order of the ring: whether the node is going away."""
        self._started: set[str] = set()
        self._kept: dict[str, Kept] = {}

    # Questions.

    def busy(self) -> bool:
        """Whether anything is in memory: then it matters which nodes are alive."""
        return bool(self._kept)

    def remembered(self) -> list[Remembered]:
        """Checkpoints in memory, the newest first."""
        out = [
            msgspec.structs.replace(
                kept.done, whole=kept.done.whole and all(piece.holders for piece in kept.pieces.values())
            )
            for kept in self._kept.values()
            if kept.done is not None
        ]
        return out[::-1]

    def holdings(self, checkpoint: str) -> Holdings | None:
        """Where its chunks are; None where it is not in memory."""
        kept = self._kept.get(checkpoint)
        if kept is None:
            return None
        pieces = [piece for piece in kept.pieces.values() if piece.part is not None]
        return Holdings(
            [piece.part for piece in pieces if piece.part is not None],
            {name: piece.holders for name, piece in kept.pieces.items()},
        )

    def copies(self, server: str) -> dict[str, tuple[str, str]]:
        """Of what a server has staged: by checkpoint, another server that has all of it, and that one's file."""
        out: dict[str, tuple[str, str]] = {}
        for kept in self._kept.values():
            piece = kept.pieces.get(part_name(kept.id, server))
            other = next((item for item in piece.holders.items() if item[0] != server), None) if piece else None
            if other is not None:
                out[kept.id] = other
        return out

    def holders(self, checkpoint: str) -> dict[str, tuple[str, str]]:
        """By server that has staged a part of a checkpoint: one that has it now, itself if it can be, and the file."""
        kept = self._kept.get(checkpoint)
        out: dict[str, tuple[str, str]] = {}
        for piece in kept.pieces.values() if kept is not None else ():
            for server, path in piece.holders.items():
                if server == piece.origin or piece.origin not in out:
                    out[piece.origin] = server, path
        return out

    def coming(self, checkpoint: str) -> bool:
        """Whether more of it is on its way from the store."""
        kept = self._kept.get(checkpoint)
        return kept is not None and any(self._is_coming(piece) for piece in kept.pieces.values())

    def _is_coming(self, piece: Piece) -> bool:
        return piece.stored and not piece.holders and bool(piece.asked & self._servers.keys())

    def settling(self, checkpoint: str) -> bool:
        """Whether it is in memory, or on its way there, and copies of it are still being made."""
        kept = self._kept.get(checkpoint)
        return kept is not None and not kept.settled

    def refusals(self, checkpoint: str) -> list[str]:
        """Why servers can't have parts of it, each reason once."""
        pieces = self._kept[checkpoint].pieces.values() if checkpoint in self._kept else ()
        return list(dict.fromkeys(why for piece in pieces for why in piece.refused.values()))

    def counts(self) -> dict[str, int]:
        """Parts and bytes that are held, all copies counted; copies beyond the first, and those missing."""
        pieces = [piece for kept in self._kept.values() for piece in kept.pieces.values()]
        return {
            "parts_held": sum(len(piece.holders) for piece in pieces),
            "bytes_held": sum(len(piece.holders) * piece.bytes for piece in pieces),
            "copies_held": sum(max(0, len(piece.holders) - 1) for piece in pieces),
            "copies_missing": sum(max(0, self._wanted() - len(self._staying(piece))) for piece in pieces),
        }

    def _wanted(self) -> int:
        staying = sum(not leaving for leaving in self._servers.values())
        return max(1, min(1 + self.options.replicas, staying))

    def _staying(self, piece: Piece) -> list[str]:
        return [server for server in piece.holders if not self._servers.get(server, True)]
