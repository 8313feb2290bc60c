"""What all commands share: the options of the store, `--json`, and what becomes of errors and interrupts.

Owns: exit codes (docs/cli.md). Promises: an error of ours is told in one message and an exit code, never as a
traceback; a traceback is a bug of ours.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Concatenate, ParamSpec, get_type_hints

import typer

from rl_ckpt.cli.output import Output
from rl_ckpt.cli.place import is_local, storage_options
from rl_ckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CommitConflictError,
    FencedError,
    InvalidInputError,
    UntrustedDataError,
)

P = ParamSpec("P")

FAILED, WRONG_CALL, NOT_FOUND, OWNED, INTERRUPTED, PIPE_CLOSED = 1, 2, 3, 4, 130, 141

_STORE, _TO = "Store", "Store of the destination"
_OPTION_HELP = "Option of the store as fsspec takes it, such as anon=true or client_kwargs.region_name=eu-west-1."
_COMMON: dict[str, Any] = {
    "storage_option": Annotated[
        list[str] | None,
        typer.Option("--storage-option", "-o", metavar="NAME=VALUE", help=_OPTION_HELP, rich_help_panel=_STORE),
    ],
    "endpoint_url": Annotated[
        str | None,
        typer.Option(metavar="URL", help="S3 server; $AWS_ENDPOINT_URL otherwise.", rich_help_panel=_STORE),
    ],
    "profile": Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Profile of the AWS files; $AWS_PROFILE otherwise.", rich_help_panel=_STORE),
    ],
}
_DESTINATION: dict[str, Any] = {
    "to_storage_option": Annotated[
        list[str] | None,
        typer.Option("--to-storage-option", metavar="NAME=VALUE", help="Where it differs.", rich_help_panel=_TO),
    ],
    "to_endpoint_url": Annotated[
        str | None, typer.Option(metavar="URL", help="Where it differs.", rich_help_panel=_TO)
    ],
    "to_profile": Annotated[str | None, typer.Option(metavar="NAME", help="Where it differs.", rich_help_panel=_TO)],
}
_JSON = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead.")]


@dataclass(frozen=True, slots=True)
class Session:
    """What a command gets beside its own arguments."""

    out: Output
    _source: dict[str, Any]
    _destination: dict[str, Any] | None

    def options(self, url: str) -> dict[str, Any]:
        """Options for the run, or for the source of a command with two places."""
        return {} if self._destination is not None and is_local(url) else self._source

    def to_options(self, url: str) -> dict[str, Any]:
        """Options for the destination: the source's, where none of its own were given."""
        if is_local(url):
            return {}
        return self._destination or self._source


def command(
    app: typer.Typer, name: str, *, interrupted: str = "", store: bool = True, two_places: bool = False,
    as_json: bool = True, **settings: Any,
) -> Callable[[Callable[Concatenate[Session, P], None]], Callable[Concatenate[Session, P], None]]:  # fmt: skip
    """Makes a function a command; its first parameter is the `Session`, the others are its own arguments.

    Args:
        app: Where it belongs.
        name: As people type it.
        interrupted: What an interrupt leaves, for the message.
        store: Whether it has the options of a store.
        two_places: Whether it has those of a destination too.
        as_json: Whether it has `--json`.
        **settings: For typer.
    """
    common = dict(_COMMON if store else {}) | (_DESTINATION if two_places else {})

    def wrap(function: Callable[Concatenate[Session, P], None]) -> Callable[Concatenate[Session, P], None]:
        hints = get_type_hints(function, include_extras=True)
        own = [p.replace(annotation=hints[p.name]) for p in list(inspect.signature(function).parameters.values())[1:]]
        more = [_keyword(key, hint, None) for key, hint in common.items()]
        if as_json:
            more.append(_keyword("as_json", _JSON, False))

        @functools.wraps(function)
        def called(**arguments: Any) -> None:
            out = Output(arguments.pop("as_json", False))
            flags = {key: arguments.pop(key) for key in common}
            with _guarded(out, interrupted):
                function(_session(out, flags, two_places), **arguments)  # type: ignore[call-arg]

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + more
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in parameters}
        del called.__wrapped__
        app.command(name, **settings)(called)
        return function

    return wrap


def _keyword(name: str, hint: Any, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _session(out: Output, flags: dict[str, Any], two_places: bool) -> Session:
    source = storage_options(flags.get("storage_option"), flags.get("endpoint_url"), flags.get("profile"))
    if not two_places:
        return Session(out, source, None)
    names = ("to_storage_option", "to_endpoint_url", "to_profile")
    return Session(out, source, storage_options(*(flags[name] for name in names)))


def exit_code(error: CheckpointError) -> int:
    """Of an error of ours."""
    if isinstance(error, CheckpointNotFoundError):
        return NOT_FOUND
    if isinstance(error, CommitConflictError | FencedError):
        return OWNED
    return WRONG_CALL if isinstance(error, InvalidInputError | UntrustedDataError) else FAILED


@contextlib.contextmanager
def _guarded(out: Output, interrupted: str) -> Iterator[None]:
    try:
        with _told(out):
            yield
            sys.stdout.flush()
    except KeyboardInterrupt as error:
        out.interrupted(f"interrupted{'; ' if interrupted else ''}{interrupted}")
        raise typer.Exit(INTERRUPTED) from error
    except CheckpointError as error:
        out.error(str(error), error.code)
        raise typer.Exit(exit_code(error)) from error
    except ImportError as error:  # of an extra; the message says which
        out.error(str(error), "not_installed")
        raise typer.Exit(WRONG_CALL) from error
    except BrokenPipeError as error:  # `rl-ckpt ls | head`: nobody reads on, and the interpreter must not try either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(PIPE_CLOSED) from error


class _Handler(logging.Handler):
    def __init__(self, out: Output) -> None:
        super().__init__(logging.WARNING)
        self._output = out

    def emit(self, record: logging.LogRecord) -> None:
        self._output.warn(record.getMessage())


@contextlib.contextmanager
def _told(out: Output) -> Iterator[None]:
    """Shows warnings of the faces and what the library logs as lines of ours."""
    logger, handler = logging.getLogger("rl_ckpt"), _Handler(out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: out.warn(str(message))
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
