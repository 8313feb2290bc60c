"""`verify`: what it reports of each kind of damage, what it writes back, and what it leaves alone."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from rl_ckpt import Checkpointer, CheckpointNotFoundError, CorruptionError, LatestN, StorageError, VerifyReport
from rl_ckpt.format import manifest as manifests
from rl_ckpt.format import records
from rl_ckpt.format.digest import digest
from rl_ckpt.store.base import Buffer
from rl_ckpt.store.layout import compose_anew, leaves_in, writer_of
from rl_ckpt.store.local import LocalStore
from rl_ckpt.store.pins import Hold, pin
from rl_ckpt.store.repair import spots
from rl_ckpt.store.run import Run
from rl_ckpt.store.verify import verify
from tests.s3_servers import S3Server

FROZEN = np.random.default_rng(0).random(5000)  # 40,000 bytes: too long for a search for one bit
Twice = tuple[str, list[str]]


def save_twice(url: str, options: dict[str, object] | None = None, **more: object) -> list[str]:
    """Three checkpoints: of 1 and 3, both hold `FROZEN` in a file of their own; 3 continues the first one."""
    ids = []
    with Checkpointer(url, storage_options=options, write_streams=1) as ckpt:
        ids.append(ckpt.save_state(0, {"n": np.zeros(3)}).result(60).id)
        ids.append(ckpt.save_state(1, state(1) | more).result(60).id)
        ckpt.load_state(0)
        ids.append(ckpt.save_state(3, state(3) | more).result(60).id)
    return ids


def state(step: int) -> dict[str, object]:
    return {"frozen": FROZEN, "own": np.full(4000, step, np.float64), "n": np.full(3, step)}


@pytest.fixture
def twice(tmp_path: Path) -> Twice:
    return str(tmp_path), save_twice(str(tmp_path))


def shard(url: str, checkpoint: str) -> Path:
    (path,) = (Path(url) / "shards" / checkpoint).iterdir()
    return path


def flip(path: Path, values: bytes, at: int = 5) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(values) + at] ^= 0x11
    path.write_bytes(data)


def contents(url: str) -> dict[str, bytes]:
    return {str(p.relative_to(url)): p.read_bytes() for p in Path(url).rglob("*") if p.is_file()}


def test_a_good_run_is_read_once_and_nothing_is_written(twice: Twice) -> None:
    url, ids = twice
    with Checkpointer(url) as ckpt:
        ckpt.load_state(3)
        ids.append(ckpt.save_state(4, state(3)).result(60).id)  # writes no chunk
    before = contents(url)
    report = Checkpointer(url).verify(repair=True)
    assert report.checkpoints == dict.fromkeys(ids, "good")
    assert report.ok
    assert report.damage == ()
    assert (report.files, report.chunks, report.bytes) == (3, 7, 3 * 24 + 2 * 40_000 + 2 * 32_000)
    assert contents(url) == before
    assert Checkpointer(url).verify(3).chunks == 3


def test_a_damaged_chunk_is_named_and_taken_from_the_other_checkpoint(twice: Twice) -> None:
    url, ids = twice
    path = shard(url, ids[2])
    good = path.read_bytes()
    flip(path, FROZEN.tobytes()[:64])
    report = Checkpointer(url).verify()
    assert list(report.checkpoints.values()) == ["good", "good", "damaged"]
    (damage,) = report.damage
    assert not report.ok
    assert (damage.file, damage.paths, damage.checkpoints) == (f"shards/{ids[2]}/{path.name}", ("frozen",), (ids[2],))
    assert (damage.bytes, damage.repaired_from) == (40_000, None)
    assert len(damage.expected) == len(damage.found) == 32 != (damage.expected == damage.found)
    assert "repair=True" in damage.advice
    with pytest.warns(UserWarning, match=f"was read whole: .*{damage.found}.*{ids[1]}.*repair=True"):
        assert Checkpointer(url).load_state()["frozen"].tobytes() == FROZEN.tobytes()
    report = Checkpointer(url).verify(3, repair=True)
    assert report.checkpoints == {ids[2]: "repaired"}
    assert ids[1] in (report.damage[0].repaired_from or "")
    assert path.read_bytes() == good
    assert Checkpointer(url).verify().damage == ()


def test_what_nobody_else_has_stays_as_it_is_and_is_said(twice: Twice) -> None:
    url, ids = twice
    flip(shard(url, ids[2]), np.full(20, 3.0).tobytes())
    before = contents(url)
    report = Checkpointer(url).verify(repair=True)
    assert report.checkpoints[ids[2]] == "damaged"
    assert "no other checkpoint" in report.damage[0].advice
    assert contents(url) == before


@pytest.mark.parametrize("lost", [40, 60_000])
def test_a_file_cut_short_is_whole_again_where_its_chunks_are_elsewhere(twice: Twice, lost: int) -> None:
    url, ids = twice
    with Checkpointer(url) as ckpt:
        ckpt.load_state(0)
        ckpt.save_state(5, {"own": np.full(4000, 3.0), "n": np.full(3, 3)}).result(60)
    path = shard(url, ids[2])
    good = path.read_bytes()
    path.write_bytes(good[:-lost])
    report = Checkpointer(url).verify(repair=True)
    assert report.checkpoints[ids[2]] == "repaired", report.damage
    assert path.read_bytes() == good


@pytest.mark.parametrize("packed", [False, True])
def test_a_deleted_file_is_made_anew_byte_for_byte(tmp_path: Path, packed: bool) -> None:
    url = str(tmp_path)
    small = {f"{i:04}": np.full(2, i, "f4" if i % 2 else "f8") for i in range(1500)} if packed else {"b": np.eye(3)}
    ids = []
    with Checkpointer(url, write_streams=1, chunk_bytes=16_000) as ckpt:
        ckpt.save_state(0, {}).result(60)
        for step in (1, 2):
            ids.append(ckpt.save_state(step, {"frozen": FROZEN, **small}).result(60).id)
            ckpt.load_state(0)  # from where another branch begins: it writes everything once more
    before = contents(url)
    for path in (tmp_path / "shards" / ids[1]).iterdir():
        path.unlink()
    report = Checkpointer(url).verify(repair=True)
    broken = [item for item in report.damage if item.repaired_from is None]
    assert not broken, broken
    assert contents(url) == before


def test_a_file_that_its_writers_manifest_does_not_name_is_looked_at_all_the_same(tmp_path: Path) -> None:
    url = str(tmp_path)
    with Checkpointer(url, write_streams=1) as ckpt:
        for step in (1, 2):
            ckpt.save_state(step, {"frozen": FROZEN, "n": np.full(3, step)}).result(60)
    run = Run.open(url)
    first, second = run.log.read().commits
    bare = msgspec.structs.replace(run.manifest(first), files=(), arrays=(), nodes={})
    data = manifests.encode(bare)
    (tmp_path / records.manifest_name(first.id)).write_bytes(data)
    changed = msgspec.structs.replace(first, manifest_bytes=len(data), manifest_digest=digest(data).hex())
    (tmp_path / records.commit_name(first.number)).write_bytes(records.encode(changed))
    report = Checkpointer(url).verify()
    assert report.checkpoints[second.id] == "good", report.damage
    flip(shard(url, first.id), FROZEN.tobytes())
    report = Checkpointer(url).verify(repair=True)
    assert report.checkpoints[second.id] == "damaged", report


def test_a_header_is_made_anew_and_the_values_stay(twice: Twice) -> None:
    url, ids = twice
    path = shard(url, ids[2])
    good = path.read_bytes()
    path.write_bytes(good[:24] + b"\xff" * 64 + good[88:-300] + b"\xff" * 64 + good[-236:])
    with pytest.raises((pa.ArrowInvalid, OSError)):
        pa.ipc.open_file(pa.py_buffer(path.read_bytes())).get_batch(0)
    report = Checkpointer(url).verify()
    assert report.checkpoints[ids[2]] == "damaged"
    assert "Arrow" in report.damage[0].found
    assert Checkpointer(url).verify(repair=True).ok
    assert path.read_bytes() == good


def test_a_wrong_name_in_a_header_is_found(twice: Twice) -> None:
    url, ids = twice
    path = shard(url, ids[2])
    path.write_bytes(path.read_bytes().replace(b"frozen", b"thawed"))
    assert "thawed" in Checkpointer(url).verify().damage[0].found
    assert Checkpointer(url).verify(repair=True).ok
    assert b"thawed" not in path.read_bytes()


def one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("how", [one_bit, Path.unlink])
def test_run_json_is_had_back_from_the_commit_log(twice: Twice, how: Callable[[Path], None]) -> None:
    url, ids = twice
    how(Path(url) / "run.json")
    ckpt = Checkpointer(url)
    for call in (ckpt.load_state, ckpt.latest, lambda: ckpt.save_state(9, {})):  # none may take it for a new run
        with pytest.raises(CorruptionError, match=r"run.json"):
            call()
    assert set(Checkpointer(url).verify().checkpoints.values()) == {"damaged"}
    assert Checkpointer(url).verify(repair=True).checkpoints == dict.fromkeys(ids, "repaired")
    assert Checkpointer(url).load_state()["n"][0] == 3
    assert Checkpointer(url).verify().ok


def test_one_wrong_bit_in_a_record_or_manifest_is_turned_back(twice: Twice) -> None:
    url, ids = twice
    before = contents(url)
    one_bit(sorted((Path(url) / "commits").iterdir())[-1])
    one_bit(Path(url) / records.manifest_name(ids[1]))
    report = Checkpointer(url).verify()
    assert report.checkpoints == {ids[0]: "good", ids[1]: "damaged"}
    assert Checkpointer(url).verify(repair=True).checkpoints == dict(
        zip(ids, ["good", "repaired", "repaired"], strict=True)
    )
    assert contents(url) == before


def test_a_lost_manifest_and_chunk_come_from_a_further_source(twice: Twice) -> None:
    url, ids = twice
    manifest = Path(url) / records.manifest_name(ids[2])
    own = np.full(4000, 3.0).tobytes()
    memory = [manifest.read_bytes(), own, b"\0" * 32_000]
    before = contents(url)
    manifest.unlink()
    flip(shard(url, ids[2]), own[:64])
    asked = []

    def more(digest: bytes, size: int) -> bytes | None:
        asked.append((digest, size))
        return next((data for data in memory if len(data) == size), None)

    assert verify(url, {}, None, True, more).checkpoints[ids[2]] == "repaired"
    assert contents(url) == before
    assert [size for _, size in asked] == [len(memory[0]), 32_000]


def test_a_further_source_is_not_believed(twice: Twice) -> None:
    url, ids = twice
    flip(shard(url, ids[2]), np.full(20, 3.0).tobytes())
    before = contents(url)
    assert not verify(url, {}, 3, True, lambda digest, size: bytes(size)).ok
    assert contents(url) == before


def test_a_repair_that_is_cut_off_leaves_what_was_there(twice: Twice, monkeypatch: pytest.MonkeyPatch) -> None:
    url, ids = twice
    flip(shard(url, ids[2]), FROZEN.tobytes()[:64])
    before = contents(url)
    put = os.rename

    def fail(source: str, target: str) -> None:
        raise OSError(5, "the power went")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(StorageError, match="the power went"):
        Checkpointer(url).verify(repair=True)
    monkeypatch.setattr(os, "rename", put)
    assert contents(url) == before
    assert Checkpointer(url).verify(repair=True).ok


def test_files_that_other_checkpoints_need_are_mended_for_them_too(twice: Twice) -> None:
    """Only step 4 is asked for; what it shares a file with is no worse off for that."""
    url, ids = twice
    with Checkpointer(url) as ckpt:
        ckpt.load_state(3)
        newest = ckpt.save_state(4, {"own": np.full(4000, 3.0)}).result(60).id
    path = shard(url, ids[2])
    good = path.read_bytes()
    flip(path, FROZEN.tobytes()[:64])
    flip(path, np.full(20, 3.0).tobytes())
    report = verify(url, {}, 4, True, lambda digest, size: np.full(4000, 3.0).tobytes())
    assert report.checkpoints == {newest: "repaired"}
    assert path.read_bytes() == good


def test_a_checkpoint_is_held_against_the_sweep_while_it_is_verified(
    twice: Twice, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, ids = twice
    seen: list[str] = []
    read_into = LocalStore.read_into

    def sweep_meanwhile(store: LocalStore, name: str, reads: list[tuple[int, memoryview]]) -> None:
        if not seen:
            seen.append(name)
            with Checkpointer(url, keep=[LatestN(1)], grace_s=0) as other:
                other.save_state(7, {"n": np.ones(3)}).result(60)
        read_into(store, name, reads)

    monkeypatch.setattr(LocalStore, "read_into", sweep_meanwhile)
    assert Checkpointer(url).verify(1, repair=True).checkpoints == {ids[1]: "good"}
    assert {info.step for info in Checkpointer(url).checkpoints()} == {1, 7}
    assert not list(Path(url).glob("pins/*"))


def test_a_repair_beside_a_job_leaves_out_what_that_job_drops(twice: Twice, monkeypatch: pytest.MonkeyPatch) -> None:
    url, ids = twice
    steps = [7]

    def drop_the_oldest(run: Run, checkpoint: str, seconds: float) -> AbstractContextManager[Hold]:
        if steps:
            with Checkpointer(url, keep=[LatestN(2)], grace_s=0) as other:
                other.save_state(steps.pop(), {"n": np.ones(3)}).result(60)
        return pin(run, checkpoint, seconds)

    monkeypatch.setattr("rl_ckpt.store.verify.pin", drop_the_oldest)
    assert Checkpointer(url).verify(repair=True).checkpoints == {ids[2]: "good"}
    steps.append(8)
    with pytest.raises(CheckpointNotFoundError, match="has no checkpoint of step 3; its steps are 7, 8"):
        Checkpointer(url).verify(3, repair=True)


def test_a_page_that_the_disk_cannot_read_costs_no_good_chunk_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path)
    state = {f"a{i}": np.random.default_rng(i).random(5000) for i in range(6)}
    with Checkpointer(url, write_streams=1) as ckpt:
        first = ckpt.save_state(0, state).result(60).id
    path = shard(url, first)
    away = path.rename(tmp_path / "away")
    with Checkpointer(url, write_streams=1) as ckpt:  # a copy of one chunk, and of no other
        ckpt.save_state(1, {"a2": state["a2"]}).result(60)
    away.rename(path)
    broken, inode = path.read_bytes().index(state["a2"].tobytes()) + 9000, path.stat().st_ino
    preadv = os.preadv

    def fail_there(fd: int, views: list[memoryview], offset: int) -> int:
        size = sum(len(view) for view in views)
        if os.fstat(fd).st_ino != inode or not offset <= broken < offset + size:
            return preadv(fd, views, offset)
        if offset // 4096 == broken // 4096:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, [views[0][: broken // 4096 * 4096 - offset]], offset)

    monkeypatch.setattr(os, "preadv", fail_there)
    assert Checkpointer(url).verify(0, repair=True).checkpoints == {first: "repaired"}
    assert Checkpointer(url).verify().ok
    found = Checkpointer(url).load_state(0)
    assert all(found[name].tobytes() == values.tobytes() for name, values in state.items())


def test_what_is_good_at_first_and_not_when_it_is_copied_stays_where_it_is(
    twice: Twice, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, ids = twice
    path = shard(url, ids[2])
    flip(path, FROZEN.tobytes())
    before = path.read_bytes()
    monkeypatch.setattr("rl_ckpt.store.mend._read_all", lambda store, name, area: None)
    report = Checkpointer(url).verify(3, repair=True)
    assert report.checkpoints == {ids[2]: "damaged"}
    assert path.read_bytes() == before


def test_where_nothing_may_be_written_it_still_reads(twice: Twice, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(store: LocalStore, name: str, data: Buffer) -> None:
        raise StorageError("read-only")

    monkeypatch.setattr(LocalStore, "create", refuse)
    assert Checkpointer(twice[0]).verify(3).ok
    with pytest.raises(StorageError, match="read-only"):
        Checkpointer(twice[0]).verify(3, repair=True)


def test_the_same_on_s3(moto_server: S3Server) -> None:
    options = moto_server.storage_options()
    url = f"s3://{moto_server.new_bucket()}/verify"
    ids = save_twice(url, options)
    store = Run.open(url, options).store
    before = {item.name: store.get(item.name) for item in store.list()}
    (name,) = [name for name in before if name.startswith(f"shards/{ids[2]}/")]
    damaged = bytearray(before[name])
    damaged[damaged.index(FROZEN.tobytes()) + 100] ^= 0x11
    store.put(name, [damaged])
    ckpt = Checkpointer(url, storage_options=options)
    with pytest.warns(UserWarning, match="was read whole"):
        assert ckpt.load_state()["frozen"].tobytes() == FROZEN.tobytes()
    assert ckpt.verify().checkpoints == {ids[0]: "good", ids[1]: "good", ids[2]: "damaged"}
    assert ckpt.verify(repair=True).checkpoints[ids[2]] == "repaired"
    assert {item.name: store.get(item.name) for item in store.list()} == before


def test_the_report_counts_each_shared_chunk_once(twice: Twice) -> None:
    url, _ = twice
    run = Run.open(url)
    store = run.store
    manifest = run.manifest(run.log.read().commits[-1])
    assert sum(map(len, spots(manifest).values())) == 3
    before = store.stats.snapshot().bytes_read
    report: VerifyReport = Checkpointer(url).verify(3)
    assert report.bytes == 72_024
    assert before <= store.stats.snapshot().bytes_read


@pytest.mark.parametrize(
    "run", sorted((Path(__file__).resolve().parents[2] / "data").glob("v*/*")), ids=lambda run: run.name
)
def test_golden_runs_are_good_and_their_files_can_be_made_anew(run: Path) -> None:
    report = Checkpointer(str(run)).verify()
    assert report.checkpoints
    assert report.ok, report.damage
    opened = Run.open(str(run))
    for commit in opened.log.read().commits:
        manifest = opened.manifest(commit)
        for entry in manifest.files:
            if writer_of(entry.name) == commit.id:
                data = bytearray((run / entry.name).read_bytes())
                made = compose_anew(entry, leaves_in(manifest, entry.name), memoryview(data))
                assert made is not None
                assert b"".join(map(bytes, made.segments)) == bytes(data)
