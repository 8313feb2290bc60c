"""The commit log: one winner a number, older writers fenced, lost replies told from lost races."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rl_ckpt.errors import CommitConflictError, CommitUnknownError, FencedError, StorageError
from rl_ckpt.format import records
from rl_ckpt.format.records import CommitRecord
from rl_ckpt.store.base import Store
from rl_ckpt.store.commit_log import CommitLog
from rl_ckpt.store.urls import open_store
from tests.unit.store.faulty import FaultyStore, once


def commit(log: CommitLog, name: str = "1-a") -> CommitRecord:
    def make(number: int, write_id: str) -> CommitRecord:
        return CommitRecord(
            number=number, run="r", write_id=write_id, epoch=log.epoch, id=name, step=1, manifest_bytes=0,
            manifest_digest="", bytes=0, bytes_written=0, time=0.0,
        )  # fmt: skip

    return log.commit(make)


def fail(operation: str, name: str) -> None:
    raise StorageError(f"connection lost in {operation} of {name}")


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> FaultyStore:
    place = str(tmp_path) if request.param == "local" else f"memory://commit_log_{tmp_path.name}_{id(tmp_path)}"
    return FaultyStore(open_store(place))


def ids(store: Store) -> list[str]:
    return [record.id for record in CommitLog(store, "r").read().commits]


def test_an_empty_log_reads_as_empty(store: FaultyStore) -> None:
    log = CommitLog(store, "r").read()
    assert (log.head, log.commits, log.epoch, log.owner) == (0, (), 0, "")


def test_commits_are_numbered_without_gaps_and_read_in_order(store: FaultyStore) -> None:
    log = CommitLog(store, "r")
    log.claim("me")
    assert [commit(log, f"{i}-x").number for i in range(3)] == [2, 3, 4]
    read = CommitLog(store, "r").read()
    assert [record.id for record in read.commits] == ["0-x", "1-x", "2-x"]
    assert (read.head, read.epoch, read.owner) == (4, 1, "me")


def test_the_older_writer_is_fenced_and_told_by_whom(store: FaultyStore) -> None:
    older, newer = CommitLog(store, "r"), CommitLog(store, "r")
    older.claim("the old job")
    commit(older, "1-a")
    assert not older.overtaken()
    newer.claim("the new job on host b")
    assert older.overtaken()
    for _ in range(2):  # it stays fenced
        with pytest.raises(FencedError, match=r"taken over by the new job on host b \(epoch 2, "):
            commit(older, "2-a")
    commit(newer, "2-b")
    with pytest.raises(FencedError):
        commit(older, "3-a")
    assert ids(store) == ["1-a", "2-b"]


def test_of_many_that_claim_at_once_each_gets_its_own_epoch_and_one_stays(store: FaultyStore) -> None:
    logs = [CommitLog(store, "r") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda log: log.claim("x"), logs))
    assert sorted(log.epoch for log in logs) == list(range(1, 9))

    def won(log: CommitLog) -> bool:
        try:
            commit(log, f"{log.epoch}-x")
        except FencedError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        winners = [log.epoch for log, success in zip(logs, pool.map(won, logs), strict=True) if success]
    assert winners == [8]
    assert ids(store) == ["8-x"]


def test_a_landed_commit_is_recognised_when_the_reply_was_lost(store: FaultyStore) -> None:
    log = CommitLog(store, "r")
    log.claim("me")
    store.after = once(fail, "create")
    assert commit(log, "1-a").number == 2
    assert commit(log, "2-a").number == 3
    assert ids(store) == ["1-a", "2-a"]


def test_a_landed_epoch_is_recognised_when_the_reply_was_lost(store: FaultyStore) -> None:
    log = CommitLog(store, "r")
    store.after = once(fail, "create")
    log.claim("me")
    assert log.epoch == 1
    assert CommitLog(store, "r").read().head == 1


def test_a_commit_that_did_not_land_is_an_error_and_leaves_the_number_free(store: FaultyStore) -> None:
    log = CommitLog(store, "r")
    log.claim("me")
    store.before = once(fail, "create")
    with pytest.raises(StorageError, match="connection lost"):
        commit(log, "1-a")
    assert commit(log, "2-a").number == 2
    assert ids(store) == ["2-a"]
    assert log.take_late() == []


def _fail_reading_too(store: FaultyStore) -> None:
    store.after = once(fail, "create")
    store.before = once(fail, "get")


def test_an_outcome_that_cant_be_found_out_is_unknown(store: FaultyStore) -> None:
    log = CommitLog(store, "r")
    log.claim("me")
    _fail_reading_too(store)
    with pytest.raises(CommitUnknownError, match="reading it back failed too"):
        commit(log, "1-a")
    assert ids(store) == ["1-a"]  # it had landed
    assert log.overtaken()  # nobody sweeps before that is known
    assert commit(log, "2-a").number == 3
    assert [record.id for record in log.take_late()] == ["1-a"]
    assert log.take_late() == []
    assert not log.overtaken()
    assert ids(store) == ["1-a", "2-a"]


def test_a_request_that_arrives_late_is_taken_for_what_it_is(store: FaultyStore) -> None:
    log = CommitLog(store, "r")
    log.claim("me")
    on_its_way: list[tuple[str, bytes]] = []
    create: Callable[[str, bytes], None] = store.inner.create

    def delay(name: str, data: bytes) -> None:
        on_its_way.append((name, data))
        raise StorageError("timed out")

    store.inner.create = delay  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="timed out"):
        commit(log, "1-a")
    store.inner.create = create  # type: ignore[method-assign, assignment]
    create(*on_its_way[0])
    assert commit(log, "2-a").number == 3
    assert [record.id for record in log.take_late()] == ["1-a"]
    assert ids(store) == ["1-a", "2-a"]


def test_a_commit_of_somebody_who_did_not_take_over_is_a_conflict(store: FaultyStore) -> None:
    mine, other = CommitLog(store, "r"), CommitLog(store, "r")
    other.claim("other")
    mine.claim("me")
    other._head = 2  # a writer that does without the claim
    commit(other, "7-theirs")
    with pytest.raises(CommitConflictError, match="another writer committed checkpoint 7-theirs as record 3"):
        commit(mine)


def test_a_damaged_record_in_the_way_is_named(store: FaultyStore) -> None:
    log = CommitLog(store, "r")
    log.claim("me")
    store.put(records.commit_name(2), [b"garbage"])
    with pytest.raises(CommitConflictError, match=r"00000002.json is damaged.* move it away and save again"):
        commit(log)


def test_damaged_and_swapped_records_are_told_and_the_rest_is_read(store: FaultyStore) -> None:
    log = CommitLog(store, "r")
    log.claim("me")
    for i in range(4):
        commit(log, f"{i}-x")
    first, second = store.get(records.commit_name(2)), store.get(records.commit_name(3))
    store.put(records.commit_name(2), [second])
    store.put(records.commit_name(3), [first])
    store.put(records.commit_name(4), [b"x" + first[1:]])
    read = CommitLog(store, "r").read()
    assert [record.id for record in read.commits] == ["3-x"]
    assert set(read.damaged) == {records.commit_name(n) for n in (2, 3, 4)}
    assert "belongs to another place" in read.damaged[records.commit_name(2)]
    assert read.head == 5
    assert CommitLog(store, "another run").read().commits == ()


def test_a_record_that_a_sweep_takes_while_the_log_is_read_is_no_damage(store: FaultyStore) -> None:
    log = CommitLog(store, "r")
    log.claim("me")
    commit(log, "1-a")
    commit(log, "2-a")
    store.before = once(lambda *_: store.inner.delete([records.commit_name(2)]), "get", prefix="commits/")
    read = CommitLog(store, "r").read()
    assert read.damaged == {}
    assert [record.id for record in read.commits][-1:] == ["2-a"]


def test_a_reader_that_is_slower_than_saves_and_sweeps_never_finds_an_empty_run(store: FaultyStore) -> None:
    log = CommitLog(store.inner, "r")
    log.claim("me")
    commit(log, "1-a")
    rounds, one_at_a_time = iter(range(2, 6)), threading.Lock()

    def overtaken(*_: str) -> None:
        """Between the reader's list and its reads, a newer checkpoint is committed and the listed one is swept."""
        with one_at_a_time:
            for step in rounds:
                kept = CommitLog(store.inner, "r").read().commits[-1]
                commit(log, f"{step}-a")
                store.inner.delete([records.commit_name(kept.number)])
                break

    store.before = lambda operation, name: overtaken() if operation == "get" else None
    assert [record.id for record in CommitLog(store, "r").read().commits] == ["5-a"]


def test_a_name_that_only_a_stale_list_has_is_not_waited_for(store: FaultyStore, monkeypatch: Any) -> None:
    log = CommitLog(store, "r")
    log.claim("me")
    commit(log, "1-a")
    stale = store.inner.list(records.COMMITS)
    store.inner.delete([records.commit_name(1)])
    monkeypatch.setattr(store.inner, "list", lambda prefix="": stale)
    assert [record.id for record in CommitLog(store, "r").read().commits] == ["1-a"]


def test_records_are_read_once_each(store: FaultyStore) -> None:
    log = CommitLog(store, "r")
    log.claim("me")
    commit(log)
    reader, reads = CommitLog(store, "r"), []
    store.before = lambda operation, name: reads.append(name) if operation == "get" else None
    reader.read()
    reader.read()
    assert sorted(reads) == [records.commit_name(1), records.commit_name(2)]
