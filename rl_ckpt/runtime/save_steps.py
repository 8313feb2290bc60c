"""Saves as the coordinator sees them: what it remembers of one, and what its brain asks the world to do.

The words of `save_machine`; no behaviour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rl_ckpt.errors import CheckpointError
from rl_ckpt.plan.deal import SavePlan, StageItem, Stored, Written
from rl_ckpt.runtime.messages import Failure, JoinSave, RepeatSave, SaveDone, SaveReply, WriteOrder
from rl_ckpt.runtime.spec import job_of
from rl_ckpt.store.committer import SaveRequest, WrittenSave

JOINING, WAITING, RESERVING, STAGING, LANDING, SETTLING, WRITING, COMMITTING, DONE, FAILED = (
    "joining", "waiting", "reserving", "staging", "landing", "settling", "writing", "committing", "done", "failed",
)  # fmt: skip
DEADLINE = "deadline"
"""No state: what the time of an urgent save is armed under."""


@dataclass(frozen=True, slots=True)
class Open:
    """Open the run for writing; answer with `opened`."""

    token: str


@dataclass(frozen=True, slots=True)
class Name:
    """Ask the committer for the checkpoint's id; answer with `named`."""

    token: str
    request: SaveRequest


@dataclass(frozen=True, slots=True)
class ReserveMemory:
    """Have a server make a generation of its staging memory anew; answer with `reserved`."""

    token: str
    server: str
    generation: int
    bytes: int


@dataclass(frozen=True, slots=True)
class ReserveAnnex:
    """Have a server make memory for what a rank takes over from dead ones; answer with `annexed`."""

    token: str
    lane: str
    server: str
    generation: int
    """Its files go when the generation's file is made anew."""
    bytes: int


@dataclass(frozen=True, slots=True)
class LookUp:
    """Ask the committer what is stored already; answer with `looked_up`."""

    token: str
    checkpoint: str


@dataclass(frozen=True, slots=True)
class Order:
    """Answer a rank that joined."""

    key: str
    rank: int
    reply: SaveReply | Failure


@dataclass(frozen=True, slots=True)
class Write:
    """Have a server write its files; answer with `written`."""

    token: str
    lane: str
    """Whose files they are in the plan; it answers under this name."""
    order: WriteOrder
    server: str
    """Who writes them."""


@dataclass(frozen=True, slots=True)
class Commit:
    """Have the committer commit; answer with `committed`."""

    token: str
    save: Save


@dataclass(frozen=True, slots=True)
class Hold:
    """All is staged: the memory tier holds it from here on. It answers with `landed`, and `freed` in the end."""

    token: str
    save: Save


@dataclass(frozen=True, slots=True)
class Land:
    """Have the committer close an attempt that stays in memory alone; answer with `committed`."""

    token: str
    save: Save


@dataclass(frozen=True, slots=True)
class MakeRoom:
    """Have the memory tier give up what it holds: staging has no memory. `freed` answers, or `failed` with `error`."""

    token: str
    error: CheckpointError


@dataclass(frozen=True, slots=True)
class Finish:
    """Tell whoever waits for the save; where it failed, its attempt is abandoned."""

    token: str
    outcome: SaveDone | Failure
    checkpoint: str


@dataclass(frozen=True, slots=True)
class Arm:
    """Call `timed_out(token, state)` after so many seconds."""

    token: str
    state: str
    seconds: float


Instruction = (
    Open | Name | ReserveMemory | ReserveAnnex | LookUp | Order | Write | Commit | Hold | Land | MakeRoom | Finish | Arm
)


@dataclass(slots=True)
class Annex:
    """What one rank takes over from dead ones (plan/redeal.py)."""

    lane: str
    rank: int
    size_bytes: int
    items: tuple[StageItem, ...]
    path: str = ""
    """File of its memory; empty until that is made."""
    told: bool = False
    """Whether the driver knows that the rank is to stage it."""
    digests: tuple[bytes, ...] | None = None
    """Once it is staged."""


@dataclass(slots=True)
class Save:
    """One save under way."""

    key: str
    token: str
    """Of this save alone (its key comes again where ranks try again after a failure): tells late answers apart."""
    request: SaveRequest
    world_size: int
    prepare: bool = False
    """Whether nothing is to be saved: only plan and memory are made ready."""
    state: str = JOINING
    joined: dict[int, JoinSave] = field(default_factory=dict)
    repeats: dict[int, RepeatSave] = field(default_factory=dict)
    """Ranks that came with a state of the standing plan's shape. Either these or `joined`, in the end."""
    told: set[int] = field(default_factory=set)
    """Ranks that know that the save failed."""
    plan_id: str = ""
    plan: SavePlan | None = None
    """Settled from WRITING on."""
    servers: tuple[str, ...] = ()
    """Shard server of each rank's node."""
    checkpoint: str = ""
    opened: bool = False
    generations: list[int] = field(default_factory=list)
    """That it holds; one, where it is no preparation."""
    memory: dict[str, str] = field(default_factory=dict)
    """File of the generation, by server."""
    to_store: bool = True
    """Whether it is to be written; else it stays in memory, if it lands there."""
    held: bool = False
    """Whether the memory tier has its generation, and gives it back."""
    landed: bool = False
    """Whether memory has all its copies."""
    asked_for_room: bool = False
    """Whether it waits for a generation that the memory tier gives up."""
    roomed: bool = False
    """Whether it has asked for that before."""
    stored: Stored | None = None
    found: Mapping[tuple[str, int], bytes] = field(default_factory=dict)
    """`digests`, once all is staged."""
    staged: dict[int, tuple[bytes, ...]] = field(default_factory=dict)
    objects: dict[int, dict[int, bytes]] = field(default_factory=dict)
    """Digests of what servers staged for ranks: by rank, and by index among its items."""
    whole: set[int] = field(default_factory=set)
    """Ranks whose chunks are all staged, or given to others."""
    dead: set[int] = field(default_factory=set)
    """Ranks whose process died after they joined."""
    annexes: dict[str, Annex] = field(default_factory=dict)
    """By lane."""
    at: dict[str, str] = field(default_factory=dict)
    """Shard server that has a lane's bytes, where the lane is not named after it."""
    written: dict[str, Sequence[Written]] = field(default_factory=dict)
    stall_s: float = 0.0
    failure: Failure | None = None

    @property
    def here(self) -> set[int]:
        """Ranks that take part so far."""
        return self.joined.keys() | self.repeats.keys()

    @property
    def job(self) -> str:
        """Ray job of those who take part; empty where nobody does yet."""
        messages: list[JoinSave | RepeatSave] = [*self.joined.values(), *self.repeats.values()]
        return job_of(messages[0].user) if messages else ""

    def wants_room(self) -> bool:
        """Whether an error now means that a server had no memory to stage into, and nothing was tried against it."""
        return self.state == RESERVING and bool(self.checkpoint) and not self.roomed

    def hear(self, rank: int) -> None:
        """Looks again at what a rank has staged."""
        if rank in self.staged and b"" not in self._digests(rank):
            self.whole.add(rank)

    def complete(self) -> bool:
        """Whether all chunks are staged."""
        return len(self.whole) == self.world_size and all(annex.digests for annex in self.annexes.values())

    def late(self) -> list[int]:
        """Ranks whose chunks are not all staged."""
        annexed = {annex.rank for annex in self.annexes.values() if not annex.digests}
        return sorted((set(range(self.world_size)) - self.whole) | annexed)

    def server(self, lane: str) -> str:
        """The shard server that has a lane's bytes."""
        return self.at.get(lane, lane)

    def _digests(self, rank: int) -> list[bytes]:
        told = self.objects.get(rank, {})
        return [told.get(i, digest) for i, digest in enumerate(self.staged[rank])]

    def digests(self) -> dict[tuple[str, int], bytes]:
        """Of what was staged, by server and offset."""
        assert self.plan is not None
        own = {
            (self.servers[rank], item.offset): digest
            for rank in self.staged
            for item, digest in zip(self.plan.stage[rank], self._digests(rank), strict=True)
        }
        return own | {
            (annex.lane, item.offset): digest
            for annex in self.annexes.values()
            for item, digest in zip(annex.items, annex.digests or (), strict=True)
        }

    def done(self) -> WrittenSave:
        """As the committer takes it, once all is written."""
        assert self.plan is not None
        return WrittenSave(self.checkpoint, self.request, self.plan, self.written, self.found)
