"""Checkpointing as a part of an AlgorithmConfig: `config.callbacks(checkpointing("s3://bucket/run-7", …))`.

Owns: that an Algorithm is saved when it is due (`SavePolicy` knows when), and that it goes on from its newest
checkpoint when the job starts again. Promises: training waits for the staging of a save alone; a save that fails in the
background is raised by the next `algo.train()` or `algo.stop()`; `algo.stop()` waits until everything staged is
committed. What it puts into the config is plain data, so it goes to Tune's trials and into checkpoints like any other
setting. Does not: save in the middle of an iteration.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.utils import force_list

from rl_ckpt import logs
from rl_ckpt.errors import CheckpointNotFoundError, InvalidInputError, SaveSkippedError
from rl_ckpt.info import Preemption
from rl_ckpt.plan.retention import BestN, KeepRule
from rl_ckpt.plan.save_rules import Auto, Best, EverySeconds, EverySteps, OnPreemption, SaveRule
from rl_ckpt.plan.when import Due, SavePolicy
from rl_ckpt.rllib.checkpointer import AlgorithmCheckpointer
from rl_ckpt.rllib.result import recorded
from rl_ckpt.rllib.resuming import loaded_from
from rl_ckpt.rllib.team import team_of
from rl_ckpt.runtime.preemption import PreemptionWatch
from rl_ckpt.store.pending import PendingSave, raise_untold
from rl_ckpt.store.urls import normalise_url

_log = logs.logger(__name__)

TRIAL = "{trial}"
TERMINATED = 143  # exit status of a process that SIGTERM ended


@dataclass
class Hidden:
    """Storage options: on their way to other processes like the rest, but no field, so that no checkpoint holds them.

    A config that comes out of a checkpoint has none, and takes credentials from the environment.
    """

    __slots__ = ("_take",)

    def __init__(self, options: Mapping[str, Any] | None) -> None:
        self._take: Callable[[], dict[str, Any]] = partial(dict, options or {})

    @property
    def options(self) -> dict[str, Any]:
        """As they were given."""
        take: Callable[[], dict[str, Any]] = getattr(self, "_take", dict)
        return take()


@dataclass(frozen=True)
class Checkpointing:
    """Settings of `checkpointing`, in a config; called by RLlib, it makes the callback."""

    url: str
    every_iterations: int | None
    every_seconds: float | None
    best: tuple[str, str] | None
    keep: tuple[KeepRule, ...]
    on_preemption: bool
    grace_s: float
    resume: bool
    options: dict[str, Any] = field(default_factory=dict)
    storage: Hidden = field(default_factory=lambda: Hidden(None))
    auto: Auto | None = None

    def __call__(self) -> CheckpointCallback:
        """The callback; RLlib makes one in the Algorithm's process and one in each env runner."""
        return CheckpointCallback(self)

    def rules(self, notice: Callable[[], Preemption | None]) -> list[SaveRule]:
        """When to save."""
        rules: list[SaveRule] = [] if self.auto is None else [self.auto]
        rules += [] if self.every_iterations is None else [EverySteps(self.every_iterations)]
        rules += [] if self.every_seconds is None else [EverySeconds(self.every_seconds)]
        rules += [] if self.best is None else [Best(*self.best)]
        return [*rules, OnPreemption(notice)]


def checkpointing(
    url: str | os.PathLike[str],
    *,
    every_iterations: int | None = None,
    every_seconds: float | None = None,
    best: tuple[str, str] | None = None,
    auto: Auto | None = None,
    keep: Sequence[KeepRule] = (),
    on_preemption: bool = True,
    grace_s: float = 30.0,
    resume: bool = True,
    storage_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:  # a Checkpointing; `AlgorithmConfig.callbacks` calls what it is given, but its annotation wants classes
    """Saves an Algorithm while it trains, and lets it go on from its newest checkpoint when the job starts again.

    For `AlgorithmConfig.callbacks(...)`, alone or in a list beside other callbacks. A job that was killed is started
    again by the very same script: `config.build_algo()` finds the newest checkpoint and restores it.

    Args:
        url: Of the run. In Ray Tune "{trial}" stands for the name of the trial's folder; without it, each trial's run
            is `<url>/<trial>`.
        every_iterations: Saves at every multiple of so many iterations. With none of the four, after every iteration.
        every_seconds: Saves at the end of the first iteration after so many seconds.
        best: Path of a metric in the result ("env_runners/episode_return_mean") and "max" or "min": saves when it is
            better than ever, and keeps that checkpoint whatever `keep` says.
        auto: Saves at the interval that loses least time, by what saves cost and how often the job had to be resumed:
            see `Auto`.
        keep: Retention rules, as for `Checkpointer`. None: all checkpoints stay.
        on_preemption: Saves at the end of the iteration when this process gets SIGTERM, or Ray drains a node that the
            Algorithm uses. Where this process has to go, `algo.train()` then raises SystemExit(143).
        grace_s: How long there is from such a notice that tells no time, in seconds.
        resume: Whether to restore the newest checkpoint, if there is any, when the Algorithm is built.
        storage_options: As for `Checkpointer`. They are not stored with the config in checkpoints.
        options: Others of `Checkpointer`: `when_busy`, `memory_tier`, `persist_every`, …

    Raises:
        InvalidInputError: An argument is out of range.
    """
    for name, number in (("every_iterations", every_iterations), ("every_seconds", every_seconds)):
        if number is not None and not (type(number) in (int, float) and 0 < number < math.inf):
            raise InvalidInputError(f"{name}={number!r} must be a number greater than 0")
    if every_iterations is not None and type(every_iterations) is not int:
        raise InvalidInputError(f"every_iterations={every_iterations!r} must be an integer")
    if auto is not None and not isinstance(auto, Auto):
        raise InvalidInputError(f"auto={auto!r} must be an Auto, such as Auto(min_s=60)")
    url = check_template(url)
    AlgorithmCheckpointer(url.replace(TRIAL, "x"), keep=keep, **options)  # says what is wrong with these
    PreemptionWatch(grace_s, 1.0)
    rules = list(keep)
    if best is not None:
        if not (isinstance(best, tuple) and len(best) == 2 and isinstance(best[0], str) and best[1] in ("max", "min")):
            raise InvalidInputError(f'best={best!r} must be like ("env_runners/episode_return_mean", "max")')
        rules += [BestN(*best)] if rules else []
    elif every_iterations is None and every_seconds is None and auto is None:
        every_iterations = 1
    return Checkpointing(
        url,
        every_iterations,
        every_seconds,
        best,
        tuple(rules),
        on_preemption,
        grace_s,
        resume,
        dict(options),
        Hidden(storage_options),
        auto,
    )


class CheckpointCallback(RLlibCallback):
    """Does what `checkpointing` says. In env runners it does nothing."""

    def __init__(self, settings: Checkpointing) -> None:
        self.settings = settings
        self.checkpointer: AlgorithmCheckpointer | None = None
        """Of the Algorithm's run, while it lives."""
        self.policy = SavePolicy(*settings.rules(self._notice))
        """When to save; `policy.chosen` is what `auto` has chosen."""
        self._pending: list[PendingSave] = []
        self._watch: PreemptionWatch | None = None
        self._actors: Callable[[], Sequence[Any]] = list
        self._closing = contextlib.ExitStack()

    def get_state(self) -> dict[str, Any]:
        """What goes into the checkpoint with the rest: the best value so far, and what saves cost."""
        return self.policy.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Takes it back."""
        best = self.settings.best
        if best is not None and isinstance(state["best"], float | int):  # of a release without `SavePolicy`
            state = {**self.policy.get_state(), "best": {Best(*best).name: state["best"]}}
        if isinstance(state["best"], Mapping):
            self.policy.set_state(state)

    def on_algorithm_init(self, *, algorithm: Algorithm, **_more: Any) -> None:
        """Opens the run, and restores its newest checkpoint.

        Raises:
            CheckpointError: It can't be restored.
        """
        settings = self.settings
        self.checkpointer = AlgorithmCheckpointer(
            run_url(settings.url, algorithm, loaded_from()),
            keep=settings.keep,
            storage_options=settings.storage.options,
            **settings.options,
        )
        self._actors = lambda: team_of(algorithm).handles[1:]
        # RLlib has no callback for the end: the Algorithm's own method is wrapped.
        algorithm.cleanup = partial(self._cleanup, algorithm.cleanup)  # type: ignore[method-assign]
        try:
            self._check_alone(algorithm, self.checkpointer.url)
            if settings.resume and loaded_from() is None:
                self._resume(algorithm, self.checkpointer)
            if settings.on_preemption:
                self._watch = self._closing.enter_context(PreemptionWatch(settings.grace_s, 1.0))
        except BaseException:
            self.close()
            raise
        self.policy.restored(algorithm.iteration)

    def _check_alone(self, algorithm: Algorithm, url: str) -> None:
        others = [found for found in force_list(algorithm.callbacks) if isinstance(found, CheckpointCallback)]
        if any(other.checkpointer and other.checkpointer.url == url for other in others if other is not self):
            raise InvalidInputError(f"checkpointing({url!r}, …) is twice among the callbacks; leave one of them")

    def _resume(self, algorithm: Algorithm, checkpointer: AlgorithmCheckpointer) -> None:
        """Restores the newest checkpoint, unless another callback of ours did restore a newer one from its run."""
        with contextlib.suppress(CheckpointNotFoundError):
            if algorithm.iteration:
                newest = checkpointer.latest()
                if newest is None or newest.step <= algorithm.iteration:
                    return
            checkpointer.restore(algorithm)
            self.policy.lost()

    def on_restored(self, algorithm: Algorithm, url: str, checkpoint: str) -> None:
        """The Algorithm was restored, by whatever means: the next save continues that checkpoint."""
        if self.checkpointer is not None and self.checkpointer.url == url:
            self.checkpointer.continues(checkpoint)
        self.policy.restored(algorithm.iteration)

    def on_train_result(self, *, algorithm: Algorithm, result: Mapping[str, Any], **_more: Any) -> None:
        """Saves where it is time to.

        Raises:
            CheckpointError: This save, or one before, failed.
            SystemExit: This process has to go; everything is saved.
        """
        assert self.checkpointer is not None, "RLlib calls on_algorithm_init first"
        raise_untold(self._pending)
        self._pending = [pending for pending in self._pending if not pending.settled()]
        metrics = recorded(result, self.settings.best)
        if self.settings.best is not None and self.settings.best[0] not in metrics:
            _log.warning("the result has no number %r (%s)", self.settings.best[0], ", ".join(map(str, result)))
        due = self.policy.due(algorithm.iteration, metrics)
        if due is not None and due.urgent:
            self._urgent(self.checkpointer, algorithm, metrics, due)
        elif due is not None:
            with contextlib.suppress(SaveSkippedError):  # earlier ones are being written: at the next iteration
                pending = self.checkpointer.save(algorithm, metrics=metrics)
                self._pending.append(pending)
                self.policy.began(due, pending)

    def close(self) -> None:
        """Waits until everything staged is committed, and lets the run go.

        Raises:
            CheckpointError: A save failed, and nobody was told yet.
        """
        checkpointer, self.checkpointer = self.checkpointer, None
        self._closing.close()
        self._watch = None
        if checkpointer is not None:
            checkpointer.close()

    def _cleanup(self, cleanup: Callable[[], None]) -> None:
        try:
            cleanup()
        finally:
            self.close()

    def _notice(self) -> Preemption | None:
        """A notice of preemption, if there is one."""
        if self._watch is None or self._watch.notice() is None:
            return None
        return self._watch.notice(self._actors())

    def _urgent(
        self, checkpointer: AlgorithmCheckpointer, algorithm: Algorithm, metrics: Mapping[str, Any], due: Due
    ) -> None:
        """Saves before the deadline, and waits for it."""
        _log.warning("%s: saving iteration %d at once", due.text, algorithm.iteration)
        pending = checkpointer.save(algorithm, metrics=metrics, deadline_s=due.deadline_s)
        pending.result()
        self.policy.began(due, pending)
        if due.leave:
            raise SystemExit(TERMINATED)


def run_url(url: str, algorithm: Any, loaded: str | None = None) -> str:
    """The url of an Algorithm's run: in a trial of Ray Tune, one of its own.

    Args:
        url: As given for all trials.
        algorithm: A trial's, or one without Tune.
        loaded: The run that `load` took the Algorithm from. If that is a trial's, it goes on there.

    Raises:
        InvalidInputError: The url names a trial, and there is none.
    """
    trial = trial_of(algorithm)
    if trial is None and loaded is not None and (TRIAL in url or _is_trials(loaded, url)):
        return loaded
    if TRIAL not in url:
        return url if trial is None else f"{url.rstrip('/')}/{trial}"
    if trial is None:
        raise InvalidInputError(f"url={url!r} names a trial of Ray Tune, and this Algorithm is none")
    return url.replace(TRIAL, trial)


def check_template(url: str | os.PathLike[str]) -> str:
    """A url for all trials, normalised: absolute, as Tune's trials work in folders of their own.

    Raises:
        InvalidInputError: It is not usable, or has something else than "{trial}" in braces.
    """
    normal = normalise_url(url)
    for found in re.findall(r"\{[^/{}]*\}", normal):
        if found != TRIAL:
            raise InvalidInputError(f"{found} stands for nothing in a url; {TRIAL} is the name of the trial's folder")
    return normal


def _is_trials(run: str, url: str) -> bool:
    """Whether a run is that of some trial below a url."""
    above, _, trial = run.rpartition("/")
    return bool(trial) and above == url.rstrip("/")


def trial_of(algorithm: Any) -> str | None:
    """Name of the trial's folder, which has its id in it; it is the same after `Tuner.restore`. None without Tune.

    (`Algorithm.trial_id` is "default" in every trial of Ray 2.60: RLlib drops what Tune says of it.)
    """
    storage = getattr(algorithm, "_storage", None)
    return None if storage is None else storage.trial_dir_name
