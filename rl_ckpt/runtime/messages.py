"""Messages of the control plane, as msgpack bytes: what workers, shard servers and the coordinator tell one another.

Metadata only: no field holds array values. Bytes rather than objects, so that they are checked on arrival, cost little
to decode at 100,000 chunks, and can be counted exactly (a test proves by it that no shard byte passes the coordinator).
"""

from __future__ import annotations

from typing import Any

import msgspec

from rl_ckpt.errors import CheckpointError, from_code
from rl_ckpt.format.records import CommitRecord
from rl_ckpt.plan.deal import FilePlan, StageItem, Written
from rl_ckpt.plan.inventory import Inventory
from rl_ckpt.plan.match import Problems
from rl_ckpt.plan.parts import Part, Remembered
from rl_ckpt.plan.shared import Shared
from rl_ckpt.plan.spread import Needs
from rl_ckpt.state.leaves import Json


class Failure(msgspec.Struct, frozen=True, tag="failure"):
    """An error that travels as a value."""

    code: str
    message: str
    failures: dict[int, str] = {}
    """By rank, where it is about ranks."""
    lost: tuple[int, ...] = ()
    """Ranks among them that were lost, not failed by code of their own."""

    @staticmethod
    def of(error: CheckpointError) -> Failure:
        """An error of ours as a value."""
        return Failure(error.code, error.message, getattr(error, "failures", {}), getattr(error, "lost", ()))

    def error(self) -> CheckpointError:
        """The error again, not raised."""
        return from_code(self.code, self.message, self.failures, self.lost)


class JoinSave(msgspec.Struct, frozen=True):
    """A rank takes part in a save."""

    key: str
    rank: int
    world_size: int
    step: int
    metrics: dict[str, Json]
    tag: str | None
    parent: str | None
    server: str
    chunk_bytes: int
    """As this rank cuts its arrays."""
    inventory: Inventory
    promised: str = ""
    """File of staging memory that was promised to this rank, in which it does not write any more."""
    prepare: bool = False
    """Only makes everything ready for saves of this shape."""
    user: str = ""
    """As in `RunSpec`."""
    deadline_s: float | None = None
    """Of an urgent save."""
    since: tuple[str, ...] = ()
    """As in `SaveRequest`."""


class SaveOrders(msgspec.Struct, frozen=True, tag="orders"):
    """What a rank has to stage."""

    checkpoint: str
    memory: str
    """File of the generation of staging memory, on the rank's node; empty where nothing is to be staged."""
    items: tuple[StageItem, ...]
    plan: str = ""
    """Id of the standing plan, for the next save of this shape; empty where there is none."""
    next_memory: str = ""
    """File of staging memory in which the rank may stage its next save of this shape before it is told to."""


class RepeatSave(msgspec.Struct, frozen=True):
    """A rank takes part in a save, with a state of the same shape as in the last one."""

    key: str
    rank: int
    world_size: int
    step: int
    metrics: dict[str, Json]
    tag: str | None
    parent: str | None
    plan: str
    """Id of the standing plan."""
    plains: bytes
    """The rank's plain leaves (plan/standing.py)."""
    identities: bytes
    """The identities of the rank's inventory, joined."""
    user: str = ""
    """As in `RunSpec`."""
    deadline_s: float | None = None
    """Of an urgent save."""
    since: tuple[str, ...] = ()
    """As in `SaveRequest`."""


class RepeatOrders(msgspec.Struct, frozen=True, tag="repeat"):
    """The standing plan holds: the rank stages as before, into `memory`, unless it has done so already."""

    checkpoint: str
    memory: str
    next_memory: str
    """As in `SaveOrders`."""


class JoinAgain(msgspec.Struct, frozen=True, tag="join_again"):
    """The standing plan does not hold: join with an inventory."""


SaveReply = SaveOrders | RepeatOrders | JoinAgain


class Staged(msgspec.Struct, frozen=True):
    """A rank has staged its chunks; `digests` in the order of its orders.

    A digest is empty where the rank's shard server stages the chunk, out of an immutable object, and tells it later.
    """

    key: str
    rank: int
    checkpoint: str
    digests: tuple[bytes, ...]
    stall_s: float
    annex: str = ""
    """File of what the rank has taken over from a dead one; empty where it is of the rank's own orders."""


class Restage(msgspec.Struct, frozen=True):
    """A rank stages what a dead one was to stage, in a save for which it has staged its own part."""

    rank: int
    checkpoint: str
    annex: str
    """File of staging memory, on the rank's node."""
    items: tuple[StageItem, ...]
    witness: tuple[int, ...]
    """Indexes among the items that the rank has staged: if their values are other ones by now, its state moved on."""


class Restages(msgspec.Struct, frozen=True, tag="restages"):
    """How a save stands in which workers have died, for its driver."""

    checkpoint: str
    waits: bool
    """Whether anything of the dead ranks has to be staged yet."""
    orders: tuple[Restage, ...] = ()
    """What the driver has to ask ranks for; each is told once."""


class StageObjects(msgspec.Struct, frozen=True):
    """A shard server stages chunks of immutable objects for a rank."""

    key: str
    rank: int
    world_size: int
    checkpoint: str
    memory: str
    items: tuple[tuple[int, int, StageItem], ...]
    """Index among the objects that come with it, index among the rank's items, and the item, its path within the
    object."""


class StagedObjects(msgspec.Struct, frozen=True):
    """A shard server has staged what a rank left to it: digests by index among the rank's items."""

    key: str
    rank: int
    checkpoint: str
    digests: dict[int, bytes]


class Lost(msgspec.Struct, frozen=True):
    """A rank can't go on with a save or restore."""

    key: str
    rank: int
    world_size: int
    failure: Failure
    checkpoint: str = ""
    """Of the save, where it has a name already: a later one may have the same key."""
    dead: bool = False
    """Whether its process is gone, and not only its state can't be saved: others may have what it was to stage."""
    unheard: bool = False
    """Whether the coordinator was lost on the way: the one that is told now need not know of the save."""


class WriteOrder(msgspec.Struct, frozen=True):
    """A shard server writes one generation of its staging memory."""

    memory: str
    """File of the generation of staging memory."""
    files: tuple[FilePlan, ...]


class WriteDone(msgspec.Struct, frozen=True, tag="written"):
    """A shard server has written its files, in the order of the plan."""

    written: tuple[Written, ...]


class SaveDone(msgspec.Struct, frozen=True, tag="saved"):
    """A save is committed."""

    record: CommitRecord
    url: str
    """Of the manifest."""
    lineage: tuple[str, ...]
    stall_s: float
    notice: str
    """What the user should know though the save succeeded (a sweep that failed); mostly empty."""
    in_store: bool = True
    """Whether it is more than in memory."""


class OpenRestore(msgspec.Struct, frozen=True):
    """A rank takes part in a restore."""

    key: str
    rank: int
    world_size: int
    step: int | None
    server: str
    """Of the rank's node."""


class Candidate(msgspec.Struct, frozen=True, tag="candidate"):
    """The checkpoint to be tried."""

    token: str
    """Of this candidate of this restore: what a rank says of it later is told from what it says of the next one."""
    manifest: bytes
    """The manifest's JSON, verified."""
    fell_back: dict[str, str]
    neighbour: int
    """Which of the ranks on its node the rank is, from 0."""
    neighbours: int
    """How many there are."""
    early: bool = False
    """All chunks are in files of the store that the rank can read: it may begin to verify before it is told where."""
    notice: str = ""
    """As in `RestoreReport`."""


class Matched(msgspec.Struct, frozen=True):
    """What a rank needs of the candidate, or what doesn't fit."""

    key: str
    token: str
    rank: int
    server: str
    problems: Problems
    needs: Needs


FETCHED, HELD, STORED = "fetched", "held", "stored"


class Source(msgspec.Struct, frozen=True, array_like=True):
    """A file that a rank reads chunks in."""

    kind: str
    """FETCHED: a restore's memory on the node, verified by its server; HELD: memory that the node holds of a
    checkpoint; STORED: a file of the store."""
    path: str
    """Of the file in shared memory; the name in the store of one that is stored."""


class Sources(msgspec.Struct, frozen=True, tag="sources"):
    """Where a rank finds its chunks, in the order in which it asked for them."""

    files: tuple[Source, ...] = ()
    """None: each chunk is in the store's file that the manifest names."""
    at: tuple[int, ...] = ()
    """Of each chunk, index in `files`; -1: the manifest's own place. Empty: all are in the first."""
    offsets: tuple[int, ...] = ()
    """Of each chunk, in its file."""
    others: tuple[int, ...] = ()
    """Indices of chunks that another rank of the node verifies."""
    needs: tuple[int, ...] | None = None
    """Indices of the chunks that this is about, where others stay as they are; `at` and `offsets` are of these alone,
    and only these are to be verified."""


class TryNext(msgspec.Struct, frozen=True, tag="next"):
    """The candidate is damaged; ask for the next one."""


class Flaw(msgspec.Struct, frozen=True, array_like=True):
    """Why a chunk can't be used where it was."""

    code: str
    """Of the error."""
    why: str


class Verified(msgspec.Struct, frozen=True):
    """A rank has looked at its chunks; `bad` are those that are not good, by index among what it asked for."""

    key: str
    token: str
    rank: int
    bad: dict[int, Flaw] = {}


class Apply(msgspec.Struct, frozen=True, tag="apply"):
    """Every rank has verified: values may be set."""

    bytes_from: dict[str, int]
    repaired: dict[str, str] = {}


class FetchItem(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One chunk in a file of the store: where it lies there, where it goes in the restore memory, and its digest."""

    source_offset: int
    offset: int
    size_bytes: int
    digest: bytes


class PassItem(msgspec.Struct, frozen=True, array_like=True):
    """A chunk that a peer passes on: where it lies in the peer's memory and, as a last source, in the store."""

    source_offset: int
    offset: int
    size_bytes: int
    digest: bytes
    file: int = -1
    """Index in the order's `names`; -1: it is not looked for in the store."""
    file_offset: int = 0


class PartItems(msgspec.Struct, frozen=True, array_like=True):
    """Chunks in a part that a peer holds."""

    server: str
    part: str
    items: tuple[PassItem, ...]


class FetchOrder(msgspec.Struct, frozen=True):
    """A shard server brings chunks into a restore's memory: out of the store, peers' restore memory, and parts."""

    key: str
    memory_bytes: int
    files: dict[str, tuple[FetchItem, ...]] = {}
    peers: dict[str, tuple[PassItem, ...]] = {}
    names: tuple[str, ...] = ()
    """Files where chunks that peers pass on lie in the store."""
    parts: tuple[PartItems, ...] = ()


IN_STORE, IN_PART, AT_PEER = "store", "part", "peer"


class NotFetched(msgspec.Struct, frozen=True, array_like=True):
    """A chunk that could not be brought."""

    offset: int
    """Where it was to go: tells the chunks of an order apart."""
    last: str
    """Where it was looked for last: IN_STORE, IN_PART (of a peer's memory), or AT_PEER (which did not get it)."""
    flaw: Flaw


class FetchDone(msgspec.Struct, frozen=True, tag="fetched"):
    """What a shard server brought in, and what not."""

    bytes_from: dict[str, int]
    """By source; as in `RestoreReport`."""
    failed: tuple[NotFetched, ...] = ()
    memory: str = ""
    """File of the restore's memory, where workers of the node map it."""


class Reserve(msgspec.Struct, frozen=True):
    """A shard server makes memory for one generation; older files of it go."""

    generation: int
    name: str
    """Of the file, unique: a straggler of a failed save must not find the next one's under its name."""
    bytes: int
    beside: bool = False
    """Whether the generation's older files stay."""


class Reserved(msgspec.Struct, frozen=True, tag="reserved"):
    """A generation is there; `path` is where workers of the node map it."""

    path: str


class HoldOrder(msgspec.Struct, frozen=True):
    """A shard server keeps what was staged in a generation of its memory."""

    part: Part
    path: str


class CopyOrder(msgspec.Struct, frozen=True):
    """A shard server copies another one's part into its memory, and keeps it."""

    part: Part
    holder: str


class HoldDone(msgspec.Struct, frozen=True, tag="held"):
    """A part is held."""

    path: str
    """File in which it lies."""


class RememberOrder(msgspec.Struct, frozen=True):
    """A shard server writes down of what checkpoint it holds parts."""

    done: Remembered
    parts: tuple[str, ...]
    """Names of all its parts, wherever they are."""


class FoundParts(msgspec.Struct, frozen=True, tag="found"):
    """What a shard server holds."""

    parts: tuple[HoldOrder, ...]
    remembered: tuple[RememberOrder, ...]


class Ok(msgspec.Struct, frozen=True, tag="ok"):
    """Done."""

    notice: str = ""
    """What the user should know; mostly nothing."""


SaveOutcome = SaveDone | Failure
OpenReply = Candidate | Failure
MatchReply = Sources | TryNext | Failure
VerifyReply = Apply | Sources | TryNext | Failure


def encode(message: msgspec.Struct) -> bytes:
    """A message as bytes."""
    return msgspec.msgpack.encode(message, enc_hook=_packed)


def decode(data: bytes, kind: Any) -> Any:
    """A message from bytes.

    Args:
        data: From `encode`.
        kind: Its type, or a union of types.

    Raises:
        msgspec.ValidationError: Not such a message: the two sides run different releases.
    """
    return msgspec.msgpack.decode(data, type=kind, dec_hook=_unpacked)


def _packed(value: Any) -> bytes:
    if isinstance(value, Shared):
        return value.encode()
    raise NotImplementedError(f"no message holds a {type(value).__name__}")


def _unpacked(kind: type, value: Any) -> Any:
    """What many ranks say alike travels as bytes of its own, and is decoded once for all of them."""
    if issubclass(kind, Shared) and isinstance(value, bytes):
        return kind.decode(value)
    raise NotImplementedError(f"no message holds a {kind.__name__}")
