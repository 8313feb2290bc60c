"""AlgorithmCheckpointer: saves, restores and loads RLlib Algorithms. Reads like the recipe."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Any

from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

from rl_ckpt.checkpointer import Checkpointer
from rl_ckpt.errors import InvalidInputError, WorkerFailuresError
from rl_ckpt.info import CheckpointInfo, VerifyReport
from rl_ckpt.rllib.fit import plan_of
from rl_ckpt.rllib.inside import restage_in_algorithm, save_in_algorithm
from rl_ckpt.rllib.load import Changes, build, read_description, start_ray
from rl_ckpt.rllib.report import AlgorithmRestore
from rl_ckpt.rllib.restoring import restore_algorithm
from rl_ckpt.rllib.resuming import tell_restored, without_resuming
from rl_ckpt.rllib.team import Team, check_algorithm, policies_of, team_of
from rl_ckpt.store.committer import SaveRequest
from rl_ckpt.store.pending import PendingSave, raise_untold


class AlgorithmCheckpointer:
    """Saves and restores the checkpoints of one run of an RLlib Algorithm.

    Example:
        with AlgorithmCheckpointer("s3://bucket/run-7", keep=[LatestN(3)]) as ckpt:
            for _ in range(100):
                algo.train()
                ckpt.save(algo)

    Used by one thread at a time, between two calls of `algo.train()` (or in a callback of the Algorithm). `close` waits
    for what is being written.
    """

    def __init__(self, url: str, *, replay_buffer: bool = True, **options: Any) -> None:
        """Names a run. Nothing is read or written yet.

        Args:
            url: Where the run is: a local folder, or any fsspec url (`s3://bucket/run-7`).
            replay_buffer: Whether saves have the replay buffer in them (DQN, SAC). Without it, a loaded Algorithm
                begins with an empty one, and a restored one keeps what it has.
            options: Those of `Checkpointer` (`keep`, `storage_options`, `when_busy`, `memory_tier`, `persist_every` …),
                but the names of workers' methods, since there are none.

        Raises:
            InvalidInputError: An option is out of range, or the url's scheme is not supported.
        """
        named = sorted(options.keys() & {"get_state", "set_state"})
        if named:
            raise InvalidInputError(f"{named} are for workers of your own; an Algorithm's are known")
        unknown = sorted(options.keys() - inspect.signature(Checkpointer).parameters.keys())
        if unknown:
            raise InvalidInputError(
                f"{unknown} are no options of a Checkpointer; settings of an Algorithm's config go to `load` by "
                "`given={...}`"
            )
        self._ckpt = Checkpointer(url, **options)
        self._replay_buffer = replay_buffer
        self.last_restore: AlgorithmRestore | None = None
        """What the last `restore` or `load` did; None before."""

    @property
    def url(self) -> str:
        """Of the run, normalised, without secrets."""
        return self._ckpt.url

    def save(
        self,
        algo: Algorithm,
        *,
        step: int | None = None,
        metrics: Mapping[str, object] | None = None,
        tag: str | None = None,
        deadline_s: float | None = None,
    ) -> PendingSave:
        """Saves a whole Algorithm; back as soon as every process of it has staged its part.

        Args:
            algo: Trained or not; not inside of `algo.train()` but for its callbacks.
            step: At least 0, not yet saved in this line of checkpoints; None: its training iteration.
            metrics: Plain values to find the checkpoint by later (a return, a loss).
            tag: A name; a tagged checkpoint is never swept.
            deadline_s: As for `Checkpointer.save`.

        Returns:
            The save under way: training may go on. `result()` waits for the commit.

        Raises:
            InvalidInputError: Bad arguments, or something that can't be saved (its path is named); nothing was written.
            WorkerFailuresError: A learner is dead, or a process could not stage its part; by rank. The training is not
                touched by it. Env runners that die are left out.
            CheckpointError: As `Checkpointer.save`.
        """
        check_algorithm(algo)
        algo.rl_ckpt_leaves_buffer_out = not self._replay_buffer  # type: ignore[attr-defined]  # for `driver_tree`
        request = self._ckpt._request(algo.iteration if step is None else step, metrics, tag, deadline_s)
        raise_untold(self._ckpt._pending)
        team = team_of(algo)
        try:
            pending = self._stage(request, team)
        except WorkerFailuresError as error:
            if not error.lost or any(team.roles[rank].kind in ("driver", "learner") for rank in error.failures):
                raise
            pending = self._stage(request, team.without(error.lost))  # runners: RLlib makes new ones
        return self._ckpt._track(pending)

    def _stage(self, request: SaveRequest, team: Team) -> PendingSave:
        save, restage = (partial(function, team.roles) for function in (save_in_algorithm, restage_in_algorithm))
        return self._ckpt._running_service().save(request, team.handles, save, restage)

    def restore(
        self,
        algo: Algorithm,
        *,
        step: int | None = None,
        policies: Mapping[str, str] | Sequence[str] | None = None,
    ) -> AlgorithmRestore:
        """Restores a running Algorithm in place, with any number of learners, env runners and evaluation runners.

        Every part is read, verified and found to fit before anything is changed. When it returns, all learners, env
        runners, evaluation runners and the env-runner state server hold the restored weights.

        Args:
            algo: Its architecture is that of the checkpoint.
            step: Which checkpoint; one that is still being saved here is waited for. None: the newest good one.
            policies: Takes only these policies out of the checkpoint, with their optimizers: a list of ids, or a dict
                {"id in the checkpoint": "id here"}. Iteration, counters, runners and buffers stay as they are then.
                None: everything.

        Raises:
            CheckpointNotFoundError: No such run or checkpoint.
            InvalidInputError: It does not fit (one error lists everything), or bad arguments; nothing was changed.
            CorruptionError: The checkpoint asked for (or every one) is damaged; nothing was changed.
            WorkerFailuresError: Processes failed; says whether anything was changed.
        """
        check_algorithm(algo)
        begun, wanted = time.monotonic(), self._ckpt._wanted(step)
        spec = self._ckpt._running_service().spec
        about = read_description(spec, self.url, wanted, "about")["about"]
        plan = plan_of(about, policies_of(algo), policies, goes_on=policies is None)
        report = self.last_restore = restore_algorithm(spec, algo, plan, wanted, begun)
        if policies is None:
            self._ckpt._branch.restored(report.id)
            tell_restored(algo, self.url, report.id)
        return report

    def load(
        self,
        *,
        step: int | None = None,
        given: Mapping[str, Any] | None = None,
        config: AlgorithmConfig | None = None,
        policies: Sequence[str] | None = None,
        policy_mapping_fn: Callable[..., str] | None = None,
        policies_to_train: Sequence[str] | Callable[..., bool] | None = None,
    ) -> Algorithm:
        """Builds the Algorithm of a checkpoint and restores it, from nothing but the run.

        Args:
            step: Which checkpoint; None: the newest good one.
            given: Settings of the config by name that replace the saved ones (`{"num_env_runners": 4}`), and what the
                checkpoint could not hold: a lambda, a class that can't be imported here (`{"env": MyEnv}`).
            config: A whole config in place of the saved one.
            policies: Builds with these policies of the checkpoint alone; needs a `policy_mapping_fn` where several
                were saved.
            policy_mapping_fn: As for `AlgorithmConfig.multi_agent`.
            policies_to_train: As for `AlgorithmConfig.multi_agent`; the others are frozen.

        Returns:
            The Algorithm, which goes on from the checkpoint. `last_restore` says what was done.

        Raises:
            CheckpointError: As `restore`; no Algorithm is left behind.
        """
        begun, wanted = time.monotonic(), self._ckpt._wanted(step)
        start_ray()
        spec = self._ckpt._running_service().spec
        changes = Changes(dict(given or {}), config, policies, policy_mapping_fn, policies_to_train)
        described = read_description(spec, self.url, wanted, "about", "config")
        with without_resuming(self.url):
            algo = build(described, changes)
        try:
            plan = plan_of(described["about"], policies_of(algo), policies, goes_on=True)
            report = self.last_restore = restore_algorithm(spec, algo, plan, wanted, begun)
        except BaseException:
            algo.stop()
            raise
        self._ckpt._branch.restored(report.id)
        tell_restored(algo, self.url, report.id)
        return algo

    def continues(self, checkpoint: str) -> None:
        """The Algorithm was restored from a checkpoint of this run by another AlgorithmCheckpointer.

        Args:
            checkpoint: Its id; the next save continues it.
        """
        self._ckpt._branch.restored(checkpoint)

    def checkpoints(self) -> list[CheckpointInfo]:
        """All checkpoints of the run in the store, oldest first."""
        return self._ckpt.checkpoints()

    def latest(self) -> CheckpointInfo | None:
        """The newest checkpoint in the store, or None."""
        return self._ckpt.latest()

    def verify(self, step: int | None = None, *, repair: bool = False) -> VerifyReport:
        """As `Checkpointer.verify`."""
        return self._ckpt.verify(step, repair=repair)

    def pin(self, step: int, *, seconds: float = 3600.0) -> AbstractContextManager[CheckpointInfo]:
        """As `Checkpointer.pin`."""
        return self._ckpt.pin(step, seconds=seconds)

    def close(self) -> None:
        """Waits until all saves are committed or have failed, and ends this run's actors (not the Algorithm's).

        Raises:
            CheckpointError: A save failed and nobody had asked for its result yet.
        """
        self._ckpt.close()

    def __enter__(self) -> AlgorithmCheckpointer:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()


def save(
    algo: Algorithm,
    url: str,
    *,
    step: int | None = None,
    metrics: Mapping[str, object] | None = None,
    tag: str | None = None,
    **options: Any,
) -> CheckpointInfo:
    """Saves an Algorithm once; back when it is committed. In a training loop, use an `AlgorithmCheckpointer`.

    Args:
        algo: As for `AlgorithmCheckpointer.save`.
        url: Of the run.
        step: As for `AlgorithmCheckpointer.save`.
        metrics: As for `AlgorithmCheckpointer.save`.
        tag: As for `AlgorithmCheckpointer.save`.
        options: As for `AlgorithmCheckpointer`.

    Raises:
        CheckpointError: As `AlgorithmCheckpointer.save`.
    """
    with AlgorithmCheckpointer(url, **options) as ckpt:
        return ckpt.save(algo, step=step, metrics=metrics, tag=tag).result()


def restore(
    algo: Algorithm,
    url: str,
    *,
    step: int | None = None,
    policies: Mapping[str, str] | Sequence[str] | None = None,
    **options: Any,
) -> AlgorithmRestore:
    """Restores a running Algorithm in place; see `AlgorithmCheckpointer.restore`.

    Args:
        algo: The Algorithm.
        url: Of the run.
        step: Which checkpoint; None: the newest good one.
        policies: As for `AlgorithmCheckpointer.restore`.
        options: As for `AlgorithmCheckpointer`.

    Raises:
        CheckpointError: As `AlgorithmCheckpointer.restore`.
    """
    with AlgorithmCheckpointer(url, **options) as ckpt:
        return ckpt.restore(algo, step=step, policies=policies)


def load(
    url: str,
    *,
    step: int | None = None,
    given: Mapping[str, Any] | None = None,
    config: AlgorithmConfig | None = None,
    policies: Sequence[str] | None = None,
    policy_mapping_fn: Callable[..., str] | None = None,
    policies_to_train: Sequence[str] | Callable[..., bool] | None = None,
    **options: Any,
) -> Algorithm:
    """Builds the Algorithm of a checkpoint and restores it; see `AlgorithmCheckpointer.load`.

    Starts Ray (`ray.init()`), where it does not run yet, as RLlib does.

    Args:
        url: Of the run.
        step: Which checkpoint; None: the newest good one.
        given: As for `AlgorithmCheckpointer.load`.
        config: As for `AlgorithmCheckpointer.load`.
        policies: As for `AlgorithmCheckpointer.load`.
        policy_mapping_fn: As for `AlgorithmCheckpointer.load`.
        policies_to_train: As for `AlgorithmCheckpointer.load`.
        options: As for `AlgorithmCheckpointer`.

    Raises:
        CheckpointError: As `AlgorithmCheckpointer.load`.
    """
    with AlgorithmCheckpointer(url, **options) as ckpt:
        return ckpt.load(
            step=step,
            given=given,
            config=config,
            policies=policies,
            policy_mapping_fn=policy_mapping_fn,
            policies_to_train=policies_to_train,
        )
