"""Reads Markdown for the documentation tests: fenced Python blocks and links.

Promises to see what GitHub renders for the plain subset of Markdown that these documents use. Runs nothing.
"""

from __future__ import annotations

import dataclasses
import re

_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,})\s*(?P<info>[^`\n]*)$")
_NO_RUN = re.compile(r"^\s*<!--\s*no-run(?P<reason>:.*?)?\s*-->\s*$")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?(?P<target>[^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_REFERENCE = re.compile(r"^\[[^\]^]+\]:\s*<?(?P<target>\S+?)>?(?:\s+\".*\")?$", re.MULTILINE)
_HTML = re.compile(r"<(?:img|a|source)\b[^>]*?\b(?:src|href|srcset)=\"(?P<target>[^\"]+)\"")
_HEADING = re.compile(r"^#{1,6}\s+(?P<title>.+?)\s*#*$", re.MULTILINE)


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """One fenced Python block."""

    line: int
    """Line of the opening fence, from 1."""
    code: str
    no_run: str | None
    """The reason why it is not run; empty where the mark gives none, None where it is run."""


def python_blocks(text: str) -> list[Block]:
    """The fenced blocks whose language is `python` or `py`, in order."""
    blocks: list[Block] = []
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        fence = _FENCE.match(lines[at])
        if fence is None:
            at += 1
            continue
        opened, ticks, indent = at, fence["ticks"], len(fence["indent"])
        body: list[str] = []
        at += 1
        while at < len(lines) and not re.fullmatch(rf"\s*{ticks[0]}{{{len(ticks)},}}\s*", lines[at]):
            body.append(lines[at][min(indent, len(lines[at]) - len(lines[at].lstrip())) :])
            at += 1
        at += 1
        if re.split(r"[\s{,]", fence["info"], maxsplit=1)[0].lower() in {"python", "py"}:
            blocks.append(Block(opened + 1, "\n".join(body) + "\n", _reason(lines, opened)))
    return blocks


def _reason(lines: list[str], opened: int) -> str | None:
    above = _NO_RUN.match(lines[opened - 1]) if opened else None
    if above is None:
        return None
    return (above["reason"] or "").removeprefix(":").strip()


def prose(text: str) -> str:
    """The text without its code, blocks and spans."""
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", "\n".join(_without_blocks(text)))


def links(text: str) -> list[str]:
    """Targets of all links and images outside of code, in order of kind."""
    plain = prose(text)
    return [match["target"] for pattern in (_LINK, _REFERENCE, _HTML) for match in pattern.finditer(plain)]


def anchors(text: str) -> set[str]:
    """The anchors that the headings get on GitHub."""
    found: dict[str, int] = {}
    result: set[str] = set()
    for match in _HEADING.finditer("\n".join(_without_blocks(text))):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match["title"]).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        result.add(f"{slug}-{count}" if count else slug)
    return result


def _without_blocks(text: str) -> list[str]:
    kept: list[str] = []
    ticks = ""
    for line in text.splitlines():
        fence = _FENCE.match(line)
        if ticks:
            if re.fullmatch(rf"\s*{ticks[0]}{{{len(ticks)},}}\s*", line):
                ticks = ""
        elif fence:
            ticks = fence["ticks"]
        else:
            kept.append(line)
    return kept
