"""What differs between two checkpoints, by how much, and what it takes to tell."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from rl_ckpt import Catalog, Checkpointer, CheckpointNotFoundError, CorruptionError, InvalidInputError, diff, fork
from rl_ckpt.format import records
from rl_ckpt.store import compare
from rl_ckpt.store.run import Run
from tests.s3_servers import S3Server

CHUNK = 1 << 12


def save(url: str, *states: Any, **options: Any) -> list[str]:
    with Checkpointer(url, **({"chunk_bytes": CHUNK} | options)) as ckpt:
        return [ckpt.save_state(step, state).result(60).id for step, state in enumerate(states)]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def test_paths_added_removed_and_changed(url: str) -> None:
    w = np.arange(12, dtype="float32").reshape(3, 4)
    shared = np.ones(3)
    a = {"w": w, "gone": 1, "lr": 0.5, "n": 1, "list": [1, 2], "same": shared, "tied": shared, "of": {"x": 1}, "e": {}}
    b = {"w": w * 2, "new": np.zeros(2), "lr": 0.25, "n": 1.0, "list": (1, 2), "same": shared, "tied": shared, "e": []}
    ids = save(url, a, b | {"of": np.zeros(2)})
    found = diff(url)
    assert (found.a.id, found.b.id) == tuple(ids)
    assert found.added == {"new": None}
    assert found.removed == {"gone": None, "of/x": None}
    assert {leaf.path: (leaf.before, leaf.after) for leaf in found.leaves} == {
        "lr": (0.5, 0.25),
        "n": (1, 1.0),
        "list": ("a list", "a tuple"),
        "of": ("a dict", "float64 (2,) numpy"),
        "e": ("a dict", "a list"),
    }
    assert type({leaf.path: leaf for leaf in found.leaves}["n"].after) is float
    (change,) = found.arrays
    assert (change.path, change.ranks, change.changed, change.elements) == ("w", None, 11, 12)
    assert change.share == 11 / 12
    assert change.max_abs == 11.0
    assert change.norm == pytest.approx(np.linalg.norm(w.astype("f8")))
    assert found.unchanged == 3, "list/0, list/1 and same: what is tied to it is told there"
    assert found.bytes_read == 2 * w.nbytes
    assert not found.same
    assert str(found).splitlines()[0] == f"{ids[0]} → {ids[1]}: 3 leaves unchanged, 96 bytes read"
    assert "~ w: float32 (3, 4) numpy, 91.67% of 12 elements, norm 22.49, at most 11" in str(found).splitlines()


def test_dtypes_shapes_and_kinds(url: str) -> None:
    torch = pytest.importorskip("torch")
    text = "long text " * 200
    a = {"dtype": np.ones(3), "shape": np.ones(3), "kind": np.ones(3), "text": text, "bytes": b"x" * 2000}
    b = {"dtype": np.ones(3, "f4"), "shape": np.ones((3, 1)), "kind": torch.ones(3, dtype=torch.float64)}
    save(url, a, b | {"text": text + "!", "bytes": b"x" * 1999 + b"y"})
    found = {change.path: change for change in diff(url).arrays}
    assert (found["dtype"].before, found["dtype"].after) == ("float64 (3,) numpy", "float32 (3,) numpy")
    assert (found["dtype"].norm, found["dtype"].changed, found["dtype"].share) == (None, None, None)
    assert found["shape"].after == "float64 (3, 1) numpy"
    assert (found["kind"].before, found["kind"].after) == ("float64 (3,) numpy", "float64 (3,) torch")
    assert (found["kind"].changed, found["kind"].norm) == (0, 0.0)
    assert (found["text"].before, found["text"].after) == ("str of 2000 bytes", "str of 2001 bytes")
    assert (found["bytes"].changed, found["bytes"].norm) == (1, None)


def test_only_chunks_that_differ_are_read(url: str) -> None:
    big = np.random.default_rng(0).random(100 * CHUNK // 8)
    after = big.copy()
    after[3], after[-1] = 7.0, 9.0
    save(url, {"big": big, "frozen": np.ones(10 * CHUNK)}, {"big": after, "frozen": np.ones(10 * CHUNK)})
    found = diff(url)
    (change,) = found.arrays
    assert (change.changed, change.elements) == (2, big.size)
    assert change.norm == pytest.approx(np.linalg.norm(after - big))
    assert found.bytes_read == 4 * CHUNK
    assert found.unchanged == 1


def test_bytes_read_is_what_the_store_was_asked_for(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url, options = f"s3://{moto_server.new_bucket()}/run", moto_server.storage_options()
    one = np.random.default_rng(0).random(1 << 20)  # 8 chunks
    two = one.copy()
    two[[5, 3 << 18]] += 1
    save(url, {"w": one, "f": one}, {"w": two, "f": one}, storage_options=options, chunk_bytes=1 << 20)
    runs: list[Run] = []
    opened = Run.open

    def spy(*args: Any) -> Run:
        runs.append(opened(*args))
        return runs[-1]

    monkeypatch.setattr(Run, "open", spy)
    found = diff(url, storage_options=options)
    (run,) = runs
    about = sum(item.size_bytes for item in run.store.list() if not item.name.startswith(records.SHARDS))
    assert found.bytes_read == 4 << 20
    assert found.bytes_read <= run.store.stats.snapshot().bytes_read <= 1.1 * found.bytes_read + about


def test_arrays_cut_in_other_ways(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    a = {"w": rng.random((300, 70)), "b": rng.integers(0, 9, 5000), "same": rng.random((200, 30))}
    b = {"w": a["w"].copy(), "b": a["b"].copy(), "same": a["same"]}
    b["w"][17:200, 3] += 1
    b["b"][4000] += 5
    save(str(tmp_path / "a"), a)
    save(str(tmp_path / "b"), b, chunk_bytes=1000)
    found = {change.path: change for change in diff(str(tmp_path / "a"), str(tmp_path / "b")).arrays}
    assert (found["w"].changed, found["w"].norm) == (183, pytest.approx(np.sqrt(183)))
    assert (found["b"].changed, found["b"].max_abs) == (1, 5.0)
    assert found["same"].changed == 0, "cut in other ways, it has to be read to tell"


def test_a_fork_and_its_source_and_what_came_of_both(tmp_path: Path) -> None:
    source, other = str(tmp_path / "source"), str(tmp_path / "fork")
    w = np.zeros(1000, ml_dtypes.bfloat16)
    save(source, {"w": w})
    fork(source, other)
    assert diff(source, other).same
    with Checkpointer(source) as one, Checkpointer(other) as two:
        one.save_state(1, {"w": w + ml_dtypes.bfloat16(1)}).result(60)
        two.save_state(1, {"w": w + ml_dtypes.bfloat16(3)}).result(60)
    found = diff(source, other)
    assert (found.arrays[0].max_abs, found.arrays[0].norm) == (2.0, pytest.approx(2 * np.sqrt(1000)))
    assert diff(source, other, a=0, b=0).same
    assert diff(other).arrays[0].max_abs == 3.0, "with its parent, which lies in the source"


def test_which_checkpoints_are_compared(url: str) -> None:
    ids = save(url, {"n": 0}, {"n": 1}, {"n": 2})
    Catalog(url).tag(0, "first")
    found = diff(url, a="first", b=1)
    assert (found.a.id, found.a.tags, found.b.id) == (ids[0], ("first",), ids[1])
    assert (diff(url, a=0).b.id, diff(url, b=1).a.id) == (ids[2], ids[0])
    assert diff(url, a=1, b=1).same
    with Checkpointer(url) as ckpt:
        ckpt.load_state(0)
        ckpt.save_state(5, {"n": 5}).result(60)
    assert diff(url).a.id == ids[0], "the parent, of another branch than the one before"
    with pytest.raises(InvalidInputError, match="continues none: say with `a`"):
        diff(url, b=0)
    with pytest.raises(CheckpointNotFoundError, match="has no checkpoint of step 7"):
        diff(url, a=7)


def test_a_part_by_its_paths(url: str) -> None:
    save(url, {"a": {"x": 1, "y": np.ones(3)}, "b": 1}, {"a": {"x": 2, "y": np.zeros(3)}, "b": 2})
    with pytest.raises(InvalidInputError, match="has such a path"):
        diff(url, select="zzz")
    found = diff(url, select=["a", "!a/y"])
    assert [leaf.path for leaf in found.leaves] == ["a/x"]
    assert found.arrays == ()
    assert found.bytes_read == 0


def test_damage_is_an_error_and_what_a_sweep_took_is_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = save(url, {"w": np.ones(100)}, {"w": np.zeros(100)})
    (path,) = (Path(url) / "shards" / ids[0]).iterdir()
    data = path.read_bytes()
    path.write_bytes(data.replace(np.ones(100).tobytes(), np.full(100, 3.0).tobytes()))
    with pytest.raises(CorruptionError, match="is damaged"):
        diff(url)
    path.unlink()
    with pytest.raises(CorruptionError, match=f"is missing, though checkpoint {ids[0]} names it"):
        diff(url)
    real = compare.compare

    def swept(*args: Any) -> Any:
        (number,) = [commit.number for commit in Run.open(url).log.read().commits if commit.id == ids[0]]
        Run.open(url).store.delete([records.commit_name(number)])
        return real(*args)

    monkeypatch.setattr(compare, "compare", swept)
    with pytest.raises(CheckpointNotFoundError, match="was dropped while it was being read: pin it"):
        diff(url)


def test_memory_is_bounded_by_chunks(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "spare_threads", lambda: 1)
    w = np.random.default_rng(0).random(8 << 20)  # 64 MiB
    save(url, {"w": w}, {"w": w + 1}, chunk_bytes=1 << 20)
    tracemalloc.start()
    try:
        found = diff(url)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.bytes_read == 2 * w.nbytes
    assert peak < 28 << 20
