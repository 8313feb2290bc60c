"""The entry point of `rl-ckpt`. Imports nothing of the extra `cli`, so that it can say what is missing."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_EXTRA = frozenset(("rich", "typer"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments; those of the process where None.

    Returns:
        The exit code (docs/cli.md, "Exit codes").
    """
    try:
        from rl_ckpt.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        sys.stderr.write(f"error: rl-ckpt needs {error.name}, which is not installed: pip install 'rl-ckpt[cli]'\n")
        return 2
    return run(sys.argv[1:] if argv is None else argv)
