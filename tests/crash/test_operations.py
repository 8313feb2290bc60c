"""The world stops at, or goes wrong at, every operation on the store; then a new process opens the run.

Each walk numbers the operations of one life (`lives.py`), reads too, and lives it again once for every number. What is
checked at each point: what was committed is bit-identical, the interrupted step is wholly there or wholly absent,
nothing that a caller was told is lost, and after the next process's saves nothing is left that no checkpoint names.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash import lives
from tests.crash.lives import Life, Told, recover, verify
from tests.crash.points import POINTS
from tests.crash.recording import CHANGES, Fault, Kind, RecordingStore, numbered, process
from tests.crash.worlds import Bucket, Disk, World
from tests.s3_servers import S3Server

__all__ = ["numbered"]

pytestmark = pytest.mark.usefixtures("numbered", "_quiet")

READS = ("get", "list", "read", "exists")
ALL = (*CHANGES, *READS)
AT: dict[Kind, tuple[str, ...]] = {
    "before": ALL,
    "during": ("put", "create"),
    "after": ALL,
    "refused": ALL,
    "reply lost": ALL,
    "twice": CHANGES,
    "paused": ALL,
    "late": CHANGES,
    "echo": CHANGES,
    "lost, echo": CHANGES,
    "unknown": CHANGES,
}
"""The operations that each kind of fault is walked at: what changes nothing arrives late, or twice, without effect."""
LIVES: dict[str, Life] = {"new run": lives.first, "job": lives.job, "coordinator": lives.coordinator}


@pytest.fixture
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("rl_ckpt.store.sweep._PARTIAL_AGE_S", 0.0, raising=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "old checkpoints could not be swept")  # told; tested elsewhere
        warnings.filterwarnings("ignore", "fell back to checkpoint")
        yield


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """In memory where there is such a folder: what a power cut takes is walked in test_system_calls.py."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield Disk(tmp_path)
        return
    with tempfile.TemporaryDirectory(prefix="rl-ckpt-crash-", dir=memory) as folder:
        yield Disk(Path(folder))


@pytest.fixture(scope="module")
def moto(moto_server: S3Server) -> Iterator[Bucket]:
    bucket = Bucket(moto_server, "crash-points")
    yield bucket
    bucket.close()


@pytest.fixture(scope="module")
def ceph(ceph_server: S3Server) -> Bucket:
    return Bucket(ceph_server, "crash-points")


def prepared(world: World, life: str) -> tuple[str, Told]:
    """What a life begins with: nothing, or a run with two checkpoints."""
    url, told = world.new(), Told()
    if life != "new run":
        with process(world.other(url)):
            lives.first(url, told)
        assert told.committed == [1, 2]
    return url, told


def operations(world: World, base: str, told: Told, life: str) -> list[str]:
    """A life without faults: its operations, in their order."""
    url = world.copy(base) if told.committed else world.new()
    store, mine = RecordingStore(world.store(url)), Told([*told.committed])
    with process(store):
        LIVES[life](url, mine)
    assert mine.committed[-1] == verify(world, url, mine)[-1]
    assert not mine.in_doubt
    world.remove(url)
    return store.seen


def walk(world: World, life: str, kind: Kind, once: bool = False) -> None:
    """Lives once for every number, or `once` for every sort of change that there is in this life: S3 is slow."""
    base, told = prepared(world, life)
    seen = operations(world, base, told, life)
    numbers = [at for at, operation in enumerate(seen) if operation.split()[0] in AT[kind]]
    if once:
        numbers = [at for at in numbers if seen[at].split()[0] in CHANGES]
        sorts = {seen[at]: [n for n in numbers if seen[n] == seen[at]] for at in numbers}
        numbers = sorted(alike[list(AT).index(kind) % len(alike)] for alike in sorts.values())
    for at in numbers:
        url = world.copy(base) if told.committed else world.new()
        mine = Told([*told.committed])
        try:
            point(world, url, mine, life, Fault(kind, at))
        except BaseException as error:
            error.add_note(f"{world.name}, {life}, {kind} operation {at} of {len(seen)}: {seen[at]}; told {mine}")
            raise
        POINTS[world.name, life, kind] += 1
        world.remove(url)
    assert POINTS[world.name, life, kind]


def point(world: World, url: str, told: Told, life: str, fault: Fault) -> None:
    """One life with one fault, and what must be true after it."""
    store = RecordingStore(world.store(url), fault, lambda name, data: world.half(url, name, data))

    def meanwhile() -> None:
        with process(world.other(url)):
            lives.newer(url, told)

    fault.meanwhile = meanwhile
    with process(store):
        LIVES[life](url, told)
    assert fault.struck
    if fault.kind == "reply lost" and fault.struck.startswith("create commits/"):
        assert not told.in_doubt, "a record whose reply was lost is found by its write id"
    if fault.kind == "late":
        meanwhile()
    echoed = bool(fault.held) and fault.kind == "echo"
    fault.land()
    verify(world, url, told, ghosts=echoed)
    recover(world, url, told)


LOCAL = [kind for kind in AT if kind != "during"]  # that is in test_system_calls.py


@pytest.mark.parametrize(
    "kind",
    # Dead after one operation is dead before the next; that a read is refused is as if its reply were lost.
    [pytest.param(kind, marks=[pytest.mark.soak] if kind in ("after", "refused") else []) for kind in LOCAL],
)
@pytest.mark.parametrize("life", LIVES)
def test_local_disk(disk: Disk, life: str, kind: Kind) -> None:
    walk(disk, life, kind)


@pytest.mark.parametrize("life", LIVES)
def test_local_disk_refuses_a_change(disk: Disk, life: str) -> None:
    walk(disk, life, "refused", once=True)


@pytest.mark.parametrize(
    ("life", "kind"),
    [("new run", "during"), ("coordinator", "late")]
    + [("job", kind) for kind in ("before", "during", "late")]
    + [pytest.param("job", kind, marks=pytest.mark.soak) for kind in ("reply lost", "paused")],
)
def test_s3_at_every_sort_of_change(moto: Bucket, life: str, kind: Kind) -> None:
    walk(moto, life, kind, once=True)


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", AT)
@pytest.mark.parametrize("life", LIVES)
def test_s3(moto: Bucket, life: str, kind: Kind) -> None:
    walk(moto, life, kind)


@pytest.mark.ceph
@pytest.mark.parametrize("kind", ["before", "late"])
def test_ceph_at_every_sort_of_change(ceph: Bucket, kind: Kind) -> None:
    walk(ceph, "job", kind, once=True)
