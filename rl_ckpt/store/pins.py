"""Pins: a reader's hold on one checkpoint, so that a sweep elsewhere does not delete it while it is being read.

Owns: pin records, and the thread that renews one for as long as its reader lives. Promises: a checkpoint that was there
after its pin was written stays until the pin is over. A pin is over when both its own clock and the store's say so, so
that no clock which jumps ends it alone.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from rl_ckpt.errors import CheckpointError, CheckpointNotFoundError, CorruptionError
from rl_ckpt.format import records
from rl_ckpt.format.records import PinRecord
from rl_ckpt.store.base import ObjectExistsError, ObjectMissingError, Store
from rl_ckpt.store.run import Run, who

FOREVER = 253402300799.0
"""Expiry of a pin that somebody else must delete: the end of the year 9999."""
_BEATS = 3  # in which a pin is renewed within its time
_RENEW_S = 60.0  # and at least so often
_JOIN_S = 5.0  # how long its end waits for a renewal that hangs in the store


@dataclass(frozen=True, slots=True)
class Pin:
    """A pin as it stands in the store."""

    name: str
    """Its file."""
    record: PinRecord


class Hold:
    """A reader's pin, renewed in the background until `close`."""

    def __init__(self, run: Run, checkpoint: str, seconds: float, by: str = "") -> None:
        """Writes the pin; see `pin`."""
        self._run = run
        self._seconds = seconds
        self._by = by or who()
        self._checkpoint = checkpoint
        self._lost = ""
        self.renewals = 0
        """How often the pin was written again so far."""
        self._stop = threading.Event()
        self.name = create(run, checkpoint, self._by, seconds)
        self._thread = threading.Thread(target=self._renew, name="rl_ckpt-pin", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Says whether the checkpoint was held all the time; asks the store nothing.

        Raises:
            CheckpointNotFoundError: The pin was over before it could be renewed, and the checkpoint is gone.
        """
        if self._lost:
            raise CheckpointNotFoundError(self._lost)

    def _renew(self) -> None:
        while not self._stop.wait(min(self._seconds / _BEATS, _RENEW_S)):
            with contextlib.suppress(CheckpointError):  # the store fails: again at the next beat
                self._beat()

    def _beat(self) -> None:
        store = self._run.store
        there = store.exists(self.name)
        store.put(self.name, [records.encode(_record(self._checkpoint, self._by, self._seconds))])
        self.renewals += 1
        if there or self._checkpoint in {commit.id for commit in self._run.log.read().commits}:
            return
        self._lost = (
            f"checkpoint {self._checkpoint} of {store.url} was dropped while it was being read: its pin could not be "
            f"renewed for {self._seconds:.0f} s; begin again, with another one"
        )

    def close(self) -> None:
        """Ends the renewing and deletes the pin."""
        self._stop.set()
        self._thread.join(_JOIN_S)
        self._run.store.delete([self.name])


@contextlib.contextmanager
def pin(run: Run, checkpoint: str, seconds: float) -> Iterator[Hold]:
    """Holds a checkpoint while the block runs, however long that is.

    Args:
        run: The run.
        checkpoint: Id of a committed checkpoint.
        seconds: When the hold ends if this process dies, counted from the last renewal.

    Raises:
        CheckpointNotFoundError: It was dropped meanwhile. One that was there after its pin stays: a sweep looks for
            pins again after it has deleted the record.
        StorageError: The store failed, or this reader may not write to it.
    """
    hold = Hold(run, checkpoint, seconds)
    try:
        yield hold
    finally:
        hold.close()


def create(run: Run, checkpoint: str, by: str, seconds: float | None = None) -> str:
    """Writes a pin that nobody renews.

    Args:
        run: The run.
        checkpoint: Id of a committed checkpoint.
        by: Who holds it, for messages.
        seconds: How long it holds; None: until somebody deletes it.

    Returns:
        The pin's file.

    Raises:
        CheckpointNotFoundError: The checkpoint was dropped meanwhile; nothing is left of the pin.
        StorageError: The store failed, or may not be written to.
    """
    name = records.pin_name(uuid.uuid4().hex)
    with contextlib.suppress(ObjectExistsError):  # nobody else has this name: the reply to the first try was lost
        run.store.create(name, records.encode(_record(checkpoint, by, seconds)))
    try:
        if checkpoint in {commit.id for commit in run.log.read().commits}:
            return name
    except BaseException:
        run.store.delete([name])
        raise
    run.store.delete([name])
    raise CheckpointNotFoundError(
        f"checkpoint {checkpoint} of {run.store.url} was dropped by the retention rules while it was being "
        "pinned; choose another"
    )


def _record(checkpoint: str, by: str, seconds: float | None) -> PinRecord:
    if seconds is None:
        return PinRecord(checkpoint=checkpoint, by=by, expires=FOREVER)
    return PinRecord(checkpoint=checkpoint, by=by, expires=time.time() + seconds, seconds=seconds)


def read_pins(store: Store, now: float, store_now: Callable[[], float | None]) -> tuple[list[Pin], list[str]]:
    """The pins that are on a store.

    Args:
        store: Of the run.
        now: Unix seconds by this process's clock.
        store_now: Unix seconds by the store's clock, or earlier; None: it is not known, only `now` decides. Asked where
            that makes a difference.

    Returns:
        Those that hold, and the files of those that are over or can't be read.
    """
    pins, over = list[Pin](), list[str]()
    for item in store.list(records.PINS):
        try:
            record = records.decode(item.name, store.get(item.name), PinRecord)
        except ObjectMissingError:
            continue
        except CorruptionError:  # a pin that can't be read names no checkpoint
            over.append(item.name)
            continue
        if record.expires > now or _lasts(record, item.modified, store_now):
            pins.append(Pin(item.name, record))
        else:
            over.append(item.name)
    return pins, over


def _lasts(record: PinRecord, modified: float, store_now: Callable[[], float | None]) -> bool:
    """Whether a pin holds by the store's clock."""
    if not record.seconds or not modified:
        return False
    now = store_now()
    return now is not None and now < modified + record.seconds


def holders(pins: list[Pin]) -> Mapping[str, str]:
    """Who holds checkpoints: id → for people."""
    found: dict[str, list[str]] = {}
    for item in pins:
        found.setdefault(item.record.checkpoint, []).append(item.record.by)
    return {checkpoint: ", ".join(sorted(by)) for checkpoint, by in found.items()}
