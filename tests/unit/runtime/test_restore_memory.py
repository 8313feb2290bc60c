"""A shard server's memory for restores: given back when told, and when a coordinator is gone; never back after that."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from rl_ckpt.errors import StorageError
from rl_ckpt.runtime import memory
from rl_ckpt.runtime.restore_memory import RestoreMemory
from rl_ckpt.runtime.transport.shelf import Shelf

SIZE = 100_000


class Place:
    """A server's memory and shelf."""

    def __init__(self) -> None:
        self.owned = memory.ServerMemory(f"test-{uuid.uuid4().hex}")
        self.shelf = Shelf()
        self.restores = RestoreMemory(self.owned, self.shelf)

    def files(self) -> list[str]:
        return sorted(self.owned.names("restore-"))


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    yield made
    for name in made.files():
        made.restores.forget(name)
    made.owned.close()


def mapped_files() -> str:
    return Path("/proc/self/maps").read_text()


def test_what_is_forgotten_is_free_and_does_not_come_back(place: Place) -> None:
    name = "restore-newest#a-1"
    place.restores.open(name, SIZE)[:] = b"x" * SIZE
    path = place.owned.path(name)
    assert path in mapped_files()
    place.restores.forget(name)
    assert path not in mapped_files()
    with pytest.raises(StorageError, match="given up already"):
        place.restores.open(name, SIZE)
    assert place.files() == []


def test_a_map_that_is_made_while_it_is_forgotten_is_forgotten_too(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "restore-newest#a-1"
    place.restores.open(name, SIZE)
    path, real = place.owned.path(name), place.owned.remove

    def remove(removed: str) -> None:
        memory.mapped(path)  # by `serve`, for a peer
        real(removed)

    monkeypatch.setattr(place.owned, "remove", remove)
    place.restores.forget(name)
    assert path not in mapped_files()
    with pytest.raises(StorageError, match="is gone"):
        memory.mapped(path)


def test_what_a_coordinator_left_goes_with_the_first_restore_of_the_next(place: Place) -> None:
    place.restores.open("restore-newest#a-1", SIZE)
    place.restores.open("restore-7#a-2", SIZE)
    place.restores.open("restore-newest#b-1", SIZE)
    assert place.files() == ["restore-newest#b-1"]
    place.restores.open("restore-newest#b-2", SIZE)
    assert place.files() == ["restore-newest#b-1", "restore-newest#b-2"], "restores of one coordinator are its own"
    with pytest.raises(StorageError, match="given up already"):
        place.restores.open("restore-7#a-2", SIZE)
    place.restores.open("restore-newest#a-3", SIZE)
    assert "restore-newest#b-2" in place.files(), "a late call of the dead one takes nothing away"


def test_what_is_just_being_made_for_a_dead_coordinator_goes_too(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = place.owned.make

    def make(name: str, size_bytes: int) -> str:
        if name == "restore-newest#a-1":
            place.restores.open("restore-newest#b-1", SIZE)
        return real(name, size_bytes)

    monkeypatch.setattr(place.owned, "make", make)
    with pytest.raises(StorageError, match="given up already"):
        place.restores.open("restore-newest#a-1", SIZE)
    assert place.files() == ["restore-newest#b-1"]


def test_what_a_killed_server_brought_in_goes_when_it_comes_back(place: Place) -> None:
    place.owned.make("restore-newest#a-1", SIZE)
    staged = place.owned.make("generation-0-x", SIZE)
    memory.ServerMemory(Path(staged).parent.name)  # the server comes back
    assert place.files() == []
    assert os.path.exists(staged), "what was staged for a save stays"
