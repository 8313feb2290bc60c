"""Options: the settings of a Checkpointer, with their defaults. Plain data; every process of a run gets the same."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Literal

from rl_ckpt.errors import InvalidInputError

WhenBusy = Literal["wait", "skip"]


_MAX_CHUNK_BYTES = 1 << 30  # an Arrow list of one chunk's values must stay below 2**31 of them


@dataclass(frozen=True)
class Options:
    """How saves and restores are done. All sizes in bytes, all times in seconds."""

    chunk_bytes: int = 16 << 20
    """Upper limit of a chunk, the unit that is hashed, stored and read."""
    file_bytes: int = 256 << 20
    """Size past which a shard server splits its shard files further."""
    write_streams: int = 4
    """Shard files that a shard server writes at a time."""
    when_busy: WhenBusy = "wait"
    """What a save does while two earlier ones are still being written."""
    join_timeout_s: float = 60.0
    """How long a save or restore waits for all its workers."""
    write_timeout_s: float = 3600.0
    """How long a staged save may take until it is committed."""
    grace_s: float = 300.0
    """How long files that no checkpoint names any more are kept for readers that are still at them."""
    allow_pickle: bool = False
    """Whether leaves that are neither arrays nor plain data may be pickled, and loaded again."""
    weak_commits: bool = False
    """Accepts a store without create-only PUT: two coordinators at once may then overwrite each other's commits."""
    memory_tier: bool = True
    """Whether shard servers keep the newest checkpoint in shared memory, and copies of it on other nodes."""
    replicas: int = 1
    """Copies on other nodes of what a node keeps in memory; fewer where there are not so many nodes."""
    memory_bytes: int | None = None
    """What a node keeps in memory of one checkpoint: its own part and copies for others. None: what there is room for.
    """
    persist_every: int = 1
    """Of so many saves one goes to the store; the others only to memory."""

    take_over: bool = False
    """Whether the first save takes the run over from another job that is alive."""

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
            InvalidInputError: A value is out of range; the message names it.
        """
        for name in ("chunk_bytes", "file_bytes", "write_streams"):
            _check_int(name, getattr(self, name), 1)
        for name in ("join_timeout_s", "write_timeout_s"):
            if not (_is_number(getattr(self, name)) and getattr(self, name) > 0):
                raise InvalidInputError(f"{name}={getattr(self, name)!r} must be a number of seconds greater than 0")
        if not (_is_number(self.grace_s) and self.grace_s >= 0):
            raise InvalidInputError(f"grace_s={self.grace_s!r} must be a number of seconds, 0 or more")
        for name, least in (("replicas", 0), ("persist_every", 1)):
            _check_int(name, getattr(self, name), least)
        if self.memory_bytes is not None:
            _check_int("memory_bytes", self.memory_bytes, 0)
        if self.persist_every > 1 and not self.memory_tier:
            raise InvalidInputError(
                f"persist_every={self.persist_every} keeps saves in memory alone, and memory_tier=False has no memory "
                "to keep them in; leave one of the two out"
            )
        if self.chunk_bytes > _MAX_CHUNK_BYTES:
            raise InvalidInputError(f"chunk_bytes={self.chunk_bytes} must be at most {_MAX_CHUNK_BYTES} (1 GiB)")
        if self.when_busy not in ("wait", "skip"):
            raise InvalidInputError(f"when_busy={self.when_busy!r} must be 'wait' or 'skip'")


def _check_int(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidInputError(f"{name}={value!r} must be an integer of at least {least}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_deadline(seconds: object) -> float | None:
    """A deadline in seconds greater than 0, or None.

    Raises:
        InvalidInputError: It is neither.
    """
    if seconds is None:
        return None
    if not _is_number(seconds) or not 0 < seconds < float("inf"):  # type: ignore[operator]  # a number by then
        raise InvalidInputError(f"deadline_s={seconds!r} must be a number of seconds greater than 0, or None")
    return float(seconds)  # type: ignore[arg-type]


def check_step(step: object) -> int:
    """A step as an int of at least 0.

    Raises:
        InvalidInputError: It is neither.
    """
    try:
        value = -1 if isinstance(step, bool) else operator.index(step)  # type: ignore[arg-type]  # that is the question
    except TypeError:
        value = -1
    if not 0 <= value < 2**63:
        raise InvalidInputError(f"step={step!r} ({type(step).__name__}) must be an int from 0 to 2**63 - 1")
    return value
