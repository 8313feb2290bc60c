"""The store over any fsspec file system: the contract on fsspec's local one, and how foreign errors come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rl_ckpt.errors import InvalidInputError, StorageError
from rl_ckpt.store.base import ObjectExistsError, Store
from rl_ckpt.store.generic import FsspecStore
from rl_ckpt.store.probe import probe_create_only
from tests.store.contract import StoreContract


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return FsspecStore(f"file://{tmp_path}/run")


class TestFsspecStore(StoreContract):
    pass


class FailingFileSystem:
    """Raises given errors, then lets the calls through to the file system below."""

    def __init__(self, below: Any, errors: list[Exception]) -> None:
        self._below = below
        self.errors = errors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._below, name)

    def cat_file(self, path: str) -> bytes:
        if self.errors:
            raise self.errors.pop(0)
        data: bytes = self._below.cat_file(path)
        return data


class CloudError(Exception):
    """As the libraries of clouds raise them: not an OSError, with an HTTP status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the cloud says {status}")
        self.status = status


def failing(store: Store, errors: list[Exception]) -> FsspecStore:
    again = FsspecStore(store.url, {"retry_base_s": 0.001, "retry_deadline_s": 5})
    again._fs = FailingFileSystem(again._fs, errors)
    return again


def test_transient_failures_are_retried_and_counted(store: Store):
    store.put("a", [b"x"])
    again = failing(store, [ConnectionResetError("cut"), TimeoutError("slow"), CloudError(503), CloudError(429)])
    assert again.get("a") == b"x"
    assert again.stats.snapshot().retries == 4


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), CloudError(403), RuntimeError("boom")])
def test_lasting_failures_are_told_at_once(store: Store, error: Exception):
    store.put("a", [b"x"])
    again = failing(store, [error])
    with pytest.raises(
        StorageError, match=rf"get of {store.url}/a failed after 1 try .*{type(error).__name__}"
    ) as told:
        again.get("a")
    assert told.value.__cause__ is error


def test_the_deadline_ends_the_retries(store: Store):
    again = FsspecStore(store.url, {"retry_base_s": 0.001, "retry_deadline_s": 0.05})
    again._fs = FailingFileSystem(again._fs, [CloudError(503) for _ in range(10_000)])
    with pytest.raises(StorageError, match=r"failed after \d+ tries"):
        again.get("a")
    assert 2 <= again.stats.snapshot().retries < 9_999


def test_options_that_do_not_fit(tmp_path: Path):
    with pytest.raises(InvalidInputError, match=r"retry_deadline_s.*must be seconds"):
        FsspecStore(f"file://{tmp_path}", {"retry_deadline_s": "soon"})
    with pytest.raises(InvalidInputError, match="cannot open sftp://nowhere"):
        FsspecStore("sftp://nowhere/x", {"port": "not a port"})


class PromisesNothing(FsspecStore):
    """Creates as a store does that accepts the condition and ignores it."""

    def create(self, name: str, data: bytes) -> None:
        self.put(name, [data])


class LosesReplies(FsspecStore):
    """Creates, but says that the object was there, as after a lost reply and a retry."""

    def create(self, name: str, data: bytes) -> None:
        super().create(name, data)
        raise ObjectExistsError(name)


def test_probe_refuses_a_store_that_lets_several_win(tmp_path: Path):
    store = PromisesNothing(f"file://{tmp_path}")
    with pytest.raises(InvalidInputError, match=r"8 of 8 writers created .*weak_commits=True"):
        probe_create_only(store)
    assert store.list() == []


def test_probe_forgives_lost_replies(tmp_path: Path):
    store = LosesReplies(f"file://{tmp_path}")
    probe_create_only(store)
    assert store.list() == []
