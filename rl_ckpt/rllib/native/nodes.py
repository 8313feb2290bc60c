"""What a restricted reading of a pickle gives for things that are not plain data: their description, never the thing.

Nothing here imports, calls or builds what it describes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Named:
    """A class or function that a pickle names. It was not imported."""

    module: str
    """Dotted name of the module."""
    name: str
    """Qualified name inside of it."""

    @property
    def dotted(self) -> str:
        """As `module.name`, for people."""
        return f"{self.module}.{self.name}"

    @property
    def ref(self) -> str:
        """As `module:name`, the way checkpoints name classes."""
        return f"{self.module}:{self.name}"


@dataclass(eq=False, slots=True)
class Record:
    """An object of a class that is known to be data: its class and what the pickle says of it. It was not built."""

    kind: Named
    """Of the object."""
    args: tuple[Any, ...] = ()
    """For its constructor."""
    state: Any = None
    """Of the object, as its class would take it; mostly a dict of attributes."""
    items: dict[Any, Any] = field(default_factory=dict)
    """Of an object that is a mapping."""


@dataclass(eq=False, slots=True)
class Code:
    """A function or class that the pickle carries by value (a lambda, something of `__main__`). It was not made."""

    maker: Named
    """What would make it."""
    parts: list[Any] = field(default_factory=list)
    """What it would be made of."""

    @property
    def name(self) -> str:
        """Of the function or class, where the pickle tells; for people."""
        if self.maker.name == "_make_skeleton_class" and len(self.parts) > 1 and isinstance(self.parts[1], str):
            return self.parts[1]
        flat = [item for part in self.parts for item in (part if isinstance(part, tuple) else (part,))]
        for item in flat:
            if isinstance(item, dict) and isinstance(item.get("__qualname__"), str):
                return str(item["__qualname__"])
        for item in flat:
            if isinstance(item, Code | Named):
                return item.name
        texts = [part for part in self.parts if isinstance(part, str) and part.isidentifier()]
        return texts[0] if texts else "a function or class"


@dataclass(eq=False, slots=True)
class Call:
    """A call that a pickle asks for and that is not allowed. It was not made; reading ends with an error that names it.

    The exception: what only code by value would call (see `Code`) is not reported, as that code is not made either.
    """

    what: str
    """That it wants to call, as `module.name`."""
    parts: list[Any] = field(default_factory=list)


def parts_of(value: Any) -> list[Any]:
    """Values directly inside a container or node; none for a leaf, and none of `Code`."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, Record):
        return [*value.args, value.state, *value.items, *value.items.values()]
    if isinstance(value, Call):
        return value.parts
    return []


def inside(*roots: Any) -> list[Any]:
    """All values reachable from the roots, each once, not looking into `Code`."""
    seen: set[int] = set()
    found: list[Any] = []
    waiting = list(roots)
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        found.append(value)
        waiting += parts_of(value)
    return found
