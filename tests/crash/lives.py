"""What a process does with a run from start to end, what it was told meanwhile, and what must be true after it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from rl_ckpt import Checkpointer, LatestN
from rl_ckpt.errors import CheckpointError, CommitConflictError, FencedError, InvalidInputError
from rl_ckpt.format import records
from rl_ckpt.format.records import EpochRecord, LogRecord
from rl_ckpt.plan.deal import deal, settle
from rl_ckpt.plan.inventory import take_inventory
from rl_ckpt.plan.merge import merge
from rl_ckpt.plan.stage import stage
from rl_ckpt.state.tree import flatten
from rl_ckpt.store import sweep as sweep_module
from rl_ckpt.store.base import Store
from rl_ckpt.store.committer import Committer, SaveRequest, WrittenSave
from rl_ckpt.store.run import Run
from rl_ckpt.store.shard_writer import write_files
from rl_ckpt.store.sweep import Sweeper
from tests.crash.recording import process
from tests.crash.worlds import World
from tests.unit.trees import assert_same

KEEP = 2
RULES: dict[str, Any] = {"keep": [LatestN(KEEP)], "grace_s": 0, "chunk_bytes": 1 << 12, "write_streams": 1}
FILE_BYTES = 1 << 12
FROZEN = np.random.default_rng(99).random(100)


@dataclass
class Told:
    """What the callers of saves were told, in that order, over all processes of one run."""

    committed: list[int] = field(default_factory=list)
    in_doubt: set[int] = field(default_factory=set)
    """The save failed, or its process died, and it may be there or not."""
    refused: set[int] = field(default_factory=set)
    """The save failed for good."""
    like: dict[int, int] = field(default_factory=dict)
    """Step → the step whose branch it continues, part of whose state it has."""
    fenced: bool = False

    def state(self, step: int) -> dict[str, Any]:
        """The state of a step. Parts are shared with others, so that checkpoints name files of older ones."""
        mine, branch = (np.random.default_rng(seed).random(500) for seed in (step, 1000 + self.like.get(step, step)))
        return {"w": mine, "branch": branch, "frozen": FROZEN, "step": step}

    def during(self, step: int, save: Callable[[], object]) -> None:
        """Runs a save and notes what it told."""
        self.in_doubt.add(step)
        try:
            save()
        except (FencedError, CommitConflictError, InvalidInputError) as error:
            self.fenced |= isinstance(error, FencedError)
            self.in_doubt.discard(step)
            self.refused.add(step)
        except CheckpointError:
            pass
        else:
            self.in_doubt.discard(step)
            self.committed.append(step)


Life = Callable[[str, Told], None]


def _checkpointer(url: str) -> Checkpointer:
    ckpt = Checkpointer(url, **RULES)
    ckpt._options = replace(ckpt._options, file_bytes=FILE_BYTES)
    return ckpt


def _save(ckpt: Checkpointer, step: int, told: Told) -> None:
    told.during(step, lambda: ckpt.save_state(step, told.state(step)).result(60))
    if ckpt._saver is not None:
        ckpt._saver._writer.submit(int).result(60)  # the sweep behind the save is done, well or badly


def _end(ckpt: Checkpointer) -> None:
    with suppress(CheckpointError):  # of a save that was told already
        ckpt.close()


def first(url: str, told: Told) -> None:
    """Opens a run that is not there yet, and saves twice."""
    ckpt = _checkpointer(url)
    for step in (1, 2):
        _save(ckpt, step, told)
    _end(ckpt)


def job(url: str, told: Told) -> None:
    """Takes a run over, saves three times with retention, and reads an old checkpoint under a pin."""
    ckpt = _checkpointer(url)
    _save(ckpt, 3, told)
    try:
        with ckpt.pin(2):
            _save(ckpt, 4, told)
            assert_same(ckpt.load_state(2), told.state(2))
            ckpt._branch.restored(None)  # it was only looked at: the job goes on from where it is
    except CheckpointError:
        pass  # the store failed this reader
    _save(ckpt, 5, told)
    _end(ckpt)


def coordinator(url: str, told: Told) -> None:
    """What the coordinator does: two saves in flight and one that is given up, then one from an older checkpoint."""
    try:
        committer = Committer(Run.create(url), RULES["keep"], 0.0)
    except CheckpointError:
        return
    begun: list[tuple[int, str]] = []
    saves: dict[int, WrittenSave] = {}
    for step in (3, 4, 5):
        with suppress(CheckpointError):  # told to the caller
            begun.append((step, committer.attempt(SaveRequest(step))))
    for step, checkpoint in begun:
        try:
            saves[step] = _write(committer, SaveRequest(step), checkpoint, told)
        except CheckpointError:
            committer.abandon(checkpoint)
            _tidy(committer)
    if saves.pop(5, None):
        committer.abandon(begun[-1][1])  # a worker died, or its deadline passed
    _tidy(committer)
    for step, checkpoint in begun:
        if step in saves:
            told.during(step, lambda step=step: committer.commit(saves[step]))  # type: ignore[misc]
        committer.abandon(checkpoint)
        _tidy(committer)
    if committer.commits:
        _branch(committer, 6, told)
    _tidy(committer)


def _branch(committer: Committer, step: int, told: Told) -> None:
    """A save that continues the oldest checkpoint, as after a restore of that one."""
    old = committer.commits[0]
    told.like[step] = told.like.get(old.step, old.step)
    request = SaveRequest(step, parent=old.id)
    try:
        checkpoint = committer.attempt(request)
        save = _write(committer, request, checkpoint, told)
    except CheckpointError:
        return
    told.during(step, lambda: committer.commit(save))
    committer.abandon(checkpoint)


def _write(committer: Committer, request: SaveRequest, checkpoint: str, told: Told) -> WrittenSave:
    flat = flatten(told.state(request.step))
    plan = deal(merge([take_inventory(flat, 1 << 12, 1)], 1 << 12), ["s"], 1, FILE_BYTES)
    memory = memoryview(bytearray(plan.staged_bytes["s"]))
    found = stage(flat, plan.stage[0], memory)
    digests = {("s", item.offset): digest for item, digest in zip(plan.stage[0], found, strict=True)}
    plan = settle(plan, checkpoint, digests, committer.stored(checkpoint))
    files = plan.files.get("s", [])
    written = write_files(committer.run.store, files, memory, 1) if files else []
    return WrittenSave(checkpoint, request, plan, {"s": written}, digests)


def _tidy(committer: Committer) -> None:
    with suppress(CheckpointError):  # told to the next caller; what is left goes at the next sweep
        committer.tidy()


def newer(url: str, told: Told) -> None:
    """A newer coordinator: takes the run over, goes back to the oldest checkpoint, saves and sweeps twice."""
    ckpt = _checkpointer(url)
    infos = ckpt.checkpoints()
    if infos:
        old = infos[0].step
        told.like |= {step: told.like.get(old, old) for step in (13, 14)}
        assert_same(ckpt.load_state(old), told.state(old))
    for step in (13, 14):
        _save(ckpt, step, told)
    _end(ckpt)


def verify(world: World, url: str, told: Told, ghosts: bool = False) -> list[int]:
    """Everything that is committed is bit-identical, and nothing of what was told has gone; the steps there are.

    Args:
        world: Where.
        url: The run.
        told: What callers were told.
        ghosts: Whether records of checkpoints that retention dropped may have come back (and name nothing any more).
    """
    with process(world.other(url)):
        ckpt = Checkpointer(url)
        steps = [info.step for info in ckpt.checkpoints()]
        if not steps:
            assert not told.committed, f"all of {told.committed} are lost"
            return steps
        assert_same(ckpt.load_state(), told.state(steps[-1]))
        for step in steps if not ghosts else steps[-1:]:
            assert_same(ckpt.load_state(step), told.state(step))
    assert not told.refused & set(steps), f"{told.refused} were refused, {steps} are there"
    landed = told.in_doubt & set(steps)
    assert steps[-1] in {*told.committed[-1:], *landed}, (steps, told)  # no step backwards
    if told.committed:
        kept = told.committed[-KEEP:] if not landed else told.committed[-1:]
        assert set(kept) <= set(steps), (steps, told)
    return steps


def recover(world: World, url: str, told: Told) -> None:
    """The next process saves; after its sweep there is nothing that no checkpoint names."""
    world.age(url)
    later = SimpleNamespace(time=lambda: time.time() + 7200, monotonic=time.monotonic)  # pins of the dead have expired
    too = mock.patch.object(Sweeper, "store_now", return_value=later.time())
    with mock.patch.object(sweep_module, "time", later), too, process(world.other(url)):
        ckpt = _checkpointer(url)
        _save(ckpt, 21, told)
        _end(ckpt)
    assert told.committed[-1] == 21
    steps = verify(world, url, told)
    assert len(steps) <= KEEP, steps
    left, known = world.everything(url), named(world.other(url))
    assert left == known, (left - known, known - left)


def named(store: Store) -> set[str]:
    """What may be in a run: run.json, the log, and what live manifests name."""
    run = Run(store, records.decode_run(store.url, store.get(records.RUN_FILE)))
    names = {records.RUN_FILE}
    for commit in run.log.read().commits:
        names |= {records.commit_name(commit.number), records.manifest_name(commit.id)}
        names |= {file.name for file in run.manifest(commit).files}
    for item in store.list(records.COMMITS):
        record: LogRecord = records.decode(item.name, store.get(item.name), LogRecord)  # type: ignore[arg-type]
        names |= {item.name} if isinstance(record, EpochRecord) else set()
    return names
