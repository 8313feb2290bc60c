"""Random interleavings of saves: never committed twice or out of order, no generation leaked, every rank answered."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rl_ckpt.errors import StorageError, WorkerFailuresError
from rl_ckpt.options import Options
from rl_ckpt.runtime import save_steps as sm
from rl_ckpt.runtime.generations import GENERATIONS
from rl_ckpt.runtime.messages import SaveOrders, Staged
from tests.unit.runtime.save_bench import Bench

WORLD = 2
STEPS = st.integers(0, 3)
RANKS = st.integers(0, WORLD - 1)
PICK = st.integers(0, 1 << 20)
HOLDING = (sm.RESERVING, sm.STAGING, sm.WRITING, sm.COMMITTING)


class Interleavings(RuleBasedStateMachine):
    """Two ranks that call `save` again and again, each blocked by its own call; the world answers late or fails."""

    when_busy = "wait"

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(Options(when_busy=self.when_busy))  # type: ignore[arg-type]
        self.blocked: dict[int, tuple[str, int]] = {}
        """Rank → the key it waits for, and how many replies it had to that key before."""
        self.staging: dict[int, tuple[str, SaveOrders]] = {}
        self.pending: set[str] = set()

    def collect(self) -> None:
        """Takes the replies that ranks wait for."""
        for rank, (key, before) in list(self.blocked.items()):
            replies = self.bench.replies.get((key, rank), [])
            if len(replies) > before:
                del self.blocked[rank]
                if isinstance(reply := replies[before], SaveOrders):
                    self.staging[rank] = (key, reply)

    @rule(rank=RANKS, step=STEPS)
    def join(self, rank: int, step: int) -> None:
        if rank not in self.blocked and rank not in self.staging:
            key = f"save-{step}"
            self.blocked[rank] = (key, len(self.bench.replies.get((key, rank), [])))
            self.bench.join(rank, step)

    @rule(rank=RANKS)
    def stage(self, rank: int) -> None:
        if rank in self.staging:
            key, orders = self.staging.pop(rank)
            digests = tuple(bytes([i, rank]) * 8 for i, _ in enumerate(orders.items))
            self.pending.add(orders.checkpoint)
            self.bench.do(self.bench.machine.staged(Staged(key, rank, orders.checkpoint, digests, 0.1)))

    @rule(rank=RANKS)
    def lose(self, rank: int) -> None:
        key = self.staging.pop(rank)[0] if rank in self.staging else self.blocked.get(rank, ("", 0))[0]
        if key:
            error = WorkerFailuresError(f"rank {rank} died", {rank: "died"})
            self.bench.lost(rank, int(key.partition("-")[2]), error)

    @precondition(lambda self: self.bench.names)
    @rule()
    def name(self) -> None:
        self.bench.name()

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

    @rule(pick=PICK)
    def break_something(self, pick: int) -> None:
        asked = [*self.bench.names, *self.bench.reserves, *self.bench.writes, *self.bench.commits]
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
        while self.staging or bench.names or bench.reserves or bench.writes or bench.commits or bench.arms:
            for rank in list(self.staging):
                self.stage(rank)
            while bench.names:
                bench.name()
            bench.reserve()
            bench.write_all()
            while bench.commits:
                bench.commit()
            self.collect()
            if not self.staging and bench.arms:
                self.time_out(0)
            self.at_most_two_generations_are_held()
        assert self.blocked == {}, "a rank was never answered"
        assert self.pending <= set(bench.finished), "a save was never decided"
        assert not bench.machine.busy()
        assert bench.open == {}, "an attempt was never given up"
        for step in (1000, 1001):
            bench.to_writing(step)  # so both generations are free
        bench.write_all()
        bench.commit()
        bench.commit()


class SkippingInterleavings(Interleavings):
    """The same where saves are skipped while two are being written."""

    when_busy = "skip"


_SETTINGS = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestWaiting = Interleavings.TestCase
TestWaiting.settings = _SETTINGS
TestSkipping = SkippingInterleavings.TestCase
TestSkipping.settings = _SETTINGS
