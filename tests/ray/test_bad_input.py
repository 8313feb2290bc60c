"""What goes wrong with input, workers and the store: said by name, before anything is written or changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import ray

from rl_ckpt import Checkpointer, Replicated, Sharded
from rl_ckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptionError,
    InvalidInputError,
    SaveTimeoutError,
    UntrustedDataError,
    WorkerFailuresError,
)
from rl_ckpt.format import records
from tests.ray.holders import (
    WAIT_S,
    Coroutines,
    Holder,
    WithoutState,
    fingerprint,
    flip_bit,
    give,
    kill_process,
    number_of_sets,
    pid_of,
    same,
    states_of,
)

pytestmark = pytest.mark.usefixtures("ray_node")


def state(rank: int, step: int = 0) -> dict[str, Any]:
    return {"w": np.arange(1000.0) + step, "own": np.full(10, 100.0 * rank + step), "step": step}


class Steps:
    """Steps that no test of this file has used yet."""

    def __init__(self) -> None:
        self.last = 0

    def next(self) -> int:
        self.last += 1
        return self.last


STEPS = Steps()


@pytest.fixture(scope="module")
def workers(ray_node: None) -> list[Any]:
    return [Holder.remote() for _ in range(3)]


@pytest.fixture(scope="module")
def ckpt(ray_node: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpointer]:
    """A run that the tests of bad saves share: each of them leaves it usable, or the next one fails.

    Its ranks wait for each other longer than a test waits: they must be told when one of them fails.
    """
    with Checkpointer(str(tmp_path_factory.mktemp("shared") / "run"), join_timeout_s=3 * WAIT_S) as made:
        yield made


def can_save(ckpt: Checkpointer, workers: list[Any]) -> None:
    """These workers are usable, and their next save commits."""
    give(workers, [state(rank) for rank in range(len(workers))])
    step = STEPS.next()
    assert ckpt.save(step, workers).result(WAIT_S).step == step


def no_actor(workers: list[Any]) -> Any:
    return [*workers[:1], "worker"]


BAD_WORKERS = {
    "none": (lambda workers: [], "workers is empty"),
    "no sequence": (lambda workers: 7, "must be a sequence of Ray actor handles, not int"),
    "no actor": (no_actor, r"workers\[1\] is a str, not a Ray actor handle"),
    "a single actor": (lambda workers: workers[0], "sequence"),
    "one twice": (lambda workers: [workers[0], workers[1], workers[0]], "the same actor twice"),
}


@pytest.mark.parametrize("name", BAD_WORKERS)
def test_bad_workers_are_refused(ckpt: Checkpointer, workers: list[Any], name: str) -> None:
    make, text = BAD_WORKERS[name]
    for call in (lambda bad: ckpt.save(STEPS.next(), bad), ckpt.restore):
        with pytest.raises(InvalidInputError, match=text):
            call(make(workers))


@pytest.mark.parametrize("step", [-1, 1.5, "3", True, None])
def test_bad_steps_are_refused(ckpt: Checkpointer, workers: list[Any], step: Any) -> None:
    with pytest.raises(InvalidInputError, match="step="):
        ckpt.save(step, workers)


def end_by_ray(worker: Any) -> None:
    ray.kill(worker)


def end_by_sigkill(worker: Any) -> None:
    kill_process(pid_of(worker))


@pytest.mark.parametrize("end", [end_by_ray, end_by_sigkill])
@pytest.mark.parametrize("what", ["save", "restore"])
def test_a_dead_worker_is_named_and_the_others_go_on(
    ckpt: Checkpointer, workers: list[Any], end: Any, what: str
) -> None:
    can_save(ckpt, workers)
    dead = Holder.remote()
    give([dead], [state(1)])
    end(dead)
    team = [workers[0], dead, workers[1]]
    with pytest.raises(WorkerFailuresError, match="rank 1 is dead or unreachable") as caught:
        ckpt.save(STEPS.next(), team) if what == "save" else ckpt.restore(team)
    assert list(caught.value.failures) == [1]
    can_save(ckpt, workers)


@pytest.mark.parametrize(
    ("kind", "text"), [(WithoutState, "has no method 'get_state'"), (Coroutines, "get_state is a coroutine")]
)
def test_actors_that_are_no_workers_are_told_what_they_lack(
    ckpt: Checkpointer, workers: list[Any], kind: type, text: str
) -> None:
    other: Any = ray.remote(num_cpus=0)(kind).remote()
    with pytest.raises(InvalidInputError, match=text):
        ckpt.save(STEPS.next(), [workers[0], other])
    can_save(ckpt, workers)


def raises() -> Any:
    raise RuntimeError("the simulator is not ready")


def test_a_get_state_that_raises_is_named_by_rank_and_poisons_nothing(ckpt: Checkpointer, workers: list[Any]) -> None:
    give(workers, [state(0), raises, state(2)])
    with pytest.raises(WorkerFailuresError, match="RuntimeError: the simulator is not ready") as caught:
        ckpt.save(STEPS.next(), workers)
    assert list(caught.value.failures) == [1]
    can_save(ckpt, workers)


def test_a_leaf_that_can_not_be_stored_is_named_by_path_and_nothing_is_written(
    ckpt: Checkpointer, workers: list[Any]
) -> None:
    folder = Path(ckpt.url.removeprefix("file://"))
    can_save(ckpt, workers)
    before = sorted(folder.rglob("*"))
    give(workers, [state(0), state(1) | {"env": {"lock": object()}}, state(2)])
    with pytest.raises(InvalidInputError, match="env/lock"):
        ckpt.save(STEPS.next(), workers)
    assert sorted(folder.rglob("*")) == before
    can_save(ckpt, workers)


def part(start: int, stop: int) -> dict[str, Any]:
    return {"table": Sharded(np.arange(start, stop), (30,), (start,))}


RAGGED = {
    "overlap": [part(0, 11), part(10, 20), part(20, 30)],
    "hole": [part(0, 9), part(10, 20), part(20, 30)],
    "short": [part(0, 10), part(10, 20), part(20, 29)],
    "one is not sharded": [part(0, 15), part(15, 30), {"table": np.arange(3)}],
    "dtypes": [part(0, 10), part(10, 20), {"table": Sharded(np.arange(10, dtype="f4"), (30,), (20,))}],
    "replicas": [
        {"table": Replicated(np.zeros(3))},
        {"table": Replicated(np.zeros(3))},
        {"table": Replicated(np.zeros(4))},
    ],
}


@pytest.mark.parametrize("name", RAGGED)
def test_states_that_do_not_fit_together_are_refused_by_path(ckpt: Checkpointer, workers: list[Any], name: str) -> None:
    give(workers, RAGGED[name])
    with pytest.raises(InvalidInputError, match="table"):
        ckpt.save(STEPS.next(), workers)
    can_save(ckpt, workers)


def test_a_step_is_not_saved_twice(ckpt: Checkpointer, workers: list[Any]) -> None:
    can_save(ckpt, workers)
    with pytest.raises(InvalidInputError, match=f"step {STEPS.last} is committed already"):
        ckpt.save(STEPS.last, workers)
    can_save(ckpt, workers)


def hang(holder: Any, path: str) -> None:
    """Blocks the actor until another process opens the other end."""
    with open(path, "rb") as fifo:
        fifo.read()


@pytest.mark.parametrize("what", ["save", "restore"])
def test_a_hung_worker_is_named_and_the_others_go_on(tmp_path: Path, workers: list[Any], what: str) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with Checkpointer(str(tmp_path / "run"), join_timeout_s=1.0) as ckpt:
        give(workers, [state(rank) for rank in range(3)])
        ckpt.save(0, workers).result(WAIT_S)
        hanging = workers[1].look.remote(hang, str(fifo))
        try:
            with pytest.raises(SaveTimeoutError, match=r"ranks \[1\].*join_timeout_s"):
                ckpt.save(1, workers) if what == "save" else ckpt.restore(workers)
            others = [workers[0], workers[2]]
            assert ckpt.save(2, others).result(WAIT_S).step == 2, "the others go on while it hangs"
        finally:
            open(fifo, "wb").close()
        ray.get(hanging, timeout=WAIT_S)
        give(workers, [state(rank) for rank in range(3)])
        assert ckpt.save(3, workers).result(WAIT_S).step == 3, "and so does the one that hung"


@pytest.fixture(scope="module")
def good(ray_node: None, tmp_path_factory: pytest.TempPathFactory, workers: list[Any]) -> Iterator[Checkpointer]:
    """A run with steps 1 and 2 that bad restores leave as it is."""
    with Checkpointer(str(tmp_path_factory.mktemp("good") / "run"), join_timeout_s=20) as made:
        for step in (1, 2):
            give(workers, [state(rank, step) | {"net": {"b": np.ones(3), "a": 1.5}} for rank in range(3)])
            made.save(step, workers).result(WAIT_S)
        yield made


def unchanged(workers: list[Any], states: list[Any], call: Any, error: type[CheckpointError], text: str) -> str:
    """A restore fails with an error, and no worker was changed; the message."""
    give(workers, states)
    with pytest.raises(error, match=text) as caught:
        call()
    assert number_of_sets(workers) == [0] * len(workers)
    for found, expected in zip(states_of(workers), states, strict=True):
        same(found, expected)
    return str(caught.value)


def test_restoring_from_nothing_says_so(tmp_path: Path, workers: list[Any]) -> None:
    states = [state(rank) for rank in range(3)]
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        unchanged(workers, states, lambda: ckpt.restore(workers), CheckpointNotFoundError, "nothing is there yet")


def test_restoring_from_a_folder_that_is_no_run_says_so(tmp_path: Path, workers: list[Any]) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    states = [state(rank) for rank in range(3)]
    with Checkpointer(str(tmp_path)) as ckpt:
        text = unchanged(workers, states, lambda: ckpt.restore(workers), CheckpointNotFoundError, "not a run")
        assert "photo.jpg" in text


def test_restoring_an_unknown_step_lists_the_steps(good: Checkpointer, workers: list[Any]) -> None:
    states = [state(rank) for rank in range(3)]
    unchanged(
        workers, states, lambda: good.restore(workers, step=7), CheckpointNotFoundError, "step 7; its steps are 1, 2"
    )


def test_a_run_of_a_newer_release_is_refused(tmp_path: Path, good: Checkpointer, workers: list[Any]) -> None:
    shutil.copytree(good.url.removeprefix("file://"), tmp_path / "run")
    record = tmp_path / "run" / "run.json"
    newer = msgspec.structs.replace(records.decode_run("run.json", record.read_bytes()), version=99)
    record.write_bytes(records.encode(newer))
    states = [state(rank) for rank in range(3)]
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        unchanged(workers, states, lambda: ckpt.restore(workers), InvalidInputError, "99.*upgrade")


def test_all_that_does_not_fit_stands_in_one_error_with_ranks(good: Checkpointer, workers: list[Any]) -> None:
    fits = state(0, 9) | {"net": {"b": np.zeros(3), "a": 0.0}}
    states = [
        fits,
        fits | {"new": np.zeros(2), "net": {"b": np.zeros(4), "a": 0.0}},
        {key: value for key, value in fits.items() if key != "step"},
    ]
    text = unchanged(workers, states, lambda: good.restore(workers), InvalidInputError, "no worker was")
    for line in (
        "rank 1: missing in the checkpoint: new",
        "rank 1: mismatched: net/b: float64 array of shape (3,) in the checkpoint, float64 array of shape (4,) here",
        "rank 2: unexpected in the checkpoint: step",
        "strict=False",
    ):
        assert line in text
    assert "rank 0:" not in text


def test_not_strict_restores_what_fits_and_reports_the_rest(good: Checkpointer, workers: list[Any]) -> None:
    mine = state(0, 9) | {"net": {"b": np.zeros(4), "a": 0.0}, "new": np.zeros(2)}
    give(workers, [mine] * 3)
    report = good.restore(workers, strict=False)
    assert {rank: set(paths) for rank, paths in report.kept.items()} == {r: {"net/b", "new"} for r in range(3)}
    for rank, found in enumerate(states_of(workers)):
        same(found, state(rank, 2) | {"net": {"b": np.zeros(4), "a": 1.5}, "new": np.zeros(2)})


def test_select_restores_only_what_it_chooses(good: Checkpointer, workers: list[Any]) -> None:
    mine = state(5, 9) | {"net": {"b": np.zeros(3), "a": 0.0}}
    give(workers, [mine] * 3)
    report = good.restore(workers, step=1, select=["net", "!net/a"])
    assert report.bytes == 3 * 24
    for found in states_of(workers):
        same(found, mine | {"net": {"b": np.ones(3), "a": 0.0}})


def test_select_that_chooses_nothing_is_an_error(good: Checkpointer, workers: list[Any]) -> None:
    states = [state(rank) for rank in range(3)]
    unchanged(workers, states, lambda: good.restore(workers, select="nett"), InvalidInputError, "chooses nothing.*net")


def test_rename_restores_under_another_name(good: Checkpointer, workers: list[Any]) -> None:
    mine = {key: value for key, value in state(5, 9).items() if key != "w"} | {
        "policy": {"b": np.zeros(3), "a": 0.0},
        "weights": np.zeros(1000),
    }
    give(workers, [mine] * 3)
    good.restore(workers, rename={"net": "policy", "w": "weights"})
    for rank, found in enumerate(states_of(workers)):
        expected = state(rank, 2)
        same(
            found,
            {"own": expected["own"], "step": 2, "policy": {"b": np.ones(3), "a": 1.5}, "weights": expected["w"]},
        )


@pytest.fixture
def damaged(tmp_path: Path, good: Checkpointer) -> Iterator[tuple[Checkpointer, str]]:
    """A copy of the good run, with a bit flipped in its newest checkpoint; that one's id."""
    shutil.copytree(good.url.removeprefix("file://"), tmp_path / "run")
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        newest = ckpt.checkpoints()[-1].id
        flip_bit(tmp_path / "run" / "shards" / newest)
        yield ckpt, newest


def test_a_damaged_newest_checkpoint_falls_back_and_reports_it(
    damaged: tuple[Checkpointer, str], workers: list[Any]
) -> None:
    ckpt, newest = damaged
    give(workers, [state(5, 9) | {"net": {"b": np.zeros(3), "a": 0.0}}] * 3)
    report = ckpt.restore(workers)
    assert report.step == 1
    assert list(report.fell_back) == [newest]
    for rank, found in enumerate(states_of(workers)):
        same(found, state(rank, 1) | {"net": {"b": np.ones(3), "a": 1.5}})


def test_a_damaged_step_that_was_asked_for_changes_no_worker(
    damaged: tuple[Checkpointer, str], workers: list[Any]
) -> None:
    states = [state(rank, 9) | {"net": {"b": np.zeros(3), "a": 0.0}} for rank in range(3)]
    unchanged(workers, states, lambda: damaged[0].restore(workers, step=2), CorruptionError, "chunk at")


def test_a_set_state_that_raises_is_named_by_rank(good: Checkpointer, workers: list[Any]) -> None:
    give(workers, [state(rank, 9) | {"net": {"b": np.zeros(3), "a": 0.0}} for rank in range(3)])

    def broken(tree: Any) -> None:
        raise RuntimeError("no such layer")

    ray.get(workers[1].look.remote(lambda holder: setattr(holder, "set_state", broken)))
    with pytest.raises(WorkerFailuresError, match="no such layer") as caught:
        good.restore(workers)
    assert list(caught.value.failures) == [1]
    ray.get(workers[1].look.remote(lambda holder: delattr(holder, "set_state")))
    good.restore(workers)


def replace_shards_by_a_file(folder: Path) -> None:
    """From now on no shard file can be written, by root neither."""
    (folder / "shards").rename(folder / "hidden")
    (folder / "shards").write_bytes(b"")


def bring_shards_back(folder: Path) -> None:
    (folder / "shards").unlink()
    (folder / "hidden").rename(folder / "shards")


@pytest.mark.parametrize("asked", [True, False])
def test_a_failure_in_the_background_reaches_result_or_the_next_call(
    tmp_path: Path, workers: list[Any], asked: bool
) -> None:
    folder = tmp_path / "run"
    ckpt = Checkpointer(str(folder))
    give(workers, [state(rank, 1) for rank in range(3)])
    ckpt.save(1, workers).result(WAIT_S)
    replace_shards_by_a_file(folder)
    give(workers, [state(rank, 2) for rank in range(3)])
    pending = ckpt.save(2, workers)
    if asked:
        with pytest.raises(CheckpointError, match=f"{folder}/shards/2-"):
            pending.result(WAIT_S)
    else:
        deadline = time.monotonic() + WAIT_S
        while not pending.done():
            assert time.monotonic() < deadline
        with pytest.raises(CheckpointError, match=f"{folder}/shards/2-"):
            ckpt.save(3, workers)
    assert [info.step for info in ckpt.checkpoints()] == [1]
    bring_shards_back(folder)
    assert ckpt.restore(workers).step == 1
    for rank, found in enumerate(states_of(workers)):
        same(found, state(rank, 1))
    give(workers, [state(rank, 2) for rank in range(3)])
    assert ckpt.save(2, workers).result(WAIT_S).step == 2, "the same step, once the store is back"
    ckpt.close()


def test_a_failure_that_nobody_asked_about_reaches_close(tmp_path: Path, workers: list[Any]) -> None:
    folder = tmp_path / "run"
    ckpt = Checkpointer(str(folder))
    give(workers, [state(rank, 1) for rank in range(3)])
    ckpt.save(1, workers).result(WAIT_S)
    replace_shards_by_a_file(folder)
    give(workers, [state(rank, 2) for rank in range(3)])
    pending = ckpt.save(2, workers)
    with pytest.raises(CheckpointError, match=f"{folder}/shards/2-"):
        ckpt.close()
    assert pending.done()
    assert fingerprint(state(0)) != fingerprint(state(1))


def test_storage_options_that_can_not_be_used_are_refused_at_once(tmp_path: Path, workers: list[Any]) -> None:
    ckpt = Checkpointer(str(tmp_path / "run"), storage_options={"key": "x"})
    for call in (lambda: ckpt.save(0, workers), lambda: ckpt.restore(workers)):
        with pytest.raises(InvalidInputError, match="a local folder takes no storage_options"):
            call()


def test_pickled_leaves_that_were_not_allowed_change_no_worker(tmp_path: Path, workers: list[Any]) -> None:
    url = str(tmp_path / "run")
    with Checkpointer(url, allow_pickle=True) as trusting:
        give(workers, [{"w": np.ones(1000), "odd": range(rank, 5)} for rank in range(3)])
        trusting.save(1, workers).result(WAIT_S)
    with Checkpointer(url) as ckpt:
        states = [{"w": np.full(1000, 9.0), "odd": None} for _ in range(3)]
        unchanged(workers, states, lambda: ckpt.restore(workers), UntrustedDataError, "'odd' was saved with pickle")


def test_memory_urls_are_refused_for_actors(workers: list[Any]) -> None:
    with pytest.raises(InvalidInputError, match="one process's memory"):
        Checkpointer("memory://run").save(0, workers)


def test_ray_that_is_not_running_is_said(tmp_path: Path) -> None:
    code = f"""
import rl_ckpt
try:
    rl_ckpt.Checkpointer({str(tmp_path / "run")!r}).save(0, [1])
except rl_ckpt.InvalidInputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_S, check=True)
    assert "call ray.init() first" in done.stdout
