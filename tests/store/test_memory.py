"""The memory store: the contract, and that stores of one url share their objects within the process."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from rl_ckpt.store.base import Store
from rl_ckpt.store.urls import open_store
from tests.store.contract import StoreContract


@pytest.fixture
def store() -> Iterator[Store]:
    store = open_store(f"memory://test-{uuid.uuid4().hex}/run")
    yield store
    store.delete([o.name for o in store.list()])


class TestMemoryStore(StoreContract):
    pass


def test_stores_of_one_url_share_objects_and_others_do_not(store: Store):
    store.put("a", [b"x"])
    assert open_store(store.url).get("a") == b"x"
    assert open_store(store.url + "2").list() == []


def test_has_no_local_path_and_tells_no_free_space(store: Store):
    assert store.local_path("a") is None
    assert store.free_bytes() is None
