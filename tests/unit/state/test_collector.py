"""The pause of Python's cycle collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.state.collector import paused
from rl_ckpt.state.tree import flatten


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    was = gc.isenabled()
    yield
    (gc.enable if was else gc.disable)()


def test_the_collector_is_off_within_and_on_after() -> None:
    gc.enable()
    with paused():
        assert not gc.isenabled()
        with paused():
            assert not gc.isenabled()
        assert not gc.isenabled(), "the inner pause ends nothing"
    assert gc.isenabled()


def test_a_collector_that_the_user_turned_off_stays_off() -> None:
    gc.disable()
    with paused():
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_a_state_that_cannot_be_saved_leaves_the_collector_on() -> None:
    gc.enable()
    with pytest.raises(InvalidInputError):
        flatten({"f": lambda: None})
    assert gc.isenabled()
