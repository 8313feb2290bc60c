"""Prefetch: brings a checkpoint into the memory of a new cluster's nodes while its workers start.

Owns: finding the checkpoint, and what the caller holds while it is brought in. The work is done by the run's actors
(rl_ckpt/runtime, imported at the first call). Promises: every byte that is kept in memory was verified; the run is not
taken over, and nothing is written to the store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Any

from rl_ckpt.errors import CheckpointNotFoundError, CorruptionError, InvalidInputError, SaveTimeoutError
from rl_ckpt.format.records import CommitRecord
from rl_ckpt.info import PrefetchReport
from rl_ckpt.store.run import Run
from rl_ckpt.store.urls import check_url

if TYPE_CHECKING:
    from rl_ckpt.runtime.prefetch_messages import PrefetchDone
    from rl_ckpt.runtime.spec import RunSpec
    from rl_ckpt.runtime.status import PrefetchStatus

LATEST = "latest"


def prefetch(
    url: str,
    *,
    at: int | str = LATEST,
    storage_options: Mapping[str, Any] | None = None,
    nodes: Sequence[str] | None = None,
    memory_bytes: int | None = None,
) -> Prefetch:
    """Has the nodes of a Ray cluster bring a checkpoint from the store into their memory; back once that is begun.

    Each node brings in its share, so each chunk leaves the store once, and copies go to other nodes. A restore that
    follows (`Checkpointer(url).restore(workers)`, of this or another driver) takes what is there, and waits for what is
    on its way; chunks that have no room or are damaged it reads from the store, as without. What was brought in stays
    in memory when the driver ends, until a newer checkpoint takes its place or a Checkpointer of the run is closed.

    Args:
        url: Of the run, as it is given to the Checkpointer.
        at: Which checkpoint: "latest", a step, an id, or a tag.
        storage_options: For the file system, as fsspec takes them.
        nodes: Ids of the Ray nodes that take part; None: all that can run anything.
        memory_bytes: Limit per node of what is brought in and copied, in bytes. None: as much as half of the shared
            memory that is free; the run's own `memory_bytes`, where its actors run already with one.

    Returns:
        The prefetch under way. `result()` waits for its end.

    Raises:
        CheckpointNotFoundError: No such run or checkpoint; nothing was started.
        InvalidInputError: Ray is not running in this process; an argument is out of range; or `at` names a checkpoint
            that is older than what memory has.
        CorruptionError: The checkpoint's manifest is damaged, or with "latest", that of every checkpoint.
        StorageError: The store failed.
    """
    from rl_ckpt.options import Options
    from rl_ckpt.runtime.prefetch import begin, nodes_of
    from rl_ckpt.runtime.prefetch_messages import PrefetchOrder

    where, options = check_url(url), dict(storage_options or {})
    Options(memory_bytes=memory_bytes)  # says what is wrong with it
    if where.startswith("memory://"):
        raise InvalidInputError(f"{where} is one process's memory; give a folder or an object store")
    names = nodes_of(nodes)
    record, manifest, fell_back = _find(Run.open(where, options), at)
    order = PrefetchOrder(record, manifest, names, at == LATEST, memory_bytes)
    spec, future = begin(where, options, order)
    return Prefetch(spec, record, future, fell_back)


class Prefetch:
    """A prefetch under way."""

    def __init__(
        self, spec: RunSpec, record: CommitRecord, future: Future[PrefetchDone], fell_back: Mapping[str, str]
    ) -> None:
        """Made by `prefetch`."""
        self._spec = spec
        self._record = record
        self._future = future
        self._fell_back = dict(fell_back)

    @property
    def step(self) -> int:
        """The step that is brought in."""
        return self._record.step

    @property
    def checkpoint(self) -> str:
        """Its id."""
        return self._record.id

    def done(self) -> bool:
        """Whether it is over."""
        return self._future.done()

    def progress(self) -> PrefetchStatus | None:
        """How far it is; None where nothing is known, or nothing of it is in memory."""
        from rl_ckpt.runtime.prefetch import status_of

        found = status_of(self._spec)
        return found if found is not None and found.checkpoint == self.checkpoint else None

    def result(self, timeout: float | None = None) -> PrefetchReport:
        """Waits until everything is in memory that can be, with its copies. A restore need not wait for this.

        Args:
            timeout: How long to wait, in seconds; None: until it is over.

        Returns:
            What was brought in, and what was not.

        Raises:
            SaveTimeoutError: Not over yet; it goes on.
            CheckpointError: No node could take part, or the run's actors were ended meanwhile.
        """
        try:
            done = self._future.result(timeout)
        except FutureTimeoutError as error:
            if self._future.done():
                raise
            raise SaveTimeoutError(f"step {self.step} is still being brought in after {timeout} s") from error
        return PrefetchReport(
            step=done.step,
            id=done.id,
            bytes=done.bytes,
            bytes_fetched=done.bytes_fetched,
            bytes_left=done.bytes_left,
            nodes=done.nodes,
            seconds=done.seconds,
            damaged=done.damaged,
            fell_back=self._fell_back,
            notices=done.notices,
        )

    def __repr__(self) -> str:
        """Step and state."""
        return f"Prefetch(step={self.step}, {'over' if self.done() else 'under way'})"


def _find(run: Run, at: int | str) -> tuple[CommitRecord, bytes, dict[str, str]]:
    """The record and the manifest's file, and newer checkpoints whose manifests are damaged."""
    log = run.log.read()
    if at != LATEST:
        record = run.find(log, at) if isinstance(at, int) else _named(log.commits, at, run.store.url)
        return record, run.manifest_file(record)[1], {}
    run.find(log, None)  # says what there is
    fell_back: dict[str, str] = {}
    for record in reversed(log.commits):
        try:
            return record, run.manifest_file(record)[1], fell_back
        except CorruptionError as error:
            fell_back[record.id] = str(error)
    raise CorruptionError(f"no good checkpoint in {run.store.url}: {fell_back}")


def _named(commits: Sequence[CommitRecord], name: str, url: str) -> CommitRecord:
    """The checkpoint of an id, else the newest one with a tag."""
    found = [one for one in commits if one.id == name] or [one for one in commits if one.tag == name]
    if found:
        return found[-1]
    raise CheckpointNotFoundError(f"{url} has no checkpoint with the id or tag {name!r}")
