"""Checkpointer: the face of the package. Reads like the recipe; the work is done on the floors below.

`save` and `restore` drive Ray actors (rl_ckpt/runtime, imported at the first call); `save_state` and `load_state` need
no Ray.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rl_ckpt.errors import CheckpointNotFoundError, InvalidInputError
from rl_ckpt.info import CheckpointInfo, RestoreReport, SuperviseReport, VerifyReport
from rl_ckpt.options import Options, WhenBusy, check_deadline, check_step
from rl_ckpt.plan.retention import KeepRule
from rl_ckpt.state.tree import flatten
from rl_ckpt.store.committer import SaveRequest, encode_metrics, info_of
from rl_ckpt.store.listing import check_tag, listed
from rl_ckpt.store.pending import Branch, PendingSave, decide, raise_untold, wanted_step
from rl_ckpt.store.pins import pin
from rl_ckpt.store.plain_load import load
from rl_ckpt.store.plain_save import PlainSaver
from rl_ckpt.store.run import Run
from rl_ckpt.store.urls import check_url
from rl_ckpt.store.verify import verify

if TYPE_CHECKING:
    from rl_ckpt.runtime.preemption import PreemptionWatch
    from rl_ckpt.runtime.service import Service
    from rl_ckpt.runtime.worker import WorkerCheckpointer


class Checkpointer:
    """Saves and restores the checkpoints of one run.

    Example:
        ckpt = Checkpointer("s3://bucket/run-7", keep=[LatestN(3), EveryNSteps(1000)])
        pending = ckpt.save(step, workers)
        pending.result()
        report = ckpt.restore(workers)

    One Checkpointer is used by one thread at a time. It is a context manager; `close` waits for what is being written.
    """

    def __init__(
        self,
        url: str,
        *,
        keep: Sequence[KeepRule] = (),
        storage_options: Mapping[str, Any] | None = None,
        get_state: str = "get_state",
        set_state: str = "set_state",
        when_busy: WhenBusy = "wait",
        allow_pickle: bool = False,
        weak_commits: bool = False,
        take_over: bool = False,
        chunk_bytes: int = Options.chunk_bytes,
        write_streams: int = Options.write_streams,
        join_timeout_s: float = Options.join_timeout_s,
        write_timeout_s: float = Options.write_timeout_s,
        grace_s: float = Options.grace_s,
        memory_tier: bool = True,
        replicas: int = Options.replicas,
        memory_bytes: int | None = None,
        persist_every: int = Options.persist_every,
    ) -> None:
        """Names a run. Nothing is read or written yet.

        Args:
            url: Where the run is: a local folder, or any fsspec url (`s3://bucket/run-7`).
            keep: Retention rules; a checkpoint stays where any of them keeps it. None: all stay.
            storage_options: For the file system, as fsspec takes them (endpoint, credentials). From the environment
                otherwise.
            get_state: Name of the workers' method that returns their state tree.
            set_state: Name of the workers' method that takes a state tree.
            when_busy: What a save does while two earlier ones are still being written: "wait" or "skip".
            allow_pickle: Whether leaves that are neither arrays nor plain data may be pickled, and loaded again.
                Loading such a checkpoint runs code from it.
            weak_commits: Accepts a store without create-only PUT: two coordinators may then overwrite each other's
                commits.
            take_over: Whether the first save takes the run over from another job that is alive and owns it. Without it
                that save raises `RunOwnedError`, and with it the other job's next save raises `FencedError`.
            chunk_bytes: Upper limit of a chunk, in bytes.
            write_streams: Shard files that a node writes at a time.
            join_timeout_s: How long a save or restore waits for all its workers, in seconds.
            write_timeout_s: How long a staged save may take until it is committed, in seconds.
            grace_s: How long files that no checkpoint names any more are kept for readers still at them, in seconds.
            memory_tier: Whether the newest checkpoint stays in the nodes' shared memory too, with copies on other
                nodes, so that a restore reads nothing from the store. Never makes a save fail: what there is no room
                for is not kept, and `result()` warns of it. (`save_state` keeps nothing in memory.)
            replicas: Copies on other nodes of what a node keeps in memory; a placement that never puts two on one node.
                Fewer where there are not so many nodes.
            memory_bytes: Limit per node of what it keeps in memory of one checkpoint: its own part, and copies of other
                nodes' parts (for a moment, while the next one is copied, of two of them), in bytes. None: what shared
                memory has room for beside staging.
            persist_every: Of so many saves one goes to the store, the first among them; the others stay in memory alone
                (`CheckpointInfo.in_store` is False) until a newer one is complete. Tagged ones, and those that there is
                no room for in memory, go to the store. Such a checkpoint outlives any one node with `replicas` of 1 or
                more, and no loss of the whole cluster.

        Raises:
            InvalidInputError: An argument is out of range, or the url's scheme is not supported.
        """
        self._options = Options(
            chunk_bytes=chunk_bytes,
            write_streams=write_streams,
            when_busy=when_busy,
            join_timeout_s=join_timeout_s,
            write_timeout_s=write_timeout_s,
            grace_s=grace_s,
            allow_pickle=allow_pickle,
            weak_commits=weak_commits,
            take_over=take_over,
            memory_tier=memory_tier,
            replicas=replicas,
            memory_bytes=memory_bytes,
            persist_every=persist_every,
        )
        if isinstance(keep, type | KeepRule) or any(isinstance(r, type) or not isinstance(r, KeepRule) for r in keep):
            raise InvalidInputError(f"keep={keep!r} must be a list of rules such as [LatestN(3), EveryNSteps(1000)]")
        self._url = check_url(url)
        self._keep = tuple(keep)
        self._storage_options = dict(storage_options or {})
        self._methods = (get_state, set_state)
        self._branch = Branch()
        self._pending: list[PendingSave] = []
        self._saver: PlainSaver | None = None
        self._service: Service | None = None

    @property
    def url(self) -> str:
        """Of the run, normalised, without secrets."""
        return self._url

    def save(
        self,
        step: int,
        workers: Sequence[Any],
        *,
        metrics: Mapping[str, object] | None = None,
        tag: str | None = None,
        deadline_s: float | None = None,
    ) -> PendingSave:
        """Saves the state of Ray actors; back as soon as it is staged.

        Args:
            step: Training step, at least 0, not yet saved in this line of checkpoints.
            workers: Ray actor handles, by rank; each has `get_state()` (see the constructor) returning a state tree.
                What is equal on several workers is written once; what differs belongs to its rank.
            metrics: Plain values to find the checkpoint by later (a return, a loss).
            tag: A name; a tagged checkpoint is never swept. A word, not what would be taken for a step or an id.
            deadline_s: For an urgent save: seconds from now until it is decided, by this call or by `result()`. It is
                committed by then, or nothing of it remains (SaveTimeoutError). In the rare case that the commit record
                itself was on its way to a store that did not answer, it may yet land (CommitUnknownError). `close`
                waits no longer either.

        Returns:
            The save under way: training may go on. `result()` waits for the commit.

        Raises:
            InvalidInputError: Bad arguments, or states that can't be saved or don't fit together; nothing was written.
            WorkerFailuresError: Workers are dead or their `get_state` raised; by rank.
            SaveTimeoutError: Workers did not take part in time.
            SaveSkippedError: Earlier saves are still being written (`when_busy="skip"`).
            RunOwnedError: Another job that is alive owns the run, and `take_over` was not given; nothing was written.
            FencedError: Another job took the run over.
            CheckpointError: An earlier save failed in the background and nobody had asked for its result yet.
        """
        request = self._request(step, metrics, tag, deadline_s)
        raise_untold(self._pending)
        return self._track(self._running_service().save(request, workers))

    def prepare(self, workers: Sequence[Any]) -> None:
        """Makes the first save as fast as the later ones. Optional; to be called before training, with its workers.

        Creates the run, starts the coordinator and the shard servers, plans from the states as they are now, and
        allocates and touches both generations of staging memory. Saves nothing.

        Args:
            workers: As for `save`.

        Raises:
            CheckpointError: As `save`, which would fail in the same way.
        """
        self._running_service().prepare(workers)

    def restore(
        self,
        workers: Sequence[Any],
        *,
        step: int | None = None,
        select: str | Sequence[str] | None = None,
        rename: Mapping[str, str] | None = None,
        strict: bool = True,
        ranks: Sequence[int] | None = None,
    ) -> RestoreReport:
        """Restores Ray actors, onto any number of them.

        Every worker's `get_state()` tells what it has; values go into its arrays in place where dtype and shape agree,
        and the whole tree goes to `set_state(tree)`. No worker is touched before every chunk that any of them needs is
        verified.

        Args:
            workers: Ray actor handles, by rank.
            step: Which checkpoint; one that is still being saved here is waited for, as long as for workers. None: the
                newest good one.
            select: Globs of saved paths to restore (`"policy/*"`, `"!optimizer"`); None: everything.
            rename: Saved path or prefix → the workers' path or prefix.
            strict: Whether paths that are missing, unexpected or mismatched are an error; if not they are left alone.
            ranks: As which of the saved ranks each worker is restored: replacements of lost workers alone, while the
                others go on. The next save continues the newest checkpoint, as if nothing had been restored.

        Returns:
            What was restored, from where, and what was left alone.

        Raises:
            CheckpointNotFoundError: No such run or checkpoint.
            InvalidInputError: States don't fit (one error lists all paths), or bad arguments; no worker was changed.
            CorruptionError: The checkpoint asked for (or every one) is damaged; no worker was changed.
            WorkerFailuresError: Workers failed; by rank.
        """
        wanted = self._wanted(step)
        report = self._running_service().restore(workers, wanted, select, rename, strict, ranks)
        if ranks is None:  # else the job goes on from where the others are
            self._branch.restored(report.id)
        return report

    def supervise(
        self,
        make_workers: Callable[[], Sequence[Any]],
        train: Callable[[list[Any], RestoreReport | None], Any],
        *,
        max_failures: int = 3,
        retry_on: Sequence[type[Exception]] = (),
        recover_timeout_s: float = 300.0,
        settle_timeout_s: float = 120.0,
    ) -> SuperviseReport:
        """Trains to the end, and recovers by itself from lost workers, objects and nodes.

        Makes workers, restores them from the newest good checkpoint if there is any, and calls `train`. When that
        raises because something was lost: waits until what was being saved is decided, ends the workers that are left
        (`ray.kill`; only those that `make_workers` returned), makes new ones, restores, and calls `train` again. Any
        other error is raised at once, as are errors of the store which no lost worker explains.

        Args:
            make_workers: Returns Ray actor handles, by rank, as many as it likes; called again after a loss. Where it
                raises a loss itself (a node that is not known to be dead yet), it is called again, with growing waits.
            train: Takes the workers and what they were restored from (None: begin anew), saves as it likes, and returns
                when it is done.
            max_failures: How many losses in a row, with no new checkpoint in between, are recovered from.
            retry_on: Further errors, of either function, that count as a loss: `GetTimeoutError` for workers that hang.
            recover_timeout_s: How long new workers may take until they are restored, all attempts together, in seconds.
            settle_timeout_s: How long a recovery waits for saves under way, in seconds.

        Returns:
            What `train` returned, and every recovery. The workers are left as they are.

        Raises:
            WorkerFailuresError: Too many losses, or no new workers in time; says how often it was tried. The last error
                is its `__cause__`.
            StorageError: The store failed at the first start, or until the end of a recovery's time.
            CheckpointError: As `restore`.
        """
        from rl_ckpt.runtime.supervise import Limits, Supervisor

        limits = Limits(max_failures, tuple(retry_on), recover_timeout_s, settle_timeout_s)
        service = self._running_service()
        return Supervisor(self, self._decided, service.settle, make_workers, train, limits).run()

    def lost_ranks(self, workers: Sequence[Any], *, patience_s: float = 5.0) -> list[int]:
        """Ranks of workers that are dead or can't be reached; for `restore(replacements, ranks=...)`.

        Args:
            workers: Ray actor handles, by rank.
            patience_s: How long to wait for those that do not answer, in seconds; they count as busy, not as lost.
        """
        from rl_ckpt.runtime.losses import lost_ranks

        return lost_ranks(workers, patience_s)

    def preemption(self, *, grace_s: float = 30.0, poll_s: float = 1.0) -> PreemptionWatch:
        """Watches for SIGTERM to this process and for nodes that Ray drains, inside a `with` block.

        The training loop asks `notice(workers)` each time around, and once there is one, makes an urgent save
        (`save(deadline_s=...)`).

        Args:
            grace_s: How long there is from a SIGTERM, or from a drain without a deadline, in seconds.
            poll_s: How often Ray is asked, in seconds.

        Raises:
            InvalidInputError: A time is not greater than 0.
        """
        from rl_ckpt.runtime.preemption import PreemptionWatch

        return PreemptionWatch(grace_s, poll_s)

    def worker(self, rank: int, world_size: int) -> WorkerCheckpointer:
        """A picklable handle for use inside worker `rank` of `world_size`: every worker calls `save` or `restore`.

        Raises:
            InvalidInputError: `rank` is not in 0 … world_size - 1.
        """
        from rl_ckpt.runtime.worker import WorkerCheckpointer

        service = self._running_service()
        service.owns_run = True
        return WorkerCheckpointer(service.spec, rank, world_size, service.take_over)

    def save_state(
        self, step: int, tree: Any, *, metrics: Mapping[str, object] | None = None, tag: str | None = None
    ) -> PendingSave:
        """Saves one process's state, without Ray; back as soon as it is staged, written by a background thread.

        Args:
            step: As for `save`.
            tree: Nested dict, OrderedDict, list and tuple of arrays and plain data.
            metrics: As for `save`.
            tag: As for `save`.

        Returns:
            The save under way.

        Raises:
            InvalidInputError, SaveSkippedError, RunOwnedError, FencedError, CheckpointError: As for `save`.
        """
        begun = time.monotonic()
        request = self._request(step, metrics, tag)
        raise_untold(self._pending)
        flat = flatten(tree, self._options.allow_pickle)  # first: a state that can't be saved leaves no trace
        if self._service is not None and self._service.owns_run:
            raise InvalidInputError(
                f"this Checkpointer saves {self._url} through Ray actors already; use another url for plain state"
            )
        if self._saver is None:
            self._saver = PlainSaver.open(self._url, self._storage_options, self._keep, self._options)
            self._options = dataclasses.replace(self._options, take_over=False)  # it was asked for once, and is done
        if self._saver.sweep_failure:
            warnings.warn(f"old checkpoints could not be swept: {self._saver.sweep_failure}", stacklevel=2)
        return self._track(self._saver.save(request, flat, begun))

    def load_state(
        self,
        step: int | None = None,
        *,
        select: str | Sequence[str] | None = None,
        rank: int = 0,
        as_numpy: bool = False,
    ) -> Any:
        """Reads a checkpoint's state tree into this process, without Ray.

        Args:
            step: Which checkpoint; None: the newest good one. A damaged chunk is taken from another checkpoint that has
                the same; where none has, the checkpoint is passed over. Both with a warning.
            select: Globs of saved paths; only their bytes are read. None: everything.
            rank: Whose per-rank leaves, where several workers saved. Sharded arrays come whole.
            as_numpy: Gives torch and jax arrays as numpy arrays (where torch or jax is not installed).

        Returns:
            The tree, with containers, kinds, dtypes and shapes as they were saved, in memory of the caller's own.

        Raises:
            CheckpointNotFoundError: No such run or checkpoint.
            CorruptionError: The checkpoint asked for (or every one) is damaged.
            UntrustedDataError: A chosen leaf was pickled, and `allow_pickle` was not set.
            InvalidInputError: `select` chooses nothing.
        """
        wanted = self._wanted(step)
        run = Run.open(self._url, self._storage_options)
        loaded = load(run, wanted, select, rank, self._options.allow_pickle, as_numpy)
        for notice in loaded.notices:
            warnings.warn(notice, stacklevel=2)
        self._branch.restored(loaded.id)
        return loaded.tree

    def checkpoints(self) -> list[CheckpointInfo]:
        """All checkpoints of the run in the store, oldest first; none where nothing was saved yet.

        What is only in memory (`persist_every`) is not among them.

        Raises:
            StorageError: The store failed.
            InvalidInputError: A newer release wrote the run.
        """
        try:
            return listed(self._url, self._storage_options)
        except CheckpointNotFoundError:
            return []

    def latest(self) -> CheckpointInfo | None:
        """The newest checkpoint in the store, or None."""
        found = self.checkpoints()
        return found[-1] if found else None

    def verify(self, step: int | None = None, *, repair: bool = False) -> VerifyReport:
        """Reads every chunk of a checkpoint, or of all of them, and compares it with what was committed.

        Also looked at: run.json, the commit log, manifests, and whether each shard file is one that Arrow tools open.
        What several checkpoints share is read once. Needs no Ray.

        Args:
            step: Which checkpoint; None: all of the run.
            repair: Writes good bytes back where they can be had: from other checkpoints that hold the same, from the
                nodes' memory where this Checkpointer saves Ray actors, or, for something small with one wrong bit, by
                its digest. Files that are good are not touched, and what can't be repaired stays as it is. Jobs may go
                on saving meanwhile.

        Returns:
            What was looked at, what is damaged, and what was repaired from where.

        Raises:
            CheckpointNotFoundError: No such run or checkpoint.
            CorruptionError: run.json is damaged, and there is no commit log to make it anew from.
            StorageError: The store failed, or can't be written to.
        """
        wanted, service = None if step is None else check_step(step), self._service
        more = None if service is None else service.held_chunk
        return verify(self._url, self._storage_options, wanted, repair, more)

    @contextlib.contextmanager
    def pin(self, step: int, *, seconds: float = 3600.0) -> Iterator[CheckpointInfo]:
        """Holds a checkpoint against the sweep, of any process, while the block runs.

        Args:
            step: Which checkpoint.
            seconds: When the hold ends if this process dies, counted from its last renewal.

        Raises:
            CheckpointNotFoundError: No such run or checkpoint.
        """
        run = Run.open(self._url, self._storage_options)
        log = run.log.read()
        commit = run.find(log, check_step(step))
        with pin(run, commit.id, seconds):
            yield info_of(run, commit, log.commits)

    def close(self) -> None:
        """Waits until all saves are committed or have failed, and ends this run's actors.

        Raises:
            CheckpointError: A save failed and nobody had asked for its result yet.
        """
        saver, self._saver = self._saver, None
        service, self._service = self._service, None
        if saver is not None:
            saver.close()
        if service is not None:
            service.close()
        raise_untold(self._pending)

    def __enter__(self) -> Checkpointer:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()

    def _wanted(self, step: int | None) -> int | None:
        return wanted_step(step, self._pending, self._options.join_timeout_s)

    def _decided(self, seconds: float) -> tuple[list[str], list[str]]:
        """Waits for saves under way, as long; ids of those that are checkpoints by now, and why others failed."""
        saves, self._pending = self._pending, []
        return decide(saves, seconds)

    def _request(
        self, step: int, metrics: Mapping[str, object] | None, tag: str | None, deadline_s: float | None = None
    ) -> SaveRequest:
        encoded, tag = encode_metrics(metrics or {}), None if tag is None else check_tag(tag)
        parent, since = self._branch.parent()
        return SaveRequest(check_step(step), encoded, tag, parent, check_deadline(deadline_s), since)

    def _running_service(self) -> Service:
        from rl_ckpt.runtime.service import Service

        if self._service is None:
            if self._saver is not None:
                self._saver.close()
                self._saver = None
            self._service = Service(self._url, self._storage_options, self._keep, self._options, self._methods)
            self._options = dataclasses.replace(self._options, take_over=False)  # it is the service's to do, once
        return self._service

    def _track(self, pending: PendingSave) -> PendingSave:
        self._branch.saved(pending)
        self._pending = [p for p in self._pending if not p.settled()] + [pending]
        return pending
