"""One save and one restore with no bytes moved: the real state machines, planners, committer and message codec.

What a coordinator would do for `Job`, on one core: decode every message, feed the machines, carry the instructions out
by computing what the other side would answer, encode every reply. Seconds are CPU time of this process, which other
programs hardly change. Time spent on behalf of workers and shard servers (making inventories, answering) is not
counted, but for two figures that say what one worker pays.
"""

from __future__ import annotations

import gc
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from benchmarks.scale.synthetic import CHUNK_BYTES, FIRST, Job, Values
from rl_ckpt.format.manifest import ArrayRef, Manifest
from rl_ckpt.options import Options
from rl_ckpt.plan.deal import StageItem, Written
from rl_ckpt.plan.match import Problems, match_state, view
from rl_ckpt.plan.spread import ChunkId, Needs
from rl_ckpt.runtime import restore_steps as rm
from rl_ckpt.runtime import save_steps as sm
from rl_ckpt.runtime.generations import StagingFile
from rl_ckpt.runtime.messages import (
    Apply,
    FetchDone,
    FetchOrder,
    JoinSave,
    Matched,
    OpenRestore,
    RepeatOrders,
    RepeatSave,
    SaveDone,
    SaveOrders,
    Staged,
    Verified,
    WriteDone,
    decode,
    encode,
)
from rl_ckpt.runtime.restore_machine import RestoreMachine
from rl_ckpt.runtime.save_machine import SaveMachine
from rl_ckpt.state.boxes import overlap
from rl_ckpt.state.tree import LocalArray
from rl_ckpt.store.committer import Committer
from rl_ckpt.store.run import Run

T = TypeVar("T")

_CANDIDATE_BYTES = 4 << 30  # the same manifest goes to every rank: past this much, the rest is reckoned
MOST_PASSES = 4_000_000
"""Chunks times servers that take them from a peer: beyond this, only a restore of mapped files is simulated."""

PLANNED = ("join", "plan", "orders", "settle", "commit")
"""The phases that the coordinator goes through for a save of a shape that is new to it."""


@dataclass
class Figures:
    """What one point cost: seconds by phase, and messages."""

    seconds: dict[str, float] = field(default_factory=dict)
    messages: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    manifest_bytes: int = 0
    chunks: int = 0
    save_peak_bytes: int = 0
    """Largest resident size of the process during the first save; below, during the others."""
    again_peak_bytes: int = 0
    restore_peak_bytes: int = 0
    mapped: bool = False
    """Whether the restore is one of mapped files."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of its body to a phase."""
        begun = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - begun

    @property
    def save_s(self) -> float:
        """All that the coordinator did for the first save."""
        return sum(self.seconds.get(name, 0.0) for name in PLANNED)

    @property
    def again_s(self) -> float:
        """All that the coordinator did for the save by the standing plan."""
        return sum(seconds for name, seconds in self.seconds.items() if name.startswith("again"))

    @property
    def restore_s(self) -> float:
        """All that the coordinator did for the restore."""
        return sum(seconds for name, seconds in self.seconds.items() if name.startswith("restore"))


@dataclass
class Simulation:
    """Drives the machines for one job."""

    job: Job
    options: Options = field(default_factory=lambda: Options(chunk_bytes=CHUNK_BYTES))
    figures: Figures = field(default_factory=Figures)

    plan_id: str = ""
    """Of the standing plan, as ranks were told."""
    items: dict[int, tuple[StageItem, ...]] = field(default_factory=dict)
    """What each rank was told to stage."""
    _prefix: str = ""
    """Of the names of phases."""

    def __post_init__(self) -> None:
        """A run in this process's memory."""
        self.run = Run.create(f"memory://scale-{uuid.uuid4().hex}")
        self.committer = Committer(self.run, (), 0.0)
        self.saves = SaveMachine(self.options)
        self.restores = RestoreMachine(self.options)
        self.bytes_from: dict[str, int] = {}

    def save(self, step: int, values: Values = FIRST) -> Manifest:
        """A whole save of a shape that the coordinator has not seen before."""
        return self._finish_save(step, values, self._joined(step, values))

    def save_again(self, step: int, values: Values) -> Manifest:
        """A whole save of the same shape as the last one, by the standing plan. Its phases are named "again, …"."""
        self._prefix = "again, "
        manifest = self._finish_save(step, values, self._repeated(step, values))
        self._prefix = ""
        return manifest

    def _phase(self, name: str) -> AbstractContextManager[None]:
        return self.figures.phase(self._prefix + name)

    def _in(self, phase: str, data: bytes, kind: type) -> msgspec.Struct:
        self.figures.messages += 1
        self.figures.bytes_in += len(data)
        with self._phase(phase):
            found: msgspec.Struct = decode(data, kind)
        return found

    def _out(self, phase: str, message: msgspec.Struct) -> bytes:
        with self._phase(phase):
            data = encode(message)
        self.figures.messages += 1
        self.figures.bytes_out += len(data)
        return data

    def _joined(self, step: int, values: Values) -> list[sm.Instruction]:
        instructions: list[sm.Instruction] = []
        job = self.job
        for rank, inventory in enumerate(job.inventories(values)):
            message = JoinSave(
                f"save-{step}", rank, job.workers, step, {}, None, None, job.server(rank), CHUNK_BYTES, inventory
            )
            begun = time.process_time()
            data = encode(message)
            if rank == 0:
                self.figures.seconds["a worker encodes"] = time.process_time() - begun
            join = self._in("join", data, JoinSave)
            assert isinstance(join, JoinSave)
            del data, message, inventory
            with self._phase("plan" if rank == job.workers - 1 else "join"):
                instructions = self.saves.join(join)
        return instructions

    def _repeated(self, step: int, values: Values) -> list[sm.Instruction]:
        instructions: list[sm.Instruction] = []
        for rank, (plains, identities) in enumerate(self.job.repeats(values)):
            data = encode(
                RepeatSave(
                    f"save-{step}", rank, self.job.workers, step, {}, None, None, self.plan_id, plains, identities
                )
            )
            message = self._in("join", data, RepeatSave)
            assert isinstance(message, RepeatSave)
            with self._phase("plan"):
                instructions = self.saves.repeat(message)
        return instructions

    def _finish_save(self, step: int, values: Values, instructions: list[sm.Instruction]) -> Manifest:
        name = _only(instructions, sm.Name)
        with self._phase("orders"):
            checkpoint = self.committer.attempt(name.request)
            instructions = self.saves.named(name.token, checkpoint)
        instructions += self._reserve(instructions)
        self._order(instructions)
        look_up = _only(instructions, sm.LookUp)
        with self._phase("settle"):
            stored = self.committer.stored(look_up.checkpoint)
            self.saves.looked_up(look_up.token, stored)
        instructions = self._stage(step, checkpoint, values)
        self._reserve(instructions)  # the other generation, for the next save
        return self._commit(instructions)

    def _reserve(self, instructions: list[sm.Instruction]) -> list[sm.Instruction]:
        """Has all staging memory made that is asked for; what comes of it."""
        out: list[sm.Instruction] = []
        for ask in _all(instructions, sm.ReserveMemory):
            file = StagingFile(ask.bytes, f"/dev/shm/{ask.server}-{ask.generation}")
            with self._phase("orders"):
                out += self.saves.reserved(ask.token, ask.server, ask.generation, file)
        return out

    def _order(self, instructions: list[sm.Instruction]) -> None:
        for order in _all(instructions, sm.Order):
            assert isinstance(order.reply, SaveOrders | RepeatOrders), order.reply
            self._out("orders", order.reply)
            if isinstance(order.reply, SaveOrders):
                self.items[order.rank] = order.reply.items
                self.plan_id = order.reply.plan

    def _stage(self, step: int, checkpoint: str, values: Values) -> list[sm.Instruction]:
        instructions: list[sm.Instruction] = []
        for rank in range(self.job.workers):
            data = encode(
                Staged(f"save-{step}", rank, checkpoint, self.job.staged(self.items[rank], rank, values), 0.1)
            )
            message = self._in("orders", data, Staged)
            assert isinstance(message, Staged)
            with self._phase("settle" if rank == self.job.workers - 1 else "orders"):
                instructions = self.saves.staged(message)
        return instructions

    def _commit(self, instructions: list[sm.Instruction]) -> Manifest:
        for write in _all(instructions, sm.Write):
            self._out("orders", write.order)
            done = WriteDone(
                tuple(_written(len(f.columns), sum(c.bytes for c in f.columns)) for f in write.order.files)
            )
            reply = self._in("orders", encode(done), WriteDone)
            assert isinstance(reply, WriteDone)
            with self._phase("orders"):
                instructions = self.saves.written(write.token, write.server, reply.written)
        commit = _only(instructions, sm.Commit)
        save = commit.save
        assert save.plan is not None
        with self._phase("commit"):
            record = self.committer.commit(save.done())
        manifest, data = self.run.manifest_file(record)
        self.figures.manifest_bytes = len(data)
        self.saves.committed(commit.token, SaveDone(record, "", (), 0.1, ""))
        assert not self.saves.busy()
        self.figures.chunks = sum(len(array.chunks) for array in manifest.arrays)
        return manifest

    def restore(self, mappable: bool = False) -> list[FetchOrder]:
        """A whole restore onto as many ranks; `mappable` where workers map the store's files."""
        f = self.figures
        f.seconds = {name: seconds for name, seconds in f.seconds.items() if not name.startswith("restore")}
        token, manifest = self._load(mappable)
        instructions: list[rm.Instruction] = []
        for rank, needs in enumerate(self.job.needs(manifest)):
            data = encode(Matched("restore", token, rank, self.job.server(rank), Problems(), Needs.of(needs)))
            message = self._in("restore, messages", data, Matched)
            assert isinstance(message, Matched)
            with f.phase("restore, plan" if rank == self.job.workers - 1 else "restore, messages"):
                instructions = self.restores.match(message)
        orders: list[FetchOrder] = []
        while fetches := _all(instructions, rm.Fetch):
            for fetch in fetches:
                self._out("restore, messages", fetch.order)
                orders.append(fetch.order)
                done = FetchDone({"store": 0}, memory="/dev/shm/x")
                with f.phase("restore, plan"):
                    instructions = self.restores.fetched(fetch.token, fetch.server, done)
        for answer in _all(instructions, rm.Answer):
            self._out("restore, messages", answer.reply)
        self._finish_restore(token)
        return orders

    def _load(self, mappable: bool) -> tuple[str, Manifest]:
        f = self.figures
        instructions: list[rm.Instruction] = []
        for rank in range(self.job.workers):
            data = encode(OpenRestore("restore", rank, self.job.workers, None, self.job.server(rank)))
            message = self._in("restore, messages", data, OpenRestore)
            assert isinstance(message, OpenRestore)
            with f.phase("restore, messages"):
                instructions = self.restores.open(message)
        load = _only(instructions, rm.Load)
        with f.phase("restore, manifest"):
            manifest, text = self.run.manifest_file(self.run.find(self.run.log.read(), None))
        with f.phase("restore, messages"):
            instructions = self.restores.loaded(load.token, manifest, text, mappable, {})
        answers = _all(instructions, rm.Answer)
        encoded = answers[: max(8, _CANDIDATE_BYTES // len(text))]
        for answer in encoded:
            self._out("restore, candidates", answer.reply)
        f.seconds["restore, candidates"] *= len(answers) / len(encoded)
        f.bytes_out += (len(answers) - len(encoded)) * len(text)
        self.a_worker_matches(manifest)
        return load.token, manifest

    def a_worker_matches(self, manifest: Manifest, rank: int = 0) -> list[ChunkId]:
        """What a rank does to find what it needs; its time is kept."""
        nodes = self.job.nodes(rank)
        begun = time.process_time()
        match = match_state(view(manifest, rank), nodes, manifest)
        assert not match.problems, match.problems.lines()[:3]
        found: list[ChunkId] = []
        for path, fill in match.fills.items():
            here = nodes[path]
            if isinstance(fill, ArrayRef) and isinstance(here, LocalArray):
                chunks = manifest.arrays[fill.index].chunks
                found += [(fill.index, c) for c, chunk in enumerate(chunks) if overlap(chunk.box, here.box)]
        self.figures.seconds["a worker matches"] = time.process_time() - begun
        return found

    def _finish_restore(self, token: str) -> None:
        for rank in range(self.job.workers):
            with self.figures.phase("restore, messages"):
                instructions = self.restores.verify(Verified("restore", token, rank))
        for answer in _all(instructions, rm.Answer):
            assert isinstance(answer.reply, Apply), answer.reply
            self.bytes_from = answer.reply.bytes_from
            self._out("restore, messages", answer.reply)
        with self.figures.phase("restore, messages"):
            for rank in range(self.job.workers):
                self.restores.applied("restore", rank, token)
        assert not self.restores.states()


def _written(columns: int, size_bytes: int) -> Written:
    return Written(size_bytes + 4096, tuple(4096 + i * CHUNK_BYTES for i in range(columns)))


def _all(instructions: Iterable[object], kind: type[T]) -> list[T]:
    return [i for i in instructions if isinstance(i, kind)]


def _only(instructions: Iterable[object], kind: type[T]) -> T:
    (found,) = _all(instructions, kind)
    return found


def simulate(job: Job) -> Figures:
    """Two saves of the same shape, all values new in the second, and a restore of a job, in this process."""
    gc.collect()
    simulation = Simulation(job)
    figures = simulation.figures
    simulation.save(1)
    figures.save_peak_bytes = take_peak()
    manifest = simulation.save_again(2, Values(own=1, common=1))
    figures.again_peak_bytes = take_peak()
    shared = job.replicated * len(manifest.arrays[0].chunks) if job.replicated else 0
    figures.mapped = shared * len({job.server(rank) for rank in range(job.workers)}) > MOST_PASSES
    del manifest
    simulation.restore(figures.mapped)
    figures.restore_peak_bytes = take_peak()
    return figures


def take_peak() -> int:
    """Largest resident size of this process since the last call, or since its program began (`VmHWM`)."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    return int(line.split()[1]) << 10
