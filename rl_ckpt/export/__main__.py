"""`python -m rl_ckpt.export URL …`: the same as `rl-ckpt export`, which does it (docs/export.md, docs/cli.md).

With any exit code but 0 there is no file, nor a part of one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rl_ckpt.cli.main import main as cli


def main(argv: Sequence[str] | None = None) -> int:
    """Exports.

    Args:
        argv: Arguments; those of the process where None.

    Returns:
        The exit code (docs/cli.md).
    """
    return cli(["export", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
