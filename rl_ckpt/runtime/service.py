"""The driver's side of a run: starts its coordinator, calls the workers, waits for outcomes, ends the actors."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from rl_ckpt.errors import (
    CheckpointError,
    InvalidInputError,
    SaveTimeoutError,
    StorageError,
)
from rl_ckpt.info import CheckpointInfo, RestoreReport
from rl_ckpt.options import Options
from rl_ckpt.plan.retention import KeepRule
from rl_ckpt.runtime.calls import Own, call_all, new_key
from rl_ckpt.runtime.deadline import Deadline
from rl_ckpt.runtime.inside import prepare_in_actor, restage_in_actor, restore_in_actor, save_in_actor
from rl_ckpt.runtime.links import attached, begin, coordinator
from rl_ckpt.runtime.messages import Failure, Ok, SaveDone, decode
from rl_ckpt.runtime.restore import RestoredRank, RestoreRequest
from rl_ckpt.runtime.spec import NAMESPACE, RunSpec
from rl_ckpt.runtime.staging import StagedRank
from rl_ckpt.store.committer import SaveRequest, info_from, info_of
from rl_ckpt.store.lease import this_process
from rl_ckpt.store.pending import PendingSave, in_thread
from rl_ckpt.store.run import Run, who
from rl_ckpt.store.urls import open_store

_ASK_AGAIN_S = 0.5
_ANSWER_S = 60.0  # for what waits for nothing
_LAST_WORD_S = 1.0


class Service:
    """A run's actors, as its driver holds them."""

    def __init__(
        self,
        url: str,
        storage_options: Mapping[str, Any],
        keep: Sequence[KeepRule],
        options: Options,
        methods: tuple[str, str],
    ) -> None:
        """Finds or starts the run's coordinator.

        Raises:
            InvalidInputError: Ray is not running in this process, or the store's options can't be used.
        """
        if not ray.is_initialized():
            raise InvalidInputError(
                "Ray is not running in this process; call ray.init() first, or use save_state and "
                "load_state, which need no Ray"
            )
        if url.startswith("memory://"):
            raise InvalidInputError(
                f"{url} is one process's memory; give a folder or an object store to save Ray actors"
            )
        open_store(url, storage_options)  # options that can't be used are said here, not by actors
        self.take_over = options.take_over
        """Whether the first save takes the run over; asked for once, so not an option of the coordinator's."""
        options = dataclasses.replace(options, take_over=False)
        user = f"{ray.get_runtime_context().get_job_id()}-{uuid.uuid4().hex[:12]}"
        spec = RunSpec(
            url, dict(storage_options), tuple(keep), options, *methods, user=user, by=who(), process=this_process()
        )
        self.spec = attached(spec)
        self.owns_run = False
        self._begun = False
        # At a normal end of the driver, staged saves are waited for and no shared memory is left behind. A driver that
        # is killed leaves the actors: what is staged still commits, and a new driver finds them by name.
        self._patience = _Patience()
        self._at_exit = partial(_close_at_exit, self.spec, self._patience)
        atexit.register(self._at_exit)

    def save(
        self,
        request: SaveRequest,
        workers: Sequence[Any],
        save: Callable[..., bytes] = save_in_actor,
        restage: Callable[..., bytes] = restage_in_actor,
    ) -> PendingSave:
        """See `Checkpointer.save`; `save` and `restage` are what runs inside the workers, as of `inside`."""
        begun = time.monotonic()
        handles, key = self._begin_saving(workers), new_key()
        limit = None if request.deadline_s is None else Deadline(self.spec, key, request, begun, for_good=True)
        self._patience.until = None if limit is None else limit.at
        try:
            replies = call_all(self.spec, handles, "lost_save", save, request, StagedRank, key, limit, restage)
        except BaseException:
            if limit is not None:
                limit.over()
            raise
        self._begun = True
        checkpoints = {reply.checkpoint for reply in replies}
        if len(checkpoints) != 1:
            raise CheckpointError(f"step {request.step}: the ranks were told different checkpoints: {checkpoints}")
        return pending_save(self.spec, request.step, checkpoints.pop(), begun, limit)

    def prepare(self, workers: Sequence[Any]) -> None:
        """See `Checkpointer.prepare`."""
        call_all(self.spec, self._begin_saving(workers), "lost_save", prepare_in_actor, None, Ok, new_key())
        self._begun = True

    def _begin_saving(self, workers: Sequence[Any]) -> list[Any]:
        handles = _handles(workers)
        if not self._begun:  # until a save has gone through: the coordinator keeps it for its own restart
            begin(self.spec, self.take_over)
        self.owns_run = True
        return handles

    def restore(
        self,
        workers: Sequence[Any],
        step: int | None,
        select: str | Sequence[str] | None,
        rename: Mapping[str, str] | None,
        strict: bool,
        ranks: Sequence[int] | None = None,
    ) -> RestoreReport:
        """See `Checkpointer.restore`."""
        begun = time.monotonic()
        handles = _handles(workers)
        saved = None if ranks is None else _check_ranks(ranks, len(handles))
        request = RestoreRequest(step, select, dict(rename) if rename else None, strict, saved)
        done = call_all(self.spec, handles, "lost_restore", restore_in_actor, request, RestoredRank, new_key())
        first, numbers = done[0], saved or range(len(done))
        return RestoreReport(
            step=first.step,
            id=first.id,
            world_size=len(done),
            saved_world_size=first.saved_world_size,
            bytes=sum(rank.bytes for rank in done),
            bytes_from=first.bytes_from,
            seconds=time.monotonic() - begun,
            kept={i: rank.kept for i, rank in zip(numbers, done, strict=True) if rank.kept},
            ignored={i: rank.ignored for i, rank in zip(numbers, done, strict=True) if rank.ignored},
            ranks_without_counterpart=() if saved else tuple(range(first.saved_world_size, len(done))),
            ranks_dropped=() if saved else tuple(range(len(done), first.saved_world_size)),
            fell_back=first.fell_back,
            repaired=first.repaired,
            notice=first.notice,
        )

    def held_chunk(self, digest: bytes, size_bytes: int) -> bytes | None:
        """The bytes of a chunk, out of the memory of any node that holds it; None where none does."""
        try:
            found: bytes | None = ray.get(coordinator(self.spec).held_chunk.remote(digest, size_bytes))
        except (ray.exceptions.RayError, InvalidInputError):  # no coordinator: nobody knows what is held
            return None
        return found

    def settle(self, seconds: float) -> None:
        """Waits for saves that workers began themselves and have staged; the workers are ended by now."""
        with contextlib.suppress(ray.exceptions.RayError):  # not settled in time, or the coordinator was lost
            link = coordinator(self.spec)
            link.forsake.remote()
            ray.get(link.drain.remote(), timeout=seconds)

    def close(self) -> None:
        """Waits until no save is under way, and ends the actors.

        Raises:
            SaveTimeoutError: Saves were still under way after `write_timeout_s`; the actors stay and go on with them.
        """
        atexit.unregister(self._at_exit)
        _close(self.spec, self._patience)


def _handles(workers: Sequence[Any]) -> list[Any]:
    try:
        handles = list(workers)
    except TypeError as error:
        kind = type(workers).__name__
        raise InvalidInputError(f"workers must be a sequence of Ray actor handles, not {kind}") from error
    if not handles:
        raise InvalidInputError("workers is empty; give at least one Ray actor handle")
    for rank, handle in enumerate(handles):
        if not isinstance(handle, ray.actor.ActorHandle | Own):
            kind = type(handle).__name__
            raise InvalidInputError(f"workers[{rank}] is a {kind}, not a Ray actor handle (`Worker.remote(...)`)")
    if len({getattr(handle, "_actor_id", None) for handle in handles}) < len(handles):
        raise InvalidInputError("workers holds the same actor twice; give each rank an actor of its own")
    return handles


def _check_ranks(ranks: Sequence[int], count: int) -> tuple[int, ...]:
    """Saved ranks for `count` workers; the checkpoint decides whether there are such."""
    if isinstance(ranks, str | bytes) or not isinstance(ranks, Iterable):
        raise InvalidInputError(f"ranks={ranks!r} must be a list of saved ranks, one for each worker")
    found = tuple(ranks)
    wrong = [rank for rank in found if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0]
    if wrong or len(set(found)) < len(found):
        raise InvalidInputError(f"ranks={list(found)}: give each worker a rank of its own, an int of at least 0")
    if len(found) != count:
        raise InvalidInputError(f"ranks={list(found)} names {len(found)} ranks for {count} workers; give one for each")
    return found


def pending_save(spec: RunSpec, step: int, checkpoint: str, begun: float, limit: Deadline | None = None) -> PendingSave:
    """A save that is staged, as its caller holds it."""
    future = in_thread(lambda: _outcome(spec, checkpoint, begun), f"rl_ckpt-wait-{step}")
    if limit is not None:
        limit.guard(future)
    return PendingSave(step, checkpoint, future)


def _outcome(spec: RunSpec, checkpoint: str, begun: float) -> CheckpointInfo:
    try:
        reply = _wait(spec, checkpoint)
    except (ray.exceptions.RayError, ValueError) as error:
        return _from_log(spec, checkpoint, str(error).strip().splitlines()[0])
    if isinstance(reply, Failure):
        if reply.code == "not_found":
            return _from_log(spec, checkpoint, reply.message)
        raise reply.error()
    if reply.notice:
        warnings.warn(reply.notice, stacklevel=2)
    durable_s = time.monotonic() - begun
    return info_from(
        reply.record, reply.url, reply.lineage, stall_s=reply.stall_s, durable_s=durable_s, in_store=reply.in_store
    )


def _wait(spec: RunSpec, checkpoint: str) -> SaveDone | Failure:
    while True:
        try:
            reply: SaveDone | Failure = decode(
                ray.get(coordinator(spec).wait_save.remote(checkpoint)), SaveDone | Failure
            )
        except ray.exceptions.ActorUnavailableError:  # a lost connection, or a restart: it can be asked again
            time.sleep(_ASK_AGAIN_S)
        else:
            return reply


def _from_log(spec: RunSpec, checkpoint: str, why: str) -> CheckpointInfo:
    """What the commit log says of a save whose coordinator was lost."""
    run = Run.open(spec.url, spec.storage_options)
    commits = run.log.read().commits
    record = next((commit for commit in commits if commit.id == checkpoint), None)
    if record is None:
        raise StorageError(f"checkpoint {checkpoint} was not committed: the coordinator was lost ({why}); save again")
    return info_of(run, record, commits)


def _server_names(spec: RunSpec) -> list[str]:
    """The run's shard servers that this cluster has, whoever started them."""
    actors: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    return [a["name"] for a in actors if a["namespace"] == NAMESPACE and a["name"].startswith(spec.server(""))]


@dataclass(slots=True)
class _Patience:
    """How long the end of a driver waits for what is staged."""

    until: float | None = None
    """Of the last urgent save, by `time.monotonic`; None: `write_timeout_s`."""

    def left_s(self, otherwise_s: float) -> float:
        """In seconds; a little where there is none left, for saves that are decided."""
        return otherwise_s if self.until is None else max(_LAST_WORD_S, self.until - time.monotonic())


def _close_at_exit(spec: RunSpec, patience: _Patience) -> None:
    try:
        _close(spec, patience)
    except SaveTimeoutError as error:
        warnings.warn(str(error), stacklevel=1)


def _close(spec: RunSpec, patience: _Patience) -> None:
    if not ray.is_initialized():
        return
    # Past an urgent save's deadline, the actors are left as by a driver that is killed: what is committed stands.
    limit_s, begun = patience.left_s(spec.options.write_timeout_s), time.monotonic()
    with contextlib.suppress(ray.exceptions.RayActorError, ray.exceptions.RaySystemError, ValueError):  # ended already
        link = coordinator(spec)
        try:
            drained = decode(ray.get(link.drain.remote(limit_s), timeout=limit_s + _ANSWER_S), Ok | Failure)
            if isinstance(drained, Ok):
                left_s = max(_LAST_WORD_S, begun + limit_s - time.monotonic())
                drained = decode(
                    ray.get(link.flush.remote(spec.user, left_s), timeout=left_s + _ANSWER_S), Ok | Failure
                )
            last = isinstance(drained, Ok) and ray.get(link.detach.remote(spec.user), timeout=_ANSWER_S)
        except ray.exceptions.GetTimeoutError:
            drained = Failure("save_timeout", "the coordinator did not answer")
        if isinstance(drained, Failure):
            link.detach.remote(spec.user, False)
            raise SaveTimeoutError(
                f"{spec.url} was not closed: {drained.message}. Its actors stay and go on with what is staged; a new "
                "Checkpointer of this url finds them, and its close tries again"
            )
        if drained.notice:
            warnings.warn(drained.notice, stacklevel=2)
        if not last:
            return  # another job uses these actors
        for name in _server_names(spec):
            with contextlib.suppress(ray.exceptions.RayError, ValueError):  # its node is gone
                server: Any = ray.get_actor(name, namespace=NAMESPACE)
                ray.get(server.close.remote(), timeout=_ANSWER_S)
                ray.kill(server)
        ray.kill(link)
