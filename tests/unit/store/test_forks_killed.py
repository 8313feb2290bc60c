"""Forks that die, and forks beside others: the source loses nothing, and the same call makes the fork."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rl_ckpt import (
    Checkpointer,
    CheckpointNotFoundError,
    InvalidInputError,
    LatestN,
    fork,
)
from rl_ckpt.format import records
from rl_ckpt.store import forks as forks_module
from rl_ckpt.store.base import Store
from rl_ckpt.store.committer import Committer
from rl_ckpt.store.pins import read_pins
from rl_ckpt.store.run import Run
from rl_ckpt.store.urls import open_store
from tests.unit.store.faulty import FaultyStore, Stopped
from tests.unit.store.forked import FROZEN, files, in_memory, load, pins, run_of, save, state
from tests.unit.trees import assert_same

# A process that dies at any operation of a fork.


def stopping(at: int, when: str) -> tuple[list[str], Callable[[Store], FaultyStore]]:
    """What makes stores that stop the world at an operation, of all of them together; and what was done."""
    seen: list[str] = []

    def stop(moment: str) -> Callable[[str, str], None]:
        def hook(operation: str, name: str) -> None:
            if moment == when:  # what fails has no moment after it
                seen.append(f"{operation} {name}")
                if len(seen) == at + 1:
                    raise Stopped

        return hook

    def make(store: Store) -> FaultyStore:
        made = FaultyStore(store)
        made.before, made.after = stop("before"), stop("after")
        return made

    return seen, make


def fork_on(source: str, url: str, make: Callable[[Store], Store], patch: pytest.MonkeyPatch) -> None:
    with patch.context() as inner:
        inner.setattr(forks_module, "open_store", lambda url, options=None: make(open_store(url, options)))
        inner.setattr("rl_ckpt.store.run.open_store", lambda url, options=None: make(open_store(url, options)))
        inner.setattr(forks_module, "probe_create_only", lambda store: store.create("probe/x", b""))
        fork(source, url)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_fork_that_is_killed_anywhere_can_be_made_again(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    source = f"{in_memory()}/source"
    save(source, range(2))
    seen, make = stopping(-1, when)
    fork_on(source, f"{in_memory()}/fork", make, monkeypatch)
    assert len(seen) > 10
    for at in range(len(seen)):
        url = f"{in_memory()}/fork"
        kept = {name: open_store(source).get(name) for name in files(source)}
        _, make = stopping(at, when)
        with pytest.raises(Stopped):
            fork_on(source, url, make, monkeypatch)
        there = {name: open_store(source).get(name) for name in files(source)}
        assert kept.items() <= there.items(), "nothing of the source was changed"
        done = files(url, records.COMMITS) and Checkpointer(url).checkpoints()
        if not done:
            fork(source, url)
        assert [info.step for info in Checkpointer(url).checkpoints()] == [1], seen[at]
        assert_same(load(url), state(1))
        assert pins(source)[run_of(url)].expires > 2e11, seen[at]
        save(url, range(2, 4), FROZEN + 1, keep=[LatestN(1)], grace_s=0)
        assert run_of(url) not in pins(source)
        left = [pin for pin in pins(source).values() if pin.by == f"fork {url}"]
        assert all(pin.expires < 2e11 for pin in left), "what nothing came of goes by itself"


def test_a_sweep_that_found_a_forks_first_pin_over_does_not_take_its_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fork was begun long ago and is finished now, while a sweep of the source is about to delete that pin."""
    source, url = f"{in_memory()}/source", f"{in_memory()}/fork"
    save(source, range(2))
    seen, make = stopping(-1, "after")
    fork_on(source, f"{in_memory()}/fork", make, monkeypatch)
    at = seen.index(f"create {records.RUN_FILE}")
    monkeypatch.setattr(forks_module, "_BEGIN_S", -1.0)
    _, make = stopping(at, "after")
    with pytest.raises(Stopped):
        fork_on(source, url, make, monkeypatch)
    committer = Committer(Run.open(source), (), 0.0)

    def meanwhile(*args: Any) -> Any:
        found = read_pins(*args)
        fork(source, url)
        return found

    monkeypatch.setattr("rl_ckpt.store.sweep.read_pins", meanwhile)
    committer.sweeper._pinned()
    committer.close()
    assert pins(source).keys() >= {run_of(url)}


def test_another_fork_is_not_taken_up_for_one_that_was_not_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    root = in_memory()
    save(f"{root}/source", range(2))
    _, make = stopping(-1, "never")

    def stop_at_commit(store: Store) -> FaultyStore:
        made = make(store)

        def hook(operation: str, name: str) -> None:
            if (operation, name[:10]) == ("put", "manifests/"):
                raise Stopped

        made.before = hook
        return made

    with pytest.raises(Stopped):
        fork_on(f"{root}/source", f"{root}/fork", stop_at_commit, monkeypatch)
    with pytest.raises(InvalidInputError, match="that was never finished"):
        fork(f"{root}/source", f"{root}/fork", at=0)
    assert fork(f"{root}/source", f"{root}/fork").step == 1


def test_a_checkpoint_dropped_while_it_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    root = in_memory()
    save(f"{root}/source", range(2))
    run = Run.open(f"{root}/source")
    first = run.log.read().commits[0]

    def sweep(store: Store) -> None:
        run.store.delete([records.commit_name(first.number)])

    monkeypatch.setattr(forks_module, "probe_create_only", sweep)
    with pytest.raises(CheckpointNotFoundError, match="was dropped"):
        fork(f"{root}/source", f"{root}/fork", at=0)
    assert files(f"{root}/source", "pins/") == set()
    assert files(f"{root}/fork") == set()


def test_of_two_forks_to_one_place_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    root = in_memory()
    save(f"{root}/source", range(2))
    probe = forks_module.probe_create_only

    def other_first(store: Store) -> None:
        monkeypatch.setattr(forks_module, "probe_create_only", probe)
        fork(f"{root}/source", f"{root}/fork", at=0)

    monkeypatch.setattr(forks_module, "probe_create_only", other_first)
    with pytest.raises(InvalidInputError, match="was created by another process meanwhile"):
        fork(f"{root}/source", f"{root}/fork", at=1)
    assert [c.step for c in Checkpointer(f"{root}/fork").checkpoints()] == [0]
    assert list(pins(f"{root}/source")) == [run_of(f"{root}/fork")]
