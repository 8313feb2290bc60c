"""Steps of a restore: the instructions of the coordinator's brain for restores, and what it knows of one.

Data only; runtime/restore_machine.py decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rl_ckpt.format.manifest import Manifest
from rl_ckpt.plan.parts import Held
from rl_ckpt.plan.sources import InStore, Known, NodePlan
from rl_ckpt.plan.spread import ChunkId, canonical_chunks
from rl_ckpt.runtime.messages import Failure, FetchOrder, Flaw, Matched, MatchReply, OpenReply, VerifyReply

OPENING, MATCHING, AWAITING, FETCHING, SEARCHING, VERIFYING, OVER, FAILED = (
    "opening", "matching", "awaiting", "fetching", "searching", "verifying", "over", "failed",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Load:
    """Read the next candidate: answer with `loaded`, or `failed`. `tried` are the ids that were damaged."""

    token: str
    step: int | None
    tried: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer a rank's last message."""

    key: str
    rank: int
    reply: OpenReply | MatchReply | VerifyReply


@dataclass(frozen=True, slots=True)
class Fetch:
    """Have a server bring chunks in; answer with `fetched`, or `unreachable`."""

    token: str
    server: str
    order: FetchOrder


@dataclass(frozen=True, slots=True)
class Search:
    """Look for chunks (digest and size) in other checkpoints; answer with `searched`."""

    token: str
    wanted: tuple[tuple[bytes, int], ...]
    skip: tuple[tuple[str, int], ...]
    """File and offset of places that are bad."""


@dataclass(frozen=True, slots=True)
class Await:
    """The checkpoint is being brought into memory: answer with `brought` once that is over."""

    token: str
    checkpoint: str


@dataclass(frozen=True, slots=True)
class Damaged:
    """A copy of a chunk in a holder's memory is not what was committed."""

    server: str
    part: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class Forget:
    """A candidate is done with: have the servers give up its memory, and let go what memory was held for it."""

    token: str
    servers: tuple[str, ...]
    keys: tuple[str, ...]
    """Of the orders whose memory it is."""


@dataclass(frozen=True, slots=True)
class Arm:
    """Call `timed_out(token, state, round)` after so many seconds."""

    token: str
    state: str
    seconds: float
    round: int = 0
    """How many rounds of sources there were: states come again with each."""


Instruction = Load | Answer | Fetch | Search | Await | Damaged | Forget | Arm


@dataclass(slots=True)
class Round:
    """What servers bring in at a time: at first all, then what could not be used where it was."""

    key: str
    """Of its orders."""
    nodes: dict[str, NodePlan]
    laid: dict[str, dict[ChunkId, int]] = field(default_factory=dict)
    """Where each chunk goes in each server's restore memory."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Of each server's restore memory, in bytes."""
    memory: dict[str, str] = field(default_factory=dict)
    """File of each server's restore memory."""
    stored: dict[ChunkId, InStore] = field(default_factory=dict)
    """Where chunks of which a place was bad are taken from in the store; all others where the manifest says."""
    not_passed: dict[str, set[ChunkId]] = field(default_factory=dict)
    """By server: chunks that it could not have from a peer."""


At = InStore | Held | Round
"""Where a chunk is on a node: in the store's file or held memory, read there by ranks, or brought in in a round."""


@dataclass(slots=True)
class Restore:
    """One restore under way: one candidate of it."""

    key: str
    token: str
    """Of this candidate of this restore alone (its key comes again): tells late answers, and its memory, apart."""
    step: int | None
    world_size: int
    state: str = OPENING
    joined: set[int] = field(default_factory=set)
    servers: dict[int, str] = field(default_factory=dict)
    """Of each rank that joined: who is whose neighbour."""
    manifest: Manifest | None = None
    known: Known | None = None
    mappable: bool = False
    coming: bool = False
    """Whether the candidate is being brought into memory."""
    notice: str = ""
    fell_back: dict[str, str] = field(default_factory=dict)
    matched: dict[int, Matched] = field(default_factory=dict)
    told_sources: bool = False
    """Whether the ranks know where their chunks are; what changes since, they are told when they have verified."""
    verified: dict[int, dict[int, Flaw]] = field(default_factory=dict)
    needed: tuple[int, int] | None = None
    """Bytes and number of the chunks that ranks need, once they were counted."""
    _twins: dict[ChunkId, ChunkId] | None = None
    rounds: list[Round] = field(default_factory=list)
    moved: dict[str, dict[ChunkId, At]] = field(default_factory=dict)
    """By server: chunks that are elsewhere than in the store's files (where ranks read those) or in the first round."""
    changed: dict[str, set[ChunkId]] = field(default_factory=dict)
    """By server: chunks that its ranks are to be told of anew."""
    missing: dict[str, set[ChunkId]] = field(default_factory=dict)
    """By server: chunks that a source is sought for."""
    searched: set[ChunkId] = field(default_factory=set)
    """Chunks that were looked for in other checkpoints."""
    damaged: dict[ChunkId, str] = field(default_factory=dict)
    """Chunks that were damaged or missing at a place, and what was said of it first."""
    damaged_copies: list[Damaged] = field(default_factory=list)
    unread: dict[ChunkId, str] = field(default_factory=dict)
    """Chunks that the store did not give, and what it said: nothing is known of their bytes."""
    now_from: dict[ChunkId, str] = field(default_factory=dict)
    """Where those chunks were taken from instead, for the report."""
    awaited: set[str] = field(default_factory=set)
    tries: dict[str, int] = field(default_factory=dict)
    """By server: how often it could not be reached."""
    bytes_from: dict[str, int] = field(default_factory=dict)
    told: set[int] = field(default_factory=set)
    failure: Failure | None = None

    @property
    def twins(self) -> dict[ChunkId, ChunkId]:
        """By chunk: the first with the same bytes. Found when it is asked for: small files are read without."""
        if self._twins is None:
            assert self.manifest is not None
            self._twins = canonical_chunks(self.manifest)
        return self._twins

    def at(self, server: str, chunk: ChunkId) -> At:
        """Where a chunk (the first of its twins) is on a server's node."""
        place = self.moved.get(server, {}).get(chunk)
        if place is not None:
            return place
        if self.rounds and chunk in self.rounds[0].laid.get(server, ()):
            return self.rounds[0]
        assert self.known is not None
        return self.known.named(chunk)

    def needs(self) -> dict[str, set[ChunkId]]:
        """By server: the chunks (the first of twins) that its ranks need."""
        out: dict[str, set[ChunkId]] = {}
        seen: set[tuple[str, int]] = set()
        twins = self.twins
        for m in self.matched.values():
            mine = out.setdefault(m.server, set())
            for part in m.needs.parts:
                if (m.server, id(part)) not in seen:
                    seen.add((m.server, id(part)))
                    mine.update([twins[chunk] for chunk in part.chunks])
        return out

    def neighbours(self) -> dict[str, list[int]]:
        """Ranks by server."""
        out: dict[str, list[int]] = {}
        for rank in sorted(self.servers):
            out.setdefault(self.servers[rank], []).append(rank)
        return out
