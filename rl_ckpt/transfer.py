"""Transfer: bringing checkpoints of a run to another place, once (`pull`) or as they come (`watch`).

Owns: what callers say and get; the work is done on the store floor, and where a Ray cluster is connected, by its nodes.
Works between any two urls; bringing something out (a push) is a pull with the arguments the other way round.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol

from rl_ckpt import logs
from rl_ckpt.catalog import Catalog
from rl_ckpt.errors import CheckpointNotFoundError, InvalidInputError, RunOwnedError, StorageError
from rl_ckpt.info import Progress, PullReport
from rl_ckpt.plan.pulling import Estimate
from rl_ckpt.plan.retention import KeepRule, Said, check_rules
from rl_ckpt.store.base import Store
from rl_ckpt.store.copier import Copier, FileJob, missing_bytes
from rl_ckpt.store.meter import PullMeter
from rl_ckpt.store.mirror import OWNER_S, Mirror
from rl_ckpt.store.pending import in_thread
from rl_ckpt.store.pull import Outcome, Survey, bring, bring_labels, survey
from rl_ckpt.store.run import Run
from rl_ckpt.store.urls import open_store

_log = logs.logger()

Nodes = Literal["auto", False]

_STREAMS, _LOCAL_STREAMS = min(16, 2 * (os.cpu_count() or 1)), 4
"""Measured on 4 cores beside the server: 8 streams are as fast as the network is, 16 only wait for each other."""
_MOST_STREAMS = 256
_TELL_S = 0.5


def pull(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    at: int | str = "latest",
    storage_options: Mapping[str, Any] | None = None,
    dst_storage_options: Mapping[str, Any] | None = None,
    streams: int | None = None,
    max_bytes_per_s: float | None = None,
    nodes: Nodes = "auto",
    progress: Callable[[Progress], None] | None = None,
    weak_commits: bool = False,
) -> PullReport:
    """Brings checkpoints of a run to another place: from S3 to a local disk, between two stores, from a disk to S3.

    The destination becomes a mirror: the same run, whose files are the source's, byte by byte. Only what is missing
    travels; every chunk is verified by its digest on its way; what a pull that was killed had brought is taken up by
    the next one. A checkpoint is there wholly or not at all. The source may be written to meanwhile.

    Args:
        src: Url of the run, or its folder.
        dst: Url or folder of the mirror; made where there is none.
        at: Which checkpoint: its step (the newest of it), its id, a tag, "latest", or "all".
        storage_options: For fsspec, of the source.
        dst_storage_options: For fsspec, of the destination. None: from the environment, or where both are of one kind
            (as s3:// and s3://), those of the source.
        streams: Reads at a time, of each node. None: two for each core, up to 16; or 4 where both sides are local.
        max_bytes_per_s: Limit for what is read from the source, over all streams and nodes together. None: none.
        nodes: "auto": where this process is connected to a Ray cluster, its nodes share the work, those that reach both
            sides. False: this process does it alone.
        progress: Called about twice a second, in the caller's thread.
        weak_commits: Accepts a destination without create-only PUT.

    Returns:
        What travelled, and what was there.

    Raises:
        CheckpointNotFoundError: No such run or checkpoint; or the source dropped it meanwhile, which says what to do.
        InvalidInputError: The destination is the source itself or another run, or an argument is out of range.
        CommitConflictError: The destination holds checkpoints that the source has not.
        RunOwnedError: A job that is alive saves to the destination.
        CorruptionError: Something is damaged in the source; nothing of that checkpoint was committed.
        StorageError: A store failed; or the destination has too little space, which is known before the start.
    """
    settings = _Settings(
        streams,
        max_bytes_per_s,
        nodes,
        progress,
        weak_commits,
        _options_of(src, dst, storage_options, dst_storage_options),
    )
    if isinstance(at, bool) or not isinstance(at, int | str):
        raise InvalidInputError(f"at={at!r} must be a step, an id, a tag, 'latest' or 'all'")
    source = Run.open(os.fspath(src), storage_options)
    return _Pull(source, open_store(dst, settings.dst_storage_options), settings).pull(at)


def _options_of(
    src: object, dst: object, mine: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """The destination's options: the source's, where none are given and both are of one kind."""
    kinds = [str(url).partition("://")[0] if "://" in str(url) else "file" for url in (src, dst)]
    return mine if theirs is None and kinds[0] == kinds[1] else theirs


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What a caller says of a transfer."""

    streams: int | None
    max_bytes_per_s: float | None
    nodes: Nodes
    progress: Callable[[Progress], None] | None
    weak_commits: bool
    dst_storage_options: Mapping[str, Any] | None

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
            InvalidInputError: A value is out of range.
        """
        if self.streams is not None and (
            not isinstance(self.streams, int)
            or isinstance(self.streams, bool)
            or not 1 <= self.streams <= _MOST_STREAMS
        ):
            raise InvalidInputError(f"streams={self.streams!r} must be an integer from 1 to {_MOST_STREAMS}")
        limit = self.max_bytes_per_s
        if limit is not None and (not _is_number(limit) or not limit > 0):
            raise InvalidInputError(f"max_bytes_per_s={limit!r} must be a number greater than 0, or None")
        if self.nodes != "auto" and self.nodes is not False:
            raise InvalidInputError(f"nodes={self.nodes!r} must be 'auto' or False")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class _Pull:
    """One source and one destination, for one pull after the other."""

    def __init__(self, source: Run, target: Store, settings: _Settings) -> None:
        self.source = source
        self.mirror = Mirror(source, target)
        self._settings = settings

    def pull(self, at: int | str | Sequence[str]) -> PullReport:
        """Brings what `at` means."""
        begun = time.monotonic()
        found, labels = survey(self.source, self.mirror, at)
        meter = PullMeter(self._settings.max_bytes_per_s)
        teller = _Teller(self._settings.progress, meter, found, begun)
        teller("checking", found.todo[-1].id if found.todo else found.already[-1].id if found.already else "")
        outcome, by_node = Outcome(), dict[str, int]()
        if found.todo:
            with self._mover(meter, found, teller.again) as mover:
                outcome = bring(
                    self.source, self.mirror, found, labels, mover.move, teller, self._settings.weak_commits
                )
                by_node, outcome.notices = mover.bytes_by_node, [*outcome.notices, *mover.notices]
        bring_labels(self.source, self.mirror.store, labels, found.already)
        if found.todo or found.already:
            teller("done", (found.todo or found.already)[-1].id)
        counts = meter.counts()
        vouched = [found.files[name] for name in found.kept]
        return PullReport(
            self.source.store.url,
            self.mirror.store.url,
            tuple(commit.id for commit in outcome.committed),
            tuple(commit.id for commit in found.already),
            counts.files_moved,
            counts.files_kept + len(vouched),
            counts.bytes_moved,
            counts.bytes_kept + sum(job.bytes for job in vouched),
            by_node,
            not outcome.unpinned,
            time.monotonic() - begun,
            tuple(outcome.notices),
        )

    def next(self) -> PullReport | None:
        """Brings the oldest checkpoint that is newer than all at the destination; None where there is none."""
        ours = {commit.number for commit in self.mirror.open().commits}
        newer = [c for c in self.source.log.read().commits if c.number > max(ours, default=0)]
        for commit in newer if ours else newer[-1:]:
            report = self.pull([commit.id])
            if report.checkpoints:
                return report
        return None

    @contextlib.contextmanager
    def _mover(self, meter: PullMeter, found: Survey, again: Callable[[], None]) -> Iterator[_Mover]:
        source, target = self.source.store, self.mirror.store
        local = source.is_local() and target.is_local()
        streams = self._settings.streams or (_LOCAL_STREAMS if local else _STREAMS)
        if self._settings.nodes and sys.modules.get("ray") is not None and sys.modules["ray"].is_initialized():
            from rl_ckpt.runtime.pull_nodes import FROM_BYTES, NodesMover

            if missing_bytes(list(found.files.values()), target) >= FROM_BYTES:
                limit = self._settings.max_bytes_per_s
                with NodesMover(source, target, meter, streams, limit, again) as mover:
                    if mover.nodes:
                        yield mover
                        return
        yield Alone(source, target, meter, streams, again)


class _Mover(Protocol):
    """Who brings files."""

    bytes_by_node: dict[str, int]
    """What each node of a cluster has moved."""
    notices: list[str]
    """What the user should know."""

    def move(self, jobs: Sequence[FileJob]) -> None:
        """Brings files; raises what `Copier.copy` raises."""


class Alone:
    """Moves files with threads of this process."""

    def __init__(self, source: Store, target: Store, meter: PullMeter, streams: int, again: Callable[[], None]) -> None:
        """Nothing has moved yet.

        Args:
            source: Read from.
            target: Written to.
            meter: Counts.
            streams: Reads at a time.
            again: Called about twice a second meanwhile.
        """
        self._copier, self._meter, self._streams, self._again = Copier(source, target, meter), meter, streams, again
        self.bytes_by_node: dict[str, int] = {}
        self.notices: list[str] = []

    def move(self, jobs: Sequence[FileJob]) -> None:
        """Brings files; the caller's thread only waits, so that ctrl-C ends it at once and nothing is half done."""
        copying = in_thread(partial(self._copier.copy, jobs, self._streams), "rl_ckpt-pull")
        try:
            while not concurrent.futures.wait([copying], _TELL_S).done:
                self._again()
        except BaseException:
            self._meter.stop()
            concurrent.futures.wait([copying])
            raise
        copying.result()


class _Teller:
    """Makes progress of counts, and tells the caller."""

    def __init__(
        self, progress: Callable[[Progress], None] | None, meter: PullMeter, found: Survey, begun: float
    ) -> None:
        self._progress, self._meter, self._found = progress, meter, found
        self._begun = begun
        self._total = found.bytes
        self._kept = sum(found.files[name].bytes for name in found.kept)
        self._estimate = Estimate(begun)
        self._phase, self._checkpoint = "", ""

    def __call__(self, phase: str, checkpoint: str) -> None:
        """A phase begins."""
        self._phase, self._checkpoint = phase, checkpoint
        self.again()

    def again(self) -> None:
        """Tells how far it is now."""
        if self._progress is None:
            return
        counts, now = self._meter.counts(), time.monotonic()
        there = min(self._total, self._kept + counts.bytes_kept + counts.bytes_moved)
        rate = self._estimate.rate(now, counts.bytes_moved)
        self._progress(
            Progress(
                self._phase,
                self._checkpoint,
                there,
                self._total,
                counts.bytes_moved,
                min(len(self._found.files), len(self._found.kept) + counts.files_kept + counts.files_moved),
                len(self._found.files),
                rate,
                now - self._begun,
                Estimate.seconds_left(self._total - there, rate),
            )
        )


def watch(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    poll_s: float = 10.0,
    until: threading.Event | None = None,
    keep: Sequence[KeepRule] = (),
    storage_options: Mapping[str, Any] | None = None,
    dst_storage_options: Mapping[str, Any] | None = None,
    streams: int | None = None,
    max_bytes_per_s: float | None = None,
    nodes: Nodes = "auto",
    progress: Callable[[Progress], None] | None = None,
    weak_commits: bool = False,
    patience_s: float = 3600.0,
) -> Iterator[PullReport]:
    """Follows a run and pulls every new checkpoint as it is committed: a standby cluster, an evaluation job.

    Where the destination has none yet, it begins with the newest. A checkpoint that the source drops before its turn
    comes is passed over.

    Args:
        src: As for `pull`; there need not be a run yet.
        dst: As for `pull`.
        poll_s: How often the source is looked at, in seconds.
        until: Ends it, within `poll_s` or after the checkpoint that is on its way. None: the caller stops asking.
        keep: Retention rules for the destination, applied after every checkpoint. None given: all stay. Where that
            fails, a notice of the report says so, and the next checkpoint's makes up for it.
        storage_options: As for `pull`.
        dst_storage_options: As for `pull`.
        streams: As for `pull`.
        max_bytes_per_s: As for `pull`.
        nodes: As for `pull`.
        progress: As for `pull`.
        weak_commits: As for `pull`.
        patience_s: How long a store may fail, beyond its own retries, before that is raised, in seconds.

    Yields:
        A report for each checkpoint, once it is committed at the destination.

    Raises:
        CheckpointError: As `pull`; of a store that fails, after `patience_s`; of another owner of the destination,
            which may only be sweeping it, after a minute.
    """
    settings = _Settings(
        streams,
        max_bytes_per_s,
        nodes,
        progress,
        weak_commits,
        _options_of(src, dst, storage_options, dst_storage_options),
    )
    for name, seconds in (("poll_s", poll_s), ("patience_s", patience_s)):
        if not _is_number(seconds) or not seconds >= 0:
            raise InvalidInputError(f"{name}={seconds!r} must be a number of seconds, 0 or more")
    check_rules((), keep, 0.0, Said())
    return _watch(src, dst, settings, storage_options, poll_s, until or threading.Event(), tuple(keep), patience_s)


def _watch(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    settings: _Settings,
    storage_options: Mapping[str, Any] | None,
    poll_s: float,
    until: threading.Event,
    keep: Sequence[KeepRule],
    patience_s: float,
) -> Iterator[PullReport]:
    following: _Pull | None = None
    failing_since: float | None = None
    looked = False  # and so the destination was nobody's
    while not until.is_set():
        try:
            if following is None:
                following = _Pull(
                    Run.open(os.fspath(src), storage_options), open_store(dst, settings.dst_storage_options), settings
                )
            report = following.next()
            looked, failing_since = True, None
        except CheckpointNotFoundError:  # nothing there yet, or dropped on its way: there will be newer ones
            report = None
        except (StorageError, RunOwnedError) as error:
            limit_s = patience_s if isinstance(error, StorageError) else min(patience_s, OWNER_S if looked else 0.0)
            if failing_since is None:
                failing_since = time.monotonic()
                _log.warning("following %s into %s: %s", src, dst, error)
            if time.monotonic() - failing_since >= limit_s:
                raise
            report = None
        if report is not None:
            yield _swept(report, dst, settings.dst_storage_options, keep) if keep else report
        else:
            until.wait(poll_s)


def _swept(
    report: PullReport, dst: str | os.PathLike[str], options: Mapping[str, Any] | None, keep: Sequence[KeepRule]
) -> PullReport:
    """Sweeps the destination; whether that works or not, what was pulled is there, and the caller is to hear of it."""
    try:
        Catalog(os.fspath(dst), storage_options=options).sweep(keep)
    except (StorageError, RunOwnedError) as error:
        notice = f"older checkpoints of {dst} were not swept: {error}"
        return dataclasses.replace(report, notices=(*report.notices, notice))
    return report
