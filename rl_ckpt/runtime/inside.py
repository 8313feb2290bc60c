"""What runs inside the user's actors: the worker's side of saves and restores.

No base class and no threads: plain functions, which Ray calls through `__ray_call__`. Promises: any error comes back as
a value with its rank; nothing is raised into the user's actor, and nothing is kept in it between saves but the mapped
staging memory and the shape of the last state.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import ray

from rl_ckpt.errors import CheckpointError, InvalidInputError, WorkerFailuresError
from rl_ckpt.runtime.links import ToldError, UnheardError, coordinator
from rl_ckpt.runtime.losses import is_loss
from rl_ckpt.runtime.messages import Failure, Lost, Ok, Restage, encode
from rl_ckpt.runtime.restore import RestoredRank, RestoreRequest, restore_rank
from rl_ckpt.runtime.spec import Place, RunSpec
from rl_ckpt.runtime.staging import StagedRank, prepare_rank, restage_rank, save_rank
from rl_ckpt.store.committer import SaveRequest


def save_in_actor(actor: Any, spec: RunSpec, place: Place, request: SaveRequest) -> bytes:
    """Saves an actor's state; runs inside it."""

    def work() -> StagedRank:
        begun = time.monotonic()
        state = _call(actor, spec.get_state)
        return save_rank(spec, place, request, state, begun)

    return as_value(spec, place, "lost_save", work)


def restage_in_actor(actor: Any, spec: RunSpec, place: Place, order: Restage) -> bytes:
    """Stages what a dead worker was to stage; runs inside an actor that has staged its own part of the save."""

    def work() -> StagedRank:
        begun = time.monotonic()
        state = _call(actor, spec.get_state)
        return restage_rank(spec, place, order, state, begun)

    return as_value(spec, place, "lost_save", work)


def restore_in_actor(actor: Any, spec: RunSpec, place: Place, request: RestoreRequest) -> bytes:
    """Restores an actor's state; runs inside it."""

    def work() -> RestoredRank:
        state = _call(actor, spec.get_state)
        tree, report = restore_rank(spec, place, request, state)
        _call(actor, spec.set_state, tree)
        return report

    return as_value(spec, place, "lost_restore", work)


def prepare_in_actor(actor: Any, spec: RunSpec, place: Place, _request: None) -> bytes:
    """Makes an actor ready for its first save; runs inside it."""

    def work() -> Ok:
        prepare_rank(spec, place, _call(actor, spec.get_state))
        return Ok()

    return as_value(spec, place, "lost_save", work)


def _call(actor: Any, name: str, *args: Any) -> Any:
    method = getattr(actor, name, None)
    if not callable(method):
        raise InvalidInputError(
            f"{type(actor).__name__} has no method {name!r}; add it, or name yours: "
            "Checkpointer(..., get_state=..., set_state=...)"
        )
    if inspect.iscoroutinefunction(method):
        text = "give a plain method (it may not wait for other actors)"
        raise InvalidInputError(f"{type(actor).__name__}.{name} is a coroutine; {text}")
    try:
        return method(*args)
    except (SystemExit, KeyboardInterrupt) as error:  # Ray would end the actor
        what = f"{type(error).__name__}({error})"
        raise RuntimeError(f"{type(actor).__name__}.{name} raised {what}, which would have ended the actor") from error


def as_value(spec: RunSpec, place: Place, lost: str, work: Callable[[], msgspec.Struct]) -> bytes:
    """Runs one rank's work; an error becomes a value, and the other ranks are told.

    Args:
        spec: The run.
        place: Which rank, in which save or restore.
        lost: The coordinator's method to tell.
        work: Returns a message.
    """
    try:
        with guarded(spec, place, lost):
            return encode(work())
    except CheckpointError as error:
        return encode(Failure.of(error))


@contextlib.contextmanager
def guarded(spec: RunSpec, place: Place, lost: str) -> Iterator[None]:
    """Whatever goes wrong on a rank becomes an error of ours that names it, and the other ranks are told.

    Args:
        spec: The run.
        place: Which rank, in which save or restore.
        lost: The coordinator's method to tell.
    """
    unheard = False
    try:
        yield
        return
    except ToldError as told:
        raise told.error from None
    except UnheardError as error:
        text = f"rank {place.rank}: {error}"
        failed: CheckpointError = WorkerFailuresError(text, {place.rank: str(error)}, [place.rank])
        unheard = True
    except InvalidInputError as error:
        failed = InvalidInputError(f"rank {place.rank}: {error}")
    except CheckpointError as error:
        failed = error
    except ray.exceptions.RayError as error:
        text = f"rank {place.rank}: a process that it needs was lost: {error}"
        failed = WorkerFailuresError(text, {place.rank: text}, [place.rank] if is_loss(error) else ())
    except Exception as error:  # noqa: BLE001 - the user's get_state or set_state may raise anything; it must not poison the actor
        text = f"rank {place.rank} (process {os.getpid()}): {type(error).__name__}: {error}"
        failed = WorkerFailuresError(text, {place.rank: text})
    message = Lost(place.key, place.rank, place.world_size, Failure.of(failed), unheard=unheard)
    with contextlib.suppress(ValueError, ray.exceptions.RayError):  # no coordinator left to tell
        getattr(coordinator(spec), lost).remote(encode(message))
    raise failed
