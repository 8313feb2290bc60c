"""Who takes part in a save or restore: the processes of one Algorithm, by rank.

Rank 0 is the process that holds the Algorithm, with the local learner, the local runners, the replay buffer and the
counters; then come remote learners, env runners and evaluation runners. Owns: finding them. RLlib's own managers never
see our calls: those go to the actors directly, so that a failure of ours can't take an actor out of service.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.rllib.algorithms.algorithm import Algorithm

from rl_ckpt.errors import InvalidInputError, WorkerFailuresError
from rl_ckpt.runtime.calls import Own
from rl_ckpt.runtime.losses import in_one_line, is_loss

_ANSWER_S = 300.0  # a learner may have updates to do before

AnyAlgorithm = Any
"""An `Algorithm`; RLlib's own types say of most of its attributes that they may be None."""

Kind = Literal["driver", "learner", "env_runner", "eval_env_runner"]


@dataclass(frozen=True, slots=True)
class Role:
    """What a process is in its Algorithm."""

    kind: Kind
    index: int = 0
    """Of the learner, from 0; or of the runner, from 1 (0 is the local one, in the driver's process)."""

    def __str__(self) -> str:
        """For messages."""
        names = {"learner": "learner", "env_runner": "env runner", "eval_env_runner": "evaluation runner"}
        return "the Algorithm's process" if self.kind == "driver" else f"{names[self.kind]} {self.index}"


@dataclass(frozen=True, slots=True)
class Team:
    """The processes of one Algorithm, by rank."""

    handles: tuple[Any, ...]
    """`Own` and Ray actor handles."""
    roles: tuple[Role, ...]
    absent: tuple[Role, ...] = ()
    """Remote runners that RLlib has marked as unhealthy; they take no part."""

    def without(self, ranks: tuple[int, ...]) -> Team:
        """The same without some, which were lost."""
        stay = [rank for rank in range(len(self.roles)) if rank not in ranks]
        gone = tuple(self.roles[rank] for rank in ranks)
        return Team(
            tuple(self.handles[rank] for rank in stay), tuple(self.roles[rank] for rank in stay), self.absent + gone
        )


def team_of(algo: AnyAlgorithm) -> Team:
    """The processes of an Algorithm as they are now.

    Raises:
        InvalidInputError: Not an Algorithm of the new API stack, or one that was stopped.
    """
    check_algorithm(algo)
    handles: list[Any] = [Own(algo)]
    roles, absent = [Role("driver")], list[Role]()
    manager = algo.learner_group._worker_manager
    if manager is not None:
        for index, actor in enumerate(manager.actors().values()):
            handles.append(actor)
            roles.append(Role("learner", index))
    groups: tuple[tuple[Kind, Any], ...] = (
        ("env_runner", algo.env_runner_group),
        ("eval_env_runner", algo.eval_env_runner_group),
    )
    for kind, group in groups:
        if group is None:
            continue
        healthy = set(group.healthy_env_runner_ids())
        for index, actor in group._worker_manager.actors().items():
            role = Role(kind, index)
            if index in healthy:
                handles.append(actor)
                roles.append(role)
            else:
                absent.append(role)
    return Team(tuple(handles), tuple(roles), tuple(absent))


def check_algorithm(algo: Any) -> None:
    """Whether we can take part of it.

    Raises:
        InvalidInputError: Not an Algorithm of the new API stack, or one that was stopped.
    """
    if not isinstance(algo, Algorithm):
        raise InvalidInputError(
            f"{type(algo).__name__} is not an RLlib Algorithm; give what `config.build_algo()` returned"
        )
    config: Any = algo.config
    if not (config.enable_rl_module_and_learner and config.enable_env_runner_and_connector_v2):
        raise InvalidInputError(
            f"{type(algo).__name__} is on RLlib's old API stack, which has no RLModules; see docs/rllib-versions.md"
        )
    if algo.learner_group is None or algo.learner_group._is_shut_down:
        raise InvalidInputError(f"{type(algo).__name__} has no learners: it was stopped")


def policies_of(algo: AnyAlgorithm) -> list[str]:
    """Ids of an Algorithm's policies, as its first learner has them.

    Raises:
        WorkerFailuresError: That learner is dead or does not answer.
    """
    group = algo.learner_group
    if group._learner is not None:
        return _policies(group._learner)
    first = next(iter(group._worker_manager.actors().values()))
    try:
        found: list[str] = ray.get(first.__ray_call__.options(max_task_retries=0).remote(_policies), timeout=_ANSWER_S)
    except ray.exceptions.RayError as error:
        text = f"learner 0 is dead or does not answer: {in_one_line(error)}"
        raise WorkerFailuresError(text, {1: text}, [1] if is_loss(error) else []) from error
    return found


def _policies(learner: Any) -> list[str]:
    return list(learner.module.keys())
