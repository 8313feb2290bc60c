"""Ways to damage the files of a run; each is made from a seed, so that it can be made again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.fuzz.runs import SavedRun, zones

Change = dict[str, bytes | None]
"""New content by name; None: deleted."""
Rng = np.random.Generator


def _range(rng: Rng, name: str, data: bytes) -> tuple[int, int]:
    """Some bytes of one zone of a file."""
    parts = [zone for zone in zones(name, data) if zone[1] > zone[0]]
    low, high = parts[int(rng.integers(len(parts)))]
    begin = int(rng.integers(low, high))
    return begin, min(high, begin + int(rng.integers(1, 65)))


def flip_bit(rng: Rng, run: SavedRun, other: SavedRun, name: str) -> Change:
    data = bytearray(run.files[name])
    at, _ = _range(rng, name, run.files[name])
    data[at] ^= 1 << int(rng.integers(8))
    return {name: bytes(data)}


def change_bytes(rng: Rng, run: SavedRun, other: SavedRun, name: str) -> Change:
    data = bytearray(run.files[name])
    begin, end = _range(rng, name, run.files[name])
    data[begin:end] = rng.bytes(end - begin)
    return {name: bytes(data)}


def zero(rng: Rng, run: SavedRun, other: SavedRun, name: str) -> Change:
    data = bytearray(run.files[name])
    begin, end = _range(rng, name, run.files[name])
    end = len(data) if rng.integers(8) == 0 else end
    data[begin:end] = bytes(end - begin)
    return {name: bytes(data)}


def truncate(rng: Rng, run: SavedRun, other: SavedRun, name: str) -> Change:
    at, _ = _range(rng, name, run.files[name])
    return {name: run.files[name][: 0 if rng.integers(8) == 0 else at]}


def extend(rng: Rng, run: SavedRun, other: SavedRun, name: str) -> Change:
    return {name: run.files[name] + rng.bytes(int(rng.integers(1, 200)))}


def insert(rng: Rng, run: SavedRun, other: SavedRun, name: str) -> Change:
    """A block of the file once more behind itself."""
    data = run.files[name]
    begin, end = _range(rng, name, data)
    return {name: data[:end] + data[begin:end] + data[end:]}


def copy_block(rng: Rng, run: SavedRun, other: SavedRun, name: str) -> Change:
    """A block of the file in place of another one."""
    data = bytearray(run.files[name])
    begin, end = _range(rng, name, run.files[name])
    to = int(rng.integers(0, len(data) - (end - begin) + 1))
    data[to : to + end - begin] = data[begin:end]
    return {name: bytes(data)}


def delete(rng: Rng, run: SavedRun, other: SavedRun, name: str) -> Change:
    return {name: None}


def swap(rng: Rng, run: SavedRun, other: SavedRun, name: str) -> Change:
    """Two files of one class change places."""
    twin = str(rng.choice(run.kinds[name.split("/", maxsplit=1)[0]]))
    return {name: run.files[twin], twin: run.files[name]}


def take_strangers(rng: Rng, run: SavedRun, other: SavedRun, name: str) -> Change:
    """A file of the same class, of another run."""
    return {name: other.files[str(rng.choice(other.kinds[name.split("/", maxsplit=1)[0]]))]}


def take_another(rng: Rng, run: SavedRun, other: SavedRun, name: str) -> Change:
    """Any other file of the run."""
    return {name: run.files[str(rng.choice(sorted(run.files)))]}


WAYS: list[Callable[[Rng, SavedRun, SavedRun, str], Change]] = [
    flip_bit, change_bytes, zero, truncate, extend, insert, copy_block, delete, swap, take_strangers, take_another,
]  # fmt: skip


def damage(rng: Rng, run: SavedRun, other: SavedRun) -> tuple[str, Change]:
    """One to three kinds of damage to files of classes that are equally likely.

    Returns:
        What was done, for messages, and the new contents. Damage to one file twice is the later one only.
    """
    said, change = [], Change()
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        kind = str(rng.choice(["shards", "shards", "shards", *run.kinds]))
        name = str(rng.choice(run.kinds[kind]))
        way = WAYS[int(rng.integers(len(WAYS)))]
        said.append(f"{way.__name__} {name}")
        change |= way(rng, run, other, name)
    return "; ".join(said), change
