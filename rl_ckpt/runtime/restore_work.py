"""Restore work: what the coordinator's restores ask of the store, in threads of its own."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from rl_ckpt.errors import CorruptionError
from rl_ckpt.format import records
from rl_ckpt.format.manifest import Manifest
from rl_ckpt.runtime.spec import RunSpec
from rl_ckpt.store.run import Run

_READS_AT_ONCE = 4

Loaded = tuple[Manifest, bytes, bool, dict[str, str]]
"""A candidate: its manifest, the same as bytes, whether workers can read the store's files themselves, and newer
checkpoints that are damaged (id to why)."""


class RestoreWork:
    """See the module. For one event loop."""

    def __init__(self, spec: RunSpec) -> None:
        """Nothing is opened yet."""
        self._spec = spec
        self._reading = ThreadPoolExecutor(_READS_AT_ONCE, "rl_ckpt-read")
        self._reader: Run | None = None

    def configure(self, spec: RunSpec, anew: bool) -> None:
        """Takes a driver's options; `anew` where everything is to be opened with them."""
        self._spec = spec
        if anew:
            self.forget()

    def forget(self) -> None:
        """What was opened is out of date: the run is another one by now."""
        self._reader = None

    async def load(self, step: int | None, tried: tuple[str, ...]) -> Loaded:
        """Reads the next candidate.

        Args:
            step: Which is asked for; None: the newest.
            tried: Ids of those that were damaged.

        Raises:
            CheckpointError: There is none, all are damaged, or the store failed.
        """
        return await asyncio.get_running_loop().run_in_executor(self._reading, partial(self._load, step, tried))

    def _load(self, step: int | None, tried: tuple[str, ...]) -> Loaded:
        if self._reader is None:
            self._reader = Run.open(self._spec.url, self._spec.storage_options)
        run = self._reader
        candidates, damaged = run.candidates(step)
        for commit in candidates:
            if commit.id in tried:
                continue
            try:
                manifest, data = run.manifest_file(commit)
            except CorruptionError as error:
                damaged[commit.id] = str(error)
                continue
            mappable = run.store.local_path(records.RUN_FILE) is not None
            return manifest, data, mappable, damaged
        bad = [*tried, *damaged]
        raise CorruptionError(f"no good checkpoint in {self._spec.url}: tried {bad}; {damaged or ''}")
