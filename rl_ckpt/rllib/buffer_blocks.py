"""Blocks: which episodes of a replay buffer are stored together, and which index entries.

A block is a run of whole episodes by their number in the buffer's life (RLlib's index: it does not change when older
episodes are evicted). Where blocks end is remembered from save to save, and found again in a restored checkpoint, so a
block whose episodes are all as before is the same bytes, and is not written again. What is written is then what was
added, the block that is being filled, the one that is being evicted, and those with episodes that went on.

The list of index entries (in which order RLlib samples) is cut where the entries themselves say so, by a hash: so what
is taken out at its front and added at its end leaves the segments between as they were.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rl_ckpt.errors import CorruptionError
from rl_ckpt.rllib.buffer_priorities import columns_from, columns_tree
from rl_ckpt.rllib.columns import Array, Columns, decode, encode, narrowed

MIN_BLOCK_BYTES = 1 << 17
MAX_BLOCK_BYTES = 1 << 26
BLOCKS = 128
"""Of a full buffer: few enough for the manifest, and so many that two of them are little."""
MIN_SEGMENT = 1 << 12
_SEGMENTS = 64

Tree = dict[str, Any]


@dataclass(slots=True)
class Layout:
    """What is remembered of a buffer between saves: the ends of its full blocks, as numbers of episodes, ascending."""

    ends: list[int]


def cut(layout: Layout, first: int, steps: Sequence[int], block_steps: int) -> list[tuple[int, int]]:
    """Deals episodes out to blocks.

    Args:
        layout: Of the last save; changed to that of this one.
        first: Number of the oldest episode that the buffer has.
        steps: Of each episode, from that one on.
        block_steps: A block is full when it has as many.

    Returns:
        First and last number (exclusive) of each block.
    """
    after = first + len(steps)
    ends = [
        end for end in layout.ends if first < end <= after
    ]  # others are of evicted episodes, or of a run rolled back
    filled = 0
    for number in range(ends[-1] if ends else first, after):
        filled += steps[number - first]
        if filled >= block_steps:
            ends.append(number + 1)
            filled = 0
    layout.ends = ends
    starts = [first, *ends]
    bounds = [*starts, after] if starts[-1] < after else starts
    return list(itertools.pairwise(bounds))


def block_steps(capacity: int, step_bytes: float) -> int:
    """How many steps a full block has, for a buffer of so many steps of so many bytes."""
    size = min(max(capacity * step_bytes / BLOCKS, MIN_BLOCK_BYTES), MAX_BLOCK_BYTES)
    return max(int(size / max(step_bytes, 1.0)), 1)


class Schemas:
    """Schemas of columns, each once: most blocks of a buffer have the same."""

    def __init__(self, known: Sequence[str] = ()) -> None:
        self._known = {schema: place for place, schema in enumerate(known)}

    def tree(self) -> list[str]:
        """As plain data."""
        return list(self._known)

    def part(self, columns: Columns) -> Tree:
        """Columns as a part of a state tree, with their schema in this table."""
        place = self._known.setdefault(columns.schema, len(self._known))
        return {"rows": columns.rows, "schema": place, "columns": columns.arrays}


def columns_of(part: Tree, schemas: Sequence[str], where: str) -> Columns:
    """What `Schemas.part` gave.

    Raises:
        CorruptionError: There is no such schema.
    """
    place = part["schema"]
    if not 0 <= place < len(schemas):
        raise CorruptionError(f"{where} names schema {place}, and there are {len(schemas)}")
    return Columns(part["rows"], schemas[place], part["columns"])


def indices_tree(indices: Sequence[tuple[Any, ...]], capacity: int, agents: bool) -> list[Tree]:
    """Index entries in segments.

    Args:
        indices: (episode, step), or (episode, agent, step) where there are `agents`, and a leaf's number after that
            where there are priorities.
        capacity: Of the buffer, in steps.
        agents: Whether entries name one.

    Returns:
        Segments: an array of numbers (entries, fields), and agents as columns.
    """
    if not indices:
        return []
    names = [entry[1] for entry in indices] if agents else []
    numbers = index_numbers(indices, agents)
    segments = []
    for start, end in itertools.pairwise(_cuts(numbers, capacity)):
        segment: Tree = {"entries": narrowed(numbers[start:end])}
        if agents:
            segment["agents"] = columns_tree(encode(names[start:end], "the replay buffer's agents"))
        segments.append(segment)
    return segments


def index_numbers(indices: Sequence[tuple[Any, ...]], agents: bool) -> Array:
    """The numbers of index entries, without agents: (entries, fields), int64."""
    if agents:
        indices = [(entry[0], *entry[2:]) for entry in indices]
    width = len(indices[0]) if indices else 2
    flat = np.fromiter(itertools.chain.from_iterable(indices), np.int64, len(indices) * width)
    return flat.reshape(-1, width)


def indices_from(segments: Sequence[Tree]) -> list[tuple[Any, ...]]:
    """The index entries again."""
    entries: list[tuple[Any, ...]] = []
    for segment in segments:
        columns = segment["entries"].T.tolist()
        if "agents" in segment:
            columns.insert(1, decode(columns_from(segment["agents"]), "the replay buffer's agents"))
        entries.extend(zip(*columns, strict=True))
    return entries


def _cuts(numbers: Array, capacity: int) -> list[int]:
    """Where segments begin, and the end: before entries whose hash says so, and which differ from the one before."""
    every = max(capacity // _SEGMENTS, MIN_SEGMENT)
    with np.errstate(over="ignore"):
        mixed = numbers[:, 0].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= numbers[:, 1].astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
    hit = (mixed >> np.uint64(32)) % np.uint64(every) == 0
    hit[1:] &= (numbers[1:, :2] != numbers[:-1, :2]).any(axis=1)
    hit[0] = False
    return [0, *np.flatnonzero(hit).tolist(), len(numbers)]
