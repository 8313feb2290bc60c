"""Compaction in passing: which chunks a save writes again although a file holds them, so that the file can go.

A shard file is deleted whole, once no checkpoint names anything in it. As states change, files come to hold ever less
that is still wanted, and what a single wanted chunk keeps alive is lost space. A save has all its chunks at hand, so it
may write those that lie in a poor file again, instead of naming that file; the file goes with the older checkpoints.

Owns that choice, and the sizes of files that incremental saves write. Pure. Promises: a file that a lasting checkpoint
names is never evacuated, as it would stay all the same; nothing is written again while less than a sixth of what stays
is lost space.

Source: the cleaning of segments in log-structured file systems (Rosenblum and Ousterhout, 1992), where a segment goes
by the share of it that is live; here what would be read to clean it is in memory already.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from rl_ckpt.format.records import CommitRecord
from rl_ckpt.plan.retention import KeepRule, LatestN, NewerThan, Said, Tagged, TimedRule

Array = np.ndarray[Any, np.dtype[Any]]

AIM = 1.2
"""Stored bytes to wanted bytes: past this, a save writes chunks of the poorest files again."""
POOR = 0.9
"""No file of which more than this share is wanted is evacuated."""
FILES_A_SAVE = 32
"""About so many files take what an incremental save writes: what changes alone must be able to go alone."""
LEAST_FILE_BYTES = 64 << 10
"""Smaller files are not made for the sake of compaction."""


@dataclass(frozen=True, slots=True)
class Files:
    """What is known of the files that a save may name; arrays are by number of the file."""

    content: Array
    """int64: bytes of values that it holds, wanted or not."""
    used: Array
    """int64: bytes of them that the state of this save has."""
    held: Array
    """bool: whether a checkpoint that lasts names it."""


def evacuate(files: Files, state_bytes: int, others_bytes: int, lasts: bool) -> Array:
    """Which files a save does not name, but writes their chunks again.

    What counts is what will be stored when all checkpoints that do not last are gone, but this one: those take files
    with them whatever is decided now, and a file that was evacuated counts no more, though it may be there for a while.
    Of a checkpoint that lasts only what it adds to that counts: what it names now can't be evacuated later.

    Args:
        files: See there.
        state_bytes: Bytes of the state's chunks, each once.
        others_bytes: Bytes of chunks that lasting checkpoints hold and the state does not.
        lasts: Whether the checkpoint that is saved lasts.

    Returns:
        bool by number of the file.
    """
    out = np.zeros(len(files.content), bool)
    free = (files.used > 0) & ~files.held
    share = files.used / np.maximum(files.content, 1)
    new_bytes = state_bytes - int(files.used.sum())
    stored = int(files.content[free].sum()) + new_bytes
    wanted = int(files.used[free].sum()) + new_bytes  # which does not change: it is named there, or written again
    if not lasts:
        stored += int(files.content[files.held].sum())
        wanted += int(files.used[files.held].sum()) + others_bytes
    for number in np.argsort(share, kind="stable"):
        if stored <= AIM * wanted or share[number] >= POOR:
            break
        if free[number]:
            out[number] = True
            stored += int(files.used[number]) - int(files.content[number])
    return out


def lasting(
    commits: Sequence[CommitRecord], rules: Sequence[KeepRule], now: float, said: Said | None = None
) -> set[str]:
    """Ids of checkpoints that do not go by themselves as others come: what tags keep, and most rules.

    Those rules are all but `LatestN` and `NewerThan`; they are asked as if one more checkpoint had come already, which
    takes the place of the newest of its period.

    Args:
        commits: All of the run, oldest first, with the one that is being saved.
        rules: Retention rules; none at all keep everything.
        now: Unix seconds.
        said: Tags and requests to remove; None: the tags given at save alone.
    """
    if not rules or not commits:
        return {commit.id for commit in commits}
    said = said or Said()
    kept = {commit.id for commit in commits if commit.tag is not None or said.tags.get(commit.id)}
    last = commits[-1]
    coming = [*commits, msgspec.structs.replace(last, id="", step=last.step + 1, metrics={}, tag=None)]
    for rule in rules:
        if not isinstance(rule, LatestN | NewerThan | Tagged):
            kept |= rule.keep_at(coming, now) if isinstance(rule, TimedRule) else rule.keep(coming)
    return kept - {"", *said.removals}


def file_target(written_bytes: int, whole: bool) -> int | float:
    """Size at which a file that a save writes is full, in bytes.

    What is written beside chunks that stay where they are may change alone the next time, and can go alone then. A save
    that writes everything has the files that were planned for it, which are as large as is fast.

    Args:
        written_bytes: All that the save writes.
        whole: Whether that is the whole state.
    """
    return math.inf if whole else max(-(-written_bytes // FILES_A_SAVE), LEAST_FILE_BYTES)
