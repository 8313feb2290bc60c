"""Ray Train: checkpoints of ours in its `train_loop_per_worker`, told to its `report`.

    def train_loop_per_worker(config):
        saves = config["saves"].join()                     # Train knows the rank
        restored = saves.restore()                         # None: nothing was saved yet
        for step in range(0 if restored is None else restored["step"] + 1, 1000):
            ...
            state = {"step": step, "model": Replicated(model.module.state_dict())}
            if saves.due(step, {"loss": loss}):
                saves.report({"loss": loss}, step=step, state=state)

    with TrainLoop("s3://bucket/run-7", when=[EverySteps(100), Auto()], keep=[LatestN(3)]) as saves:
        TorchTrainer(train_loop_per_worker, train_loop_config={"saves": saves}, ...).fit()

Owns: which worker is which rank, that all save after the same step, and what Train is told. Promises: workers train on
while a checkpoint is written; what Train itself stores for it is a file that names ours; a worker group that Train
starts again, of any size, goes on from the newest checkpoint that was committed. Does not: run the training.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import ray
import ray.train
import ray.train.collective

from rl_ckpt.checkpointer import Checkpointer
from rl_ckpt.errors import CheckpointNotFoundError, InvalidInputError
from rl_ckpt.plan.retention import KeepRule
from rl_ckpt.plan.save_rules import EverySteps, SaveRule
from rl_ckpt.plan.when import Due, SavePolicy
from rl_ckpt.rllib.pointer import Pointer, write
from rl_ckpt.rllib.result import recorded_as_given
from rl_ckpt.runtime.worker import WorkerCheckpointer
from rl_ckpt.store.pending import PendingSave


class TrainLoop:
    """The checkpoints of one Ray Train run. Made in the driver; goes to the workers in `train_loop_config`."""

    def __init__(
        self, url: str, *, when: Sequence[SaveRule] = (), keep: Sequence[KeepRule] = (), **options: Any
    ) -> None:
        """Starts the run's service; and Ray, where it does not run yet, as Train does.

        Args:
            url: As for `Checkpointer`.
            when: Rules by which `TrainWorker.due` says when to save, as for `SavePolicy`. None: at every step.
            keep: As for `Checkpointer`.
            options: Others of `Checkpointer`.

        Raises:
            InvalidInputError: As `Checkpointer`.
        """
        self._when = tuple(when) or (EverySteps(1),)
        SavePolicy(*self._when)  # says what is wrong with these
        if not ray.is_initialized():
            ray.init()
        self._ckpt: Checkpointer | None = Checkpointer(url, keep=keep, **options)
        self._url = self._ckpt.url
        self._worker = self._ckpt.worker(0, 1)

    def join(self) -> TrainWorker:
        """In `train_loop_per_worker`: this worker's part. All workers call it."""
        context = ray.train.get_context()
        handle = self._worker.as_rank(context.get_world_rank(), context.get_world_size())
        return TrainWorker(self._url, handle, SavePolicy(*self._when))

    def close(self) -> None:
        """In the driver: waits until all saves are committed or have failed, and ends the run's actors."""
        if self._ckpt is None:
            raise InvalidInputError("a worker has no run to close; the driver that made the TrainLoop has")
        self._ckpt.close()

    def __getstate__(self) -> dict[str, Any]:
        """For workers: without what only the driver may do."""
        return {**vars(self), "_ckpt": None}

    def __enter__(self) -> TrainLoop:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()


class TrainWorker:
    """One worker's part; made by `TrainLoop.join`, used by one thread."""

    def __init__(self, url: str, handle: WorkerCheckpointer, policy: SavePolicy) -> None:
        self._url = url
        self._handle = handle
        self._policy = policy  # rank 0's is asked
        self._due: Due | None = None

    def restore(self, state: Any = None, *, step: int | None = None, select: str | Sequence[str] | None = None) -> Any:
        """This rank's state from the newest good checkpoint. All workers call it.

        Args:
            state: As for `WorkerCheckpointer.restore`.
            step: Which checkpoint; None: the newest good one.
            select: As for `WorkerCheckpointer.restore`.

        Returns:
            The state tree; None where nothing was saved yet.

        Raises:
            CheckpointError: As `WorkerCheckpointer.restore`.
        """
        try:
            restored = self._handle.restore(state, step=step, select=select)
        except CheckpointNotFoundError:
            if step is not None:
                raise
            return None
        self._policy.lost()
        return restored

    def due(self, step: int, metrics: Mapping[str, Any] | None = None) -> bool:
        """Whether to save (`report`) after this step. All workers call it; rank 0 decides, and the others wait for it.

        Args:
            step: The step that was just done.
            metrics: By name; those of rank 0 count.
        """
        if self._handle.rank == 0:
            self._due = self._policy.due(step, metrics)
        return bool(ray.train.collective.broadcast_from_rank_zero(self._due is not None))

    def report(self, metrics: Mapping[str, Any], *, step: int, state: Any, tag: str | None = None) -> PendingSave:
        """Saves this rank's state and reports to Train, with a checkpoint that names it. All workers call it.

        Back when the state is staged and every worker has reported. The next call raises what failed in the background.

        Args:
            metrics: As for `ray.train.report`; the plain values among them are recorded with the checkpoint.
            step: As for `Checkpointer.save`.
            state: This rank's state tree: `Replicated` around what is equal on all.
            tag: As for `Checkpointer.save`.

        Returns:
            The save under way.

        Raises:
            CheckpointError: As `WorkerCheckpointer.save`.
        """
        pending = self._handle.save(step, state, metrics=recorded_as_given(metrics), tag=tag)
        if self._due is not None and self._due.step == step:
            self._policy.began(self._due, pending)
        if self._handle.rank:
            ray.train.report(dict(metrics))
            return pending
        with tempfile.TemporaryDirectory(prefix="rl_ckpt-") as folder:
            write(folder, Pointer(url=self._url, id=pending.checkpoint, step=step))
            ray.train.report(dict(metrics), checkpoint=ray.train.Checkpoint.from_directory(folder))
        return pending
