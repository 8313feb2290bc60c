"""The world around a RestoreMachine, as data: checkpoints to try, servers that fetch, ranks that ask."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import numpy as np

from rl_ckpt.errors import CheckpointError, CorruptionError
from rl_ckpt.format.manifest import Manifest
from rl_ckpt.options import Options
from rl_ckpt.plan.match import Problems
from rl_ckpt.plan.parts import ChunkAt, Holdings, Part
from rl_ckpt.plan.spread import ChunkId, Needs
from rl_ckpt.runtime import restore_steps as rm
from rl_ckpt.runtime.messages import (
    AT_PEER,
    IN_PART,
    IN_STORE,
    Apply,
    Candidate,
    Failure,
    FetchDone,
    FetchItem,
    Flaw,
    Matched,
    NotFetched,
    OpenRestore,
    PassItem,
    Sources,
    TryNext,
    Verified,
)
from rl_ckpt.runtime.restore_machine import RestoreMachine
from tests.unit.plan.model import save

Item = FetchItem | PassItem
Reply = Candidate | Sources | TryNext | Apply | Failure
_MANIFEST: Manifest = save([{"a": np.arange(20.0), "b": np.arange(5)}] * 2, ["s0", "s1"]).manifest


def manifest(name: str) -> Manifest:
    """A checkpoint of several chunks."""
    return msgspec.structs.replace(_MANIFEST, id=name)


def all_chunks() -> list[ChunkId]:
    return [(a, c) for a, array in enumerate(_MANIFEST.arrays) for c in range(len(array.chunks))]


def held_by(*servers: str) -> Holdings:
    """All chunks as one part, staged by the first of some servers and copied to the others."""
    rows = []
    for n, (a, c) in enumerate(all_chunks()):
        saved = _MANIFEST.arrays[a].chunks[c]
        rows.append(ChunkAt(bytes.fromhex(saved.digest), 64 * n, saved.bytes))
    part = Part("2-new", servers[0], 64 * len(rows), tuple(rows))
    return Holdings([part], {part.name: {server: f"/held/{server}" for server in servers}})


class Bench:
    """Feeds events to the machine and keeps its instructions until a test answers them."""

    def __init__(
        self,
        *,
        mappable: bool = False,
        candidates: tuple[str, ...] = ("2-new", "1-old"),
        holdings: Holdings | None = None,
        search: bool = True,
        servers: int = 2,
        passing: bool = True,
        coming: bool = False,
    ) -> None:
        self.machine = RestoreMachine(Options())
        self.mappable = mappable
        self.candidates = candidates
        self.holdings = holdings
        self.search_at_once = search
        self.servers = servers
        self.passing = passing
        """Whether servers can have anything from one another."""
        self.coming = coming
        """Whether candidates are being brought into memory."""
        self.awaits: list[rm.Await] = []
        self.elsewhere: dict[bytes, list[tuple[str, int]]] = {}
        """Digest → places in other checkpoints."""
        self.loads: list[rm.Load] = []
        self.fetches: list[rm.Fetch] = []
        self.searches: list[rm.Search] = []
        self.damaged: list[rm.Damaged] = []
        self.forgotten: list[rm.Forget] = []
        self.arms: list[rm.Arm] = []
        self.replies: dict[tuple[str, int], list[Reply]] = {}
        self.memory: dict[tuple[str, str], int] = {}
        """Restore memory that servers hold: order's key and server → bytes brought in."""
        self.in_use: set[str] = set()
        """Tokens for which memory is held."""
        self.broken: set[tuple[str, bytes]] = set()
        """Chunks that a server could not bring: order's key and digest."""

    def do(self, instructions: list[rm.Instruction]) -> None:
        for i in instructions:
            match i:
                case rm.Load():
                    self.loads.append(i)
                case rm.Fetch(token, server, order):
                    assert order.key.partition("+")[0] == token, "the memory's name must tell candidates apart"
                    self.memory.setdefault((order.key, server), 0)
                    self.fetches.append(i)
                case rm.Search():
                    self.searches.append(i)
                    if self.search_at_once:
                        self.search()
                case rm.Await():
                    self.awaits.append(i)
                case rm.Damaged():
                    self.damaged.append(i)
                case rm.Forget(token, servers, keys):
                    self.forgotten.append(i)
                    self.in_use.discard(token)
                    for server in servers:
                        for key in keys:
                            self.memory.pop((key, server), None)
                case rm.Arm():
                    self.arms.append(i)
                case rm.Answer(key, rank, reply):
                    self.replies.setdefault((key, rank), []).append(reply)

    def server(self, rank: int) -> str:
        return f"server-{rank % self.servers}"

    def search(self) -> None:
        ask = self.searches.pop(0)
        found = {(digest, size): self.elsewhere.get(digest, []) for digest, size in ask.wanted}
        self.do(self.machine.searched(ask.token, found))

    def reply(self, rank: int, key: str = "r") -> Reply:
        return self.replies[key, rank][-1]

    def failure(self, rank: int, key: str = "r") -> Failure:
        reply = self.reply(rank, key)
        assert isinstance(reply, Failure), reply
        return reply

    def open(self, rank: int, *, world: int = 2, step: int | None = None, key: str = "r") -> None:
        self.do(self.machine.open(OpenRestore(key, rank, world, step, self.server(rank))))

    def load(self) -> None:
        """Answers the oldest Load as the coordinator does."""
        ask = self.loads.pop(0)
        left = [name for name in self.candidates if name not in ask.tried]
        if not left:
            self.do(self.machine.failed(ask.token, CorruptionError(f"no good checkpoint: tried {ask.tried}")))
            return
        self.in_use.add(ask.token)
        candidate = manifest(left[0])
        self.do(
            self.machine.loaded(ask.token, candidate, b"json", self.mappable, {}, self.holdings, coming=self.coming)
        )

    def token(self, rank: int, key: str) -> str:
        """Of the last candidate that a rank was given."""
        found = [r for r in self.replies.get((key, rank), []) if isinstance(r, Candidate)]
        return found[-1].token if found else "none"

    def match(self, rank: int, problems: Problems | None = None, key: str = "r") -> None:
        needs = Needs.of(all_chunks())
        matched = Matched(key, self.token(rank, key), rank, self.server(rank), problems or Problems(), needs)
        self.do(self.machine.match(matched))

    def fetch(self, ask: rm.Fetch, damaged: str = "", code: str = "corruption") -> None:
        """Answers a Fetch; `damaged`: without the first of what the server was to get itself, for this reason."""
        self.fetches.remove(ask)
        order = ask.order
        flaw, failed = Flaw(code, damaged), list[NotFetched]()
        if damaged:
            own: list[tuple[Item, str]] = [(i, IN_STORE) for items in order.files.values() for i in items]
            own += [(i, IN_PART) for part in order.parts for i in part.items]
            for item, last in own[:1]:
                self.broken.add((order.key, item.digest))
                failed.append(NotFetched(item.offset, last, flaw))
        passed = [i for items in order.peers.values() for i in items]
        lacking = [i for i in passed if not self.passing or (order.key, i.digest) in self.broken]
        failed += [NotFetched(i.offset, AT_PEER, flaw) for i in lacking]
        left_out = {item.offset for item in failed}
        sizes: dict[str, Iterable[Iterable[Item]]] = {
            "store": order.files.values(),
            "peers": order.peers.values(),
            "peers_memory": [p.items for p in order.parts],
        }
        found = {
            name: sum(i.size_bytes for items in some for i in items if i.offset not in left_out)
            for name, some in sizes.items()
        }
        found = {name: size for name, size in found.items() if size}
        if (order.key, ask.server) in self.memory:
            self.memory[order.key, ask.server] += sum(found.values())
        done = FetchDone(found, tuple(failed), f"/shm/{ask.server}/{order.key}")
        self.do(self.machine.fetched(ask.token, ask.server, done))

    def fetch_all(self) -> None:
        while self.fetches:
            self.fetch(self.fetches[0])

    def verify(self, rank: int, damaged: str = "", key: str = "r") -> None:
        bad = {0: Flaw("corruption", damaged)} if damaged else {}
        self.do(self.machine.verify(Verified(key, self.token(rank, key), rank, bad)))

    def applied(self, rank: int, key: str = "r") -> None:
        self.do(self.machine.applied(key, rank, self.token(rank, key)))

    def lost(self, rank: int, error: CheckpointError, key: str = "r", world: int = 2) -> None:
        self.do(self.machine.lost(key, rank, world, Failure.of(error)))

    def time_out(self, state: str) -> None:
        arm = [a for a in self.arms if a.state == state][-1]
        self.do(self.machine.timed_out(arm.token, arm.state, arm.round))

    def to_matching(self, step: int | None = None) -> None:
        for rank in (0, 1):
            self.open(rank, step=step)
        self.load()

    def to_fetching(self, step: int | None = None) -> None:
        self.to_matching(step)
        for rank in (0, 1):
            self.match(rank)

    def to_verifying(self) -> None:
        self.to_fetching()
        self.fetch_all()

    def to_over(self) -> None:
        self.to_verifying()
        for rank in (0, 1):
            self.verify(rank)

    def restore(self) -> None:
        """A whole restore that nothing disturbs."""
        self.to_over()
        for rank in (0, 1):
            assert isinstance(self.reply(rank), Apply)
            self.applied(rank)
