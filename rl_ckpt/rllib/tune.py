"""Ray Tune: trials whose checkpoints are ours.

    from rl_ckpt.rllib.tune import tune_trainable

    tuner = tune.Tuner(tune_trainable(PPO, "s3://bucket/sweep"), param_space=config, run_config=..., tune_config=...)

Owns: what a trial does when Tune asks it to save and to restore. Promises: a trial trains on while its checkpoint is
written; each trial has a run of its own; `Tuner.restore`, retries after failures, pausing schedulers and PBT restore
what Tune says. What Tune itself stores for a checkpoint is a file that names ours. Does not: decide when to save; that
is Tune's `CheckpointConfig` and its schedulers.

A trial that takes over another one's checkpoint (PBT) goes on in a new run, `<its url>.<checkpoint>`, so that in every
run steps only grow, or branch where a trial went back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

from rl_ckpt import logs
from rl_ckpt.errors import CheckpointNotFoundError, InvalidInputError
from rl_ckpt.plan.retention import KeepRule
from rl_ckpt.rllib.callback import TRIAL, Hidden, check_template, run_url, trial_of
from rl_ckpt.rllib.checkpointer import AlgorithmCheckpointer
from rl_ckpt.rllib.pointer import Pointer, read, wait_for, write
from rl_ckpt.rllib.result import recorded

_log = logs.logger(__name__)


def tune_trainable(
    algorithm: type[Algorithm],
    url: str | os.PathLike[str],
    *,
    keep: Sequence[KeepRule] = (),
    storage_options: Mapping[str, Any] | None = None,
    wait_s: float = 120.0,
    **options: Any,
) -> type[Algorithm]:
    """An Algorithm class for `tune.Tuner` whose checkpoints are ours.

    Args:
        algorithm: PPO, DQN, … of the new API stack.
        url: Of the sweep: each trial's run is `<url>/<trial>`, or the url with the name of the trial's folder in place
            of "{trial}".
        keep: Retention rules of each trial's run. Tune's own (`num_to_keep`) remove nothing but its pointers; with PBT
            keep as many as a trial may be behind.
        storage_options: As for `Checkpointer`.
        wait_s: How long a restore waits for another trial's checkpoint that is still being written, in seconds.
        options: Others of `Checkpointer`.

    Returns:
        A subclass of the same name.

    Raises:
        InvalidInputError: No Algorithm class, or an argument is out of range.
    """
    if not (isinstance(algorithm, type) and issubclass(algorithm, Algorithm)):
        raise InvalidInputError(f"{algorithm!r} is no class of an RLlib Algorithm; give PPO, not PPOConfig()")
    url = check_template(url)
    AlgorithmCheckpointer(url.replace(TRIAL, "x"), keep=keep, **options)
    settings = {
        "rl_ckpt_url": url,
        "rl_ckpt_options": {"keep": tuple(keep), **options},
        "rl_ckpt_storage": Hidden(storage_options),
        "rl_ckpt_wait_s": wait_s,
        "rl_ckpt_saves_as": algorithm,
        "__module__": __name__,
        "__doc__": algorithm.__doc__,
    }
    return type(algorithm.__name__, (_Trial, algorithm), settings)


class _Trial(Algorithm):
    """What `tune_trainable` adds. Tune calls it in the trial's actor."""

    rl_ckpt_url: str
    rl_ckpt_options: Mapping[str, Any]
    rl_ckpt_storage: Hidden
    rl_ckpt_wait_s: float
    rl_ckpt_saves_as: type[Algorithm]
    """Whose checkpoints these are: `load` builds it without Tune."""

    _rl_ckpt: AlgorithmCheckpointer | None = None
    _rl_ckpt_last: Pointer | None = None

    def setup(self, config: AlgorithmConfig) -> None:  # type: ignore[override]  # as Algorithm's own
        """Builds the Algorithm; one of a trial that was ended before Tune knew of its checkpoints goes on from them.

        Where Tune does know one, it restores that afterwards.
        """
        super().setup(config)
        self._rl_ckpt = self._open(run_url(self.rl_ckpt_url, self))
        if self._rl_ckpt.latest() is not None:
            self._restore(self._rl_ckpt, None)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Saves; back as soon as the state is staged.

        Raises:
            CheckpointError: This save, or one before it, failed.
        """
        ckpt, last = self._rl_ckpt, self._rl_ckpt_last
        assert ckpt is not None, "Tune saves no trial that it has stopped"
        if last is None or last.step != self.iteration:  # else Tune asks twice: by schedule and at the end, or a pause
            pending = ckpt.save(self, metrics=recorded(self._last_result or {}))
            last = self._rl_ckpt_last = self._pointer(ckpt, pending.checkpoint)
        write(checkpoint_dir, last)

    def load_checkpoint(self, checkpoint_dir: str) -> None:  # type: ignore[override]  # as Algorithm's own
        """Restores what a pointer names: this trial's, or another one's.

        Raises:
            CheckpointError: It can't be restored, or does not fit; nothing was changed.
        """
        pointer = read(Path(checkpoint_dir))
        self._end()
        source = self._open(pointer.url)
        if pointer.owner == str(trial_of(self)):
            self._rl_ckpt = source
            self._restore(source, pointer)
            return
        try:
            self._take_over(source, pointer)
        finally:
            source.close()
        self._rl_ckpt = self._open(f"{run_url(self.rl_ckpt_url, self)}.{pointer.id}")

    def cleanup(self) -> None:
        """At the end of the trial: what is staged is committed."""
        try:
            super().cleanup()
        finally:
            self._end()

    def _open(self, url: str) -> AlgorithmCheckpointer:
        return AlgorithmCheckpointer(url, storage_options=self.rl_ckpt_storage.options, **self.rl_ckpt_options)

    def _end(self) -> None:
        ckpt, self._rl_ckpt = self._rl_ckpt, None
        self._rl_ckpt_last = None
        if ckpt is not None:
            ckpt.close()

    def _pointer(self, ckpt: AlgorithmCheckpointer, checkpoint: str) -> Pointer:
        return Pointer(url=ckpt.url, id=checkpoint, step=self.iteration, owner=str(trial_of(self)))

    def _restore(self, ckpt: AlgorithmCheckpointer, pointer: Pointer | None) -> None:
        """Restores the trial from its own run: what is asked for, or the newest that was committed before its end."""
        there = pointer is not None and wait_for(ckpt, pointer.id, 0.0)
        report = ckpt.restore(self, step=pointer.step if pointer is not None and there else None)
        if pointer is not None and report.id != pointer.id:
            _log.warning("checkpoint %s was not committed; restored %s", pointer.id, report.id)
        self._rl_ckpt_last = self._pointer(ckpt, report.id)

    def _take_over(self, source: AlgorithmCheckpointer, pointer: Pointer) -> None:
        """Restores another trial's checkpoint."""
        if not wait_for(source, pointer.id, self.rl_ckpt_wait_s):
            raise CheckpointNotFoundError(
                f"trial {pointer.owner} began checkpoint {pointer.id} in {pointer.url} and did not commit it within "
                f"{self.rl_ckpt_wait_s} s; see why there, or raise `wait_s`"
            )
        source.restore(self, step=pointer.step)
