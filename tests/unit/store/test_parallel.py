"""Work in a few threads: all of it is done, errors come out, nothing outlives the call."""

from __future__ import annotations

import gc
import threading
import weakref
from functools import partial

import pytest

from rl_ckpt.store import parallel
from rl_ckpt.store.parallel import run_all, spare_threads


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_job_is_done_once_and_no_thread_is_left(threads: int) -> None:
    done: list[int] = []
    before = threading.active_count()
    run_all([partial(done.append, i) for i in range(100)], threads)
    assert sorted(done) == list(range(100))
    assert threading.active_count() == before


def test_jobs_run_at_the_same_time() -> None:
    meeting = threading.Barrier(3, timeout=30)

    def meet() -> None:
        meeting.wait()

    run_all([meet] * 3, 3)
    assert not meeting.broken


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_comes_out_and_no_other_job_is_begun(threads: int) -> None:
    begun: list[int] = []
    failed = threading.Event()

    def job(i: int) -> None:
        if i == 0:
            begun.append(i)
            failed.set()
            raise ValueError("job 0")
        assert failed.wait(30)
        begun.append(i)

    with pytest.raises(ValueError, match="job 0"):
        run_all([partial(job, i) for i in range(1000)], threads)
    assert len(begun) < 500


def test_processes_that_share_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: range(4))
    assert [spare_threads(users) for users in (1, 2, 3, 4, 9)] == [4, 2, 1, 1, 1]
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: range(64))
    assert spare_threads(1) == 4, "memory is the limit from there on"


def test_an_error_keeps_nothing_that_the_jobs_used() -> None:
    class Buffer:
        pass

    def fail(_: Buffer) -> None:
        meeting.wait()  # so that each of the threads has one
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("all but the caller's")

    meeting = threading.Barrier(3, timeout=30)
    buffer = Buffer()
    kept = weakref.ref(buffer)
    gc.disable()
    try:
        with pytest.raises(ValueError, match="all but"):
            run_all([partial(fail, buffer) for _ in range(3)], 3)
        del buffer
        assert kept() is None
    finally:
        gc.enable()
