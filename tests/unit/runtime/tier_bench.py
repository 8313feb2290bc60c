"""The world around a Tier, as data: shard servers with files, which answer when they are told to, or die."""

from __future__ import annotations

from dataclasses import dataclass, field

from rl_ckpt.format.records import CommitRecord
from rl_ckpt.options import Options
from rl_ckpt.plan.parts import ChunkAt, Part, Remembered
from rl_ckpt.runtime import tier_steps as tier
from rl_ckpt.runtime.tier import Tier

Ask = tier.Hold | tier.Copy | tier.Bring


@dataclass
class Server:
    """What one shard server has in its memory."""

    has: dict[str, Part] = field(default_factory=dict)
    memos: dict[str, tuple[Remembered, tuple[str, ...]]] = field(default_factory=dict)


def chunks(checkpoint: str, origin: str) -> tuple[ChunkAt, ...]:
    """Two chunks of one part, which no other part has, and one that all parts of the checkpoint have."""
    return tuple(
        ChunkAt(f"{name}-{checkpoint}".encode(), 64 * i, 50) for i, name in enumerate((f"a{origin}", f"b{origin}", "c"))
    )


def part(checkpoint: str, origin: str, size_bytes: int = 192) -> Part:
    return Part(checkpoint, origin, size_bytes, chunks(checkpoint, origin))


def record(checkpoint: str, number: int) -> CommitRecord:
    return CommitRecord(
        number=number, run="r", write_id="w", epoch=1, id=checkpoint, step=int(checkpoint), manifest_bytes=1,
        manifest_digest="", bytes=1, bytes_written=1, time=float(checkpoint),
    )  # fmt: skip


class Bench:
    """Feeds events to the brain and keeps its instructions until a test answers them."""

    def __init__(self, servers: int = 3, options: Options | None = None) -> None:
        self.brain = Tier(options or Options())
        self.servers = {f"s{i}": Server() for i in range(servers)}
        self.draining: set[str] = set()
        self.asked: list[Ask] = []
        self.landed: list[str] = []
        self.stuck: dict[str, str] = {}
        self.freed: list[int] = []
        self.look()

    def do(self, instructions: list[tier.Instruction]) -> None:
        for one in instructions:
            match one:
                case tier.Hold() | tier.Copy() | tier.Bring():
                    self.asked.append(one)
                case tier.Remember(server, done, parts):
                    self.servers[server].memos[done.id] = (done, parts)
                case tier.Release(server, name):
                    if server in self.servers:
                        self.servers[server].has.pop(name, None)
                case tier.GenerationFree(generation):
                    self.freed.append(generation)
                case tier.Landed(checkpoint):
                    assert checkpoint not in [*self.landed, *self.stuck], "said twice"
                    self.landed.append(checkpoint)
                case tier.CannotLand(checkpoint, why):
                    assert checkpoint not in [*self.landed, *self.stuck], "said twice"
                    self.stuck[checkpoint] = why

    def look(self) -> None:
        """The brain hears which nodes are there."""
        self.do(self.brain.servers_are({name: name in self.draining for name in self.servers}))

    def stage(self, checkpoint: str, generation: int, origins: dict[str, int] | None = None, place: int = 0) -> None:
        """A save is staged; on all servers, 192 bytes each, unless it is said where."""
        sizes = origins or dict.fromkeys(self.servers, 192)
        staged = {name: (size, f"/shm/{name}/g") for name, size in sizes.items()}
        self.brain.begin(checkpoint, generation, staged, place)
        self.do(self.brain.tabled(checkpoint, [part(checkpoint, name, size) for name, size in sizes.items()]))

    def prefetch(self, checkpoint: str, origins: dict[str, int] | None = None, limit: int | None = None) -> None:
        """A checkpoint of the store is wanted in memory; of all servers, 192 bytes each, unless it is said of whom."""
        sizes = origins or dict.fromkeys(self.servers, 192)
        number = int(checkpoint)
        done = Remembered(checkpoint, number, b"{}", record(checkpoint, number), number, True, float(number))
        self.do(self.brain.prefetch(done, [part(checkpoint, name, size) for name, size in sizes.items()], limit))

    def answer(self, ask: Ask, why: str = "") -> None:
        """A server does what it is asked to, if it is alive and a holder has it; or says why it does not."""
        self.asked.remove(ask)
        server = self.servers.get(ask.server)
        copied = isinstance(ask, tier.Copy)
        there = not copied or ask.part.name in getattr(self.servers.get(ask.holder), "has", {})
        if server is None or why or not there:
            why = why or "gone"
            self.do(self.brain.not_held(ask.part.checkpoint, ask.part.name, ask.server, why))
            return
        server.has[ask.part.name] = ask.part
        path = f"/shm/{ask.server}/{'g' if isinstance(ask, tier.Hold) else ask.part.name}"
        if isinstance(ask, tier.Bring):
            self.do(self.brain.brought(ask.server, ask.part, path))
            return
        self.do(self.brain.held(ask.part.checkpoint, ask.part.name, ask.server, path))

    def answer_all(self) -> None:
        while self.asked:
            self.answer(self.asked[0])

    def commit(self, checkpoint: str, number: int | None = None, in_store: bool = True) -> None:
        after = int(checkpoint) if number is None else number
        found = record(checkpoint, after) if in_store else None
        self.do(self.brain.committed(Remembered(checkpoint, int(checkpoint), b"{}", found, after, True, after + 0.0)))

    def save(self, checkpoint: str, generation: int, origins: dict[str, int] | None = None) -> None:
        """A save that nothing disturbs."""
        self.stage(checkpoint, generation, origins)
        self.answer_all()
        self.commit(checkpoint)

    def kill(self, name: str) -> None:
        """A node dies, and the brain hears of it."""
        del self.servers[name]
        self.look()

    def holders(self, checkpoint: str, origin: str) -> list[str]:
        """Servers whose memory has a part."""
        name = part(checkpoint, origin).name
        return sorted(server for server, found in self.servers.items() if name in found.has)
