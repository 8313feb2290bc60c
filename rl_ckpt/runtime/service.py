"""The driver's side of a run: starts its coordinator, calls the workers, waits for outcomes, ends the actors."""

from __future__ import annotations

import atexit
import contextlib
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import ray

from rl_ckpt.errors import (
    CheckpointError,
    InvalidInputError,
    SaveTimeoutError,
    StorageError,
    WorkerFailuresError,
)
from rl_ckpt.info import CheckpointInfo, RestoreReport
from rl_ckpt.options import Options
from rl_ckpt.plan.retention import KeepRule
from rl_ckpt.runtime.inside import prepare_in_actor, restore_in_actor, save_in_actor
from rl_ckpt.runtime.links import coordinator, start_coordinator
from rl_ckpt.runtime.messages import Failure, Lost, Ok, SaveDone, decode, encode
from rl_ckpt.runtime.restore import RestoredRank, RestoreRequest
from rl_ckpt.runtime.spec import NAMESPACE, Place, RunSpec
from rl_ckpt.runtime.staging import StagedRank
from rl_ckpt.store.committer import SaveRequest, info_from, info_of
from rl_ckpt.store.pending import PendingSave, in_thread
from rl_ckpt.store.run import Run
from rl_ckpt.store.urls import open_store

_PHASES = 3  # in which a rank may use up `join_timeout_s`: beginning, joining, staging or matching
_ASK_AGAIN_S = 0.5
_STRAGGLERS_S = 5.0  # how long to wait for the other ranks once one has failed


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
        self.spec = start_coordinator(RunSpec(url, dict(storage_options), tuple(keep), options, *methods))
        self.owns_run = False
        self._user = uuid.uuid4().hex
        self._job = ray.get_runtime_context().get_job_id()
        ray.get(coordinator(self.spec).attach.remote(self._user, self._job))
        # At a normal end of the driver, staged saves are waited for and no shared memory is left behind. A driver that
        # is killed leaves the actors: what is staged still commits, and a new driver finds them by name.
        self._at_exit = partial(_close, self.spec, self._user)
        atexit.register(self._at_exit)

    def save(self, request: SaveRequest, workers: Sequence[Any]) -> PendingSave:
        """See `Checkpointer.save`."""
        begun = time.monotonic()
        handles = self._begin_saving(workers)
        replies = self._call_all(handles, "lost_save", save_in_actor, request, StagedRank)
        checkpoints = {reply.checkpoint for reply in replies}
        if len(checkpoints) != 1:
            raise CheckpointError(f"step {request.step}: the ranks were told different checkpoints: {checkpoints}")
        return pending_save(self.spec, request.step, checkpoints.pop(), begun)

    def prepare(self, workers: Sequence[Any]) -> None:
        """See `Checkpointer.prepare`."""
        self._call_all(self._begin_saving(workers), "lost_save", prepare_in_actor, None, Ok)

    def _begin_saving(self, workers: Sequence[Any]) -> list[Any]:
        handles = _handles(workers)
        self.owns_run = True
        link = coordinator(self.spec)
        link.attach.remote(self._user, self._job)  # again: a coordinator that was restarted has forgotten it
        link.configure.remote(self.spec)
        return handles

    def restore(
        self,
        workers: Sequence[Any],
        step: int | None,
        select: str | Sequence[str] | None,
        rename: Mapping[str, str] | None,
        strict: bool,
    ) -> RestoreReport:
        """See `Checkpointer.restore`."""
        begun = time.monotonic()
        handles = _handles(workers)
        request = RestoreRequest(step, select, dict(rename) if rename else None, strict)
        ranks = self._call_all(handles, "lost_restore", restore_in_actor, request, RestoredRank)
        first = ranks[0]
        return RestoreReport(
            step=first.step,
            id=first.id,
            world_size=len(ranks),
            saved_world_size=first.saved_world_size,
            bytes=sum(rank.bytes for rank in ranks),
            bytes_from=first.bytes_from,
            seconds=time.monotonic() - begun,
            kept={i: rank.kept for i, rank in enumerate(ranks) if rank.kept},
            ignored={i: rank.ignored for i, rank in enumerate(ranks) if rank.ignored},
            ranks_without_counterpart=tuple(range(first.saved_world_size, len(ranks))),
            ranks_dropped=tuple(range(len(ranks), first.saved_world_size)),
            fell_back=first.fell_back,
            repaired=first.repaired,
            notice=first.notice,
        )

    def close(self) -> None:
        """Waits until no save is under way, and ends the actors."""
        atexit.unregister(self._at_exit)
        self._at_exit()

    def _call_all(
        self, handles: Sequence[Any], lost: str, function: Callable[..., bytes], request: object, kind: Any
    ) -> list[Any]:
        """Runs `function` inside every worker.

        Raises:
            CheckpointError: What the coordinator said, or `WorkerFailuresError` by rank, or `SaveTimeoutError`.
        """
        key, count = uuid.uuid4().hex, len(handles)
        refs = {
            handle.__ray_call__.remote(function, self.spec, Place(key, rank, count), request): rank
            for rank, handle in enumerate(handles)
        }
        replies: dict[int, Any] = {}
        patience_s = _PHASES * self.spec.options.join_timeout_s
        deadline = time.monotonic() + patience_s
        while refs:
            ready, _ = ray.wait(list(refs), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                if not ray.get(coordinator(self.spec).under_way.remote(key)):
                    break
                deadline = time.monotonic() + patience_s
            for ref in ready:
                rank = refs.pop(ref)
                replies[rank] = self._reply(ref, lost, Place(key, rank, count), kind)
                if isinstance(replies[rank], Failure):
                    deadline = min(deadline, time.monotonic() + _STRAGGLERS_S)
        _raise_failures(replies, sorted(refs.values()), self.spec.options)
        return [replies[rank] for rank in range(count)]

    def _reply(self, ref: Any, lost: str, place: Place, kind: Any) -> Any:
        """A worker's answer; where it died, the coordinator is told, so that the other ranks do not wait for it."""
        try:
            return decode(ray.get(ref), kind | Failure)
        except ray.exceptions.RayError as error:
            text = f"rank {place.rank} is dead or unreachable: {str(error).strip().splitlines()[0]}"
            failure = Failure.of(WorkerFailuresError(text, {place.rank: text}))
            message = Lost(place.key, place.rank, place.world_size, failure)
            getattr(coordinator(self.spec), lost).remote(encode(message))
            return failure


def _handles(workers: Sequence[Any]) -> list[Any]:
    try:
        handles = list(workers)
    except TypeError as error:
        kind = type(workers).__name__
        raise InvalidInputError(f"workers must be a sequence of Ray actor handles, not {kind}") from error
    if not handles:
        raise InvalidInputError("workers is empty; give at least one Ray actor handle")
    for rank, handle in enumerate(handles):
        if not isinstance(handle, ray.actor.ActorHandle):
            kind = type(handle).__name__
            raise InvalidInputError(f"workers[{rank}] is a {kind}, not a Ray actor handle (`Worker.remote(...)`)")
    if len({handle._actor_id for handle in handles}) < len(handles):
        raise InvalidInputError("workers holds the same actor twice; give each rank an actor of its own")
    return handles


def _raise_failures(replies: Mapping[int, Any], silent: Sequence[int], options: Options) -> None:
    failures = {rank: reply for rank, reply in sorted(replies.items()) if isinstance(reply, Failure)}
    if not failures:
        if silent:
            raise SaveTimeoutError(
                f"ranks {list(silent)} did not answer; they may be busy in another method. Raise `join_timeout_s` (now "
                f"{options.join_timeout_s} s) if that is expected"
            )
        return
    by_rank: dict[int, str] = {}
    for failure in failures.values():
        by_rank |= failure.failures
    if by_rank:
        raise WorkerFailuresError("; ".join(dict.fromkeys(by_rank.values())), by_rank)
    raise next(iter(failures.values())).error()


def pending_save(spec: RunSpec, step: int, checkpoint: str, begun: float) -> PendingSave:
    """A save that is staged, as its caller holds it."""
    return PendingSave(step, in_thread(lambda: _outcome(spec, checkpoint, begun), f"rl_ckpt-wait-{step}"))


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


def _close(spec: RunSpec, user: str) -> None:
    if not ray.is_initialized():
        return
    with contextlib.suppress(ray.exceptions.RayError, ValueError):  # ended already, or its cluster was
        link = coordinator(spec)
        ray.get(link.drain.remote())
        if not ray.get(link.detach.remote(user)):
            return  # another driver uses these actors
        for name in _server_names(spec):
            with contextlib.suppress(ray.exceptions.RayError, ValueError):  # its node is gone
                server: Any = ray.get_actor(name, namespace=NAMESPACE)
                ray.get(server.close.remote())
                ray.kill(server)
        ray.kill(link)
