"""Everything that a command shows: tables, trees and lines on a terminal, plain lines elsewhere, or one JSON document.

Owns: what goes to stdout (results) and to stderr (errors, warnings, progress), and how. Promises: with `--json` stdout
holds exactly one JSON document; elsewhere than on a terminal no colours, no line breaks of its own, one record a line;
no text that was stored reaches a terminal as anything but text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from rl_ckpt.cli.text import as_json, clean, spoken

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


@dataclass(frozen=True, slots=True)
class Column:
    """Of a table."""

    name: str
    right: bool = False
    """Numbers stand on the right."""
    style: str = ""
    whole: bool = False
    """Never broken over lines: people copy it."""


@dataclass(slots=True)
class Node:
    """Of a tree: a name, what is said about it, and what is below."""

    name: str
    about: str = ""
    children: list[Node] = field(default_factory=list)


class Output:
    """Where one command's results go.

    Args:
        as_json: Whether `--json` was given.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        plain = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": False}
        self._out = Console(file=sys.stdout, **plain)  # type: ignore[arg-type]
        self._err = Console(file=sys.stderr, **plain)  # type: ignore[arg-type]

    @property
    def terminal(self) -> bool:
        """Whether results go to a terminal."""
        return self._out.is_terminal and not self.as_json

    @property
    def errors(self) -> Console:
        """Where progress is shown."""
        return self._err

    def json(self, document: object) -> None:
        """The one document of `--json`."""
        sys.stdout.write(json.dumps(as_json(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        sys.stdout.flush()

    def json_line(self, document: object) -> None:
        """One of many documents, a line each: of commands that go on until they are stopped."""
        sys.stdout.write(json.dumps(as_json(document), ensure_ascii=False, allow_nan=False) + "\n")
        sys.stdout.flush()

    def line(self, text: str = "", style: str = "") -> None:
        """One line of result."""
        if self.terminal:
            self._out.print(Text(clean(text), style), soft_wrap=True)
        else:
            sys.stdout.write(clean(text) + "\n")

    def flush(self) -> None:
        """So that who reads a pipe sees it now."""
        sys.stdout.flush()

    def fields(self, pairs: Sequence[tuple[str, object]]) -> None:
        """Names and values, a line each."""
        width = max(len(name) for name, _ in pairs) + 1
        for name, value in pairs:
            label = f"{name}:".ljust(width)
            if self.terminal:
                self._out.print(Text.assemble((label, "dim"), " ", clean(value)), soft_wrap=True)
            else:
                sys.stdout.write(f"{label} {clean(value)}\n")

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[object]]) -> None:
        """Rows of values; columns in which no row has anything are left out."""
        used = [i for i in range(len(columns)) if any(clean(row[i]) for row in rows)]
        columns = [columns[i] for i in used]
        cells = [[clean(row[i]) for i in used] for row in rows]
        if not self.terminal:
            for line in _plain_table(columns, cells):
                sys.stdout.write(line + "\n")
            return
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for column, *texts in zip(columns, *cells, strict=True):
            table.add_column(
                column.name, justify="right" if column.right else "left", style=column.style or None,
                no_wrap=column.whole, min_width=max(map(len, texts)) if column.whole else None,
            )  # fmt: skip
        for row in cells:
            table.add_row(*map(Text, row))
        self._out.print(table)

    def states(self, rows: Sequence[tuple[str, str, str, str]], width: int = 0) -> None:
        """Findings: state ("ok", "warn", "fail", "skip"), name, what was found, and what to do.

        Args:
            rows: Of these.
            width: Of the names, at least.
        """
        width = max([width, *(len(name) for _, name, _, _ in rows)])
        for state, name, found, advice in rows:
            head = f"{state:4}  {clean(name).ljust(width)}  "
            more = [f"{' ' * 6}{' ' * width}  → {clean(spoken(advice))}"] if advice else []
            if not self.terminal:
                sys.stdout.write("\n".join([f"{head}{clean(spoken(found))}", *more]) + "\n")
                continue
            style = _STYLES.get(state, "")
            self._out.print(Text.assemble((head, style), clean(spoken(found))), soft_wrap=True)
            for line in more:
                self._out.print(Text(line, style), soft_wrap=True)

    def tree(self, root: Node) -> None:
        """A tree, as `tree` shows folders."""
        if not self.terminal:
            sys.stdout.write("\n".join(_plain_tree(root)) + "\n")
            return
        shown = Tree(_label(root), guide_style="dim")
        stack = [(shown, root)]
        while stack:
            branch, node = stack.pop()
            stack.extend((branch.add(_label(child)), child) for child in node.children)
        self._out.print(shown, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Something that the user should know although the command goes on."""
        self._said("warning", text, "yellow")

    def error(self, text: str, code: str = "error") -> None:
        """Why the command ends; with `--json` also as the document."""
        if self.as_json:
            self.json({"error": {"code": code, "message": spoken(text)}})
        self._said("error", text, "bold red")

    def interrupted(self, text: str) -> None:
        """That Ctrl-C or SIGTERM ended the command, and what it leaves."""
        if self.as_json:
            self.json({"error": {"code": "interrupted", "message": text}})
        self.note(text)

    def note(self, text: str) -> None:
        """What goes on, on stderr."""
        sys.stderr.write(clean(text) + "\n")
        sys.stderr.flush()

    def live(self, shown: RenderableType) -> Live:
        """A part of the terminal that is drawn anew again and again."""
        return Live(shown, console=self._out, auto_refresh=False, transient=False)

    def _said(self, what: str, text: str, style: str) -> None:
        first, *more = spoken(text).splitlines() or [""]  # errors list what is wrong, a line each
        lines = "\n".join([clean(first), *map(clean, more)])
        if self._err.is_terminal:
            self._err.print(Text.assemble((f"{what}: ", style), lines), soft_wrap=True)
        else:
            sys.stderr.write(f"{what}: {lines}\n")
            sys.stderr.flush()


def _label(node: Node) -> Text:
    return Text.assemble((clean(node.name), "bold" if node.children else ""), ("  " + clean(node.about), "dim"))


def _plain_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max([len(column.name), *(len(row[i]) for row in rows)]) for i, column in enumerate(columns)]
    for row in [[column.name for column in columns], *rows]:
        cells = zip(row, widths, columns, strict=True)
        yield "  ".join(c.rjust(w) if column.right else c.ljust(w) for c, w, column in cells).rstrip()


def _plain_tree(root: Node) -> Iterator[str]:
    """Lines of a tree; not recursive, as states may be deep."""
    stack = [(root, "", "")]
    while stack:
        node, head, below = stack.pop()
        yield f"{head}{clean(node.name)}  {clean(node.about)}".rstrip()
        last = len(node.children) - 1
        for i in range(last, -1, -1):
            guide = ("└── ", "    ") if i == last else ("├── ", "│   ")
            stack.append((node.children[i], below + guide[0], below + guide[1]))
