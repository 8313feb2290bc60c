"""Labels: tags, notes and requests to remove, which anybody may put on a checkpoint after it was committed.

Owns: label records, how they are written beside a sweep of another process, and how a commit record that such a sweep
deleted is put back. Promises: once `relabel` has returned, a checkpoint with tags is kept by every sweep, whenever that
began and wherever it is killed. Does not decide what goes (plan/retention.py), nor delete (store/sweep.py).

The order that the promise rests on: a label is written first, and then the commit log is read; a sweep deletes commit
records first, and then reads the labels. So either the writer finds the record gone, takes its words back and says so,
or the sweep finds the label and puts the record back before it deletes a file. Where the sweep is killed in between,
the next one puts it back; only for a label that its writer has confirmed, as of another's files deletes may be on their
way.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import msgspec

from rl_ckpt.errors import CheckpointNotFoundError, CorruptionError
from rl_ckpt.format import records
from rl_ckpt.format.records import CommitRecord, LabelRecord
from rl_ckpt.plan.retention import Said
from rl_ckpt.store.base import ObjectExistsError, ObjectMissingError, Store, StoredObject
from rl_ckpt.store.run import Run, who

_READERS = 16
_SETTLED_S = 3.0  # stores tell times in whole seconds: what was unchanged for longer has not changed in between either


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of a run as they were read."""

    by_checkpoint: Mapping[str, LabelRecord] = field(default_factory=dict)
    damaged: Mapping[str, str] = field(default_factory=dict)
    """Checkpoints whose labels can't be read: id → why. They may be tagged."""

    def tags(self, commit: CommitRecord) -> tuple[str, ...]:
        """All tags of a checkpoint: the one given at save first."""
        label = self.by_checkpoint.get(commit.id)
        given = () if commit.tag is None or (label is not None and label.untagged) else (commit.tag,)
        return given + tuple(tag for tag in (label.tags if label is not None else ()) if tag not in given)

    def said(self, commits: Sequence[CommitRecord]) -> Said:
        """As the retention rules take it."""
        tags = {commit.id: tags for commit in commits if (tags := self.tags(commit))}
        removals = {id_: label.by for id_, label in self.by_checkpoint.items() if label.remove}
        return Said(tags, removals, frozenset(self.damaged))

    def note(self, checkpoint: str) -> str:
        """The note on a checkpoint; mostly empty."""
        label = self.by_checkpoint.get(checkpoint)
        return label.note if label is not None else ""


class LabelReader:
    """Reads a run's labels, again and again: those that have not changed are not read twice."""

    def __init__(self, run: Run) -> None:
        """Nothing is read yet."""
        self._run = run
        self._known: dict[str, tuple[tuple[int, float], float, LabelRecord | str | None]] = {}
        # by file: size and time in the store, when these were first seen by this process's clock, and what it says if
        # that was read when they were settled

    def read(self) -> Labels:
        """All labels there are now.

        Raises:
            StorageError: The store failed.
        """
        now = time.monotonic()
        items = {item.name: item for item in self._run.store.list(records.LABELS)}
        before, self._known = self._known, {}
        new: list[StoredObject] = []
        for name, item in items.items():
            key = (item.size_bytes, item.modified)
            known = before.get(name)
            seen = known[1] if known is not None and known[0] == key else now
            self._known[name] = (key, seen, known[2] if known is not None and known[0] == key else None)
            if self._known[name][2] is None:
                new.append(item)
        found: dict[str, LabelRecord | str] = {n: said for n, (_, _, said) in self._known.items() if said is not None}
        with ThreadPoolExecutor(min(_READERS, len(new) or 1), "rl_ckpt-labels") as pool:
            get = self._run.store.getter()
            for item, said in zip(new, pool.map(lambda item: read_label(self._run, item.name, get), new), strict=True):
                if said is None:  # a sweep took it away meanwhile
                    continue
                found[item.name] = said
                key, seen, _ = self._known[item.name]
                if now - seen >= _SETTLED_S:
                    self._known[item.name] = (key, seen, said)
        ids = {name: name.removeprefix(records.LABELS).removesuffix(".json") for name in found}
        return Labels(
            {ids[name]: said for name, said in found.items() if isinstance(said, LabelRecord)},
            {ids[name]: said for name, said in found.items() if isinstance(said, str)},
        )


def read_label(run: Run, name: str, get: Callable[[str], bytes] | None = None) -> LabelRecord | str | None:
    """One label: as it stands, why it can't be read, or None where there is none."""
    store: Store = run.store
    try:
        label = records.decode(store.object_url(name), (get or store.get)(name), LabelRecord)
    except ObjectMissingError:
        return None
    except CorruptionError as error:
        return str(error)
    if name != records.label_name(label.checkpoint) or label.commit.id != label.checkpoint:
        return f"{name} is the label of another checkpoint, {label.checkpoint}"
    if label.commit.run != run.record.run:
        return f"{name} is of another run, {label.commit.run}"
    return label


def relabel(run: Run, commit: CommitRecord, change: Callable[[LabelRecord], LabelRecord]) -> LabelRecord:
    """Changes a checkpoint's label.

    Of two that change the same label in the same moment, the later one's words stand.

    Args:
        run: The run; who owns it does not matter.
        commit: The checkpoint, as it was listed.
        change: Makes the new label of the old one; where there is none, of one that says nothing.

    Returns:
        The label as it stands now.

    Raises:
        CheckpointNotFoundError: The checkpoint was dropped meanwhile; the label is as it was.
        StorageError: The store failed; whether the label was changed is unknown.
    """
    name = records.label_name(commit.id)
    before = read_label(run, name)
    blank = LabelRecord(checkpoint=commit.id, commit=commit)
    old = before if isinstance(before, LabelRecord) else blank
    label = change(msgspec.structs.replace(old, commit=commit, by=who(), time=time.time()))
    confirmed = old.confirmed and _keeps(old)  # then every sweep has kept it all the time
    run.store.put(name, [records.encode(msgspec.structs.replace(label, confirmed=confirmed))])
    # A crash here leaves a label that no sweep drops the checkpoint over, but of which nobody was told that it is so.
    if commit.id not in {there.id for there in run.log.read().commits}:
        if isinstance(before, LabelRecord) and before.confirmed:
            run.store.put(name, [records.encode(before)])
        else:
            run.store.delete([name])
        raise CheckpointNotFoundError(
            f"checkpoint {commit.id} of {run.store.url} was dropped by the retention rules while it was being "
            "labelled; choose another"
        )
    if confirmed or not _keeps(label):
        return label
    label = msgspec.structs.replace(label, confirmed=True)
    run.store.put(name, [records.encode(label)])
    return label


def _keeps(label: LabelRecord) -> bool:
    """Whether a label keeps its checkpoint from every sweep."""
    return not label.remove and bool(Labels({label.checkpoint: label}).tags(label.commit))


def put_back(run: Run, labels: Labels, checkpoints: Iterable[str]) -> list[CommitRecord]:
    """Creates commit records anew that were deleted while their checkpoints were being tagged.

    Only for the run's owner, and before it deletes any file.

    Args:
        run: The run.
        labels: Of which the records are copied.
        checkpoints: Ids, of checkpoints whose records are gone and whose files this process has not deleted.

    Returns:
        The records, as they are in the log again; those that nothing is left of, or that are tagged no more, are not
        among them.

    Raises:
        StorageError: The store failed.
    """
    found: list[CommitRecord] = []
    for checkpoint in checkpoints:
        label = labels.by_checkpoint.get(checkpoint)
        if label is None or not _keeps(label):
            continue
        try:
            run.manifest(label.commit)
        except CorruptionError:  # the files are gone: an older release swept it, or somebody by hand
            continue
        with contextlib.suppress(ObjectExistsError):  # by another who put it back, or by a reply that was lost
            run.store.create(records.commit_name(label.commit.number), records.encode(label.commit))
        found.append(label.commit)
    return found


def missing(labels: Labels, known: Collection[str], head: int) -> list[str]:
    """Checkpoints that must be in the log as their labels were confirmed, and are not.

    Args:
        labels: Of the run.
        known: Ids of the commits that there are.
        head: Number of the newest record that was known before the labels were read.
    """
    return [
        checkpoint
        for checkpoint, label in labels.by_checkpoint.items()
        if checkpoint not in known and label.confirmed and _keeps(label) and label.commit.number < head
    ]


def leftovers(labels: Labels, known: Collection[str], head: int) -> list[str]:
    """Files of labels whose checkpoints are gone for good, as far as the log was known up to `head`."""
    return [
        records.label_name(checkpoint)
        for checkpoint, label in labels.by_checkpoint.items()
        if checkpoint not in known and label.commit.number < head
    ]
