"""Random interleavings of restores: every rank is answered, memory is given back, nobody applies what is not whole."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from rl_ckpt.errors import StorageError, WorkerFailuresError
from rl_ckpt.plan.match import Problems
from rl_ckpt.runtime.messages import FETCHED, Apply, Candidate, Failure, Sources, TryNext
from tests.unit.runtime.restore_bench import Bench, held_by

RANKS = st.integers(0, 1)
PICK = st.integers(0, 1 << 20)


class Interleavings(RuleBasedStateMachine):
    """Two ranks that call `restore` again and again, and a world that answers late, damaged or not at all."""

    mappable = False
    holders: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        holdings = held_by(*self.holders) if self.holders else None
        self.bench = Bench(mappable=self.mappable, candidates=("3-c", "2-b", "1-a"), holdings=holdings, search=False)
        self.asked: dict[int, int] = {}
        """Rank that waits for an answer → replies it had before."""
        self.has: dict[int, Candidate | Sources | Apply] = {}
        """Rank → the reply that it works on."""

    def collect(self) -> None:
        for rank, before in list(self.asked.items()):
            replies = self.bench.replies.get(("r", rank), [])
            if len(replies) == before:
                continue
            assert len(replies) == before + 1, "answered twice"
            del self.asked[rank]
            reply = replies[before]
            if isinstance(reply, TryNext):
                self.open(rank)
            elif not isinstance(reply, Failure):
                self.has[rank] = reply
                self.check(reply)

    def check(self, reply: Candidate | Sources | Apply) -> None:
        """A rank that is told where its chunks lie finds them all there."""
        if isinstance(reply, Sources) and reply.files:
            brought = [tuple(file.path.split("/")[:1:-1]) for file in reply.files if file.kind == FETCHED]
            assert all(place in self.bench.memory for place in brought)
            assert any(reply.token in self.bench.in_use for reply in self.candidates()), (
                "held memory is let go too soon"
            )

    def candidates(self) -> list[Candidate]:
        return [reply for all_ in self.bench.replies.values() for reply in all_ if isinstance(reply, Candidate)]

    def ask(self, rank: int) -> None:
        self.asked[rank] = len(self.bench.replies.get(("r", rank), []))

    def open(self, rank: int) -> None:
        self.ask(rank)
        self.bench.open(rank)
        self.collect()

    @rule(rank=RANKS)
    def begin(self, rank: int) -> None:
        if rank not in self.asked and rank not in self.has:
            self.open(rank)

    @rule(rank=RANKS, bad=st.booleans())
    def go_on(self, rank: int, bad: bool) -> None:
        reply = self.has.pop(rank, None)
        if isinstance(reply, Apply):
            self.bench.applied(rank)
        elif isinstance(reply, Candidate):
            self.ask(rank)
            self.bench.match(rank, Problems(missing=["x"]) if bad and rank else None)
        elif isinstance(reply, Sources):
            self.ask(rank)
            self.bench.verify(rank, "a flipped bit" if bad else "")
        self.collect()

    @rule(rank=RANKS)
    def lose(self, rank: int) -> None:
        if rank in self.asked or rank in self.has:
            self.asked.pop(rank, None)
            self.has.pop(rank, None)
            self.bench.lost(rank, WorkerFailuresError("died", {rank: "died"}))
            self.collect()

    @precondition(lambda self: self.bench.loads)
    @rule(fails=st.integers(0, 9))
    def load(self, fails: int) -> None:
        if fails == 0:
            self.bench.do(self.bench.machine.failed(self.bench.loads.pop(0).token, StorageError("gone")))
        else:
            self.bench.load()
        self.collect()

    @precondition(lambda self: self.bench.fetches)
    @rule(pick=PICK, outcome=st.integers(0, 9))
    def fetch(self, pick: int, outcome: int) -> None:
        ask = self.bench.fetches[pick % len(self.bench.fetches)]
        if outcome == 0:
            self.bench.fetches.remove(ask)
            self.bench.do(self.bench.machine.failed(ask.token, StorageError("gone")))
        else:
            self.bench.fetch(ask, "a flipped bit" if outcome == 1 else "")
        self.collect()

    @precondition(lambda self: self.bench.fetches)
    @rule(pick=PICK)
    def not_reached(self, pick: int) -> None:
        ask = self.bench.fetches.pop(pick % len(self.bench.fetches))
        self.bench.do(self.bench.machine.unreachable(ask.token, ask.server, ask.order, "gone"))
        self.collect()

    @precondition(lambda self: self.bench.searches)
    @rule(found=st.booleans())
    def search(self, found: bool) -> None:
        for digest, _ in self.bench.searches[0].wanted if found else ():
            self.bench.elsewhere[digest] = [("shards/older", len(self.bench.elsewhere))]
        self.bench.search()
        self.collect()

    @rule(server=st.sampled_from(["server-1", "server-9"]))
    def lose_node(self, server: str) -> None:
        self.bench.do(self.bench.machine.server_lost(server))
        self.collect()

    @precondition(lambda self: self.bench.arms)
    @rule(pick=PICK)
    def time_out(self, pick: int) -> None:
        arm = self.bench.arms.pop(pick % len(self.bench.arms))
        self.bench.do(self.bench.machine.timed_out(arm.token, arm.state, arm.round))
        self.collect()

    def teardown(self) -> None:
        """The world answers everything in the end: then everybody has an answer, and no memory is held."""
        bench = self.bench
        while self.has or bench.loads or bench.fetches or bench.searches or bench.arms:
            while bench.loads or bench.fetches or bench.searches:
                if bench.searches:
                    self.search(False)
                if bench.loads:
                    bench.load()
                if bench.fetches:
                    bench.fetch(bench.fetches[0])
                self.collect()
            for rank in list(self.has):
                self.go_on(rank, False)
            if not self.has and not bench.loads and not bench.fetches and bench.arms:
                self.time_out(0)
        assert self.asked == {}, "a rank was never answered"
        assert bench.memory == {}, "memory was never given back"
        assert bench.in_use == set(), "held memory was never let go"
        assert set(bench.machine.states().values()) <= {"failed"}


class MappableInterleavings(Interleavings):
    """The same where workers map the store's files."""

    mappable = True


class HeldInterleavings(Interleavings):
    """The same where memory has everything."""

    holders = ("server-0", "server-9")


class HeldMappableInterleavings(Interleavings):
    """The same where memory has everything, beside files that workers map."""

    mappable = True
    holders = ("server-9", "server-1")


_SETTINGS = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestFetching = Interleavings.TestCase
TestFetching.settings = _SETTINGS
TestMapping = MappableInterleavings.TestCase
TestMapping.settings = _SETTINGS
TestHeld = HeldInterleavings.TestCase
TestHeld.settings = _SETTINGS
TestHeldMapping = HeldMappableInterleavings.TestCase
TestHeldMapping.settings = _SETTINGS
