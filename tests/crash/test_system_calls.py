"""Local disk: a process is killed, or the power is cut, at every system call that changes the folder.

A life is lived once; before each call, and in the middle of each write, it is noted what kill -9 would leave and what a
power cut may leave (`system_calls.py`). Each of these folders is then opened by a new process, as in
test_operations.py. Folders that are alike, at a moment when callers had been told the same, are opened once.
"""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial

import pytest

from rl_ckpt.store import file_writer, local
from rl_ckpt.store import run as run_module
from rl_ckpt.store.probe import probe_create_only
from tests.crash import lives
from tests.crash.lives import Told, recover, verify
from tests.crash.points import POINTS
from tests.crash.recording import RecordingStore, numbered, process
from tests.crash.system_calls import Model, TracedOs, snapshot, write_image
from tests.crash.test_operations import LIVES, _quiet, disk, prepared
from tests.crash.worlds import Disk

__all__ = ["_quiet", "disk", "numbered"]

pytestmark = pytest.mark.usefixtures("numbered", "_quiet")

Image = dict[str, bytes | None]


class Camera:
    """Takes pictures of what a crash leaves."""

    def __init__(self, model: Model, told: Told) -> None:
        self._model, self._told = model, told
        self.seen: dict[tuple[str, str], tuple[Image, Told, str]] = {}
        self.counts: Counter[str] = Counter()

    def __call__(self, call: str) -> None:
        told = copy.deepcopy(self._told)
        self._take("killed", snapshot(self._model.root), told, call)
        for image in self._model.cuts():
            self._take("power cut", image, told, call)

    def _take(self, how: str, image: Image, told: Told, call: str) -> None:
        self.counts[how] += 1
        self.seen.setdefault((repr(sorted(image.items())), repr(told)), (image, told, f"{how} at {call}"))


def traced(patch: pytest.MonkeyPatch, model: Model, watch: object) -> None:
    stands = TracedOs(model, watch)  # type: ignore[arg-type]
    patch.setattr(local, "os", stands)
    patch.setattr(file_writer, "os", stands)


@pytest.fixture(autouse=True)
def _one_call_at_a_time(numbered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "probe_create_only", partial(probe_create_only, writers=1, rounds=1))


@pytest.fixture
def _direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "direct writes":
        monkeypatch.setattr(file_writer, "DIRECT_FROM_BYTES", 1)


@pytest.mark.parametrize(
    ("life", "_direct"),
    [(life, "cached writes") for life in LIVES] + [("new run", "direct writes")],
    indirect=["_direct"],
)
@pytest.mark.usefixtures("_direct")
def test_killed_or_cut_at_any_call(
    disk: Disk, life: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    url, told = prepared(disk, life)
    root = url.removeprefix("file://")
    camera = Camera(model := Model(root), told)
    with monkeypatch.context() as patch, process(RecordingStore(disk.store(url))):
        traced(patch, model, camera)
        LIVES[life](url, told)
    camera("end")
    assert not told.in_doubt
    for image, was, where in camera.seen.values():
        other, then = disk.new(), copy.deepcopy(was)
        write_image(image, other.removeprefix("file://"))
        try:
            verify(disk, other, then)
            recover(disk, other, then)
        except BaseException as error:
            error.add_note(f"{where}; told {then}")
            raise
        disk.remove(other)
    for how, count in camera.counts.items():
        POINTS[disk.name, life, f"{how} at a system call"] += count


def test_killed_at_any_call_then_power_cut_after_the_next_process_saved(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first process made and did not sync any more, the second one must not rely on."""
    at = 0
    while True:
        url, told = disk.new(), Told()
        root = url.removeprefix("file://")
        model, calls = Model(root), 0
        store = RecordingStore(disk.store(url))

        def watch(call: str, store: RecordingStore = store, at: int = at) -> None:
            nonlocal calls
            if not store.dead and calls == at:
                store.dead = True
            calls += 1
            if store.dead:
                store.get("")  # raises Stopped

        with monkeypatch.context() as patch, process(store):
            traced(patch, model, watch)
            lives.first(url, told)
        if not store.dead:
            break
        with monkeypatch.context() as patch, process(disk.store(url)):
            traced(patch, model, lambda call: None)
            lives.newer(url, told)
        for image in list(model.cuts())[:2]:
            other, then = disk.new(), copy.deepcopy(told)
            write_image(image, other.removeprefix("file://"))
            try:
                verify(disk, other, then)
            except BaseException as error:
                error.add_note(f"killed at call {at}; told {then}")
                raise
            disk.remove(other)
            POINTS[disk.name, "new run", "killed, then power cut"] += 1
        disk.remove(url)
        at += 1
    assert at > 50
