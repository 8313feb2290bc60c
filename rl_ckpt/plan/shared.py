"""Shared parts: what many ranks say alike travels as the same bytes, is decoded once, and is one object for all.

A thousand ranks with the same arrays send a thousand times the same list of them, each with a few lines of its own. Cut
into parts, all but the parts with those lines are the same bytes. Pure.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import msgspec

from rl_ckpt.format.digest import digest


class Shared(ABC):
    """Part of a message. Not to be changed once made."""

    __slots__ = ("__weakref__", "_encoded")

    fields_type: ClassVar[Any]
    """Of what `fields` returns, for the decoder; the class is made from these fields."""
    _known: ClassVar[weakref.WeakValueDictionary[bytes, Any]]
    """By the digest of their encoding, as long as somebody holds them."""

    def __init_subclass__(cls) -> None:
        """Each kind of part has its own."""
        super().__init_subclass__()
        cls._known = weakref.WeakValueDictionary()

    @abstractmethod
    def fields(self) -> tuple[object, ...]:
        """All that is encoded."""

    def encode(self) -> bytes:
        """As msgpack; the same for every rank that holds the same."""
        data: bytes | None = getattr(self, "_encoded", None)
        if data is None:
            data = self._encoded = msgspec.msgpack.encode(self.fields())
        return data

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """From `encode`: the same object for the same bytes, as long as somebody holds it.

        Raises:
            msgspec.ValidationError: Not such a part.
        """
        key = digest(data)
        part: Self | None = cls._known.get(key)
        if part is None:
            part = cls(*msgspec.msgpack.decode(data, type=cls.fields_type))
            cls._known[key] = part
        return part
