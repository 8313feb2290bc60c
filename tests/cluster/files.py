"""What the tests in this folder look at: the files of cluster/ as data, with the image names and commands in them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
# A name with a tag of at least two numbers, which upstream does not move to another minor version.
PINNED = re.compile(r"^[a-z0-9./-]+:v?\d+\.\d+[a-z0-9.-]*$")


def documents(path: Path) -> list[dict[str, Any]]:
    """The documents of a YAML file."""
    return [made for made in yaml.safe_load_all(path.read_text()) if made is not None]


def words(node: Any) -> Iterator[str]:
    """Every string anywhere in a tree, keys left out."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for part in node.values():
            yield from words(part)
    elif isinstance(node, list):
        for part in node:
            yield from words(part)


def images(node: Any) -> Iterator[str]:
    """Values of every key `image`."""
    if isinstance(node, dict):
        for key, part in node.items():
            if key == "image" and isinstance(part, str):
                yield part
            else:
                yield from images(part)
    elif isinstance(node, list):
        for part in node:
            yield from images(part)


def run_with_stand_ins(
    command: list[str], folder: Path, names: list[str], environment: dict[str, str]
) -> list[list[str]]:
    """Run a container's command on this machine with programs that only tell how they were called.

    Args:
        command: What the container would run.
        folder: Empty; the stand-ins are put there.
        names: Of the programs that are replaced.
        environment: Variables that the container has.

    Returns:
        The calls, name and arguments, in order.
    """
    told = folder / "calls"
    told.touch()
    for name in names:
        program = folder / name
        program.write_text(f"""#!/bin/sh\nprintf '%s\\0' {name} "$@" >> {told}; printf '\\n' >> {told}\n""")
        program.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, env={**environment, "PATH": path}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.rstrip("\0").split("\0") for line in told.read_text().splitlines()]


def ray_start_options() -> set[str]:
    """Every option of the `ray start` that is installed here."""
    from ray.scripts.scripts import start

    assert isinstance(start, click.Command)
    return {name for parameter in start.params for name in parameter.opts}


def ray_start_commands(node: Any) -> list[list[str]]:
    """Options of every `ray start` that a tree's strings, or lists of strings, hold."""
    texts = [*words(node), *(" ".join(part) for part in _string_lists(node))]
    commands = [match.group(1) for text in texts for match in re.finditer(r"\bray start\b([^;\n]*)", text)]
    # A list is met as a whole and part by part.
    found = {tuple(re.findall(r"--[a-z-]+", command)) for command in commands}
    return [list(options) for options in sorted(found) if options]


def _string_lists(node: Any) -> Iterator[list[str]]:
    if isinstance(node, list) and node and all(isinstance(part, str) for part in node):
        yield node
    elif isinstance(node, dict | list):
        for part in node.values() if isinstance(node, dict) else node:
            yield from _string_lists(part)
