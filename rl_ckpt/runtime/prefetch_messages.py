"""Messages of a prefetch, as msgpack bytes: between its driver, the coordinator and shard servers.

As in `messages`: metadata only.
"""

from __future__ import annotations

import msgspec

from rl_ckpt.format.records import CommitRecord
from rl_ckpt.plan.parts import Part
from rl_ckpt.runtime.messages import FetchItem, Flaw


class BringOrder(msgspec.Struct, frozen=True):
    """A shard server brings a part in from the store, and keeps it."""

    part: Part
    files: dict[str, tuple[FetchItem, ...]]
    """All chunks of the part, by the file of the store where each lies."""


class BringDone(msgspec.Struct, frozen=True, tag="brought"):
    """A part is held, or what could be had of it."""

    part: Part
    """Without the chunks that could not be had."""
    path: str
    """File in which it lies."""
    flaws: dict[int, Flaw] = {}
    """Why chunks could not be had, by their offset in the part."""


class PrefetchOrder(msgspec.Struct, frozen=True):
    """A checkpoint is to be brought into memory."""

    record: CommitRecord
    """Of the checkpoint."""
    manifest: bytes
    """Its file."""
    nodes: tuple[str, ...]
    """Ids of those that bring it in."""
    latest: bool = True
    """Whether it was asked for as the newest: a newer one that memory has is as good, or better."""
    memory_bytes: int | None = None
    """As in `Options`, for this checkpoint; None: as the options say."""
    again: bool = False
    """Whether it was asked for before, of this coordinator or of one that was lost: what that came to is the answer."""


class PrefetchDone(msgspec.Struct, frozen=True, tag="prefetched"):
    """A prefetch is over."""

    step: int
    id: str
    """Of what memory has; another one than was asked for, where that is newer."""
    bytes: int
    bytes_fetched: int
    bytes_left: int
    nodes: dict[str, int]
    damaged: dict[str, str]
    notices: tuple[str, ...]
    seconds: float
