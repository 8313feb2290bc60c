"""`top` and `demo`: a run at work."""

from __future__ import annotations

import contextlib
import time
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from rl_ckpt.cli.cluster import Address, connected
from rl_ckpt.cli.command import Session, command
from rl_ckpt.cli.listing import Run
from rl_ckpt.cli.place import only_run
from rl_ckpt.cli.status_lines import status_lines
from rl_ckpt.cli.text import clean
from rl_ckpt.errors import StorageError

_PANEL = "Run"
_AS_GIVEN = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def add(app: typer.Typer) -> None:
    """Adds these commands."""
    command(app, "top", rich_help_panel=_PANEL)(_top)
    settings: dict[str, Any] = {"context_settings": _AS_GIVEN, "rich_help_panel": _PANEL, "add_help_option": False}
    command(app, "demo", store=False, as_json=False, **settings)(_demo)


def _top(
    session: Session,
    url: Run = None,
    every_s: Annotated[float, typer.Option("--every", min=0.1, metavar="SECONDS", help="Between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end, as elsewhere than on a terminal.")] = False,
    address: Address = None,
) -> None:
    """Show what a run does now: saves and restores under way, the nodes' memory, the last checkpoint and its age.

    Without --address only the store is asked, which knows of checkpoints and owners, and not of what is under way.
    """
    from rl_ckpt.runtime.status import StatusReader

    place = only_run(url)
    reader = StatusReader(place, session.options(place))
    with connected(address):
        status = reader.read()
        if session.out.as_json:
            session.out.json(status)
        elif once or not session.out.terminal:
            for line in status_lines(status):
                session.out.line(line)
        else:
            with contextlib.suppress(KeyboardInterrupt):  # how one leaves it
                _watch(session, reader, every_s)


def _watch(session: Session, reader: Any, every_s: float) -> None:
    """Draws a `StatusReader`'s status again and again."""
    shown = Group()
    with session.out.live(shown) as live:
        while True:
            try:
                shown = Group(*(Text(clean(line), no_wrap=True) for line in status_lines(reader.read())))
                live.update(shown, refresh=True)
            except StorageError as error:  # it may answer again
                live.update(Group(shown, Text(clean(error), "red")), refresh=True)
            time.sleep(every_s)


def _demo(session: Session, context: typer.Context) -> None:
    """Run the demo: train on a local Ray cluster that loses a node, and go on from the checkpoint."""
    try:
        from rl_ckpt.demo.__main__ import main
    except ModuleNotFoundError as error:
        raise ImportError(f"the demo needs {error.name}: pip install 'rl-ckpt[demo]'") from error
    raise typer.Exit(main(context.args))
