"""Random deaths in saves: what is committed is what live workers staged, whatever the dead and the late still do.

Two drivers save with workers of their own. Workers die and are replaced, nodes are lost with all on them, and a process
that was given up for dead may go on: it writes rubbish wherever it was ever told to write, and speaks late. Staging
memory is modelled, so that what a shard server reads is compared with the digests that go into the manifest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rl_ckpt.errors import StorageError, WorkerFailuresError
from rl_ckpt.format.digest import digest
from rl_ckpt.options import Options
from rl_ckpt.plan.deal import StageItem, Written, entries
from rl_ckpt.runtime import save_steps as sm
from rl_ckpt.runtime.generations import GENERATIONS
from rl_ckpt.runtime.messages import (
    Failure,
    JoinAgain,
    Lost,
    RepeatOrders,
    Restage,
    Restages,
    SaveOrders,
    Staged,
)
from rl_ckpt.runtime.spec import CALL
from tests.unit.runtime.save_bench import Bench, State, join, repeat

PICK = st.integers(0, 1 << 20)
RUBBISH = b"rubbish of a zombie"
HOLDING = (sm.RESERVING, sm.STAGING, sm.SETTLING, sm.WRITING, sm.COMMITTING)


@dataclass(eq=False)
class Process:
    """A worker: what it was told, and what it does next."""

    rank: int
    server: str
    calls: list[object] = field(default_factory=list)
    """Keys of saves that the driver has called it for, and orders to take over, in turn."""
    waits: tuple[str, int] | None = None
    """For the reply of this number to this key."""
    orders: tuple[str, SaveOrders | RepeatOrders] | None = None
    plan: str = ""
    items: tuple[StageItem, ...] = ()
    promised: str = ""
    places: set[tuple[str, int]] = field(default_factory=set)
    """Where it was writing, or about to, when it was given up for dead."""
    known_dead: bool = False
    """Whether the coordinator was told."""


@dataclass(eq=False)
class Driver:
    """Saves with workers of its own, one save at a time."""

    number: int
    team: list[Process]
    own: bool
    key: str = ""
    step: int = 0
    answered: set[int] = field(default_factory=set)
    dead: list[int] = field(default_factory=list)
    """Ranks of whose death it has heard, and the coordinator has not."""
    told: set[int] = field(default_factory=set)

    def state(self, rank: int) -> State:
        shared: State = {"w": np.full(512, self.step, "f8"), "v": np.full(300, self.step, "f8"), "n": self.step}
        return shared | ({"own": np.full(10, 100.0 * self.step + rank)} if self.own else {})


def value(item: StageItem, step: int, rank: int) -> bytes:
    """Digest of a chunk as a live worker has it."""
    return digest(f"{item.path} {item.box} {step} {rank if item.path == 'own' else ''}".encode())


class Deaths(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(Options())
        self.memory: dict[tuple[str, int], bytes] = {}
        self.zombies: list[tuple[Process, Driver, str]] = []
        self.lost_servers: set[str] = set()
        self.numbers = iter(range(1, 1 << 30))
        self.drivers: list[Driver] = []
        self.steps = iter(range(1, 1 << 30))

    @initialize(worlds=st.tuples(st.integers(2, 4), st.integers(1, 3)), own=st.booleans())
    def start(self, worlds: tuple[int, int], own: bool) -> None:
        self.nodes = ["server-a0", "server-b0"]
        for number, world in enumerate(worlds):
            team = [Process(rank, self.nodes[rank % 2]) for rank in range(world)]
            self.drivers.append(Driver(number, team, own and number == 0))

    # Drivers and workers.

    def driver(self, pick: int) -> Driver:
        return self.drivers[pick % len(self.drivers)]

    @rule(pick=PICK)
    def save(self, pick: int) -> None:
        driver = self.driver(pick)
        if not driver.key:
            driver.key, driver.step = f"{CALL}{next(self.numbers)}", next(self.steps)
            driver.answered, driver.dead, driver.told = set(), [], set()
            for process in driver.team:
                process.calls.append(driver.key)

    @rule(pick=PICK, rounds=st.integers(1, 3))
    def work_all(self, pick: int, rounds: int) -> None:
        """All workers of a driver do so many things each, and the world answers between."""
        for _ in range(rounds):
            for which in range(len(self.driver(pick).team)):
                self.work(pick, which)
            self.answer_all()

    @rule(pick=PICK)
    def up_to_staging(self, pick: int) -> None:
        """All workers of a driver come to a save, and are told what to stage."""
        if not self.driver(pick).key:
            self.save(pick)
            self.work_all(pick, 1)

    @rule()
    def quiet(self) -> None:
        """Nothing happens for a while: what is under way ends, and another save begins."""
        self.rest()
        self.save(0)

    def rest(self) -> None:
        for _ in range(3):
            for number, driver in enumerate(self.drivers):
                self.work_all(number, 2)
                while driver.dead:
                    self.tell(number)
                self.ask(number)
            self.answer_all()
            while self.bench.writes:
                self.write(0)
            while self.bench.commits:
                self.commit()

    @rule()
    def answer_all(self) -> None:
        """The world answers what workers wait for."""
        while self.bench.names:
            self.name()
        self.reserve()
        self.annex()
        self.look_up()

    @rule(pick=PICK, which=PICK)
    def work(self, pick: int, which: int) -> None:
        """A worker does the next thing that it is to do."""
        driver = self.driver(pick)
        process = driver.team[which % len(driver.team)]
        if process.orders is not None:
            self.stage(driver, process)
        elif process.waits is None and process.calls:
            call = process.calls.pop(0)
            if isinstance(call, Restage):
                self.take_over(driver, process, call)
            else:
                self.come(driver, process, str(call))
        self.collect()

    def come(self, driver: Driver, process: Process, key: str) -> None:
        process.waits = (key, len(self.bench.replies.get((key, process.rank), [])))
        world, state = len(driver.team), driver.state(process.rank)
        if process.plan:
            if process.promised:  # it writes ahead
                self.put(process, process.promised, process.items, driver.step)
            message = repeat(process.rank, driver.step, process.plan, world, state)
            self.bench.do(self.bench.machine.repeat(msgspec.structs.replace(message, key=key)))
        else:
            self.join(driver, process, key)

    def join(self, driver: Driver, process: Process, key: str) -> None:
        message = join(process.rank, driver.step, len(driver.team), key, driver.state(process.rank))
        message = msgspec.structs.replace(message, server=process.server, promised=process.promised)
        process.promised = ""
        self.bench.do(self.bench.machine.join(message))

    def put(self, process: Process, path: str, items: tuple[StageItem, ...], step: int) -> None:
        for item in items:
            self.memory[path, item.offset] = value(item, step, process.rank)

    def collect(self) -> None:
        """Takes the replies that workers wait for."""
        for driver in self.drivers:
            for process in driver.team:
                while process.waits is not None:
                    key, before = process.waits
                    replies = self.bench.replies.get((key, process.rank), [])
                    if len(replies) <= before:
                        break
                    process.waits, reply = None, replies[before]
                    if isinstance(reply, JoinAgain):
                        process.plan = ""
                        process.waits = (key, before + 1)
                        self.join(driver, process, key)
                    elif isinstance(reply, Failure):
                        self.answer(driver, process.rank, key)
                    else:
                        process.orders = (key, reply)

    def stage(self, driver: Driver, process: Process) -> None:
        assert process.orders is not None
        (key, orders), process.orders = process.orders, None
        if isinstance(orders, SaveOrders):
            process.plan, process.items = orders.plan, orders.items
        process.promised = orders.next_memory
        step = int(orders.checkpoint.partition("-")[0])
        self.put(process, orders.memory, process.items, step)
        digests = tuple(value(item, step, process.rank) for item in process.items)
        self.bench.do(self.bench.machine.staged(Staged(key, process.rank, orders.checkpoint, digests, 0.1)))
        self.answer(driver, process.rank, key)

    def take_over(self, driver: Driver, process: Process, order: Restage) -> None:
        step = int(order.checkpoint.partition("-")[0])
        self.put(process, order.annex, order.items, step)
        digests = tuple(value(item, step, process.rank) for item in order.items)
        staged = Staged(driver.key, process.rank, order.checkpoint, digests, 0.1, order.annex)
        self.bench.do(self.bench.machine.staged(staged))

    def answer(self, driver: Driver, rank: int, key: str) -> None:
        if key == driver.key:
            driver.answered.add(rank)
            self.end(driver)

    def end(self, driver: Driver) -> None:
        """The call of `save` returns once every rank has answered, or its fate is known."""
        if driver.answered >= set(range(len(driver.team))) and not driver.dead and not driver.told:
            driver.key = ""

    @rule(pick=PICK)
    def ask(self, pick: int) -> None:
        """The driver hears what is to be done in the place of the dead."""
        driver = self.driver(pick)
        if driver.key:
            news = self.bench.machine.restages(driver.key)
            if isinstance(news, Restages):
                for order in news.orders:
                    driver.team[order.rank].calls.append(order)
            if isinstance(news, Failure) or not news.waits:
                driver.answered |= driver.told
                driver.told = set()
                self.end(driver)

    # Deaths.

    @rule(pick=PICK, which=PICK)
    def die_in_staging(self, pick: int, which: int) -> None:
        self.up_to_staging(pick)
        self.die(pick, 4 * which)
        self.tell(pick)

    @rule(pick=PICK, which=PICK)
    def die(self, pick: int, which: int) -> None:
        driver = self.driver(pick)
        busy = [process for process in driver.team if process.waits or process.orders]
        if busy or which % 4 == 0:
            self.kill(driver, (busy or driver.team)[which % len(busy or driver.team)])

    def kill(self, driver: Driver, process: Process) -> None:
        """A process is given up for dead; it may go on. Another one is there in its place for the next save."""
        if process.orders is not None:
            orders = process.orders[1]
            items = orders.items if isinstance(orders, SaveOrders) else process.items
            process.places |= {(orders.memory, item.offset) for item in items}
        if process.waits is not None:  # it may be writing ahead
            process.places |= {(process.promised, item.offset) for item in process.items}
        for call in process.calls:
            if isinstance(call, Restage):
                process.places |= {(call.annex, item.offset) for item in call.items}
        self.zombies.append((process, driver, driver.key))
        driver.team[process.rank] = Process(process.rank, process.server)
        busy = process.waits or process.orders or process.calls
        if driver.key and busy and process.rank not in driver.told:
            driver.dead.append(process.rank)

    @rule(pick=PICK)
    def tell(self, pick: int) -> None:
        driver = self.driver(pick)
        if driver.dead:
            rank = driver.dead.pop(0)
            driver.told.add(rank)
            failure = Failure.of(WorkerFailuresError("dead", {rank: "dead"}))
            for process, its, key in self.zombies:
                process.known_dead |= (process.rank, its, key) == (rank, driver, driver.key)
            self.bench.do(self.bench.machine.lost(Lost(driver.key, rank, len(driver.team), failure, dead=True)))
            self.collect()

    @rule(pick=PICK, late=st.booleans())
    def haunt(self, pick: int, late: bool) -> None:
        """A zombie writes, and says that it has staged."""
        if self.zombies:
            process, _, _ = self.zombies[pick % len(self.zombies)]
            for place in process.places:
                self.memory[place] = RUBBISH
            if late and process.known_dead and process.orders is not None:
                key, orders = process.orders
                digests = tuple(RUBBISH for _ in (orders.items if isinstance(orders, SaveOrders) else process.items))
                self.bench.do(self.bench.machine.staged(Staged(key, process.rank, orders.checkpoint, digests, 0.1)))
                self.collect()

    @rule(pick=PICK)
    def lose_node(self, pick: int) -> None:
        """With all workers on it; a new node comes in its place."""
        if pick % 3:
            return  # else hardly any save is left alone by it
        which = pick % 2
        lost = self.nodes[which]
        self.nodes[which] = f"server-{'ab'[which]}{next(self.numbers)}"
        self.lost_servers.add(lost)
        for driver in self.drivers:
            for process in list(driver.team):
                if process.server == lost:
                    self.kill(driver, process)
                    driver.team[process.rank].server = self.nodes[which]
        self.bench.do(self.bench.machine.server_lost(lost, {}))
        bench = self.bench
        queues: Any = (bench.reserves, bench.annexes, bench.writes)
        for asks in queues:
            for ask in [ask for ask in asks if ask.server == lost]:
                asks.remove(ask)
                bench.do(bench.machine.failed(ask.token, StorageError("its node is dead"), lost))
        self.collect()

    # The rest of the world.

    @precondition(lambda self: self.bench.names)
    @rule()
    def name(self) -> None:
        self.bench.name()
        self.collect()

    @rule()
    def reserve(self) -> None:
        self.bench.reserve()
        self.collect()

    @rule()
    def annex(self) -> None:
        self.bench.annex()

    @rule()
    def look_up(self) -> None:
        self.bench.look_up()

    @precondition(lambda self: self.bench.writes)
    @rule(pick=PICK)
    def write(self, pick: int) -> None:
        """A shard server reads its memory."""
        ask = self.bench.writes.pop(pick % len(self.bench.writes))
        assert ask.server not in self.lost_servers
        save = self.bench.machine._current(ask.token)
        if save is not None:
            for file in ask.order.files:
                for column in file.columns:
                    read = self.memory[ask.order.memory, column.offset]
                    assert read == save.found[ask.lane, column.offset], f"{column.path} is not what was staged"
                    assert read != RUBBISH
        done = [Written(1000, tuple(range(len(file.columns)))) for file in ask.order.files]
        self.bench.do(self.bench.machine.written(ask.token, ask.lane, done))
        self.collect()

    @precondition(lambda self: self.bench.commits)
    @rule()
    def commit(self) -> None:
        save = self.bench.commits[0].save
        assert save.plan is not None
        _, arrays = entries(save.plan, save.written, save.found)
        assert len(arrays) == len(save.plan.merged.arrays)
        self.bench.commit()
        self.collect()

    @precondition(lambda self: self.bench.arms)
    @rule(pick=PICK)
    def time_out(self, pick: int) -> None:
        arm = self.bench.arms.pop(pick % len(self.bench.arms))
        self.bench.do(self.bench.machine.timed_out(arm.token, arm.state))
        self.collect()

    @invariant()
    def a_generation_has_one_holder(self) -> None:
        held = [g for save in self.bench.machine._saves.values() if save.state in HOLDING for g in save.generations]
        assert len(held) == len(set(held)) <= GENERATIONS

    @invariant()
    def no_step_is_committed_twice(self) -> None:
        assert len(self.bench.committed) == len(set(self.bench.committed))

    def teardown(self) -> None:
        """The world answers in the end: every call returns, every save is decided, and nothing is held."""
        if not self.drivers:
            return
        while True:
            for _ in range(5):
                self.rest()
            if not self.bench.arms:
                break
            # What is left waits for ranks that died before they came, or for memory of such a save: its time is over.
            for _ in list(self.bench.arms):
                self.time_out(0)
        for driver in self.drivers:
            assert not driver.key, f"a call of save does not return: {driver}"
            assert all(process.waits is None for process in driver.team), "a rank waits for ever"
        assert not self.bench.machine.busy()
        assert self.bench.open == {}
        for step in (10_001, 10_002):
            self.bench.to_writing(step)
        self.bench.write_all()
        self.bench.commit()
        self.bench.commit()


TestDeaths = Deaths.TestCase
TestDeaths.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
