"""`python -m benchmarks`: answers the questions, prints tables, keeps the samples.

`compare A.json B.json` sets two runs side by side; `page RUN.json` writes docs/benchmarks.md and its plots from one.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks import page, results, run, show
from benchmarks.questions import QUESTIONS
from benchmarks.settings import QUICK, Settings

_OUT = Path("benchmarks/out")


def main() -> int:
    """Runs what the arguments say; not 0 where a question gave no figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    _run_arguments(parser)
    compare = commands.add_parser("compare", help="two kept runs side by side")
    compare.add_argument("a", type=Path)
    compare.add_argument("b", type=Path)
    paged = commands.add_parser("page", help="docs/benchmarks.md and plots from a kept run")
    paged.add_argument("kept", type=Path)
    paged.add_argument("--docs", type=Path, default=Path("docs"))
    one = commands.add_parser("answer", help="one group of questions in this process (what a run starts)")
    one.add_argument("module")
    one.add_argument("function")
    one.add_argument("settings", help="JSON")
    one.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.command == "compare":
        show.comparison(results.load(args.a), results.load(args.b))
    elif args.command == "page":
        page.write(results.load(args.kept), args.docs)
    elif args.command == "answer":
        run.answer(args.module, args.function, args.settings, args.out)
    else:
        return _run(args)
    return 0


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = Settings()
    parser.add_argument("--only", default="", help=f"comma-separated, of: {', '.join(QUESTIONS)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--json", type=Path, default=None, help=f"file for the samples; default: in {_OUT}")
    for name, value in defaults.as_dict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=None, help=f"default: {value}")


def _run(args: argparse.Namespace) -> int:
    base = QUICK if args.quick else Settings()
    chosen = {name: value for name in base.as_dict() if (value := getattr(args, name)) is not None}
    settings = Settings(**(base.as_dict() | chosen))
    names = [name for name in args.only.split(",") if name] or list(QUESTIONS)
    unknown = sorted(set(names) - set(QUESTIONS))
    if unknown:
        print(f"unknown questions: {', '.join(unknown)}; there are: {', '.join(QUESTIONS)}", file=sys.stderr)
        return 2
    found = run.run(names, settings)
    path = args.json or _OUT / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    results.keep(found, path)
    show.run(found)
    print(f"samples: {path}")
    return 1 if found.failed else 0


if __name__ == "__main__":
    sys.exit(main())
