"""Taking over from dead workers: every chunk still has one place, with a live holder, and the others' places stay."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rl_ckpt import PerRank
from rl_ckpt.plan.deal import SavePlan, StageItem, deal
from rl_ckpt.plan.redeal import Annexed, lost_chunks, places, redeal, without
from tests.unit.plan.test_save_plan import MANY, jobs, planned


class Team:
    """A plan through a series of deaths, as the coordinator keeps it."""

    def __init__(self, states: list[Any], servers: list[str]) -> None:
        self.servers = servers
        self.merged, self.plan = planned(states, servers)
        self.before = self.plan
        self.dead: set[int] = set()
        self.annexes: dict[str, Annexed] = {}
        self.number = itertools.count()

    def die(self, ranks: set[int], lanes: set[str] = frozenset()) -> Any:  # type: ignore[assignment]
        self.dead |= ranks
        lanes = lanes | {lane for lane, annex in self.annexes.items() if annex.rank in ranks}
        moved, plan = lost_chunks(self.plan, ranks, self.servers, lanes)
        plan, annexes, orphans = redeal(
            plan, moved, self.dead, self.servers, lambda r: f"{self.servers[r]}.{next(self.number)}", 2, 1 << 20
        )
        if not orphans:
            self.plan = plan
            self.annexes = {lane: a for lane, a in self.annexes.items() if lane not in lanes}
            self.annexes |= {annex.lane: annex for annex in annexes}
        return orphans

    def staged(self) -> list[tuple[str, int, StageItem]]:
        own = [(self.servers[r], r, item) for r, items in self.plan.stage.items() for item in items]
        return own + [(lane, annex.rank, item) for lane, annex in self.annexes.items() for item in annex.items]


def holders_of(plan: SavePlan) -> dict[Any, tuple[int, ...]]:
    return {(a, c): chunk.holders for a, array in enumerate(plan.merged.arrays) for c, chunk in enumerate(array.chunks)}


@MANY
@given(jobs(), st.data())
def test_every_chunk_has_one_place_with_a_live_holder(job: tuple[list[Any], list[str]], data: st.DataObject) -> None:
    team = Team(*job)
    holders = holders_of(team.plan)
    for _ in range(2):
        ranks = data.draw(st.sets(st.sampled_from(range(len(job[1])))))
        lanes = set(data.draw(st.sets(st.sampled_from(team.servers), max_size=1)))
        ranks |= {rank for rank, server in enumerate(team.servers) if server in lanes}
        lanes |= {lane for lane in team.annexes if team.servers[team.annexes[lane].rank] in lanes}
        orphans = team.die(ranks, lanes)
        hopeless = {team.plan.merged.arrays[a].path for (a, c), who in holders.items() if set(who) <= team.dead}
        if orphans:
            assert set(orphans) <= hopeless
            return
        at = places(team.plan)
        assert sorted(at.values()) == sorted(holders), "every chunk once"
        staged = team.staged()
        assert {(lane, item.offset) for lane, _, item in staged} == set(at), "what is staged is what is written"
        for lane, rank, item in staged:
            assert rank in holders[at[lane, item.offset]]
            assert rank not in team.dead
        for annex in team.annexes.values():
            spans = sorted((item.offset, item.offset + item.size_bytes) for item in annex.items)
            assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
            assert spans[-1][1] <= annex.bytes
            assert set(team.plan.staged_bytes).isdisjoint({annex.lane})
        left = {(team.servers[r], i) for r, items in team.plan.stage.items() for i in items}
        assert left <= {(team.servers[r], i) for r, items in team.before.stage.items() for i in items}, "no other moves"


@MANY
@given(jobs(), st.data())
def test_a_plan_without_the_dead_is_one_of_the_living(job: tuple[list[Any], list[str]], data: st.DataObject) -> None:
    merged, _ = planned(*job)
    dead = data.draw(st.sets(st.sampled_from(range(len(job[1])))))
    rest, orphans = without(merged, dead)
    for array, old in zip(rest.arrays, merged.arrays, strict=True):
        for chunk, was in zip(array.chunks, old.chunks, strict=True):
            assert chunk.holders == tuple(rank for rank in was.holders if rank not in dead)
            assert bool(chunk.holders) or set(was.holders) <= set(orphans[array.path])
    if not orphans:
        assert all(not deal(rest, job[1], 2, 1 << 20).stage[rank] for rank in dead)


def test_what_only_the_dead_had_is_told_with_who_had_it() -> None:
    team = Team([{"w": np.arange(64), "own": PerRank(np.arange(8) + rank)} for rank in range(3)], ["a", "b", "b"])
    assert team.die({1}) == {"own": (1,)}
    assert team.plan is team.before


def test_what_several_take_over_is_dealt_evenly() -> None:
    team = Team([{"w": np.zeros((60, 8))} for _ in range(3)], ["a", "b", "c"])
    assert team.die({1}) == {}
    assert sorted((annex.rank, sum(i.size_bytes for i in annex.items)) for annex in team.annexes.values()) == [
        (0, 640),
        (2, 640),
    ]
