"""safetensors: all arrays, streamed from the shard files, without the safetensors library, torch, or RLlib.

The file is what https://github.com/huggingface/safetensors describes: 8 bytes with the header's size, a JSON header
with dtype, shape and offsets by name and text under `__metadata__`, then the arrays' bytes in C order without gaps.
Arrays with wider elements stand first, so that each is aligned to its own element size.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.export.source import Source, weights_digest
from rl_ckpt.export.stream import copy_arrays, targets, write_all
from rl_ckpt.format.digest import hasher
from rl_ckpt.format.manifest import ArrayRef
from rl_ckpt.state.arrays import flat_bytes
from rl_ckpt.state.dtypes import dtype_from_name

DTYPES: Mapping[str, str] = {
    "bool": "BOOL",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2", "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
"""Our dtypes → the format's; it has no others of ours."""
_HEADER_BYTES = 100 << 20  # the library refuses longer headers
_PIECE_BYTES = 1 << 20


def write_safetensors(source: Source, path: Path) -> tuple[str, list[str]]:
    """Writes the file.

    Args:
        source: What goes into it.
        path: Of an empty file.

    Returns:
        The digest of all weights, and texts about damage that was read around.

    Raises:
        InvalidInputError: A dtype or a name that the format does not have.
        CorruptionError, StorageError: As `copy_arrays`.
        OSError: The file can't be written.
    """
    places, size = _layout(source)
    header = _header(source, places, "0" * 32)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.ftruncate(fd, len(header) + size)
        chunked = [
            (n.index, len(header) + places[name]) for name, n in source.arrays.items() if isinstance(n, ArrayRef)
        ]
        notices = copy_arrays(source.run, source.manifest, targets(source.manifest, chunked), fd)
        for name in source.arrays:
            inline = source.inline(name)
            if inline is not None:
                write_all(fd, bytes(flat_bytes(inline)), len(header) + places[name])
        found = weights_digest(
            {
                name: (*source.dtype_and_shape(name), _digest(source, name, fd, len(header) + place))
                for name, place in places.items()
            }
        )
        write_all(fd, _header(source, places, found), 0)
    finally:
        os.close(fd)
    return found, notices


def _layout(source: Source) -> tuple[dict[str, int], int]:
    """Offset of each array after the header, by name, and the size of all of them, in bytes."""
    no_dtype = [f"{name} ({source.dtype_and_shape(name)[0]})" for name in source.arrays if _itemsize(source, name) == 0]
    if no_dtype:
        raise InvalidInputError(
            f"safetensors has no such dtype: {', '.join(no_dtype)}; leave them out with `select`, or use format='numpy'"
        )
    if "__metadata__" in source.arrays:
        raise InvalidInputError("safetensors keeps the name '__metadata__' for itself; use another format")
    places: dict[str, int] = {}
    end = 0
    for name in sorted(source.arrays, key=lambda name: (-_itemsize(source, name), name)):
        places[name] = end
        end += _size(source, name)
    return places, end


def _itemsize(source: Source, name: str) -> int:
    """Bytes of an element; 0 where the format has no such dtype."""
    dtype = source.dtype_and_shape(name)[0]
    return dtype_from_name(dtype).itemsize if dtype in DTYPES else 0


def _size(source: Source, name: str) -> int:
    return math.prod(source.dtype_and_shape(name)[1]) * _itemsize(source, name)


def _header(source: Source, places: Mapping[str, int], digest: str) -> bytes:
    fields: dict[str, object] = {"__metadata__": source.metadata(digest)}
    for name, place in places.items():
        dtype, shape = source.dtype_and_shape(name)
        ends = [place, place + _size(source, name)]
        fields[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": ends}
    try:
        text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"safetensors takes only names of Unicode text: {error}") from error
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_BYTES:
        raise InvalidInputError(f"the header of {len(places)} arrays is longer than the format allows; use `select`")
    return len(text).to_bytes(8, "little") + text


def _digest(source: Source, name: str, fd: int, place: int) -> str:
    """Of an array's bytes: that of its only chunk, which was compared, or of what stands in the file."""
    known = source.known_digest(name)
    if known is not None:
        return known
    running, end = hasher(), place + _size(source, name)
    while place < end:
        piece = os.pread(fd, min(_PIECE_BYTES, end - place), place)
        running.update(piece)
        place += len(piece)
    return running.hexdigest()
