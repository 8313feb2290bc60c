"""The memory tier as the coordinator sees it: what it remembers of a checkpoint, and what its brain wants done.

The words of `tier`; no behaviour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rl_ckpt.plan.parts import Part, Remembered


@dataclass(frozen=True, slots=True)
class Hold:
    """Have a server keep what was staged in its memory; answer with `held` or `not_held`."""

    server: str
    part: Part
    path: str


@dataclass(frozen=True, slots=True)
class Copy:
    """Have a server copy a part from a holder; answer with `held` or `not_held`. It may have to be started first."""

    server: str
    part: Part
    holder: str


@dataclass(frozen=True, slots=True)
class Bring:
    """Have a server bring a part in from the store; answer with `brought` or `not_held`. It may have to be started."""

    server: str
    part: Part


@dataclass(frozen=True, slots=True)
class Remember:
    """Tell a holder what it holds parts of, for whoever comes after this coordinator."""

    server: str
    checkpoint: Remembered
    parts: tuple[str, ...]
    """Names of all its parts."""


@dataclass(frozen=True, slots=True)
class Release:
    """Have a server give a part up."""

    server: str
    part: str


@dataclass(frozen=True, slots=True)
class GenerationFree:
    """Nobody holds this generation of staging memory any more."""

    generation: int


@dataclass(frozen=True, slots=True)
class Landed:
    """All parts of a checkpoint have the copies that they are to have."""

    checkpoint: str


@dataclass(frozen=True, slots=True)
class CannotLand:
    """They will not have them, and this is why."""

    checkpoint: str
    why: str


Instruction = Hold | Copy | Bring | Remember | Release | GenerationFree | Landed | CannotLand


@dataclass(frozen=True, slots=True)
class Found:
    """What a server has in memory, as it tells a coordinator that knows of nothing."""

    parts: Sequence[tuple[Part, str]]
    """Parts, and the file of each."""
    remembered: Sequence[tuple[Remembered, tuple[str, ...]]]
    """Checkpoints, and names of all parts of each."""


@dataclass(slots=True)
class Piece:
    """A part and its copies."""

    origin: str
    bytes: int
    path: str
    """Of the origin's file."""
    part: Part | None = None
    """Once its table is made."""
    holders: dict[str, str] = field(default_factory=dict)
    """Servers that have it, each with its file."""
    asked: set[str] = field(default_factory=set)
    """Servers that are to have it and have not answered."""
    refused: dict[str, str] = field(default_factory=dict)
    """Servers that can't have it, with the reason."""
    stored: bool = False
    """Whether it is brought in from the store where nobody has it."""


@dataclass(slots=True)
class Kept:
    """One checkpoint in memory."""

    id: str
    generation: int | None
    """That it was staged in; None: nothing is to be given back."""
    pieces: dict[str, Piece]
    """By name of the part."""
    done: Remembered | None = None
    """Once it is a checkpoint."""
    told: set[str] = field(default_factory=set)
    """Servers that have been told to remember it."""
    settled: bool = False
    """Whether it has landed, or can't."""
    users: set[str] = field(default_factory=set)
    place: int = 0
    """In the order of the saves; 0 for what was there before."""
    bad: list[Release] = field(default_factory=list)
    """Damaged copies, to be given up once nobody restores from the checkpoint."""
    prefetched: bool = False
    """Whether it was brought in from the store, and no save staged it."""
    limit: int | None = None
    """Bytes of it that a server may have; None: as the options say."""
