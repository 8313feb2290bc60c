"""Whether a manifest makes sense: nothing in it may lead a reader to memory or bytes that are not the array's own.

Owns: the rules of docs/format.md, "Manifest", beyond the types of the fields. A digest finds damage, not a writer who
got it wrong or means harm: what passes here can be read without further questions. Pure.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rl_ckpt.errors import CorruptionError, InvalidInputError
from rl_ckpt.format.manifest import ArrayEntry, ArrayRef, Chunk, Manifest, ShardFileEntry, Variant
from rl_ckpt.format.records import PLAIN_VERSION, SHARDS, in_run
from rl_ckpt.state.arrays import KINDS, LONG_PLAIN, ArraySpec
from rl_ckpt.state.boxes import Box, check_tiling
from rl_ckpt.state.dtypes import dtype_from_name
from rl_ckpt.state.leaves import is_encoded
from rl_ckpt.state.tree import CONTAINERS, Container, Plain

_MOST_BYTES = 2**62
_MOST_AXES = 64  # numpy's own limit
_DIGEST = re.compile(r"[0-9a-f]{32}\Z").match
_PART = re.compile(r"[^./\\][^/\\]*\Z")


def check_manifest(name: str, manifest: Manifest) -> None:
    """Checks that everything in a manifest refers to something that is there, and fits it.

    Args:
        name: Of the file, for messages.
        manifest: As it was decoded.

    Raises:
        CorruptionError: It does not; the message says what, and of which array or path.
    """
    problem = next(_problems(manifest), None)
    if problem is not None:
        raise CorruptionError(
            f"{name} has the digest that was committed but makes no sense: {problem}; it was not written by a release "
            "of rl-ckpt that works"
        )


def _problems(manifest: Manifest) -> Iterator[str]:
    for file in manifest.files:
        if not (0 <= file.bytes < _MOST_BYTES and _is_shard_file(file, manifest.version)):
            yield f"no shard file can be called {file.name!r} or have {file.bytes} bytes"
    places: dict[tuple[int, int], Chunk] = {}
    for index, entry in enumerate(manifest.arrays):
        why = _array_problem(entry, manifest.files, places)
        if why:
            yield f"array {index}: {why}"
    for path, variants in manifest.nodes.items():
        why = _node_problem(variants, len(manifest.arrays))
        if why:
            yield f"{path!r}: {why}"
    if not manifest.nodes.get(""):
        yield "it has no root"


def _is_shard_file(file: ShardFileEntry, version: int) -> bool:
    name = in_run(file.name) if version > PLAIN_VERSION else file.name
    parts = name.removeprefix(SHARDS).split("/")
    return name.startswith(SHARDS) and name.isprintable() and all(map(_PART.match, parts))


def _array_problem(
    entry: ArrayEntry, files: Sequence[ShardFileEntry], places: dict[tuple[int, int], Chunk]
) -> str | None:
    looks = _looks(entry.spec)
    if looks.problem:
        return looks.problem
    whole = looks.whole
    for chunk in entry.chunks:
        box, index, offset, size = chunk.box, chunk.file, chunk.offset, chunk.bytes
        if (box != whole or size != looks.bytes) and (why := _box_problem(chunk, looks)):
            return why
        if not 0 <= index < len(files):
            return f"a chunk lies in file {index} of {len(files)}"
        if not 0 <= offset <= files[index].bytes - size:
            return f"a chunk of {size} bytes at {offset} does not lie in {files[index]}"
        twin = places.setdefault((index, offset), chunk)
        if twin is not chunk and (twin.bytes, twin.digest) != (size, chunk.digest):
            return f"another chunk is said to lie at {offset} of {files[index].name}, of other bytes"
        if not _DIGEST(chunk.digest):
            return f"{chunk.digest!r} is no digest"
    if len(entry.chunks) == 1 and entry.chunks[0].box == whole:  # so it is with most
        return None
    return _tiling_problem(entry)


@dataclass(frozen=True, slots=True)
class _Looks:
    """What can be said of an array by its spec."""

    problem: str
    width: int = 0
    """Bytes of an element."""
    bytes: int = 0
    whole: Box = Box((), ())  # noqa: RUF009  # a box never changes


@functools.lru_cache(4096)
def _looks(spec: ArraySpec) -> _Looks:
    shape = spec.shape
    try:
        width = dtype_from_name(spec.dtype).itemsize
    except TypeError as error:
        return _Looks(str(error))
    if not width:
        return _Looks(f"values of {spec.dtype!r} have no bytes to be stored")
    if spec.kind not in KINDS or (spec.kind in LONG_PLAIN and (spec.dtype != "uint8" or len(shape) != 1)):
        return _Looks(f"no leaf of kind {spec.kind!r} is an array of {spec.dtype} with {len(shape)} axes")
    whole = Box.whole(shape)
    if not 0 < len(shape) <= _MOST_AXES or min(shape) < 1 or whole.size * width > _MOST_BYTES:
        return _Looks(f"no stored array of {spec.dtype} has the shape {shape}")
    return _Looks("", width, whole.size * width, whole)


def _box_problem(chunk: Chunk, looks: _Looks) -> str | None:
    box = chunk.box
    if not len(box.offset) == len(box.shape) == len(looks.whole.shape):
        return f"a chunk's box {box} has another number of axes than the shape {looks.whole.shape}"
    if min(box.shape) < 1 or chunk.bytes != box.size * looks.width:
        return f"a chunk of {chunk.bytes} bytes can't hold the values of its box {box}, of {looks.width} bytes each"
    return None


def _tiling_problem(entry: ArrayEntry) -> str | None:
    boxes = [chunk.box for chunk in entry.chunks]
    if len(set(boxes)) < len(boxes):
        return "two chunks have the same box"
    try:
        check_tiling("it", entry.spec.shape, boxes)
    except InvalidInputError as error:
        return str(error)
    return None


def _node_problem(variants: Sequence[Variant], arrays: int) -> str | None:
    if not variants:
        return "nothing stands there"
    for variant in variants:
        node = variant.node
        if type(node) is ArrayRef:
            if not 0 <= node.index < arrays:
                return f"it refers to array {node.index} of {arrays}"
        elif isinstance(node, Container):
            if node.type not in CONTAINERS:
                return f"there is no container {node.type!r}"
        elif isinstance(node, Plain) and isinstance(node.value, dict | list) and not is_encoded(node.value):
            return "its plain leaf is none"
    return None
