"""The world around a SaveMachine, as data: what it was told to do and not answered yet, and a committer with rules."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from rl_ckpt.errors import CheckpointError, InvalidInputError
from rl_ckpt.format.records import CommitRecord
from rl_ckpt.options import Options
from rl_ckpt.plan.deal import Written
from rl_ckpt.plan.inventory import take_inventory
from rl_ckpt.plan.standing import encode_plains
from rl_ckpt.runtime import save_steps as sm
from rl_ckpt.runtime.generations import StagingFile
from rl_ckpt.runtime.messages import (
    Failure,
    JoinSave,
    Lost,
    RepeatOrders,
    RepeatSave,
    SaveDone,
    SaveOrders,
    SaveReply,
    Staged,
    decode,
    encode,
)
from rl_ckpt.runtime.save_machine import SaveMachine
from rl_ckpt.state.tree import Plain, flatten

State = dict[str, object]
CHUNK_BYTES = 1 << 20


def shared_and_own(rank: int, step: int = 0) -> State:
    """A state of 4 KB that all ranks share and 80 bytes of each rank's own."""
    return {"w": np.full(512, step, "f8"), "own": np.full(10, 100.0 * step + rank)}


def join(rank: int, step: int, world: int = 2, key: str | None = None, state: State | None = None) -> JoinSave:
    flat = flatten(shared_and_own(rank, step) if state is None else state)
    inventory = take_inventory(flat, CHUNK_BYTES, world)
    server = f"server-{rank % 2}"
    message = JoinSave(key or f"save-{step}", rank, world, step, {}, None, None, server, CHUNK_BYTES, inventory)
    return decode(encode(message), JoinSave)  # as it arrives: what ranks say alike is one object


def repeat(rank: int, step: int, plan: str, world: int = 2, state: State | None = None) -> RepeatSave:
    """As a rank that remembers `plan` comes with a state of the same shape."""
    flat = flatten(shared_and_own(rank, step) if state is None else state)
    parts = take_inventory(flat, CHUNK_BYTES, world).parts
    plains = encode_plains({path: node for path, node in flat.nodes.items() if isinstance(node, Plain)})
    joined = b"".join(identity for part in parts for identity in part.identities.values())
    return RepeatSave(f"save-{step}", rank, world, step, {}, None, None, plan, plains, joined)


@dataclass
class Bench:
    """Feeds events to the machine and keeps its instructions until a test answers them."""

    options: Options = field(default_factory=lambda: Options(memory_tier=False))

    def __post_init__(self) -> None:
        self.machine = SaveMachine(self.options)
        self.names: list[sm.Name] = []
        self.reserves: list[sm.ReserveMemory] = []
        self.opens: list[sm.Open] = []
        self.look_ups: list[sm.LookUp] = []
        self.writes: list[sm.Write] = []
        self.commits: list[sm.Commit] = []
        self.arms: list[sm.Arm] = []
        self.holds: list[tuple[str, int]] = []
        """Checkpoints that the memory tier holds or has begun to, in their order, each with its generation."""
        self.lands: list[sm.Land] = []
        self.landed: list[int] = []
        self.rooms: list[sm.MakeRoom] = []
        self.replies: dict[tuple[str, int], list[SaveReply | Failure]] = {}
        self.finished: dict[str, SaveDone | Failure] = {}
        self.committed: list[int] = []
        self.items: dict[int, int] = {}
        self.open: dict[str, int] = {}
        self.named_tokens: list[str] = []
        self.commit_tokens: list[str] = []

    def do(self, instructions: list[sm.Instruction]) -> None:
        for i in instructions:
            match i:
                case sm.Name():
                    self.names.append(i)
                    self.named_tokens.append(i.token)
                case sm.Open():
                    self.opens.append(i)
                case sm.LookUp():
                    self.look_ups.append(i)
                case sm.ReserveMemory():
                    self.reserves.append(i)
                case sm.Write():
                    self.writes.append(i)
                case sm.Commit():
                    assert not self.commits, "a commit was begun while another was under way"
                    assert i.token not in self.commit_tokens, "a save was committed twice"
                    self.commit_tokens.append(i.token)
                    self.commits.append(i)
                case sm.Arm():
                    self.arms.append(i)
                case sm.Order(key, rank, reply):
                    self.replies.setdefault((key, rank), []).append(reply)
                case sm.Hold(_, save):
                    self.holds.append((save.checkpoint, save.generations[0]))
                case sm.Land():
                    self.lands.append(i)
                case sm.MakeRoom():
                    self.rooms.append(i)
                case sm.Finish(_, outcome, checkpoint):
                    if isinstance(outcome, Failure):
                        self.holds = [hold for hold in self.holds if hold[0] != checkpoint]
                    if checkpoint:
                        assert checkpoint not in self.finished, "a save was decided twice"
                        self.finished[checkpoint] = outcome
                        self.open.pop(checkpoint, None)

    def join(self, rank: int, step: int, **how: object) -> None:
        self.do(self.machine.join(join(rank, step, **how)))  # type: ignore[arg-type]

    def join_all(self, step: int, world: int = 2, **how: object) -> None:
        for rank in range(world):
            self.join(rank, step, world=world, **how)

    def repeat_all(self, step: int, plan: str, world: int = 2) -> None:
        for rank in range(world):
            self.do(self.machine.repeat(repeat(rank, step, plan, world)))

    def plan(self, step: int) -> str:
        """The standing plan that the ranks of a save were told."""
        return self.orders(step, 0).plan

    def reply(self, step: int, rank: int) -> SaveReply | Failure:
        """The last answer to a rank."""
        return self.replies[f"save-{step}", rank][-1]

    def orders(self, step: int, rank: int) -> SaveOrders:
        reply = self.reply(step, rank)
        assert isinstance(reply, SaveOrders)
        return reply

    def failure(self, step: int, rank: int) -> Failure:
        reply = self.reply(step, rank)
        assert isinstance(reply, Failure)
        return reply

    def name(self) -> None:
        """Answers the oldest Name as the committer does."""
        token, request = (ask := self.names.pop(0)).token, ask.request
        if request.step in self.committed or request.step in self.open.values():
            self.do(self.machine.failed(token, InvalidInputError(f"step {request.step} is taken")))
            return
        checkpoint = f"{request.step}-{token.rpartition('#')[2]}"
        self.open[checkpoint] = request.step
        self.do(self.machine.named(token, checkpoint))

    def reserve(self) -> None:
        while self.reserves:
            ask = self.reserves.pop(0)
            file = StagingFile(ask.bytes, f"/shm/{ask.server}/{ask.generation}/{ask.token}")
            self.do(self.machine.reserved(ask.token, ask.server, ask.generation, file))

    def look_up(self) -> None:
        """Answers all questions for what is stored: nothing is."""
        while self.look_ups:
            self.do(self.machine.looked_up(self.look_ups.pop(0).token, {}))

    def stage(self, step: int, rank: int) -> None:
        orders = self.reply(step, rank)
        assert isinstance(orders, SaveOrders | RepeatOrders)
        if isinstance(orders, SaveOrders):
            self.items[rank] = len(orders.items)
        digests = tuple(bytes([i % 251, rank]) * 8 for i in range(self.items[rank]))
        self.do(self.machine.staged(Staged(f"save-{step}", rank, orders.checkpoint, digests, 0.1 * (rank + 1))))

    def write(self, write: sm.Write) -> None:
        self.writes.remove(write)
        done = [Written(1000, tuple(range(len(file.columns)))) for file in write.order.files]
        self.do(self.machine.written(write.token, write.server, done))

    def write_all(self, token: str | None = None) -> None:
        for write in [w for w in self.writes if token in (None, w.token)]:
            self.write(write)

    def commit(self) -> None:
        ask = self.commits.pop()
        save = ask.save
        assert save.plan is not None
        save.digests()
        self.committed.append(save.request.step)
        record = CommitRecord(
            number=1, run="r", write_id="w", epoch=1, id=save.checkpoint, step=save.request.step, manifest_bytes=1,
            manifest_digest="", bytes=1, bytes_written=1, time=1.0, world_size=save.world_size,
        )  # fmt: skip
        done = SaveDone(record, "u", (), save.stall_s, "")
        self.do(self.machine.committed(ask.token, done))
        self.replace_held(save.checkpoint)

    def land(self) -> None:
        """Answers the oldest Land as the committer does."""
        ask = self.lands.pop(0)
        self.landed.append(ask.save.request.step)
        record = CommitRecord(
            number=1, run="r", write_id="", epoch=1, id=ask.save.checkpoint, step=ask.save.request.step,
            manifest_bytes=1, manifest_digest="", bytes=1, bytes_written=0, time=1.0,
        )  # fmt: skip
        done = SaveDone(record, "", (), ask.save.stall_s, "", in_store=False)
        self.do(self.machine.committed(ask.token, done))
        self.replace_held(ask.save.checkpoint)

    def copied(self, step: int, well: bool = True) -> None:
        """The tier has all copies of a save, or will not have them."""
        checkpoint = next(name for name, _ in self.holds if name.startswith(f"{step}-"))
        self.do(self.machine.landed(checkpoint, well))

    def make_room(self, helps: bool) -> None:
        """The tier gives up what is committed, if there is any and it is not in use."""
        ask = self.rooms.pop(0)
        over = [hold for hold in self.holds if isinstance(self.finished.get(hold[0]), SaveDone)] if helps else []
        self.holds = [hold for hold in self.holds if hold not in over]
        for _, generation in over:
            self.do(self.machine.freed(generation))
        if not over:
            self.do(self.machine.failed(ask.token, ask.error))

    def replace_held(self, checkpoint: str) -> None:
        """The tier holds a new checkpoint, and gives back the generations of those before it."""
        known = [name for name, _ in self.holds]
        if checkpoint in known and isinstance(self.finished.get(checkpoint), SaveDone):
            over, self.holds = self.holds[: known.index(checkpoint)], self.holds[known.index(checkpoint) :]
            for _, generation in over:
                self.do(self.machine.freed(generation))

    def fail(
        self, asked: sm.Name | sm.ReserveMemory | sm.LookUp | sm.Write | sm.Commit, error: CheckpointError
    ) -> None:
        for queue in (self.names, self.reserves, self.look_ups, self.writes, self.commits):
            if asked in queue:
                queue.remove(asked)  # type: ignore[arg-type]
        self.do(self.machine.failed(asked.token, error))

    def lost(self, rank: int, step: int, error: CheckpointError, world: int = 2) -> None:
        self.do(self.machine.lost(Lost(f"save-{step}", rank, world, Failure.of(error))))

    def time_out(self, state: str) -> None:
        """Fires the newest timer of a state."""
        arm = [a for a in self.arms if a.state == state][-1]
        self.do(self.machine.timed_out(arm.token, arm.state))

    def to_staging(self, step: int, world: int = 2) -> None:
        self.join_all(step, world)
        self.name()
        self.reserve()
        self.look_up()

    def to_writing(self, step: int, world: int = 2) -> None:
        self.to_staging(step, world)
        for rank in range(world):
            self.stage(step, rank)
        self.reserve()  # the other generation, for the next save

    def save(self, step: int, world: int = 2) -> None:
        """A whole save that nothing disturbs."""
        self.to_writing(step, world)
        self.write_all()
        self.commit()
        assert step in self.committed
