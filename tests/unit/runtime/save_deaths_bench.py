"""States and steps that the tests of deaths in a save have in common."""

from __future__ import annotations

import numpy as np

from tests.unit.runtime.save_bench import Bench, State

SHARED: State = {"w": np.arange(512.0), "v": np.arange(256.0), "u": np.arange(64.0)}
"""All of it replicated."""


def joined(bench: Bench, step: int = 5, world: int = 3, state: State | None = None) -> None:
    bench.join_all(step, world, state=SHARED if state is None else state)


def to_staging(bench: Bench, step: int = 5, world: int = 3, state: State | None = None) -> None:
    joined(bench, step, world, state)
    bench.name()
    bench.reserve()
    bench.look_up()


def finish(bench: Bench) -> None:
    bench.write_all()
    bench.commit()


def paths_staged(bench: Bench, rank: int, step: int = 5) -> set[str]:
    return {item.path for item in bench.orders(step, rank).items}


def repeating(bench: Bench) -> str:
    """A save of two ranks whose plan stands; of its second save both ranks have asked to repeat it."""
    for step in (1, 2):
        bench.join_all(step, 2, state=SHARED)
        bench.name()
        bench.reserve()
        bench.look_up()
        for rank in (0, 1):
            bench.stage(step, rank)
        bench.reserve()
        finish(bench)
    return bench.plan(2)
