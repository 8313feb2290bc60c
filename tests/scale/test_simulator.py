"""The simulator's saves and restores are whole, and the work that planning does grows with what is planned."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from benchmarks.scale.growth import exponent, table
from benchmarks.scale.simulate import Simulation, simulate
from benchmarks.scale.synthetic import FIRST, SHARES, Job, Values
from rl_ckpt.plan.deal import Written, deal, entries, settle
from rl_ckpt.plan.inventory import Inventory
from rl_ckpt.plan.merge import merge
from rl_ckpt.plan.spread import spread
from rl_ckpt.runtime import restore_machine
from rl_ckpt.runtime.messages import JoinAgain, JoinSave, Matched, RepeatSave, Staged, decode, encode
from rl_ckpt.runtime.save_steps import Instruction, Order
from rl_ckpt.state import boxes
from rl_ckpt.state.boxes import Box, check_tiling


@pytest.mark.parametrize("kind", SHARES)
def test_a_save_and_a_restore_are_whole(kind: str) -> None:
    job = Job(kind, 20, 400)
    simulation = Simulation(job)
    manifest = simulation.save(1)
    assert simulation.figures.chunks == 400
    needs = list(job.needs(manifest))
    for rank in (0, 7, 19):
        assert simulation.a_worker_matches(manifest, rank) == needs[rank]  # what a worker would ask for
    orders = simulation.restore()
    read = Counter(i.source_offset for order in orders for items in order.files.values() for i in items)
    files = Counter(name for order in orders for name in order.files)
    assert sum(read.values()) == 400  # each chunk leaves the store once
    assert set(files) == {file.name for file in manifest.files}
    assert simulation.figures.save_s > 0 < simulation.figures.restore_s
    simulation.restore(mappable=True)
    wanted = [manifest.arrays[a].chunks[c].bytes for mine in needs for a, c in mine]
    assert simulation.bytes_from == {"files": sum(wanted)}  # every rank maps what it needs, replicas too


def test_a_second_save_writes_what_changed() -> None:
    simulation = Simulation(Job("mixed", 8, 160))
    first, second = simulation.save(1), simulation.save(2, Values(own=1))
    old = {file.name for file in first.files}
    again = [c for a in second.arrays for c in a.chunks if second.files[c.file].name in old]
    assert len(again) == 120  # replicas and shards are as they were; what is a rank's own is new
    assert len([c for a in second.arrays for c in a.chunks]) == 160


@pytest.mark.parametrize("kind", SHARES)
def test_a_save_by_the_standing_plan_is_whole(kind: str) -> None:
    simulation = Simulation(Job(kind, 16, 320))
    first = simulation.save(1)
    received, plan = simulation.figures.bytes_in, simulation.plan_id
    second = simulation.save_again(2, Values(own=1, common=1))
    assert {file.name for file in first.files}.isdisjoint(file.name for file in second.files)  # all of it is new
    assert second.nodes == first.nodes
    boxes = [[[c.box for c in array.chunks] for array in manifest.arrays] for manifest in (first, second)]
    assert boxes[0] == boxes[1]
    assert simulation.plan_id == plan != ""
    assert simulation.figures.bytes_in - received < received  # identities alone
    assert simulation.figures.again_s > 0
    third = simulation.save_again(3, Values(own=2, common=1))
    old = {file.name for file in second.files}
    kept = [c for array in third.arrays for c in array.chunks if third.files[c.file].name in old]
    assert len(kept) == 320 * (4 - SHARES[kind][2]) // 4


def test_the_standing_plan_does_not_hold_where_replicas_part() -> None:
    simulation = Simulation(Job("replicated", 4, 32))
    simulation.save(1)
    repeats = list(simulation.job.repeats(Values(common=1)))
    repeats[3] = (repeats[3][0], bytes(len(repeats[3][1])))
    asked = [
        simulation.saves.repeat(
            RepeatSave("save-2", rank, 4, 2, {}, None, None, simulation.plan_id, plains, identities)
        )
        for rank, (plains, identities) in enumerate(repeats)
    ]
    assert [i.reply for i in asked[-1] if isinstance(i, Order)] == [JoinAgain()] * 4


def test_what_replicas_say_by_the_standing_plan_is_held_once() -> None:
    simulation = Simulation(Job("replicated", 6, 32))
    simulation.save(1)
    for rank, (plains, identities) in enumerate(simulation.job.repeats(Values(common=1))):
        if rank < 5:  # the last one would end the joining
            said = RepeatSave("save-2", rank, 6, 2, {}, None, None, simulation.plan_id, plains, identities)
            simulation.saves.repeat(decode(encode(said), RepeatSave))
    held = simulation.saves._saves["save-2"].repeats.values()
    assert len(held) == 5
    assert len({id(message.identities) for message in held}) == 1
    assert len({message.plains for message in held}) == 5


def test_figures_become_a_table() -> None:
    job = Job("mixed", 4, 64)
    lines = table({job: simulate(job)}).splitlines()
    assert lines[2].startswith("| mixed | 4 | 64 |")
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


def test_the_exponent_of_a_power_is_that_power() -> None:
    assert exponent([(x, 3 * x**1.5) for x in (10.0, 100.0, 1000.0)]) == pytest.approx(1.5)


def calls(work: Callable[[], Any]) -> int:
    """Calls of Python and C functions: a measure of work that no other program disturbs."""
    count = 0

    def seen(_frame: object, event: str, _arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def received(job: Job) -> list[Inventory]:
    """The inventories as the coordinator gets them: what ranks say alike is one object."""
    joins = [
        JoinSave("k", r, job.workers, 1, {}, None, None, "s", 1 << 24, i) for r, i in enumerate(job.inventories(FIRST))
    ]
    return [decode(encode(join), JoinSave).inventory for join in joins]


def planning(kind: str, workers: int, chunks: int) -> int:
    """Calls from inventories to the manifest's entries, and to the plan of a restore."""
    job = Job(kind, workers, chunks)
    inventories = received(job)
    servers = [job.server(rank) for rank in range(workers)]

    def work() -> None:
        plan = deal(merge(inventories, 1 << 24), servers, 4, 256 << 20)
        digests = {
            (server, column.offset): repr((server, column.offset)).encode()
            for server, files in plan.files.items()
            for file in files
            for column in file.columns
        }
        plan = settle(plan, "1-x", digests, {})
        written = {
            server: [Written(1, tuple(range(len(f.columns)))) for f in files] for server, files in plan.files.items()
        }
        entries(plan, written, digests)

    return calls(work)


@pytest.mark.parametrize("kind", SHARES)
def test_planning_grows_no_faster_than_the_chunks(kind: str) -> None:
    work = [planning(kind, 16, chunks) for chunks in (640, 1280, 2560)]
    assert all(after < 2.3 * before for before, after in pairwise(work)), work  # twice the chunks; log n is in C


@pytest.mark.parametrize("kind", SHARES)
def test_planning_grows_no_faster_than_the_workers(kind: str) -> None:
    work = [planning(kind, workers, 1280) for workers in (32, 64, 128)]
    assert all(after < 2.3 * before for before, after in pairwise(work)), work


def test_what_ranks_have_staged_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def staging(workers: int) -> int:
        simulation, work = Simulation(Job("sharded", workers, 1280)), 0
        real = simulation.saves.staged

        def staged(message: Staged) -> list[Instruction]:
            nonlocal work
            out: list[Instruction] = []
            work += calls(lambda: out.extend(real(message)))
            return out

        monkeypatch.setattr(simulation.saves, "staged", staged)
        simulation.save(1)
        return work

    work = [staging(workers) for workers in (32, 64, 128)]
    assert all(after < 1.5 * before for before, after in pairwise(work)), work  # the chunks are as many


def test_more_replicas_of_the_same_cost_next_to_nothing() -> None:
    few, many = planning("replicated", 16, 2560), planning("replicated", 64, 2560)
    assert many < 1.6 * few


def test_who_holds_an_array_is_said_once_for_all_of_them() -> None:
    merged = merge(received(Job("replicated", 16, 4000)), 1 << 24)
    said = Counter(id(chunk.holders) for array in merged.arrays for chunk in array.chunks)
    assert max(said.values()) > 3600  # but for those in the part with each rank's own seed


class _CountedRanks(tuple[int, ...]):
    """Ranks that count how often they are hashed: with a thousand of them, that is what takes time."""

    hashed = 0

    def __hash__(self) -> int:
        _CountedRanks.hashed += 1
        return super().__hash__()


def test_the_holders_of_many_chunks_are_not_hashed_for_each() -> None:
    merged = merge(received(Job("replicated", 16, 400)), 1 << 24)
    holders = _CountedRanks(range(16))
    for array in merged.arrays:
        for chunk in array.chunks:
            chunk.holders = holders
    deal(merged, ["s"] * 16, 4, 256 << 20)
    assert 0 < _CountedRanks.hashed < 10


def test_a_restore_of_replicas_is_planned_without_asking_every_server_for_every_chunk() -> None:
    job = Job("replicated", 64, 800)
    manifest = Simulation(job).save(1)
    everything = set(next(job.needs(manifest)))

    def work(servers: int) -> int:
        return calls(lambda: spread(manifest, {f"s{i:02}": everything for i in range(servers)}))

    assert work(32) < 2 * work(4)


def test_nodes_that_need_the_same_of_mapped_files_are_planned_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def matching(workers: int) -> int:
        simulation, work = Simulation(Job("replicated", workers, 1600)), 0
        real = simulation.restores.match

        def match(message: Matched) -> list[restore_machine.Instruction]:
            nonlocal work
            out: list[restore_machine.Instruction] = []
            work += calls(lambda: out.extend(real(message)))
            return out

        monkeypatch.setattr(simulation.restores, "match", match)
        simulation.save(1)
        simulation.restore(mappable=True)
        return work

    assert matching(128) < 1.5 * matching(32)


def test_shards_along_any_axis_are_checked_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[Box, Box]] = []
    real = boxes.overlap

    def counted(a: Box, b: Box) -> Box | None:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(boxes, "overlap", counted)
    grid = [Box((4 * row, 4 * column), (4, 4)) for row in range(20) for column in range(20)]
    check_tiling("w", (80, 80), grid)
    assert compared == []
    # No grid: one column is cut elsewhere.
    ragged = [b for b in grid if b.offset[1]] + [Box((8 * row, 0), (8, 4)) for row in range(10)]
    check_tiling("w", (80, 80), ragged)
    assert 0 < len(compared) < 20 * len(ragged)
    compared.clear()
    # Columns, each cut in two, at one row or at another.
    columns = [(at, 1 + at % 2) for at in range(200)]
    halves = [Box((0, at), (row, 1)) for at, row in columns] + [Box((row, at), (4 - row, 1)) for at, row in columns]
    check_tiling("w", (4, 200), halves)
    assert 0 < len(compared) < 3 * len(halves)
