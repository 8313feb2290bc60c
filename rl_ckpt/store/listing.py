"""Listing: a run's checkpoints as callers see them, with their labels, and finding one by what people call it.

Owns: what a reference means. Promises: whatever the number of checkpoints, the store is asked for each record once, in
parallel, and for a label only where there is one. Writes nothing.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from rl_ckpt.errors import CheckpointNotFoundError, InvalidInputError
from rl_ckpt.format import records
from rl_ckpt.format.records import CommitRecord
from rl_ckpt.info import CheckpointInfo
from rl_ckpt.options import check_step
from rl_ckpt.state.leaves import is_utf8
from rl_ckpt.store.commit_log import Log
from rl_ckpt.store.committer import info_from
from rl_ckpt.store.labels import LabelReader, Labels
from rl_ckpt.store.run import Run

LATEST = "latest"
Ref = int | str
"""What people call a checkpoint: its step (the newest of it), its id, a tag (the newest that has it), or "latest"."""
_TAG_CHARS = 200


def read(url: str, storage_options: Mapping[str, Any]) -> tuple[Run, Log, Labels]:
    """A run, its log and its labels; warns of what can't be read.

    Raises:
        CheckpointError: As `Run.open`.
    """
    run = Run.open(url, storage_options)
    log, labels = run.log.read(), LabelReader(run).read()
    bad = [*log.damaged.values(), *labels.damaged.values()]
    if bad:
        warnings.warn(f"records that can't be read are left out: {'; '.join(bad)}", stacklevel=4)
    return run, log, labels


def listed(url: str, storage_options: Mapping[str, Any]) -> list[CheckpointInfo]:
    """All checkpoints of a run, oldest first; see `read`."""
    run, log, labels = read(url, storage_options)
    return infos(run, log.commits, labels)


def infos(run: Run, commits: Sequence[CommitRecord], labels: Labels) -> list[CheckpointInfo]:
    """Checkpoints as callers see them.

    Args:
        run: The run.
        commits: All of it, oldest first.
        labels: Its labels.
    """
    lines: dict[str, tuple[str, ...]] = {}  # by id: its ancestors; a parent is older, so its line is known
    parents = {commit.id: commit.parent for commit in commits}
    out = []
    for commit in commits:
        line = list[str]()
        parent = commit.parent
        while parent is not None and parent not in line and parent != commit.id:
            line.append(parent)
            if parent in lines:
                line += lines[parent]
                break
            parent = parents.get(parent)
        lines[commit.id] = tuple(line)
        url = run.store.object_url(records.manifest_name(commit.id))
        info = info_from(commit, url, lines[commit.id])
        out.append(dataclasses.replace(info, tags=labels.tags(commit), note=labels.note(commit.id)))
    return out


def find_ref(run: Run, log: Log, labels: Labels, ref: Ref) -> CommitRecord:
    """The checkpoint that a reference names.

    Raises:
        CheckpointNotFoundError: There is none; the message lists what there is.
        CorruptionError: No record can be read.
        InvalidInputError: It is no reference.
    """
    if isinstance(ref, str):
        if not ref:
            raise InvalidInputError("an empty string names no checkpoint: give a step, an id, a tag or 'latest'")
        newest = run.find(log, None)  # also says where there is none at all
        if ref == LATEST:
            return newest
        step = int(ref) if ref.isascii() and ref.isdecimal() else None
        found = [commit for commit in log.commits if ref == commit.id or commit.step == step]
        found = found or [commit for commit in log.commits if ref in labels.tags(commit)]
        if found:
            return found[-1]
        if step is None:
            tags = sorted({tag for commit in log.commits for tag in labels.tags(commit)})
            raise CheckpointNotFoundError(
                f"{run.store.url} has no checkpoint with id or tag {ref!r}; its tags are {tags[-20:]}, and its newest "
                f"checkpoint is {newest.id}"
            )
        ref = step
    return run.find(log, check_step(ref))


def check_tag(name: object) -> str:
    """A tag that can be found again.

    Raises:
        InvalidInputError: It is none, or would be taken for a step, an id or "latest".
    """
    if not isinstance(name, str) or not name.strip() or not is_utf8(name) or not name.isprintable():
        raise InvalidInputError(f"tag {name!r} must be a string of printable text, and not empty")
    if name != name.strip() or len(name) > _TAG_CHARS:
        raise InvalidInputError(f"tag {name!r} must have no space around it, and at most {_TAG_CHARS} characters")
    if name == LATEST or name.isdecimal() or records.is_id(name):
        raise InvalidInputError(f"tag {name!r} would be taken for a step, an id or the newest checkpoint; use a word")
    return name
