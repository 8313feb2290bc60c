"""Paths: the names of leaves in a state tree, and the patterns that choose among them.

A path joins the keys from the root with "/". Integer keys and list positions are written bare (`layers/0/w`); in string
keys "~" is written "~0", "/" is "~1", a string that looks like an integer gets "~2" in front, and the empty string is
"~3". So every path is unique and `split` gives back the very keys. The root's path is "".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

Key = str | int

_INTEGER = re.compile(r"-?\d+\Z")


def escape(key: Key) -> str:
    """One key as a path component."""
    if isinstance(key, int):
        return str(key)
    if key.isidentifier():  # most are: nothing to escape, and nothing to look for
        return key
    if not key:
        return "~3"
    text = key.replace("~", "~0").replace("/", "~1")
    return "~2" + text if _INTEGER.match(text) else text


def unescape(component: str) -> Key:
    """The key that `escape` wrote."""
    if _INTEGER.match(component):
        return int(component)
    if component == "~3":
        return ""
    text = component.removeprefix("~2")
    return text.replace("~1", "/").replace("~0", "~")


def join(parent: str, key: Key) -> str:
    """Path of a child. `parent` is "" for the root."""
    return f"{parent}/{escape(key)}" if parent else escape(key)


def split(path: str) -> tuple[Key, ...]:
    """The keys from the root to `path`."""
    return tuple(unescape(part) for part in path.split("/")) if path else ()


def parents(path: str) -> list[str]:
    """All containers above `path`, the root first."""
    if not path:
        return []
    parts = path.split("/")
    return ["/".join(parts[:i]) for i in range(len(parts))]


def above(paths: Iterable[str]) -> set[str]:
    """All containers above any of `paths`: what `parents` gives for them all."""
    found: set[str] = set()
    for path in paths:
        if path:
            parent = path.rpartition("/")[0]
            if parent not in found:  # else all above it are there too
                found.add(parent)
                found.update(parents(parent))
    return found


class Selector:
    """Chooses paths by glob patterns.

    `*` stands for any run of characters but "/", `**` for any run at all, `?` for one character but "/", `[ab]` for one
    of a set. A pattern also takes everything below what it matches, so `learner` takes `learner/w`. A pattern that
    starts with "!" takes away from what the others chose (or from everything, where all patterns do).
    """

    def __init__(self, patterns: str | Sequence[str] | None) -> None:
        """Compiles the patterns; None chooses everything."""
        given = [patterns] if isinstance(patterns, str) else list(patterns or ["**"])
        self._take = [_compile(p) for p in given if not p.startswith("!")]
        self._leave = [_compile(p[1:]) for p in given if p.startswith("!")]
        if not self._take:
            self._take = [_compile("**")]
        self._all = patterns is None

    def __call__(self, path: str) -> bool:
        """Whether `path` is chosen."""
        return self._all or (any(p.match(path) for p in self._take) and not any(p.match(path) for p in self._leave))


def _compile(pattern: str) -> re.Pattern[str]:
    out, i = "", 0
    while i < len(pattern):
        if pattern.startswith("**", i):
            out, i = out + ".*", i + 2
            continue
        char = pattern[i]
        close = pattern.find("]", i + 2) if char == "[" else -1
        if close > 0:
            inside = pattern[i + 1 : close].replace("\\", "\\\\").replace("[", "\\[")
            out, i = out + "[" + ("^" + inside[1:] if inside[0] == "!" and inside[1:] else inside) + "]", close
        else:
            out += {"*": "[^/]*", "?": "[^/]"}.get(char, re.escape(char))
        i += 1
    return re.compile(out + r"(/.*)?\Z", re.DOTALL)


def literal(path: str) -> str:
    """A pattern that chooses this path, and what is below it, whatever characters its keys hold."""
    pattern = re.sub(r"[*?[]", r"[\g<0>]", path)
    return f"[!]{pattern[1:]}" if pattern.startswith("!") else pattern


def renamed(path: str, rename: Mapping[str, str]) -> str:
    """The path under which a reader knows the saved `path`.

    Args:
        path: Saved path.
        rename: Saved path or prefix → new path or prefix; the longest that fits is used.
    """
    if not rename:
        return path
    for prefix in [path, *reversed(parents(path))]:
        if prefix in rename:
            rest = path[len(prefix) :].lstrip("/")
            return "/".join(part for part in (rename[prefix], rest) if part)
    return path
