"""Random walks of the memory tier: saves, deaths, restores and restarts in any order; nothing is lost or leaked."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rl_ckpt.options import Options
from rl_ckpt.runtime.generations import GENERATIONS
from tests.unit.runtime.test_tier import found
from tests.unit.runtime.tier_bench import Bench, Server, part

PICK = st.integers(0, 1 << 20)


class Walks(RuleBasedStateMachine):
    """A few nodes, saves one after the other (up to two under way), and whatever may happen to them."""

    @initialize(servers=st.integers(1, 5), replicas=st.integers(0, 2), budget=st.sampled_from([None, None, 400]))
    def begin(self, servers: int, replicas: int, budget: int | None) -> None:
        self.options = Options(replicas=replicas, memory_bytes=budget)
        self.bench = Bench(servers, self.options)
        self.number = 0
        self.nodes = servers
        self.under_way: dict[str, int] = {}
        self.generations = list(range(GENERATIONS + 1))
        self.held: dict[str, int] = {}
        """Generations that the tier has of committed ones."""
        self.origins: dict[str, list[str]] = {}
        self.seen_freed = 0
        self.may_go = False
        self.users: dict[str, str] = {}
        self.nowhere: set[str] = set()
        """Of which the last part was lost with its node."""
        self.prefetched: set[str] = set()

    def collect(self) -> None:
        for generation in self.bench.freed[self.seen_freed :]:
            assert generation in self.held.values(), "given back twice, or not the tier's"
            over = next(name for name, g in self.held.items() if g == generation)
            complete = (*self.bench.landed, *self.bench.stuck, *self.prefetched)
            newer = [name for name in complete if int(name) > int(over)]
            assert newer or self.may_go or over in {*self.bench.stuck, *self.nowhere}, (
                "given up before a newer one was complete"
            )
            self.held = {name: g for name, g in self.held.items() if g != generation}
            self.generations.append(generation)
        self.seen_freed = len(self.bench.freed)

    @precondition(lambda self: self.generations and len(self.under_way) < GENERATIONS and self.bench.servers)
    @rule(pick=PICK)
    def stage(self, pick: int) -> None:
        self.number += 1
        names = sorted(self.bench.servers)
        origins = names[: 1 + pick % len(names)]
        checkpoint = str(self.number)
        self.under_way[checkpoint] = self.generations.pop(0)
        self.origins[checkpoint] = origins
        self.bench.stage(checkpoint, self.under_way[checkpoint], dict.fromkeys(origins, 192))
        self.collect()

    @precondition(lambda self: self.bench.servers and not self.under_way)
    @rule(pick=PICK)
    def prefetch(self, pick: int) -> None:
        """Another cluster's checkpoint, of which each of some servers is to bring a part."""
        self.number += 1
        names = sorted(self.bench.servers)
        checkpoint = str(self.number)
        self.origins[checkpoint] = names[: 1 + pick % len(names)]
        self.prefetched.add(checkpoint)
        self.bench.prefetch(checkpoint, dict.fromkeys(self.origins[checkpoint], 192))
        self.collect()

    @precondition(lambda self: self.bench.asked)
    @rule(pick=PICK, why=st.sampled_from(["", "", "", "", "no room"]))
    def answer(self, pick: int, why: str) -> None:
        self.bench.answer(self.bench.asked[pick % len(self.bench.asked)], why)
        self.collect()

    @precondition(lambda self: self.under_way)
    @rule(in_store=st.booleans())
    def commit(self, in_store: bool) -> None:
        self._commit(next(iter(self.under_way)), in_store)

    @precondition(lambda self: self.under_way)
    @rule()
    def abort(self) -> None:
        checkpoint = next(iter(self.under_way))
        self.generations.append(self.under_way.pop(checkpoint))
        self.bench.do(self.bench.brain.aborted(checkpoint))
        self.collect()

    @precondition(lambda self: len(self.bench.servers) > 1)
    @rule(pick=PICK)
    def kill(self, pick: int) -> None:
        names = sorted(self.bench.servers)
        gone = self.bench.servers[names[pick % len(names)]]
        rest = {name for server in self.bench.servers.values() if server is not gone for name in server.has}
        self.nowhere |= {
            one for one in self.held if not any(part(one, origin).name in rest for origin in self.origins[one])
        }
        self.bench.kill(names[pick % len(names)])
        self.collect()

    @rule()
    def join(self) -> None:
        if self.nodes < 8:
            self.bench.servers[f"s{self.nodes}"] = Server()
            self.nodes += 1
            self.bench.look()

    @rule(pick=PICK)
    def drain(self, pick: int) -> None:
        names = sorted(self.bench.servers)
        self.bench.draining ^= {names[pick % len(names)]}
        self.bench.look()
        self.collect()

    @rule(pick=PICK)
    def use(self, pick: int) -> None:
        remembered = self.bench.brain.remembered()
        if remembered:
            self.users[f"u{pick}"] = remembered[pick % len(remembered)].id
            self.bench.brain.use(self.users[f"u{pick}"], f"u{pick}")

    @precondition(lambda self: self.users)
    @rule()
    def done(self) -> None:
        token = next(iter(self.users))
        del self.users[token]
        self.bench.do(self.bench.brain.done(token))
        self.collect()

    @rule()
    def make_room(self) -> None:
        self.bench.do(self.bench.brain.make_room())
        self.may_go = True
        self.collect()
        self.may_go = False

    @precondition(lambda self: not self.under_way)
    @rule()
    def restart(self) -> None:
        """Another coordinator: it knows of no generation, and servers have made files of the parts' own of them."""
        before = self.bench
        self.bench = Bench(0, self.options)
        self.bench.servers, self.bench.draining = before.servers, before.draining
        self.bench.look()
        self.generations = list(range(GENERATIONS + 1))
        self.held, self.users, self.seen_freed = {}, {}, 0
        self.bench.do(self.bench.brain.adopt(found(self.bench)))
        self.collect()

    def whole(self, checkpoint: str) -> bool:
        return all(self.bench.holders(checkpoint, origin) for origin in self.origins[checkpoint])

    @invariant()
    def two_copies_are_never_on_one_node(self) -> None:
        """A node has one server, and no server that has a part is asked to have it again."""
        if hasattr(self, "bench"):
            for kept in self.bench.brain._kept.values():
                for piece in kept.pieces.values():
                    assert not piece.asked & piece.holders.keys()

    @invariant()
    def what_the_brain_believes_is_there(self) -> None:
        if hasattr(self, "bench"):
            for kept in self.bench.brain._kept.values():
                for name, piece in kept.pieces.items():
                    assert all(name in self.bench.servers[server].has for server in piece.holders)

    @invariant()
    def what_is_said_to_be_whole_is_whole(self) -> None:
        if hasattr(self, "bench"):
            for one in self.bench.brain.remembered():
                assert one.whole == self.whole(one.id)

    @invariant()
    def generations_are_somewhere(self) -> None:
        if hasattr(self, "bench"):
            have = [*self.generations, *self.under_way.values(), *self.held.values()]
            assert sorted(have) == list(range(GENERATIONS + 1))

    def teardown(self) -> None:
        """The world answers everything: then what landed survives any one node, and one more save frees the rest."""
        if not hasattr(self, "bench"):
            return
        bench = self.bench
        bench.draining.clear()
        bench.look()
        for checkpoint in list(self.under_way):
            self._commit(checkpoint, in_store=True)
        bench.answer_all()
        assert not any(bench.brain.coming(name) or bench.brain.settling(name) for name in self.prefetched)
        for token in list(self.users):
            bench.do(bench.brain.done(token))
        self.collect()
        if len(bench.servers) > 1 and self.options.memory_bytes is None and self.options.replicas:
            self.number += 1
            checkpoint, generation = str(self.number), self.generations.pop(0)
            self.origins[checkpoint] = sorted(bench.servers)
            self.held[checkpoint] = generation
            bench.save(checkpoint, generation)
            self.collect()
            assert checkpoint in bench.landed
            assert [one.id for one in bench.brain.remembered()] == [checkpoint]
            assert len(self.generations) == GENERATIONS
            left = {name for server in bench.servers.values() for name in server.has}
            assert left == {part(checkpoint, origin).name for origin in self.origins[checkpoint]}, "something leaked"
            for name in sorted(bench.servers):
                rest = {other: found for other, found in bench.servers.items() if other != name}
                there = {held for server in rest.values() for held in server.has}
                assert there == left, f"the loss of {name} alone loses something"

    def _commit(self, checkpoint: str, in_store: bool) -> None:
        self.held[checkpoint] = self.under_way.pop(checkpoint)
        self.bench.commit(checkpoint, in_store=in_store)
        self.collect()


TestWalks = Walks.TestCase
TestWalks.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
