"""Manifest: everything about one checkpoint but the values (docs/format.md).

Owns: its fields, its JSON, and the names of files and columns that it refers to. Leaf module: knows nothing of stores,
plans or workers. Values that were equal on several ranks stand once; what differed stands once a variant, with its
ranks. Records have no cycles and are hidden from Python's collector (`gc=False`): at 100,000 chunks it takes half the
time else.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from rl_ckpt.errors import CorruptionError, InvalidInputError
from rl_ckpt.format.digest import check
from rl_ckpt.format.records import FORMAT_VERSION, PLAIN_VERSION, SHARDS, split_base
from rl_ckpt.state.arrays import ArraySpec
from rl_ckpt.state.boxes import Box
from rl_ckpt.state.leaves import Json
from rl_ckpt.state.tree import Container, Plain, Tie


class ShardFileEntry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A shard file that the checkpoint uses: its name below the run's URL, and its size."""

    name: str
    bytes: int


class Chunk(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where the values of one box of an array lie: `bytes` bytes at `offset` of `files[file]`, in C order."""

    box: Box
    file: int
    offset: int
    bytes: int
    digest: str
    """xxh3-128 of those bytes, 32 hex digits."""


class ArrayEntry(msgspec.Struct, frozen=True, gc=False):
    """A stored array: its spec with the global shape, and chunks that tile it."""

    spec: ArraySpec
    chunks: tuple[Chunk, ...]


class ArrayRef(msgspec.Struct, frozen=True, tag_field="node", tag="array", gc=False):
    """A leaf that is `arrays[index]`."""

    index: int


SavedNode = Container | Plain | Tie | ArrayRef


class Variant(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What stands at a path on some ranks."""

    node: SavedNode
    ranks: tuple[int, ...] | None = None
    """Which ranks had it; None: all of them."""
    shared: bool = True
    """Whether it may go to ranks that had none; False for what belongs to its rank."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint."""

    version: int = PLAIN_VERSION
    run: str
    id: str
    step: int
    world_size: int
    time: float
    writer: str
    parent: str | None
    metrics: dict[str, Json]
    tag: str | None
    files: tuple[ShardFileEntry, ...]
    arrays: tuple[ArrayEntry, ...]
    nodes: dict[str, tuple[Variant, ...]]
    """By path, a container before its children."""

    @property
    def array_bytes(self) -> int:
        """Bytes of all arrays, each once."""
        return sum(chunk.bytes for array in self.arrays for chunk in array.chunks)


def encode(manifest: Manifest) -> bytes:
    """The manifest's file."""
    return msgspec.json.encode(manifest)


def decode(name: str, data: bytes, expected: bytes) -> Manifest:
    """Reads a manifest's file.

    Args:
        name: Of the file, for messages.
        data: Its bytes.
        expected: Digest from the commit record, 16 bytes.

    Raises:
        CorruptionError: Not the bytes that were committed, or no manifest.
        InvalidInputError: Written by a newer release.
    """
    check(name, data, expected)
    try:
        version = msgspec.json.decode(data, type=_Version).version
        if version > FORMAT_VERSION:
            raise InvalidInputError(
                f"{name} has format version {version}; this release reads up to {FORMAT_VERSION}: upgrade rl-ckpt"
            )
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptionError(f"{name} is no manifest: {error}") from error


class _Version(msgspec.Struct):
    version: int


def version_for(files: Iterable[ShardFileEntry]) -> int:
    """Version of a manifest that names these files."""
    return PLAIN_VERSION if all(split_base(file.name) is None for file in files) else FORMAT_VERSION


def shard_file_name(checkpoint: str, server: str, k: int) -> str:
    """The k-th file that a shard server writes for a checkpoint."""
    return f"{SHARDS}{checkpoint}/{server}-{k}.arrow"
