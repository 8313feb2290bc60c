"""Pins: a reader's hold on one checkpoint, so that a sweep elsewhere does not delete it while it is being read."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator

from rl_ckpt.format import records
from rl_ckpt.format.records import PinRecord
from rl_ckpt.store.run import Run, who


@contextlib.contextmanager
def pin(run: Run, checkpoint: str, seconds: float) -> Iterator[None]:
    """Holds a checkpoint while the block runs.

    Args:
        run: The run.
        checkpoint: Id of a committed checkpoint.
        seconds: When the hold ends if this process dies, counted from now.

    Raises:
        StorageError: The store failed, or this reader may not write to it.
    """
    name = records.pin_name(uuid.uuid4().hex)
    record = PinRecord(checkpoint=checkpoint, by=who(), expires=time.time() + seconds)
    run.store.create(name, records.encode(record))
    try:
        yield
    finally:
        run.store.delete([name])
