"""A restore of an Algorithm, as its driver conducts it: all fetch and check, then all apply, then all compare.

Promises: where anything does not fit, or can't be read, nothing of the Algorithm was changed, and one error says all of
it; when the restore returns, every learner, env runner, evaluation runner and the env-runner state server has the
restored weights, by digest. What may still go wrong in between (a process that dies while it applies) is an error that
says that the Algorithm is in part restored.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from rl_ckpt.errors import CheckpointError, InvalidInputError, WorkerFailuresError
from rl_ckpt.rllib.algorithm import forget_numbers, forget_requests
from rl_ckpt.rllib.fit import Plan
from rl_ckpt.rllib.inside import (
    Fetched,
    Task,
    apply_in_algorithm,
    fetch_in_algorithm,
    finish_in_driver,
    release_in_algorithm,
)
from rl_ckpt.rllib.parts import Applied, local_roles
from rl_ckpt.rllib.report import AlgorithmRestore
from rl_ckpt.rllib.served import replace_served
from rl_ckpt.rllib.team import AnyAlgorithm, Team, team_of
from rl_ckpt.runtime.calls import Own, call_all, new_key
from rl_ckpt.runtime.losses import in_one_line
from rl_ckpt.runtime.messages import Failure, decode
from rl_ckpt.runtime.restore import RestoreRequest
from rl_ckpt.runtime.spec import RunSpec

_REPLY: Any = Applied | Failure
_PHASES = 3  # in which a process may use up `join_timeout_s`, as in runtime/calls.py


def restore_algorithm(
    spec: RunSpec, algo: AnyAlgorithm, plan: Plan, step: int | None, begun: float
) -> AlgorithmRestore:
    """Restores an Algorithm in place.

    Args:
        spec: The run.
        algo: Of any number of learners and runners.
        plan: What of the checkpoint goes where.
        step: Which checkpoint; None: the newest good one.
        begun: When the restore was called for, by `time.monotonic`.

    Raises:
        InvalidInputError: It does not fit; nothing was changed.
        CheckpointError: As `Checkpointer.restore`; nothing was changed, unless the message says so.
    """
    team, key = team_of(algo), new_key()
    task = Task(plan, team.roles, local_roles(algo))
    with _released(team, key):
        fetched = _fetch(spec, team, task, step, key)
        first = fetched[0].report
        problems = "\n  ".join(_problems(team, fetched))
        if problems:
            text = f"checkpoint {first.id} does not fit this Algorithm (nothing was changed):\n  {problems}"
            raise InvalidInputError(text)
        forget_requests(algo)
        applied = _apply(spec, team, key)
        forget_numbers(algo)
        digests = _compare(plan, team, applied, replace_served(algo))
        finish_in_driver(key)
    notices = [text for part in applied for text in part.notices]
    notices += [f"{role} is not healthy; RLlib gives it the restored weights when it is back" for role in team.absent]
    return AlgorithmRestore(
        step=first.step,
        id=first.id,
        iteration=algo.iteration,
        policies=dict(plan.policies),
        learners=sum(len(part.learners) for part in applied),
        env_runners=sum(len(part.runners) for part in applied),
        eval_env_runners=sum(len(part.eval_runners) for part in applied),
        digests=digests,
        bytes=sum(part.report.bytes for part in fetched),
        bytes_from=first.bytes_from,
        seconds=time.monotonic() - begun,
        fell_back=first.fell_back,
        repaired=first.repaired,
        notices=tuple(dict.fromkeys([*notices, *([first.notice] if first.notice else [])])),
    )


@contextlib.contextmanager
def _released(team: Team, key: str) -> Iterator[None]:
    """Whatever fails inside, no process goes on holding what it fetched.

    Nobody waits for that: an actor may be what hangs, and it does this before anything it is called for later.
    """
    try:
        yield
    except BaseException:
        for rank, handle in enumerate(team.handles):
            release = _Call(release_in_algorithm, key, rank)
            if isinstance(handle, Own):
                release(handle.target)
            else:
                handle.__ray_call__.options(max_task_retries=0).remote(release)
        raise


def _fetch(spec: RunSpec, team: Team, task: Task, step: int | None, key: str) -> list[Fetched]:
    fetch = partial(fetch_in_algorithm, task)
    try:
        return call_all(spec, team.handles, "lost_restore", fetch, RestoreRequest(step), Fetched, key)
    except WorkerFailuresError as error:
        named = "; ".join(
            f"{team.roles[rank]}: {text}" for rank, text in error.failures.items() if rank < len(team.roles)
        )
        raise WorkerFailuresError(f"{named or error} (nothing was changed)", error.failures, error.lost) from error


def _problems(team: Team, fetched: Sequence[Fetched]) -> list[str]:
    """Each problem once, with all that have it."""
    who: dict[str, list[str]] = {}
    for role, part in zip(team.roles, fetched, strict=True):
        for text in part.problems:
            who.setdefault(text, []).append(str(role))
    return [f"{', '.join(names)}: {text}" for text, names in who.items()]


def _apply(spec: RunSpec, team: Team, key: str) -> list[Applied]:
    """All set what they hold."""
    found = _applied(spec, team, key)
    failed = {rank: part.message for rank, part in enumerate(found) if isinstance(part, Failure)}
    if failed:
        said = "; ".join(f"{team.roles[rank]}: {text}" for rank, text in failed.items())
        raise WorkerFailuresError(
            f"the restore ended half-way ({said}): parts of this Algorithm are as they were, others are restored. "
            "Restore again, or stop it and use `load`",
            failed,
            [rank for rank in failed if rank in _lost(found)],
        )
    return [part for part in found if isinstance(part, Applied)]


def _lost(found: Sequence[Any]) -> set[int]:
    return {rank for part in found if isinstance(part, Failure) for rank in part.lost}


def _applied(spec: RunSpec, team: Team, key: str) -> list[Applied | Failure]:
    """Every process of a team sets what it holds, the own one last; an answer or a `Failure` of each, by rank."""
    calls = {
        rank: handle.__ray_call__.options(max_task_retries=0).remote(_Call(apply_in_algorithm, key, rank))
        for rank, handle in enumerate(team.handles)
        if not isinstance(handle, Own)
    }
    deadline = time.monotonic() + _PHASES * spec.options.join_timeout_s
    replies: list[Applied | Failure] = []
    for rank, handle in enumerate(team.handles):
        if isinstance(handle, Own):
            replies.append(decode(apply_in_algorithm(key, rank, handle.target), _REPLY))
            continue
        try:
            data = ray.get(calls[rank], timeout=max(0.0, deadline - time.monotonic()))
            replies.append(decode(data, _REPLY))
        except ray.exceptions.RayError as error:
            text = f"is dead or does not answer: {in_one_line(error)}"
            replies.append(Failure.of(WorkerFailuresError(text, {rank: text}, [rank])))
    return replies


@dataclass(frozen=True, slots=True)
class _Call:
    """What Ray calls with the actor."""

    function: Callable[[str, int, Any], bytes]
    key: str
    rank: int

    def __call__(self, actor: Any) -> bytes:
        return self.function(self.key, self.rank, actor)


def _compare(plan: Plan, team: Team, applied: Sequence[Applied], served: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The digest of each restored policy's weights, the same everywhere.

    Raises:
        CheckpointError: It is not; says where.
    """
    where: dict[str, dict[str, list[str]]] = {}
    for role, part in zip(team.roles, applied, strict=True):
        for copies in (part.learners, part.runners, part.eval_runners):
            _note(where, copies, str(role))
    _note(where, served, "the env-runner state server")
    restored = {id_: where.get(id_, {}) for id_ in plan.policies.values()}
    differing = {id_: found for id_, found in restored.items() if len(found) != 1}
    if differing:
        raise CheckpointError(
            f"after the restore, weights differ between processes (by policy, digest → who has it): {differing}. "
            "This should never happen: please report it; stop this Algorithm and use `load`"
        )
    return {id_: next(iter(found)) for id_, found in restored.items()}


def _note(where: dict[str, dict[str, list[str]]], copies: Iterable[Mapping[str, str]], who: str) -> None:
    for digests in copies:
        for id_, digest in digests.items():
            where.setdefault(id_, {}).setdefault(digest, []).append(who)
