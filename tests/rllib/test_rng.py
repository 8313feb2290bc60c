"""Generators of a process: what is drawn after a restore is what was drawn after the save."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray.rllib")
import torch

from rl_ckpt import Checkpointer, Replicated
from rl_ckpt.rllib.rng import rng_tree, set_rng


def drawn() -> list[Any]:
    return [
        random.random(), random.gauss(0, 1), np.random.random(), np.random.normal(), torch.rand(3).tolist(),
        random.getrandbits(64),
    ]  # fmt: skip


@pytest.mark.parametrize("before", [0, 1])
def test_all_generators_go_on(before: int, tmp_path: Path) -> None:
    random.gauss(0, 1)  # of the two that are made at once, each keeps the second for the next call
    np.random.normal()
    for _ in range(before):
        drawn()
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save_state(1, Replicated({"rng": rng_tree()})).result()
        expected = [drawn(), drawn()]
        set_rng(ckpt.load_state()["rng"])
    assert [drawn(), drawn()] == expected


def test_a_tree_is_not_changed_by_what_is_drawn_later() -> None:
    tree = rng_tree()
    expected = drawn()
    set_rng(tree)
    assert drawn() == expected
    set_rng(tree)
    assert drawn() == expected
