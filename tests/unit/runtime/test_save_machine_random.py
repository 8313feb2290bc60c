"""Random interleavings of saves: never committed twice or out of order, no generation leaked, every rank answered."""

from __future__ import annotations

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rl_ckpt.errors import StorageError, WorkerFailuresError
from rl_ckpt.options import Options
from rl_ckpt.runtime import save_steps as sm
from rl_ckpt.runtime.generations import GENERATIONS
from rl_ckpt.runtime.messages import JoinAgain, RepeatOrders, SaveOrders, Staged
from tests.unit.runtime.save_bench import Bench, join, repeat

WORLD = 2
STEPS = st.integers(0, 3)
RANKS = st.integers(0, WORLD - 1)
PICK = st.integers(0, 1 << 20)
HOLDING = (sm.RESERVING, sm.STAGING, sm.LANDING, sm.SETTLING, sm.WRITING, sm.COMMITTING)


class Interleavings(RuleBasedStateMachine):
    """Two ranks that call `save` again and again, each blocked by its own call; the world answers late or fails."""

    when_busy = "wait"
    memory_tier = False
    persist_every = 1

    def __init__(self) -> None:
        super().__init__()
        how = {"when_busy": self.when_busy, "memory_tier": self.memory_tier, "persist_every": self.persist_every}
        self.bench = Bench(Options(**how))  # type: ignore[arg-type]
        self.blocked: dict[int, tuple[str, int]] = {}
        """Rank → the key it waits for, and how many replies it had to that key before."""
        self.staging: dict[int, tuple[str, SaveOrders | RepeatOrders]] = {}
        self.remembered: dict[int, tuple[str, int]] = {}
        """Rank → its standing plan, and the number of its items."""
        self.promised: dict[int, str] = {}
        self.zombies: set[str] = set()
        """Files in which processes that were given up for dead may still write."""
        self.pending: set[str] = set()

    def collect(self) -> None:
        """Takes the replies that ranks wait for."""
        for rank, (key, before) in list(self.blocked.items()):
            replies = self.bench.replies.get((key, rank), [])
            if len(replies) > before:
                del self.blocked[rank]
                reply = replies[before]
                if isinstance(reply, JoinAgain):
                    self.join(rank, int(key.partition("-")[2]))
                elif isinstance(reply, SaveOrders | RepeatOrders):
                    if isinstance(reply, SaveOrders):
                        self.remembered[rank] = (reply.plan, len(reply.items))
                    self.promised[rank] = reply.next_memory
                    self.staging[rank] = (key, reply)

    @rule(rank=RANKS, step=STEPS)
    def join(self, rank: int, step: int) -> None:
        if rank not in self.blocked and rank not in self.staging:
            key = f"save-{step}"
            self.blocked[rank] = (key, len(self.bench.replies.get((key, rank), [])))
            promised = self.promised.pop(rank, "")
            self.bench.do(self.bench.machine.join(msgspec.structs.replace(join(rank, step), promised=promised)))

    @rule(rank=RANKS, step=STEPS)
    def repeat(self, rank: int, step: int) -> None:
        """A rank writes into what was promised to it while it asks."""
        plan, _ = self.remembered.get(rank, ("", 0))
        if plan and rank not in self.blocked and rank not in self.staging:
            key = f"save-{step}"
            self.blocked[rank] = (key, len(self.bench.replies.get((key, rank), [])))
            self.bench.do(self.bench.machine.repeat(repeat(rank, step, plan)))

    @rule(rank=RANKS)
    def stage(self, rank: int) -> None:
        if rank in self.staging:
            key, orders = self.staging.pop(rank)
            digests = tuple(bytes([i, rank]) * 8 for i in range(self.remembered[rank][1]))
            self.pending.add(orders.checkpoint)
            self.bench.do(self.bench.machine.staged(Staged(key, rank, orders.checkpoint, digests, 0.1)))

    @rule(rank=RANKS)
    def lose(self, rank: int) -> None:
        key = self.staging.pop(rank)[0] if rank in self.staging else self.blocked.get(rank, ("", 0))[0]
        if key:
            error = WorkerFailuresError(f"rank {rank} died", {rank: "died"})
            self.bench.lost(rank, int(key.partition("-")[2]), error)

    @rule(rank=RANKS)
    def replace(self, rank: int) -> None:
        """A rank's process is given up for dead, and a new one takes its place; the old one goes on writing."""
        if rank not in self.blocked:
            orders = self.staging.get(rank)
            self.zombies |= {self.promised.pop(rank, ""), orders[1].memory if orders else ""} - {""}
            self.lose(rank)
            self.remembered.pop(rank, None)

    @precondition(lambda self: self.bench.names)
    @rule()
    def name(self) -> None:
        self.bench.name()

    @precondition(lambda self: self.bench.look_ups)
    @rule()
    def look_up(self) -> None:
        self.bench.look_up()

    @precondition(lambda self: self.bench.reserves)
    @rule()
    def reserve(self) -> None:
        self.bench.reserve()

    @precondition(lambda self: self.bench.writes)
    @rule(pick=PICK)
    def write(self, pick: int) -> None:
        self.bench.write(self.bench.writes[pick % len(self.bench.writes)])

    @precondition(lambda self: self.bench.commits)
    @rule()
    def commit(self) -> None:
        self.bench.commit()

    @precondition(lambda self: self.bench.lands)
    @rule()
    def land(self) -> None:
        self.bench.land()

    @precondition(lambda self: self.bench.holds)
    @rule(pick=PICK, well=st.booleans())
    def copied(self, pick: int, well: bool) -> None:
        """The tier says so once; what it says of saves that are over by now changes nothing."""
        self.bench.do(self.bench.machine.landed(self.bench.holds[pick % len(self.bench.holds)][0], well))

    @precondition(lambda self: self.bench.rooms)
    @rule(helps=st.booleans())
    def make_room(self, helps: bool) -> None:
        self.bench.make_room(helps)

    @rule(pick=PICK)
    def break_something(self, pick: int) -> None:
        bench = self.bench
        asked = [*bench.names, *bench.reserves, *bench.look_ups, *bench.writes, *bench.commits]
        if asked:
            self.bench.fail(asked[pick % len(asked)], StorageError("the store is gone"))  # type: ignore[arg-type]

    @precondition(lambda self: self.bench.arms)
    @rule(pick=PICK)
    def time_out(self, pick: int) -> None:
        arm = self.bench.arms.pop(pick % len(self.bench.arms))
        self.bench.do(self.bench.machine.timed_out(arm.token, arm.state))

    @invariant()
    def at_most_two_generations_are_held(self) -> None:
        self.collect()
        assert sum(state in HOLDING for state in self.bench.machine.states().values()) <= GENERATIONS

    @invariant()
    def nobody_writes_where_a_server_reads(self) -> None:
        """Neither unasked, into what was promised, nor by the orders of another save."""
        self.collect()
        for save in self.bench.machine._saves.values():
            if save.state in (sm.LANDING, sm.WRITING, sm.COMMITTING):
                read = set(save.memory.values())
                assert not read & (set(self.promised.values()) | self.zombies)
                others = [orders for _, orders in self.staging.values() if orders.checkpoint != save.checkpoint]
                assert not read & {orders.memory for orders in others}

    @invariant()
    def commits_keep_the_order_of_the_saves(self) -> None:
        order = {token: i for i, token in enumerate(self.bench.named_tokens)}
        begun = [order[token] for token in self.bench.commit_tokens]
        assert begun == sorted(set(begun))

    @invariant()
    def no_step_is_committed_twice(self) -> None:
        assert len(self.bench.committed) == len(set(self.bench.committed))

    def teardown(self) -> None:
        """The world answers everything in the end: then everybody has an answer, and nothing is held."""
        bench = self.bench
        while (
            self.staging
            or bench.names
            or bench.reserves
            or bench.look_ups
            or bench.writes
            or bench.commits
            or bench.lands
            or bench.rooms
            or bench.arms
        ):
            for rank in list(self.staging):
                self.stage(rank)
            while bench.names:
                bench.name()
            bench.reserve()
            bench.look_up()
            bench.write_all()
            while bench.commits or bench.lands:
                bench.commit() if bench.commits else bench.land()
            while bench.rooms:
                bench.make_room(True)
            self.collect()
            if not self.staging and bench.arms:
                self.time_out(0)
            self.at_most_two_generations_are_held()
        assert self.blocked == {}, "a rank was never answered"
        assert self.pending <= set(bench.finished), "a save was never decided"
        assert not bench.machine.busy()
        assert bench.open == {}, "an attempt was never given up"
        bench.machine.configure(Options(memory_tier=self.memory_tier))
        for step in (1000, 1001):
            bench.to_writing(step)  # so both generations are free
        bench.write_all()
        bench.commit()
        bench.commit()
        held = [generation for _, generation in bench.holds]
        assert len(held) == self.memory_tier
        assert sorted([*held, *bench.machine._generations._free, *bench.machine._generations._promised]) == list(
            range(GENERATIONS + self.memory_tier)
        ), "a generation was lost, or given back twice"


class SkippingInterleavings(Interleavings):
    """The same where saves are skipped while two are being written."""

    when_busy = "skip"


class TieredInterleavings(Interleavings):
    """The same with a memory tier."""

    memory_tier = True


class LandingInterleavings(Interleavings):
    """The same where two of three saves stay in memory."""

    memory_tier = True
    persist_every = 3


_SETTINGS = settings(
    max_examples=100, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestWaiting = Interleavings.TestCase
TestWaiting.settings = _SETTINGS
TestSkipping = SkippingInterleavings.TestCase
TestSkipping.settings = _SETTINGS
TestTiered = TieredInterleavings.TestCase
TestTiered.settings = _SETTINGS
TestLanding = LandingInterleavings.TestCase
TestLanding.settings = _SETTINGS
