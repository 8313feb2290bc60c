"""Save work: what the coordinator's saves ask of the store, in threads of its own.

Owns: the committer, which is for one thread, and when it is opened: at the first save, so that jobs that only restore
take nothing over. Naming a save waits for no earlier one's commit or sweep; nor does one that stays in memory, which
ends well while the store hangs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import msgspec

from rl_ckpt.errors import CheckpointError, CheckpointNotFoundError, FencedError, StorageError
from rl_ckpt.format import records
from rl_ckpt.format.manifest import Manifest
from rl_ckpt.format.records import CommitRecord
from rl_ckpt.plan.deal import Stored
from rl_ckpt.plan.parts import Remembered
from rl_ckpt.runtime.messages import Failure, SaveDone, SaveOutcome
from rl_ckpt.runtime.save_steps import Save
from rl_ckpt.runtime.spec import RunSpec
from rl_ckpt.store.committer import Committer, SaveRequest
from rl_ckpt.store.run import Run, lineage

T = TypeVar("T")


class SaveWork:
    """See the module. For one event loop."""

    def __init__(self, spec: RunSpec, service: str, gone: Callable[[], None]) -> None:
        """Nothing is opened yet.

        Args:
            spec: Of the run.
            service: Id of the coordinator, the same when it comes back in another process.
            gone: Is told where the run was removed, and a new one comes in its place.
        """
        self._spec = spec
        self._service = service
        self._job = ""
        self._take_over = False
        self._gone = gone
        self._committing = ThreadPoolExecutor(1, "rl_ckpt-commit")
        self._naming = ThreadPoolExecutor(1, "rl_ckpt-name")
        self._landing = ThreadPoolExecutor(1, "rl_ckpt-land")
        self._committer: Committer | None = None
        self._notice = ""
        self._landed: dict[str, tuple[Remembered, str | None]] = {}  # with the parent: what is in memory alone

    def configure(self, spec: RunSpec, anew: bool) -> None:
        """Takes a driver's rules and options; `anew` where everything is to be opened with them."""
        self._spec = spec
        if anew:
            self._let_go()
        if self._committer is not None:
            self._committer.configure(spec.keep, spec.options.grace_s)

    def begin(self, job: str, take_over: bool, idle: bool) -> None:
        """A Checkpointer is about to save for the first time.

        Args:
            job: For messages to others.
            take_over: Takes the run over from a writer outside of this cluster too.
            idle: Whether no save is under way.
        """
        self._job = job
        if self._committer is not None and (self._committer.fenced() or (take_over and idle)):
            self._let_go()  # whether this one may have the run is asked again
        if self._committer is None:  # else it has the run, and what was asked for must not count at some later time
            self._take_over = self._take_over or take_over

    def is_open(self) -> bool:
        """Whether the run is open for writing: others are kept from it."""
        return self._committer is not None

    def _let_go(self) -> None:
        committer, self._committer = self._committer, None
        if committer is not None:
            self._committing.submit(committer.close)

    async def close(self) -> None:
        """Lets the run go; the next save opens it again."""
        self._let_go()
        await self.drain()

    async def open(self) -> Committer:
        """Opens the run for writing, unless it is open.

        Raises:
            RunOwnedError: Another job that is alive owns the run.
            CheckpointError: The store failed.
        """
        return await self._in_thread(self._committing, self._opened)

    def _opened(self) -> Committer:
        if self._committer is not None and self._committer.is_gone():
            self._let_go()  # its folder was removed: this is a new run
            self._landed = {}
            self._gone()
        if self._committer is None:
            spec = self._spec
            run = Run.create(spec.url, spec.storage_options, spec.options.weak_commits)
            self._committer = Committer(
                run,
                spec.keep,
                spec.options.grace_s,
                take_over=self._take_over,
                job=self._job,
                service=self._service,
            )
            self._take_over = False  # asked for once: a coordinator that is fenced later stays so
            for landed, parent in self._landed.values():
                if landed.run == run.record.run:  # else that run was removed, and this is another one
                    self._committer.take_landed(landed.id, landed.step, parent)
        return self._committer

    async def name(self, request: SaveRequest) -> str:
        """Checks a request and names its checkpoint.

        Raises:
            CheckpointError: As `Committer.attempt`, or the store failed.
        """
        committer = self._committer
        if committer is None or await self._in_thread(self._naming, committer.is_gone):
            committer = await self.open()
        return await self._in_thread(self._naming, partial(committer.attempt, request))

    async def look_up(self, checkpoint: str) -> Stored:
        """What an attempt need not write; see `Committer.stored`."""
        return await self._in_thread(self._committing, lambda: self._open_committer().stored(checkpoint))

    async def commit(self, save: Save) -> tuple[SaveDone, bytes]:
        """Makes a checkpoint of what was written.

        Returns:
            What came of it, and the manifest as it was encoded.

        Raises:
            CheckpointError: As `Committer.commit`.
        """
        return await self._in_thread(self._committing, partial(self._commit, save))

    def _commit(self, save: Save) -> tuple[SaveDone, bytes]:
        committer = self._committer_of(save)
        _check_visible(committer.run, save)
        record = committer.commit(save.done())
        url = committer.run.store.object_url(records.manifest_name(record.id))
        return self._done(committer, record, url, save), committer.last_manifest

    async def land(self, save: Save) -> tuple[SaveDone, bytes]:
        """Makes a checkpoint of what stays in memory; it is in the line of those in the store.

        Returns:
            As `commit`.
        """
        return await self._in_thread(self._landing, partial(self._land, save))

    def _land(self, save: Save) -> tuple[SaveDone, bytes]:
        committer = self._committer_of(save)
        record, manifest = committer.land(save.done())
        return self._done(committer, record, "", save), manifest

    def _committer_of(self, save: Save) -> Committer:
        """The committer, if it is the one that named a save.

        Raises:
            FencedError: It is another: the run was opened anew since. Others may have committed between.
        """
        committer = self._committer
        if committer is None or not committer.is_open(save.checkpoint):
            raise FencedError(
                f"{self._spec.url} was opened for writing anew while step {save.request.step} was saved, as another "
                "writer had taken it over or it was removed; that save is not committed: save again"
            )
        return committer

    def _done(self, committer: Committer, record: CommitRecord, url: str, save: Save) -> SaveDone:
        notice, self._notice = self._notice, ""
        return SaveDone(record, url, lineage(record, committer.commits), save.stall_s, notice, in_store=bool(url))

    async def attempt_landed(self, landed: Remembered, manifest: Manifest) -> bool:
        """Opens the run to store what is in memory alone; whether it may be stored, see `Committer.attempt_landed`.

        Raises:
            RunOwnedError, FencedError: The run is another job's by now.
            CheckpointError: The store failed.
        """
        return await self._in_thread(self._committing, partial(self._attempt_landed, landed, manifest))

    def _attempt_landed(self, landed: Remembered, manifest: Manifest) -> bool:
        if self._committer is None:  # looked at first: nothing is claimed, or made anew, for what is out of date
            try:
                run = Run.open(self._spec.url, self._spec.storage_options)
            except CheckpointNotFoundError:
                return False  # it was removed, and is not to come back by this
            newest = run.log.read().commits[-1:]
            if run.record.run != manifest.run or any(commit.number > landed.after for commit in newest):
                return False
        elif self._committer.is_gone():
            return False
        committer = self._opened()
        committer.run.log.check_owner()
        return committer.attempt_landed(manifest, landed.after)

    def take_landed(self, found: Iterable[Remembered]) -> None:
        """Learns which checkpoints only memory has, the newest first: whoever opens the run anew is told of them."""
        alone = [one for one in found if one.record is None][::-1]  # the oldest first, as they landed
        self._landed = {one.id: self._landed.get(one.id) or _landed(one) for one in alone}

    def finish(self, outcome: SaveOutcome, checkpoint: str) -> None:
        """A save is decided: a failed one's files are orphans from now on; then retention and sweep, later."""
        if self._committer is not None:
            if isinstance(outcome, Failure):
                self._committer.abandon(checkpoint)
            elif not outcome.in_store:
                return  # nothing was stored: nothing is to be swept
            self._committing.submit(self._tidy)

    def _tidy(self) -> None:
        committer = self._committer
        if committer is None:  # let go meanwhile: whoever opens the run next looks for what is left
            return
        try:
            committer.tidy()
        except CheckpointError as error:  # the checkpoint is committed all the same; the next save's caller is told
            self._notice = f"old checkpoints could not be swept: {error}"

    async def drain(self) -> None:
        """Waits until the last commit's sweep is done."""
        await self._in_thread(self._committing, lambda: None)

    def _open_committer(self) -> Committer:
        assert self._committer is not None
        return self._committer

    def _in_thread(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(pool, work)


def _landed(one: Remembered) -> tuple[Remembered, str | None]:
    return one, msgspec.json.decode(one.manifest, type=Manifest).parent


def _check_visible(run: Run, save: Save) -> None:
    """On a local disk, files must be there for the coordinator too: nodes with disks of their own make no run."""
    assert save.plan is not None
    for server, files in save.plan.files.items():
        for file in files:
            if run.store.local_path(file.name) is not None and not run.store.exists(file.name):
                raise StorageError(
                    f"{run.store.object_url(file.name)}, which {server} wrote, is not there on the coordinator's "
                    "node: the nodes don't share this folder. Give a shared file system or an object store "
                    "(s3://...) as url"
                )
