"""Work in a few threads of the calling process: jobs that release the interpreter (reading, hashing, copying).

Owns: how many threads a process may take beside the others of its machine. Promises: no thread outlives the call.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

_MOST = 4
"""Memory is the limit from there on: measured, 4 threads copy twice as fast as one, 8 no faster than 4."""


def spare_threads(users: int = 1) -> int:
    """Threads for one of `users` processes that are busy on this machine at the same time: its share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST, cores // max(users, 1)))


def run_all(jobs: Iterable[Callable[[], None]], threads: int) -> None:
    """Runs jobs, begun in their order, in the caller's thread and `threads` - 1 more.

    Raises:
        Exception: What a job raised; jobs under way were waited for, and no other was begun.
    """
    left = deque(jobs)

    def work() -> None:
        while left:
            try:
                job = left.popleft()
            except IndexError:  # another thread took the last one
                return
            try:
                job()
            except BaseException:
                left.clear()
                raise

    more = min(threads, len(left)) - 1
    if more < 1:
        work()
        return
    with ThreadPoolExecutor(more, "rl_ckpt-read") as pool:
        others = [pool.submit(work) for _ in range(more)]
        try:
            work()
            while others:
                others.pop().result()
        finally:  # an error of theirs has this frame in its traceback: a cycle, which would keep the jobs' buffers
            others.clear()
