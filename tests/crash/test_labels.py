"""Tags and removals beside a sweep: whoever is killed, paused or answered late, and wherever.

What is checked at each point: a tag that its caller was told of keeps the checkpoint, bit-identical, through the sweeps
that follow; what is in the log can be read; what was removed is gone wholly, or not at all.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from rl_ckpt import Catalog, Checkpointer, CheckpointError, CheckpointNotFoundError, LatestN
from rl_ckpt.format import records
from rl_ckpt.store.base import Store
from rl_ckpt.store.committer import Committer
from rl_ckpt.store.run import Run
from tests.crash.lives import Told, named
from tests.crash.points import POINTS
from tests.crash.recording import CHANGES, Fault, Kind, RecordingStore, numbered, process
from tests.crash.worlds import Bucket, Disk, World
from tests.s3_servers import S3Server
from tests.unit.trees import assert_same

__all__ = ["numbered"]

pytestmark = pytest.mark.usefixtures("numbered", "_in_order")

STEPS = (1, 2, 3)
OLD = STEPS[0]  # what is tagged or removed
KINDS: tuple[Kind, ...] = ("before", "after", "refused", "reply lost", "twice", "paused", "late", "echo", "lost, echo")


@pytest.fixture
def _in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl_ckpt.store.labels._READERS", 1)
    monkeypatch.setattr("rl_ckpt.store.sweep_by_hand._READERS", 1)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield Disk(tmp_path)
        return
    with tempfile.TemporaryDirectory(prefix="rl-ckpt-crash-", dir=memory) as folder:
        yield Disk(Path(folder))


@pytest.fixture(scope="module")
def moto(moto_server: S3Server) -> Iterator[Bucket]:
    bucket = Bucket(moto_server, "crash-labels")
    yield bucket
    bucket.close()


def prepared(world: World) -> tuple[str, Told]:
    """A run with three checkpoints, which share a file."""
    url, told = world.new(), Told()
    with process(world.other(url)), Checkpointer(url, chunk_bytes=1 << 12) as ckpt:
        for step in STEPS:
            told.during(step, lambda step=step: ckpt.save_state(step, told.state(step)).result(60))  # type: ignore[misc]
    assert told.committed == [*STEPS]
    return url, told


def sweeper(store: Store) -> None:
    """A job that keeps the newest alone: opens the run, sweeps, and is gone."""
    with process(store), suppress(CheckpointError):
        committer = Committer(Run.open(store.url), [LatestN(1)], 0.0)
        with suppress(CheckpointError):
            committer.tidy()
        committer.close()


def tag(store: Store) -> bool | None:
    """Tags the oldest checkpoint: whether it was told to be done; None: refused, as it was gone."""
    with process(store):
        try:
            Catalog(store.url).tag(OLD, "keep me")
        except CheckpointNotFoundError:
            return None
        except CheckpointError:
            return False
        return True


def check(world: World, url: str, told: Told, tagged: bool | None) -> None:
    """What is listed can be read, now and after two more sweeps of jobs, and the tagged one is there."""
    for _ in range(2):
        sweeper(world.other(url))
    with process(world.other(url)):
        infos = Catalog(url).checkpoints()
        steps = [info.step for info in infos]
        assert steps[-1] == STEPS[-1]
        for step in steps:
            assert_same(Checkpointer(url).load_state(step), told.state(step))
    if tagged:
        assert steps == [OLD, STEPS[-1]]
        assert infos[0].tags == ("keep me",)
    if tagged is None:
        assert steps == [STEPS[-1]]
    store = world.other(url)
    labels = {item.name for item in store.list(records.LABELS)}
    assert labels <= {records.label_name(info.id) for info in infos}
    assert {item.name for item in store.list()} <= named(store) | labels


def count(world: World, url: str, life: str) -> list[str]:
    """The operations of a life without faults, in order; its run is lost by that."""
    store = RecordingStore(world.store(url))
    _LIVES[life](store)
    return store.seen


def removal(store: Store) -> None:
    with process(store), suppress(CheckpointError):
        Catalog(store.url).remove(OLD, grace_s=0)


_LIVES = {"tag": tag, "sweep": sweeper, "remove": removal}


def numbers(seen: list[str], kind: Kind) -> list[int]:
    only_changes = kind in ("twice", "late", "echo", "lost, echo")
    return [at for at, op in enumerate(seen) if not only_changes or op.split()[0] in CHANGES]


def walk_tag(world: World, kind: Kind) -> None:
    """The tagger goes wrong at every operation; a sweep comes in the middle of it, or after it."""
    base, told = prepared(world)
    for at in numbers(count(world, world.copy(base), "tag"), kind):
        url = world.copy(base)
        fault = Fault(kind, at, lambda url=url: sweeper(world.other(url)))  # type: ignore[misc]
        tagged = tag(RecordingStore(world.store(url), fault))
        assert fault.struck
        if kind not in ("echo", "twice", "paused"):  # before its request arrives
            sweeper(world.other(url))
        fault.land()
        try:
            check(world, url, told, tagged)
        except BaseException as error:
            error.add_note(f"{world.name}, {kind} operation {at}: {fault.struck}; told {tagged}")
            raise
        POINTS[world.name, "tag", kind] += 1
        world.remove(url)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tag_goes_wrong_beside_a_sweep(disk: Disk, kind: Kind) -> None:
    walk_tag(disk, kind)


@pytest.mark.parametrize("kind", ["before", "paused", "late"])
def test_a_tag_goes_wrong_beside_a_sweep_on_s3(moto: Bucket, kind: Kind) -> None:
    walk_tag(moto, kind)


@pytest.mark.parametrize(
    ("kind", "later"), [("before", 8), ("reply lost", 3), pytest.param("before", 99, marks=pytest.mark.soak)]
)
def test_a_sweep_that_meets_a_tag_goes_wrong(disk: Disk, kind: Kind, later: int) -> None:
    """Somebody tags at any operation of the sweep, and the sweep is killed, or loses an answer, at any later one."""
    base, told = prepared(disk)
    seen = count(disk, disk.copy(base), "sweep")
    kept = 0
    for tag_at in range(len(seen)):
        for at in [n for n in numbers(seen, kind) if n >= tag_at][:later]:
            url = disk.copy(base)
            answers: list[bool | None] = []
            meets = Fault("paused", tag_at, lambda url=url, a=answers: a.append(tag(disk.other(url))))  # type: ignore[misc]
            inner = RecordingStore(disk.store(url), Fault(kind, at))
            sweeper(RecordingStore(inner, meets))
            try:
                check(disk, url, told, answers[0])
            except BaseException as error:
                error.add_note(f"tagged ({answers}) at {tag_at} ({seen[tag_at]}), {kind} at {at} ({seen[at]})")
                raise
            kept += answers == [True]
            POINTS[disk.name, "tagged sweep", kind] += 1
            disk.remove(url)
    assert 0 < kept < POINTS[disk.name, "tagged sweep", kind]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "paused"])
def test_a_removal_goes_wrong(disk: Disk, kind: Kind) -> None:
    base, told = prepared(disk)
    for at in numbers(count(disk, disk.copy(base), "remove"), kind):
        url = disk.copy(base)
        fault = Fault(kind, at)
        removal(RecordingStore(disk.store(url), fault))
        fault.land()
        with process(disk.other(url)):
            steps = [info.step for info in Catalog(url).checkpoints()]
            asked = bool(disk.other(url).list(records.LABELS))
            committer = Committer(Run.open(url), [], 0.0)
            committer.tidy()
            committer.close()
            left = [info.step for info in Catalog(url).checkpoints()]
            ghost = kind in ("echo", "lost, echo") and "labels/" in fault.struck
            assert left == ([*STEPS[1:]] if asked or OLD not in steps else [*STEPS]) or ghost
            for step in left:
                assert_same(Checkpointer(url).load_state(step), told.state(step))
        store = disk.other(url)
        found = {item.name for item in store.list()}
        assert found - named(store) <= {records.WAITING_FILE}, (fault.struck, found - named(store))
        POINTS[disk.name, "remove", kind] += 1
        disk.remove(url)
