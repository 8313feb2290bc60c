"""Candidates: which checkpoints a restore tries, in which order; some are in the store, some in memory, some in both.

Pure. What is in the log counts for more than what memory says: a checkpoint of which memory has another record than the
log is not the one that was committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rl_ckpt.format.records import CommitRecord
from rl_ckpt.plan.parts import Remembered


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checkpoint that may be restored."""

    id: str
    step: int
    record: CommitRecord | None
    """None: it is only in memory."""
    memory: Remembered | None
    """What the memory tier has of it; None: nothing."""


def candidates(
    commits: Sequence[CommitRecord] | None, remembered: Sequence[Remembered], step: int | None = None
) -> list[Candidate]:
    """Checkpoints to try.

    Args:
        commits: Of the log, oldest first; None: the store can't be read.
        remembered: What memory has, newest first.
        step: Which is asked for; None: all.

    Returns:
        Best first. What is only in memory stands after the commit that was the newest when it was complete, and so
        before any that somebody made since. Of a step that was asked for, only the newest. Without a log, only what
        memory has whole.
    """
    if commits is None:
        out = [Candidate(m.id, m.step, m.record, m) for m in remembered if m.whole]
    else:
        by_id = {m.id: m for m in remembered}
        committed = {commit.id for commit in commits}
        alone = [m for m in remembered if m.record is None and m.id not in committed]
        out = []
        for commit in reversed(commits):
            out += [Candidate(m.id, m.step, None, m) for m in alone if m.after >= commit.number]
            alone = [m for m in alone if m.after < commit.number]
            out.append(Candidate(commit.id, commit.step, commit, _same(by_id.get(commit.id), commit)))
        out += [Candidate(m.id, m.step, None, m) for m in alone]
    return out if step is None else [one for one in out if one.step == step][:1]


def _same(memory: Remembered | None, commit: CommitRecord) -> Remembered | None:
    """What memory has, if that is what was committed; it may not have heard of the commit yet."""
    if memory is None or memory.record is None or memory.record.write_id == commit.write_id:
        return memory
    return None
