"""The commands of `rl-ckpt`, put together.

Owns: their order in `--help`, the options before the command, and signals.
"""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from rl_ckpt._version import __version__
from rl_ckpt.cli import checking, converting, keeping, lineage, listing, moving, running

_EPILOG = (
    "A run is named by its url, a folder or any fsspec url (s3://bucket/run-7), or by $RL_CKPT_URL. A checkpoint is "
    "named by its step, its id, a tag, or 'latest'. Credentials come from where every AWS tool has them. Exit codes: "
    "0 done, 1 failed or damaged, 2 wrong call, 3 not found, 4 another job owns the run, 130 interrupted."
)

app = typer.Typer(
    name="rl-ckpt",
    help="Checkpoints of reinforcement learning on Ray: what is there, whether it is good, and where it goes.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for part in (listing, checking, keeping, lineage, moving, converting, running):
    part.add(app)


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"rl-ckpt {__version__}\n")
        raise typer.Exit


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """Before every command."""


def run(argv: Sequence[str]) -> int:
    """Runs one command.

    Args:
        argv: Its words.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever a name holds, it can be shown
    with _terminated():
        try:
            app(list(argv), prog_name="rl-ckpt")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM is as Ctrl-C: what is under way is undone or left to go on from."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
