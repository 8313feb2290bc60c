"""What runs inside the processes of an Algorithm: staging, fetching, applying.

A restore has two phases. `fetch_in_algorithm` reads and verifies a process's part into memory of its own, checks that
it fits, and holds it; nothing of the process is changed. `apply_in_algorithm` sets what is held, once the driver knows
that all of them fit. Promises: whatever goes wrong comes back as a value; nothing is raised inside RLlib's actors,
which would take them out of service or hang the training.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from rl_ckpt.errors import CheckpointError, InvalidInputError, WorkerFailuresError
from rl_ckpt.rllib.fit import Plan, select_for
from rl_ckpt.rllib.parts import Applied, apply_part, part_problems, part_tree
from rl_ckpt.rllib.rng import set_rng
from rl_ckpt.rllib.team import Role
from rl_ckpt.runtime.inside import as_value
from rl_ckpt.runtime.messages import Failure, Ok, Restage, encode
from rl_ckpt.runtime.restore import RestoredRank, RestoreRequest, restore_rank
from rl_ckpt.runtime.spec import Place, RunSpec
from rl_ckpt.runtime.staging import StagedRank, restage_rank, save_rank
from rl_ckpt.state.declare import Replicated
from rl_ckpt.store.committer import SaveRequest


class Fetched(msgspec.Struct, frozen=True, tag="fetched"):
    """A process has its part of a checkpoint in memory, and has changed nothing."""

    report: RestoredRank
    problems: tuple[str, ...]
    """Why it does not fit."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a restore asks of the processes of an Algorithm."""

    plan: Plan
    roles: tuple[Role, ...]
    """By rank."""
    local: tuple[Role, ...]
    """What else lives in the driver's process."""

    def parts(self, rank: int) -> tuple[Role, ...]:
        """What a process consists of."""
        role = self.roles[rank]
        return (role, *self.local) if role.kind == "driver" else (role,)


@dataclass(frozen=True, slots=True)
class _Held:
    task: Task
    tree: Any


_held: dict[tuple[str, int], _Held] = {}
"""Between the phases, by restore and rank: the driver's process may be an actor of another Algorithm's Tune trial."""


def save_in_algorithm(roles: tuple[Role, ...], target: Any, spec: RunSpec, place: Place, request: SaveRequest) -> bytes:
    """Stages a process's part of a save; runs inside it."""

    def work() -> StagedRank:
        begun = time.monotonic()
        with part_tree(target, roles[place.rank], place.key, roles) as tree:
            return save_rank(spec, place, request, Replicated(tree), begun)

    return as_value(spec, place, "lost_save", work)


def restage_in_algorithm(roles: tuple[Role, ...], target: Any, spec: RunSpec, place: Place, order: Restage) -> bytes:
    """Stages what a process that died was to stage; runs inside one that has staged its own part."""

    def work() -> StagedRank:
        begun = time.monotonic()
        with part_tree(target, roles[place.rank], place.key, roles) as tree:
            return restage_rank(spec, place, order, Replicated(tree), begun)

    return as_value(spec, place, "lost_save", work)


def fetch_in_algorithm(task: Task, target: Any, spec: RunSpec, place: Place, request: RestoreRequest) -> bytes:
    """Reads and checks a process's part of a checkpoint, and holds it; runs inside it."""

    def work() -> Fetched:
        _forget(place.rank)
        parts = task.parts(place.rank)
        wanted = RestoreRequest(request.step, select_for(task.plan, parts), None, True, None)
        tree, report = restore_rank(spec, place, wanted, None)
        problems = part_problems(target, parts, tree, task.plan)
        if not problems:
            _held[place.key, place.rank] = _Held(task, tree)
        return Fetched(report, tuple(problems))

    return as_value(spec, place, "lost_restore", work)


def apply_in_algorithm(key: str, rank: int, target: Any) -> bytes:
    """Sets what was fetched; runs inside the process."""

    def work() -> Applied:
        held = _held.get((key, rank))
        if held is None:
            raise InvalidInputError("nothing is held of this restore: the process was restarted; restore again")
        if rank:  # the driver needs it until the end
            del _held[key, rank]
        return apply_part(target, held.task.parts(rank), held.tree, held.task.plan, key)

    return told(rank, work)


def finish_in_driver(key: str) -> None:
    """Sets the driver's generators, after everything that may have drawn from them, and forgets what was held."""
    held = _held.pop((key, 0))
    if held.task.plan.whole:
        set_rng(held.tree["algorithm"]["rng"])


def release_in_algorithm(_key: str, rank: int, _target: Any) -> bytes:
    """Forgets what was fetched, as it does not fit somewhere; runs inside the process."""

    def work() -> Ok:
        _forget(rank)
        return Ok()

    return told(rank, work)


def told(rank: int, work: Callable[[], msgspec.Struct]) -> bytes:
    """Runs a rank's work where no coordinator waits for it; an error becomes a value."""
    try:
        return encode(work())
    except CheckpointError as error:
        return encode(Failure.of(error))
    except Exception as error:  # noqa: BLE001 - RLlib's code or the user's may raise anything; it must not reach the actor
        text = f"rank {rank} (process {os.getpid()}): {type(error).__name__}: {error}"
        return encode(Failure.of(WorkerFailuresError(text, {rank: text})))


def _forget(rank: int) -> None:
    for key in [key for key in _held if key[1] == rank]:
        del _held[key]
