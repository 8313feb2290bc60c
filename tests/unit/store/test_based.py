"""A fork's store: which object a name means, wherever the bases are, and that nothing of theirs is written to."""

from __future__ import annotations

import itertools
import os
import pickle
from pathlib import Path

import pytest

from rl_ckpt.errors import CorruptionError, InvalidInputError
from rl_ckpt.format import records
from rl_ckpt.format.records import RunRecord
from rl_ckpt.store.base import ObjectMissingError, Store
from rl_ckpt.store.based import (
    BasedStore,
    base_entry,
    base_url,
    open_run_store,
    outer_base,
    self_contained,
    sizes_of,
    with_bases,
)
from rl_ckpt.store.urls import open_store

_names = itertools.count()
FILE = "shards/3-aa/local-0.arrow"


def run_record(*bases: str) -> RunRecord:
    return RunRecord(2, "r", 1.0, "test", "probed", bases, ("3-aa",) * len(bases))


@pytest.mark.parametrize(
    ("run", "base", "entry"),
    [
        ("s3://bucket/pbt/run-2", "s3://bucket/pbt/run-1", "../run-1"),
        ("s3://bucket/run-2", "s3://bucket/old/run-1", "../old/run-1"),
        ("s3://bucket/run-2", "s3://other/run-1", "s3://other/run-1"),
        ("s3://bucket/run-2", "file:///bucket/run-1", "file:///bucket/run-1"),
        ("file:///data/a/run-2", "file:///data/b/run-1", "../../b/run-1"),
        ("file:///data/run-2", "file:///home/run-1", "file:///home/run-1"),
    ],
)
def test_a_base_is_named_relative_to_the_run_below_one_root(run: str, base: str, entry: str) -> None:
    assert base_entry(run, base) == entry
    assert base_url(run, entry) == base


@pytest.mark.parametrize("entry", ["../../../x", "../.."])
def test_a_base_that_leads_out_of_the_bucket_is_refused(entry: str) -> None:
    with pytest.raises(CorruptionError, match="leads nowhere"):
        base_url("s3://bucket/run", entry)


def test_neighbours_are_found_where_a_linked_folder_really_is(tmp_path: Path) -> None:
    (tmp_path / "real/run").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "real/run", tmp_path / "elsewhere/link")
    real = os.path.realpath(tmp_path)
    assert base_url(f"file://{tmp_path}/elsewhere/link", "../source") == f"file://{real}/real/source"
    assert base_entry(f"file://{tmp_path}/elsewhere/link", f"file://{tmp_path}/real/source") == "../source"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("base/0/shards/a/b", (0, "shards/a/b")),
        ("base/12/shards/", (12, "shards/")),
        ("base/1/base/0/shards/a", (1, "base/0/shards/a")),
        ("shards/a", None),
        ("base/", None),
        ("base/00/shards/a", None),
        ("base/٣/shards/a", None),
        ("base/0/manifests/a", None),
        ("base/0/base/x/shards/a", None),
        ("base//shards/a", None),
    ],
)
def test_names_in_bases(name: str, parts: tuple[int, str] | None) -> None:
    assert records.split_base(name) == parts
    if parts is not None:
        assert records.based_name(*parts) == name


@pytest.fixture(params=["local", "memory"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, Store]:
    """The stores of a source with one file, and of a fork."""
    root = str(tmp_path) if request.param == "local" else f"memory://based_{next(_names)}"
    source, own = open_store(f"{root}/source"), open_store(f"{root}/fork")
    source.put(FILE, [b"0123456789"])
    source.put(records.RUN_FILE, [b"{}"])
    own.put(records.RUN_FILE, [records.encode(run_record("../source"))])
    own.put("shards/4-bb/local-0.arrow", [b"own"])
    return source, own


def opened(own: Store, how: str) -> Store:
    store = open_run_store(own.url) if how == "lazily" else with_bases(own, run_record("../source"))
    return pickle.loads(pickle.dumps(store)) if how == "pickled" else store


@pytest.mark.parametrize("how", ["lazily", "read", "pickled"])
def test_a_bases_files_are_read_as_if_they_were_the_runs_own(pair: tuple[Store, Store], how: str) -> None:
    source, own = pair
    if how == "pickled" and own.url.startswith("memory"):
        pytest.skip("a store in memory is one process's")
    store, name = opened(own, how), f"base/0/{FILE}"
    assert store.get(name) == store.getter()(name) == b"0123456789"
    assert store.getter()("shards/4-bb/local-0.arrow") == b"own"
    room = bytearray(4)
    store.read_into(name, [(2, memoryview(room))])
    assert room == b"2345"
    assert store.exists(name)
    assert not store.exists("base/0/shards/none")
    assert store.object_url(name) == source.object_url(FILE)
    assert store.local_path(name) == source.local_path(FILE)
    assert [(item.name, item.size_bytes) for item in store.list("base/0/shards/3-aa/")] == [(name, 10)]
    assert [item.name for item in store.list("shards/")] == ["shards/4-bb/local-0.arrow"]
    assert sizes_of(store, [name]) == {name: 10, "shards/4-bb/local-0.arrow": 3}
    assert store.is_local() == own.is_local()
    assert outer_base(store, name) == source.url
    assert outer_base(store, "shards/4-bb/local-0.arrow") is None
    assert store.stats.snapshot().bytes_read >= 14, "what bases give is counted too"


def test_every_operation_of_a_store_goes_to_the_right_one() -> None:
    operations = {name for name, value in vars(Store).items() if callable(value) and not name.startswith("_")}
    assert operations <= vars(BasedStore).keys(), "one that is missing here would look for a base's files in the fork"


def test_nothing_is_written_to_a_base(pair: tuple[Store, Store]) -> None:
    source, own = pair
    store, name = opened(own, "read"), f"base/0/{FILE}"
    for call in (lambda: store.put(name, [b"x"]), lambda: store.create(name, b"x"), lambda: store.delete([name])):
        with pytest.raises(InvalidInputError, match=r"belongs to a run that .*/fork was forked from"):
            call()
    store.put("shards/5/new", [b"1"])
    store.delete(["shards/4-bb/local-0.arrow"])
    assert [item.name for item in own.list("shards/")] == ["shards/5/new"]
    assert source.get(FILE) == b"0123456789"


def test_a_base_that_is_gone_is_named(pair: tuple[Store, Store]) -> None:
    source, own = pair
    store = opened(own, "read")
    source.delete([FILE])
    with pytest.raises(ObjectMissingError):
        store.get(f"base/0/{FILE}")
    assert store.missing(f"base/0/{FILE}") == f"{source.url}/{FILE} is missing"
    source.delete([records.RUN_FILE])
    assert "was forked from the run at " + source.url in store.missing(f"base/0/{FILE}")
    assert sizes_of(store, [f"base/0/{FILE}"]) == {"shards/4-bb/local-0.arrow": 3}


def test_a_base_that_run_json_does_not_have_is_damage(pair: tuple[Store, Store]) -> None:
    with pytest.raises(CorruptionError, match="has 1 bases; a manifest names files of base 1"):
        opened(pair[1], "lazily").get(f"base/1/{FILE}")


def test_a_copy_that_stands_by_itself_has_its_bases_files_in_it(pair: tuple[Store, Store]) -> None:
    own, name = pair[1], f"base/0/{FILE}"
    record = self_contained(run_record("../source"))
    assert (record.bases, record.held) == (("base/0",), ("",))
    store = with_bases(own, record)
    store.put(name, [b"copied"])
    assert own.get(name) == store.get(name) == b"copied"
    assert sizes_of(store, [name])[name] == 6
    assert outer_base(store, name) is None
    store.delete([name])
    assert not store.exists(name)


def test_a_run_on_a_disk_with_a_base_elsewhere_is_not_read_as_local_files(tmp_path: Path) -> None:
    own = open_store(str(tmp_path / "fork"))
    store = with_bases(own, run_record(f"memory://based_{next(_names)}"))
    assert own.is_local()
    assert not store.is_local()


def test_bases_get_the_options_of_the_run_or_those_that_are_given_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    record = run_record("../source", "s3://other/run", "file:///source")

    def of_bases(options: dict[str, object]) -> list[dict[str, object]]:
        store = with_bases(open_store("s3://bucket/run", options), record, options)
        assert isinstance(store, BasedStore)
        return [store.base(number).storage_options for number in range(2)]

    assert of_bases({"key": "a", "secret": "b"}) == [{"key": "a", "secret": "b"}] * 2
    assert of_bases({"key": "a", "bases": {"anon": True}}) == [{"anon": True}] * 2
    local = with_bases(open_store("s3://bucket/run", {"key": "a"}), record)
    assert isinstance(local, BasedStore)
    assert local.base(2).storage_options == {}
