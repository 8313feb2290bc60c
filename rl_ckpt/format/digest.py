"""Digests: xxh3-128 of the bytes, as 16 raw bytes in memory and 32 hex digits on storage."""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash

from rl_ckpt.errors import CorruptionError

ALGORITHM = "xxh3-128"
DIGEST_BYTES = 16


Buffer = bytes | bytearray | memoryview | np.ndarray[Any, np.dtype[Any]]
"""What is hashed: contiguous bytes. An array must be in C order: it is taken as the bytes of its values."""


def digest(data: Buffer) -> bytes:
    """Digest of a buffer: 16 bytes."""
    return xxhash.xxh3_128_digest(data)  # type: ignore[arg-type]  # before Python 3.12 no type says that arrays are buffers


def hasher() -> xxhash.xxh3_128:
    """A digest in the making: `update` it with buffers, then ask for `digest()`."""
    return xxhash.xxh3_128()


def check(name: str, data: bytes | bytearray | memoryview, expected: bytes) -> None:
    """Compares a buffer with the digest it was committed with.

    Raises:
        CorruptionError: They differ.
    """
    found = digest(data)
    if found != expected:
        raise CorruptionError(
            f"{name} is damaged: {ALGORITHM} {expected.hex()} was committed, {found.hex()} was read ({len(data)} bytes)"
        )
