"""Catalog: the checkpoints of one run, for people and tools: list, find, tag, note, verify, hold, remove, sweep.

Owns: what is done with checkpoints after they were written. Needs no Ray, and no ownership of the run but to delete.
Writes no checkpoints (rl_ckpt/checkpointer.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.format.records import CommitRecord, LabelRecord
from rl_ckpt.info import CheckpointInfo, SweepReport, VerifyReport
from rl_ckpt.options import Options
from rl_ckpt.plan.retention import KeepRule
from rl_ckpt.state.leaves import is_utf8
from rl_ckpt.store import sweep_by_hand
from rl_ckpt.store.labels import Labels, relabel
from rl_ckpt.store.listing import Ref, check_tag, find_ref, infos, listed, read
from rl_ckpt.store.pins import pin
from rl_ckpt.store.sweep_by_hand import check_grace
from rl_ckpt.store.urls import check_url
from rl_ckpt.store.verify import verify


class Catalog:
    """The checkpoints of one run.

    Example:
        catalog = Catalog("s3://bucket/run-7")
        catalog.tag("latest", "shipped")
        for info in catalog.checkpoints():
            print(info.step, info.tags, info.metrics)

    A checkpoint is named by its step (then the newest of that step is meant), its id, a tag (then the newest that has
    it), or "latest". A Catalog remembers no checkpoints: every call asks the store.
    """

    def __init__(self, url: str, *, storage_options: Mapping[str, Any] | None = None) -> None:
        """Names a run. Nothing is read yet.

        Args:
            url: As it was given to the Checkpointer which saved.
            storage_options: For the file system, as fsspec takes them.

        Raises:
            InvalidInputError: The url can't be used.
        """
        self._url = check_url(url)
        self._storage_options = dict(storage_options or {})

    @property
    def url(self) -> str:
        """Of the run, normalised, without secrets."""
        return self._url

    def checkpoints(self) -> list[CheckpointInfo]:
        """All checkpoints in the store, oldest first.

        Raises:
            CheckpointNotFoundError: No such run.
            StorageError: The store failed.
            InvalidInputError: A newer release wrote the run.
        """
        return listed(self._url, self._storage_options)

    def find(self, ref: Ref = "latest") -> CheckpointInfo:
        """One checkpoint.

        Args:
            ref: Its step, id or tag, or "latest".

        Raises:
            CheckpointNotFoundError: No such run or checkpoint.
            CorruptionError: No record of the run can be read.
            StorageError: The store failed.
        """
        run, log, labels = read(self._url, self._storage_options)
        commit = find_ref(run, log, labels, ref)
        return next(info for info in infos(run, log.commits, labels) if info.id == commit.id)

    def tag(self, ref: Ref, name: str) -> CheckpointInfo:
        """Gives a checkpoint a tag, in addition to those it has: it is never swept from then on.

        Jobs may go on saving to the run. A request to remove the checkpoint is taken back.

        Args:
            ref: Which checkpoint.
            name: Any text that is no step, no id and not "latest". Several checkpoints may have the same tag: `find`
                then gives the newest of them.

        Returns:
            The checkpoint as it is now.

        Raises:
            CheckpointNotFoundError: No such checkpoint, or a sweep dropped it in this moment.
            InvalidInputError: The name can't be a tag.
            StorageError: The store failed, or can't be written to.
        """
        check_tag(name)

        def change(label: LabelRecord) -> LabelRecord:
            if name == label.commit.tag:
                return msgspec.structs.replace(label, untagged=False, remove=False)
            return msgspec.structs.replace(label, tags=tuple(dict.fromkeys((*label.tags, name))), remove=False)

        return self._change(ref, change)

    def untag(self, ref: Ref, name: str) -> CheckpointInfo:
        """Takes a tag off a checkpoint. Without any, the retention rules decide on it again.

        Raises:
            InvalidInputError: The checkpoint does not have this tag.
            CheckpointNotFoundError, StorageError: As `tag`.
        """

        def change(label: LabelRecord) -> LabelRecord:
            tags = Labels({label.checkpoint: label}).tags(label.commit)
            if name not in tags:
                raise InvalidInputError(f"checkpoint {label.checkpoint} has no tag {name!r}; its tags are {list(tags)}")
            left = tuple(tag for tag in label.tags if tag != name)
            return msgspec.structs.replace(label, tags=left, untagged=label.untagged or name == label.commit.tag)

        return self._change(ref, change)

    def note(self, ref: Ref, text: str) -> CheckpointInfo:
        """Writes a note on a checkpoint, in place of the one it had; an empty one takes it away.

        Raises:
            InvalidInputError: The text is no Unicode string.
            CheckpointNotFoundError, StorageError: As `tag`.
        """
        if not isinstance(text, str) or not is_utf8(text):
            raise InvalidInputError(f"note {text!r} must be a string of Unicode text")
        return self._change(ref, lambda label: msgspec.structs.replace(label, note=text))

    def remove(
        self, refs: Ref | Sequence[Ref], *, force: bool = False, grace_s: float = Options.grace_s
    ) -> SweepReport:
        """Removes checkpoints. Their files, as far as no other checkpoint names them, go when the grace time is over.

        Where a job that is alive owns the run, it is asked to do it: the report's `requested` says who, and when.

        Args:
            refs: Which checkpoints, one or several.
            force: Whether tagged ones too.
            grace_s: As for `sweep`.

        Raises:
            InvalidInputError: One of them is the newest, tagged (without `force`), or held by a reader or a fork;
                nothing was removed.
            CheckpointNotFoundError: No such run or checkpoint.
            StorageError: The store failed, or can't be written to.
        """
        wanted = [refs] if isinstance(refs, int | str) else list(refs)
        run, log, labels = read(self._url, self._storage_options)
        commits = {commit.id: commit for commit in (find_ref(run, log, labels, ref) for ref in wanted)}
        if not commits:
            raise InvalidInputError("refs is empty: say which checkpoints are to be removed")
        return sweep_by_hand.remove(run, log, labels, [*commits.values()], force, check_grace(grace_s))

    def sweep(
        self, keep: Sequence[KeepRule] = (), *, dry_run: bool = False, grace_s: float = Options.grace_s
    ) -> SweepReport:
        """Deletes the checkpoints that no rule keeps, and what no checkpoint names.

        In two phases: commit records go at once; manifests and files when `grace_s` seconds have passed since a sweep
        has first seen that nothing names them, so by a later sweep, as readers may still be at them.

        Args:
            keep: Retention rules; a checkpoint stays where any of them keeps it. None: all stay, and only what was
                asked to be removed goes, and what no checkpoint names.
            dry_run: Changes nothing, and says what would go and why.
            grace_s: In seconds; 0 where nobody reads the run.

        Raises:
            InvalidInputError: The rules keep nothing of what is there; nothing was deleted.
            RunOwnedError: A job that is alive owns the run; nothing was deleted.
            CheckpointNotFoundError: No such run.
            StorageError: The store failed, or can't be written to.
        """
        run, log, labels = read(self._url, self._storage_options)
        act = sweep_by_hand.dry_run if dry_run else sweep_by_hand.sweep
        return act(run, log, labels, keep, check_grace(grace_s))

    def verify(
        self,
        ref: Ref | None = None,
        *,
        repair: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> VerifyReport:
        """Reads every chunk of a checkpoint, or of all of them, and compares it with what was committed.

        Args:
            ref: Which checkpoint; None: all of the run.
            repair: As `Checkpointer.verify`.
            progress: Told how many bytes were looked at, and of how many; by any thread.

        Raises:
            CheckpointError: As `Checkpointer.verify`.
        """
        wanted = None if ref is None else self.find(ref).id
        return verify(self._url, self._storage_options, wanted, repair, progress=progress)

    @contextlib.contextmanager
    def pin(self, ref: Ref = "latest", *, seconds: float = 3600.0) -> Iterator[CheckpointInfo]:
        """Holds a checkpoint against the sweep, of any process, while the block runs, however long that is.

        Args:
            ref: Which checkpoint.
            seconds: When the hold ends if this process dies, counted from its last renewal.

        Raises:
            CheckpointNotFoundError: No such run or checkpoint.
            StorageError: The store failed, or can't be written to.
        """
        run, log, labels = read(self._url, self._storage_options)
        commit = find_ref(run, log, labels, ref)
        with pin(run, commit.id, seconds):
            yield next(info for info in infos(run, log.commits, labels) if info.id == commit.id)

    def _change(self, ref: Ref, change: Callable[[LabelRecord], LabelRecord]) -> CheckpointInfo:
        run, log, labels = read(self._url, self._storage_options)
        commit: CommitRecord = find_ref(run, log, labels, ref)
        label = relabel(run, commit, change)
        now = Labels({**labels.by_checkpoint, commit.id: label})
        return next(info for info in infos(run, log.commits, now) if info.id == commit.id)
