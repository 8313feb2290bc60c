"""Reuse: which chunks a save need not write, as the run holds them already.

Owns: what the run's committer knows of stored chunks, and whether a new checkpoint may lean on their files. Promises:
none of them is of a file that is missing or cut short, nor of a checkpoint that this writer or an earlier one may be
deleting. For one thread at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl_ckpt.errors import CorruptionError
from rl_ckpt.format.manifest import Manifest
from rl_ckpt.format.records import CommitRecord
from rl_ckpt.plan.deal import Stored, stored_chunks
from rl_ckpt.store.based import sizes_of
from rl_ckpt.store.run import Run


class Reuse:
    """What saves to one run need not write; kept by the run's committer."""

    def __init__(self, run: Run) -> None:
        """Nothing is read yet."""
        self._run = run
        self._stored: Stored | None = None

    def find(self, parent: str | None, commits: Sequence[CommitRecord]) -> Stored:
        """Chunks of the checkpoint that a save continues: after a fallback the newest is damaged, that one was read.

        Args:
            parent: Id of the checkpoint that the save continues; None: the newest.
            commits: All of the run, oldest first.

        Raises:
            StorageError: The store failed.
        """
        newest = commits[-1] if commits else None
        start = next((c for c in commits if c.id == parent), newest)
        if start is not newest and start is not None:
            # An older coordinator may have dropped it before it was fenced, and its deletes still be on their way. It
            # can't have dropped what was the newest when it was fenced, and this one's own are this one's to drop.
            return self._stored_in(start) if start.epoch == self._run.log.epoch else {}
        if self._stored is None:
            self._stored = self._stored_in(newest)
        return self._stored

    def committed(self, manifest: Manifest) -> None:
        """Says that `manifest` is committed, and the newest."""
        self._stored = stored_chunks(manifest)

    def _stored_in(self, commit: CommitRecord | None) -> Stored:
        try:
            return self._intact(stored_chunks(self._run.manifest(commit))) if commit else {}
        except CorruptionError:
            return {}  # nothing to refer to: the save writes everything, and stands by itself

    def _intact(self, stored: Stored) -> Stored:
        """Leaves out chunks whose file is gone or cut short: a new checkpoint must not lean on those."""
        sizes = sizes_of(self._run.store, {file.name for file, _ in stored.values()})
        return {key: value for key, value in stored.items() if sizes.get(value[0].name) == value[0].bytes}
