"""The same saves and restores, called from inside the workers: all ranks call, the coordinator brings them together."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.options import check_deadline, check_step
from rl_ckpt.runtime.deadline import Deadline
from rl_ckpt.runtime.inside import guarded
from rl_ckpt.runtime.links import begin
from rl_ckpt.runtime.restore import RestoredRank, RestoreRequest, restore_rank
from rl_ckpt.runtime.service import pending_save
from rl_ckpt.runtime.spec import Place, RunSpec
from rl_ckpt.runtime.staging import prepare_rank, save_rank
from rl_ckpt.store.committer import SaveRequest, encode_metrics
from rl_ckpt.store.listing import check_tag
from rl_ckpt.store.pending import Branch, PendingSave, raise_untold


class WorkerCheckpointer:
    """A rank's handle. Picklable: made by `Checkpointer.worker`, sent to the worker, used there by one thread."""

    def __init__(self, spec: RunSpec, rank: int, world_size: int, take_over: bool = False) -> None:
        """Made by `Checkpointer.worker`.

        Raises:
            InvalidInputError: `rank` is not in 0 … world_size - 1.
        """
        if not 0 <= rank < world_size:
            raise InvalidInputError(f"rank={rank} is not in 0 … {world_size - 1} (world_size={world_size})")
        self._spec = spec
        self._rank = rank
        self._world_size = world_size
        self._take_over = take_over
        self._begun = False
        self._branch = Branch()
        self._pending: list[PendingSave] = []
        self.last_restored: RestoredRank | None = None
        """What the last `restore` did on this rank; None before."""

    def as_rank(self, rank: int, world_size: int) -> WorkerCheckpointer:
        """The handle of another worker of the same run, for who learns in the worker which one it is.

        Raises:
            InvalidInputError: `rank` is not in 0 … world_size - 1.
        """
        return WorkerCheckpointer(self._spec, rank, world_size, self._take_over)

    @property
    def rank(self) -> int:
        """Of this worker."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of workers."""
        return self._world_size

    def save(
        self,
        step: int,
        state: Any,
        *,
        metrics: Mapping[str, object] | None = None,
        tag: str | None = None,
        deadline_s: float | None = None,
    ) -> PendingSave:
        """Saves this rank's state; back as soon as it is staged. All ranks call it with the same step.

        Args:
            step: As for `Checkpointer.save`.
            state: This rank's state tree.
            metrics: Rank 0's count, or those of whichever rank joins first.
            tag: As metrics.
            deadline_s: As for `Checkpointer.save`; the shortest of all ranks counts.

        Raises:
            CheckpointError: As `Checkpointer.save`.
        """
        begun = time.monotonic()
        metrics, limit_s = encode_metrics(metrics or {}), check_deadline(deadline_s)
        named = None if tag is None else check_tag(tag)
        parent, since = self._branch.parent()
        request = SaveRequest(check_step(step), metrics, named, parent, limit_s, since)
        place = Place(f"save-{self._spec.job}-{request.step}", self._rank, self._world_size)
        with guarded(self._spec, place, "lost_save"), contextlib.ExitStack() as undone:
            raise_untold(self._pending)  # in here, so that the other ranks do not wait for this one
            self._begin()
            limit = None if limit_s is None else Deadline(self._spec, place.key, request, begun, for_good=False)
            if limit is not None:
                undone.callback(limit.over)
            staged = save_rank(self._spec, place, request, state, begun)
            undone.pop_all()
        self._begun = True
        pending = pending_save(self._spec, request.step, staged.checkpoint, begun, limit)
        self._branch.saved(pending)
        self._pending = [p for p in self._pending if not p.settled()] + [pending]
        return pending

    def _begin(self) -> None:
        """Before the first save: every rank, since none may join before the coordinator knows that its job may."""
        if not self._begun:
            begin(self._spec, self._take_over)

    def prepare(self, state: Any) -> None:
        """Makes the first save of a state of this shape as fast as the later ones. All ranks call it.

        Raises:
            CheckpointError: As `Checkpointer.prepare`.
        """
        place = Place(f"prepare-{self._spec.job}", self._rank, self._world_size)
        with guarded(self._spec, place, "lost_save"):
            self._begin()
            prepare_rank(self._spec, place, state)
        self._begun = True

    def restore(
        self,
        state: Any = None,
        *,
        step: int | None = None,
        select: str | Sequence[str] | None = None,
        rename: Mapping[str, str] | None = None,
        strict: bool = True,
        alone: bool = False,
    ) -> Any:
        """Restores this rank. All ranks call it with the same step, unless one is restored `alone`.

        Args:
            state: What the worker has; its arrays are filled in place where dtype and shape agree. None: the tree as it
                was saved, with sharded arrays whole.
            step: As for `Checkpointer.restore`.
            select: As for `Checkpointer.restore`.
            rename: As for `Checkpointer.restore`.
            strict: As for `Checkpointer.restore`.
            alone: Whether only this rank restores, as the replacement of one that was lost, while the others go on.

        Returns:
            The restored tree.

        Raises:
            CheckpointError: As `Checkpointer.restore`.
        """
        wanted = None if step is None else check_step(step)
        which = "newest" if wanted is None else wanted
        place = Place(f"restore-{self._spec.job}-{which}", self._rank, self._world_size)
        request = RestoreRequest(wanted, select, rename, strict)
        if alone:
            place = Place(f"restore-{self._rank}-{uuid.uuid4().hex}", 0, 1)
            request = RestoreRequest(wanted, select, rename, strict, (self._rank,))
        with guarded(self._spec, place, "lost_restore"):
            tree, self.last_restored = restore_rank(self._spec, place, request, state)
        if not alone:  # else the job goes on from where the others are
            self._branch.restored(self.last_restored.id)
        return tree
