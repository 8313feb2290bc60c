"""Saves of plain state without Ray: staged in this process, written and committed by a background thread.

Same plan, format, commit and fencing as a save through Ray actors. Memory is bounded at two generations: the one being
written and the one being staged.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from rl_ckpt.errors import CheckpointError, SaveSkippedError
from rl_ckpt.format.shard_file import PAGE_BYTES
from rl_ckpt.info import CheckpointInfo
from rl_ckpt.options import Options
from rl_ckpt.plan.deal import SavePlan, deal, settle
from rl_ckpt.plan.inventory import take_inventory
from rl_ckpt.plan.merge import merge
from rl_ckpt.plan.retention import KeepRule
from rl_ckpt.plan.stage import stage
from rl_ckpt.plan.standing import Standing, fixed_and_plains, standing
from rl_ckpt.state.tree import FlatTree, Node
from rl_ckpt.store.committer import Committer, SaveRequest, WrittenSave, info_of
from rl_ckpt.store.counting import Counted, tell_newest
from rl_ckpt.store.pending import PendingSave
from rl_ckpt.store.run import Run
from rl_ckpt.store.shard_writer import write_files

_SERVER = "local"
_GENERATIONS = 2


@dataclass(frozen=True, slots=True)
class _Staged:
    checkpoint: str
    request: SaveRequest
    plan: SavePlan
    buffer: np.ndarray[Any, np.dtype[np.uint8]]
    """The generation of staging memory, of which `memory` is the part in use."""
    memory: memoryview
    digests: dict[tuple[str, int], bytes]
    begun: float
    stall_s: float
    counted: Counted


class PlainSaver:
    """Saves from one process. `save` may be called from any thread."""

    def __init__(self, run: Run, keep: Sequence[KeepRule], options: Options) -> None:
        """Takes the run over for this process.

        Raises:
            RunOwnedError: Another job that is alive owns the run, and the options do not say to take it over.
            StorageError, CommitUnknownError: The store failed.
        """
        self._run = run
        self._options = options
        self._committer = Committer(run, keep, options.grace_s, take_over=options.take_over)
        for record in self._committer.commits[-1:]:  # for the alert, should no save succeed from here on
            tell_newest(run.store.url, record)
        self._buffers: queue.Queue[np.ndarray[Any, np.dtype[np.uint8]]] = queue.Queue()
        for _ in range(_GENERATIONS):
            self._buffers.put(np.empty(0, np.uint8))
        self._writer = ThreadPoolExecutor(1, "rl_ckpt-save")  # one: commits keep the order of the saves
        self.sweep_failure: str | None = None
        self._last: tuple[dict[str, Node], Standing] | None = None  # nodes of the last save, and its plan
        self._planning = threading.Lock()

    @staticmethod
    def open(url: str, storage_options: Mapping[str, Any], keep: Sequence[KeepRule], options: Options) -> PlainSaver:
        """Opens the run for a save, and makes it where there is none; where that fails, it is a save that failed.

        Raises:
            CheckpointError: As `Run.create`, and as the constructor.
        """
        try:
            return PlainSaver(Run.create(url, storage_options, options.weak_commits), keep, options)
        except BaseException as error:
            Counted(url).failed(error, "")
            raise

    def save(self, request: SaveRequest, flat: FlatTree, begun: float) -> PendingSave:
        """Stages a state; back as soon as the caller may change it.

        Args:
            request: Step, metrics, tag, and what it continues.
            flat: The state, taken apart.
            begun: When the caller's call began, by `time.monotonic`.

        Returns:
            The save under way.

        Raises:
            InvalidInputError: The step is committed already; nothing was written.
            SaveSkippedError: Two saves are still being written, and the options say to skip.
        """
        counted = Counted(self._run.store.url)
        try:
            buffer = self._buffer()
        except BaseException as error:
            counted.failed(error, "")
            raise
        checkpoint = ""
        try:
            plan = self._plan(flat)
            checkpoint = self._committer.attempt(request)
            size = plan.staged_bytes.get(_SERVER, 0)
            if len(buffer) < size:
                buffer = _pages(size)
            memory = buffer[:size].data.cast("B") if size else memoryview(bytearray())
            found = stage(flat, plan.stage[0], memory)
            digests = {(_SERVER, item.offset): d for item, d in zip(plan.stage[0], found, strict=True)}
        except BaseException as error:
            counted.failed(error, checkpoint)
            self._give_back(checkpoint, buffer)
            raise
        staged = _Staged(checkpoint, request, plan, buffer, memory, digests, begun, time.monotonic() - begun, counted)
        job = self._writer.submit(self._write, staged)
        self._writer.submit(self._tidy)
        return PendingSave(request.step, checkpoint, job)

    def _plan(self, flat: FlatTree) -> SavePlan:
        """The plan of the last save, where the state has the same shape; else a new one."""
        options = self._options
        fixed, plains = fixed_and_plains(flat.nodes)
        with self._planning:
            if self._last is not None and self._last[0] == fixed:
                return self._last[1].renewed([plains])
            self._last = None
            inventories = [take_inventory(flat, options.chunk_bytes, 1)]
            merged = merge(inventories, options.chunk_bytes)
            plan = deal(merged, [_SERVER], options.write_streams, options.file_bytes)
            stands = standing("", inventories, [_SERVER], plan, options.chunk_bytes)
            self._last = (fixed, stands) if stands is not None else None
        return plan

    def _buffer(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        try:
            return self._buffers.get(block=self._options.when_busy == "wait")
        except queue.Empty as error:
            raise SaveSkippedError(
                f"skipped: {_GENERATIONS} saves are still being written to {self._run.store.url}; save less often, or "
                "use when_busy='wait'"
            ) from error

    def _write(self, staged: _Staged) -> CheckpointInfo:
        committer, streams = self._committer, self._options.write_streams
        try:
            plan = settle(staged.plan, staged.checkpoint, staged.digests, committer.stored(staged.checkpoint))
            files = plan.files.get(_SERVER, [])
            written = write_files(self._run.store, files, staged.memory, streams) if files else []
            save = WrittenSave(staged.checkpoint, staged.request, plan, {_SERVER: written}, staged.digests)
            record = committer.commit(save)
            durable_s = time.monotonic() - staged.begun
            sizes = staged.plan.new_bytes, plan.new_bytes
            staged.counted.committed(record, *sizes, staged.stall_s, durable_s)
            return info_of(self._run, record, committer.commits, stall_s=staged.stall_s, durable_s=durable_s)
        except BaseException as error:
            staged.counted.failed(error, staged.checkpoint)
            raise
        finally:  # before the result is known: who waited for it finds the memory free
            self._give_back(staged.checkpoint, staged.buffer)

    def _give_back(self, checkpoint: str, buffer: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Frees a generation, and gives an attempt up unless it was committed."""
        self._committer.abandon(checkpoint)
        self._buffers.put(buffer)

    def _tidy(self) -> None:
        try:
            self._committer.tidy()
            self.sweep_failure = None
        except CheckpointError as error:  # the checkpoint is committed; the next call of the user is told
            self.sweep_failure = str(error)

    def close(self) -> None:
        """Waits until everything staged is committed or has failed, and lets the run go."""
        self._writer.shutdown(wait=True)
        self._committer.close()


def _pages(size_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """New memory that starts at a page, as in the shard files that are written from it."""
    room = np.empty(size_bytes + PAGE_BYTES, np.uint8)
    skip = -room.ctypes.data % PAGE_BYTES
    return room[skip : skip + size_bytes]
