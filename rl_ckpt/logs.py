"""Logs with fields: every record of this package has `run`, `step`, `attempt` and `node`, empty where it has none.

Owns: the fields, and a handler that writes JSON lines. Promises: nothing is configured unless `to_json` is called; the
logger is "rl_ckpt", as any library's. In Ray's processes, `ray.init(logging_config=ray.LoggingConfig(encoding="JSON"))`
puts the same fields into Ray's own JSON lines.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import IO, TYPE_CHECKING, Any

from rl_ckpt.errors import InvalidInputError

NAME = "rl_ckpt"
FIELDS = ("run", "step", "attempt", "node")
"""What every record has: url of the run, step of the training, the try's id (of a checkpoint's id the part after the
step), id of the Ray node."""

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter

_here: dict[str, object] = {}  # of this process, where it serves one run


class _Fields(_Adapter):
    """A logger whose records all have the fields."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Adds the fields that a call does not give."""
        given: Mapping[str, object] = kwargs.get("extra") or {}
        kwargs["extra"] = {**dict.fromkeys(FIELDS, ""), **_here, **given}
        return msg, kwargs


def logger(name: str = NAME) -> _Fields:
    """A logger of this package. A call's fields: `log.info("...", extra={"step": 7})`."""
    return _Fields(logging.getLogger(name), {})


def here(run: str, node: str) -> None:
    """What this process's records say where a call does not: for actors, which serve one run on one node."""
    _here.update(run=run, node=node)


def fields(checkpoint: str) -> dict[str, object]:
    """`step` and `attempt` of a checkpoint's id, for `extra`."""
    step, _, attempt = checkpoint.partition("-")
    return {"step": int(step) if step.isdecimal() else "", "attempt": attempt}


def to_json(level: int | str = logging.INFO, stream: IO[str] | None = None) -> logging.Handler:
    """Writes this package's records of this process as JSON, a line each; they no longer go to the root's handlers.

    Args:
        level: From which level on.
        stream: Where to; None: standard error.

    Returns:
        The handler; `logging.getLogger("rl_ckpt").removeHandler` takes it away.

    Raises:
        InvalidInputError: python-json-logger is not installed (`pip install rl-ckpt[metrics]`), or no such level.
    """
    try:
        from pythonjsonlogger.json import JsonFormatter
    except ImportError as error:
        raise InvalidInputError(
            "python-json-logger is not installed; `pip install rl-ckpt[metrics]` brings it"
        ) from error
    log = logging.getLogger(NAME)
    try:
        log.setLevel(level)
    except (ValueError, TypeError) as error:
        raise InvalidInputError(f"level={level!r} is none of logging's: {error}") from error
    handler = logging.StreamHandler(stream or sys.stderr)
    known = ("asctime", "levelname", "name", "message", *FIELDS)
    handler.setFormatter(JsonFormatter(list(known), rename_fields={"asctime": "time", "levelname": "level"}))
    log.addHandler(handler)
    log.propagate = False
    return handler
