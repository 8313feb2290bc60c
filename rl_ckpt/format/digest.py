"""Digests: xxh3-128 of the bytes, as 16 raw bytes in memory and 32 hex digits on storage."""

from __future__ import annotations

import xxhash

from rl_ckpt.errors import CorruptionError

ALGORITHM = "xxh3-128"


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """Digest of a buffer: 16 bytes."""
    return xxhash.xxh3_128_digest(data)


def hasher() -> xxhash.xxh3_128:
    """A digest in the making: `update` it with buffers, then ask for `digest()`."""
    return xxhash.xxh3_128()


def check(name: str, data: bytes | bytearray | memoryview, expected: bytes) -> None:
    """Compares a buffer with the digest it was committed with.

    Raises:
        CorruptionError: They differ.
    """
    compare(name, digest(data), expected, len(data))


def compare(name: str, found: bytes, expected: bytes, size_bytes: int) -> None:
    """As `check`, for who has hashed already.

    Raises:
        CorruptionError: They differ.
    """
    if found != expected:
        raise CorruptionError(
            f"{name} is damaged: {ALGORITHM} {expected.hex()} was committed, {found.hex()} was read "
            f"({size_bytes} bytes)"
        )
