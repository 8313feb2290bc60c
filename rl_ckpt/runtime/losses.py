"""Losses: which errors tell that a process or a node is gone, and which workers are.

Owns the one definition of a loss, for what a failed rank is told of, and for what a supervised job recovers from.
Promises: an error of the user's own code is no loss, wherever it was raised.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray

from rl_ckpt.errors import WorkerFailuresError

_LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.ActorUnschedulableError,  # pinned to a node that is gone
    ray.exceptions.LocalRayletDiedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.OutOfMemoryError,  # Ray killed the worker before the system would have
    ray.exceptions.TaskUnschedulableError,
    ray.exceptions.WorkerCrashedError,
)
_ASK_AGAIN_S = 0.2
_OTHERS_S = 1.0


def origin(error: BaseException) -> BaseException:
    """What was raised first, where an error came through Ray tasks and actors."""
    while isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def is_loss(error: BaseException) -> bool:
    """Whether an error tells that a process, an object or a node was lost.

    An actor whose own constructor raised is no loss: it would raise again.
    """
    first = origin(error)
    if isinstance(first, WorkerFailuresError):
        return bool(first.lost)
    return isinstance(first, _LOST) and not getattr(first, "actor_init_failed", False)


def in_one_line(error: BaseException) -> str:
    """What an error of Ray says; of a constructor that raised also the last line, which tells what it raised."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0]} … {lines[-1]}" if getattr(error, "actor_init_failed", False) else lines[0]


def lost_ranks(workers: Sequence[Any], patience_s: float, decided_s: float = 0.0) -> list[int]:
    """Ranks of workers that are dead or can't be reached.

    Args:
        workers: Ray actor handles, by rank.
        patience_s: How long to wait for workers that do not answer; they are busy, not lost. Once one is found to be
            lost, the others are not waited for much longer.
        decided_s: How long to wait until Ray knows whether one that can't be reached is dead, and so which nodes are.
    """
    begun = time.monotonic()
    until, decided = begun + patience_s, begun + decided_s
    asked, lost, undecided = {_ask(worker): rank for rank, worker in enumerate(workers)}, set[int](), set[int]()
    while asked:
        limit = max(until, decided) if undecided else until
        ready, _ = ray.wait(list(asked), timeout=max(0.0, limit - time.monotonic()))
        if not ready:
            break
        rank = asked.pop(ready[0])
        error = _answer(ready[0])
        for ranks, found in ((lost, error is not None), (undecided, _is_undecided(error))):
            (ranks.add if found else ranks.discard)(rank)
        if error is not None:
            until = min(until, time.monotonic() + _OTHERS_S)
        if rank in undecided and time.monotonic() < decided:
            time.sleep(_ASK_AGAIN_S)
            asked[_ask(workers[rank])] = rank
    return sorted(lost)


def _ask(worker: Any) -> Any:
    return worker.__ray_call__.remote(_here)


def _answer(ref: Any) -> BaseException | None:
    """What a worker that is lost answers; None of one that is not."""
    try:
        ray.get(ref)
    except ray.exceptions.RayError as error:
        return error
    return None


def _is_undecided(error: BaseException | None) -> bool:
    return isinstance(error, ray.exceptions.ActorUnavailableError)


def _here(_actor: Any) -> bool:
    """Runs inside a worker."""
    return True
