"""Pins: a reader's hold on one checkpoint, so that a sweep elsewhere does not delete it while it is being read."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator

from rl_ckpt.errors import CheckpointNotFoundError
from rl_ckpt.format import records
from rl_ckpt.format.records import PinRecord
from rl_ckpt.store.base import ObjectExistsError
from rl_ckpt.store.run import Run, who


@contextlib.contextmanager
def pin(run: Run, checkpoint: str, seconds: float) -> Iterator[None]:
    """Holds a checkpoint while the block runs.

    Args:
        run: The run.
        checkpoint: Id of a committed checkpoint.
        seconds: When the hold ends if this process dies, counted from now.

    Raises:
        CheckpointNotFoundError: It was dropped meanwhile. One that was there after its pin stays: a sweep looks for
            pins again after it has deleted the record.
        StorageError: The store failed, or this reader may not write to it.
    """
    name = records.pin_name(uuid.uuid4().hex)
    record = PinRecord(checkpoint=checkpoint, by=who(), expires=time.time() + seconds)
    with contextlib.suppress(ObjectExistsError):  # nobody else has this name: the reply to the first try was lost
        run.store.create(name, records.encode(record))
    try:
        if checkpoint not in {commit.id for commit in run.log.read().commits}:
            raise CheckpointNotFoundError(
                f"checkpoint {checkpoint} of {run.store.url} was dropped by the retention rules while it was being "
                "pinned; choose another"
            )
        yield
    finally:
        run.store.delete([name])
