"""Whether a manifest makes sense: nothing in it may lead a reader to memory or bytes that are not the array's own.

Owns: the rules of docs/format.md, "Manifest", beyond the types of the fields. A digest finds damage, not a writer who
got it wrong or means harm: what passes here can be read without further questions. Pure.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence

from rl_ckpt.errors import CorruptionError, InvalidInputError
from rl_ckpt.format.manifest import ArrayEntry, ArrayRef, Chunk, Manifest, ShardFileEntry, Variant
from rl_ckpt.format.records import SHARDS
from rl_ckpt.state.arrays import KINDS, LONG_PLAIN
from rl_ckpt.state.boxes import Box, check_tiling
from rl_ckpt.state.dtypes import dtype_from_name
from rl_ckpt.state.leaves import is_encoded
from rl_ckpt.state.tree import CONTAINERS, Container, Plain

_MOST_BYTES = 2**62
_MOST_AXES = 64  # numpy's own limit
_DIGEST = re.compile(r"[0-9a-f]{32}\Z")
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
        if not (0 <= file.bytes < _MOST_BYTES and _is_shard_file(file)):
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


def _is_shard_file(file: ShardFileEntry) -> bool:
    parts = file.name.removeprefix(SHARDS).split("/")
    return file.name.startswith(SHARDS) and file.name.isprintable() and all(map(_PART.match, parts))


def _array_problem(
    entry: ArrayEntry, files: Sequence[ShardFileEntry], places: dict[tuple[int, int], Chunk]
) -> str | None:
    spec = entry.spec
    width = _width(spec.dtype)
    if width is None:
        return f"there is no dtype {spec.dtype!r}"
    if spec.kind not in KINDS or (spec.kind in LONG_PLAIN and (spec.dtype != "uint8" or len(spec.shape) != 1)):
        return f"no leaf of kind {spec.kind!r} is an array of {spec.dtype} with {len(spec.shape)} axes"
    if not 0 < len(spec.shape) <= _MOST_AXES or min(spec.shape) < 1 or Box.whole(spec.shape).size * width > _MOST_BYTES:
        return f"no stored array has the shape {spec.shape} (of {width} bytes an element)"
    for chunk in entry.chunks:
        if len(chunk.box.offset) != len(spec.shape) or len(chunk.box.shape) != len(spec.shape):
            return f"a chunk's box {chunk.box} has another number of axes than the shape {spec.shape}"
        if min(chunk.box.shape) < 1 or chunk.bytes != chunk.box.size * width:
            return f"a chunk of {chunk.bytes} bytes can't hold the {spec.dtype} values of its box {chunk.box}"
        if not 0 <= chunk.file < len(files):
            return f"a chunk lies in file {chunk.file} of {len(files)}"
        if not 0 <= chunk.offset <= files[chunk.file].bytes - chunk.bytes:
            return f"a chunk of {chunk.bytes} bytes at {chunk.offset} does not lie in {files[chunk.file]}"
        twin = places.setdefault((chunk.file, chunk.offset), chunk)
        if twin is not chunk and (twin.bytes, twin.digest) != (chunk.bytes, chunk.digest):
            return f"another chunk is said to lie at {chunk.offset} of {files[chunk.file].name}, of other bytes"
        if not _DIGEST.match(chunk.digest):
            return f"{chunk.digest!r} is no digest"
    return _tiling_problem(entry)


def _tiling_problem(entry: ArrayEntry) -> str | None:
    boxes = [chunk.box for chunk in entry.chunks]
    if len(boxes) == 1 and boxes[0] == Box.whole(entry.spec.shape):  # so it is with most
        return None
    if len(set(boxes)) < len(boxes):
        return "two chunks have the same box"
    try:
        check_tiling("it", entry.spec.shape, boxes)
    except InvalidInputError as error:
        return str(error)
    return None


@functools.lru_cache(4096)
def _width(dtype: str) -> int | None:
    """Bytes of an element; None where there is no such dtype, or it has none."""
    try:
        return dtype_from_name(dtype).itemsize or None
    except TypeError:
        return None


def _node_problem(variants: Sequence[Variant], arrays: int) -> str | None:
    if not variants:
        return "nothing stands there"
    for variant in variants:
        node = variant.node
        if isinstance(node, ArrayRef):
            if not 0 <= node.index < arrays:
                return f"it refers to array {node.index} of {arrays}"
        elif isinstance(node, Container):
            if node.type not in CONTAINERS:
                return f"there is no container {node.type!r}"
        elif isinstance(node, Plain) and isinstance(node.value, dict | list) and not is_encoded(node.value):
            return "its plain leaf is none"
    return None
