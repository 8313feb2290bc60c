"""`python -m rl_ckpt.demo`: run the demo job and show what happened.

Exit codes: 0, the job lost a node and went on from its checkpoint; 1, it did not, or a check after the recovery failed;
2, it could not begin (wrong arguments, a URL in use, a store that cannot be reached).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from rl_ckpt.demo.job import run_job
from rl_ckpt.demo.records import JobConfig
from rl_ckpt.demo.report import show
from rl_ckpt.errors import CheckpointError, InvalidInputError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: Arguments; those of the process where None.

    Returns:
        The exit code, see above.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    out = args.out or Path("demo-run") / time.strftime("%Y%m%d-%H%M%S")
    config = JobConfig(
        url=args.url or str((out / "checkpoints").resolve()),
        iterations=args.iterations,
        workers=args.workers,
        workers_after=args.workers_after,
        seed=args.seed,
        save_every=args.save_every,
        address=args.address,
        kill=args.kill,
    )
    if config.kill == "you" and config.address is None:
        parser.error("--kill you needs a cluster that you started: --address")
    if min(config.workers, config.workers_after, config.save_every) < 1 or config.fail_at >= config.iterations:
        parser.error("at least 1 worker, and at least twice as many iterations as there are between saves")
    console = Console()
    say = _ignore if args.quiet else lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)
    started = time.monotonic()
    try:
        result = run_job(config, say)
    except (CheckpointError, ConnectionError) as error:
        print(f"the demo stopped: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidInputError | ConnectionError) else 1
    show(result, console, out / "return.png")
    console.print(f"checkpoints: {config.url}", soft_wrap=True)
    console.print(f"{'went on from its checkpoint' if result.passed else 'FAILED'}, {time.monotonic() - started:.0f} s")
    return 0 if result.passed else 1


def _ignore(line: str) -> None:
    """Takes a line of progress that nobody wants to see."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rl_ckpt.demo",
        description="Reinforcement learning on a Ray cluster that loses a node and goes on from its checkpoint.",
    )
    defaults = JobConfig(url="")
    parser.add_argument("--url", help="where checkpoints go: a folder or any fsspec URL (default: in --out)")
    parser.add_argument("--out", type=Path, help="folder of the plot (default: ./demo-run/<time>)")
    parser.add_argument("--address", help="of a Ray cluster that is running, or auto (default: starts its own)")
    parser.add_argument("--kill", choices=["demo", "you"], default=defaults.kill, help="who kills a node of --address")
    parser.add_argument("--iterations", type=int, default=defaults.iterations)
    parser.add_argument("--workers", type=int, default=defaults.workers, help="rollout workers before the failure")
    parser.add_argument("--workers-after", type=int, default=defaults.workers_after, help="and after it")
    parser.add_argument("--save-every", type=int, default=defaults.save_every, help="iterations between saves")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--quiet", action="store_true", help="only the report at the end")
    return parser


if __name__ == "__main__":
    sys.exit(main())
