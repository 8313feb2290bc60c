"""Runs to fork, and what is in them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from rl_ckpt import (
    Checkpointer,
)
from rl_ckpt.format import records
from rl_ckpt.format.records import PinRecord
from rl_ckpt.store.run import Run
from rl_ckpt.store.urls import open_store

_names = itertools.count()

FROZEN = np.random.default_rng(0).random(4000)  # 32,000 bytes


def in_memory() -> str:
    """A place that nobody else has."""
    return f"memory://forks_{next(_names)}"


def state(step: int, frozen: Any = FROZEN) -> dict[str, Any]:
    return {"frozen": frozen, "own": np.full(500, step, np.float64), "step": step}


def save(url: str, steps: range, frozen: Any = FROZEN, **options: Any) -> None:
    with Checkpointer(url, **options) as ckpt:
        for step in steps:
            ckpt.save_state(step, state(step, frozen)).result(60)


def load(url: str, step: int | None = None) -> Any:
    return Checkpointer(url).load_state(step)


def files(url: str, prefix: str = "") -> set[str]:
    return {item.name for item in open_store(url).list(prefix)}


def pins(url: str) -> dict[str, PinRecord]:
    """By run that holds them."""
    store = open_store(url)
    names = files(url, records.PINS)
    return {name[5:-5]: records.decode(name, store.get(name), PinRecord) for name in names}


def run_of(url: str) -> str:
    return Run.open(url).record.run


def newest(url: str) -> str:
    found = Checkpointer(url).latest()
    assert found is not None
    return found.id
