"""Which run, and which of its checkpoints, the words of a command mean; and how its store is reached.

Owns: $RL_CKPT_URL, refs as people write them, and the options of the store. Reads nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.store.urls import normalise_url

URL_VARIABLE = "RL_CKPT_URL"
_TEXT = frozenset(("key", "secret", "token", "username", "password", "profile", "endpoint_url"))
"""Options that are text even where they look like a number."""


def run_and_rest(words: Sequence[str | None]) -> tuple[str, list[str]]:
    """The run's url, which $RL_CKPT_URL may stand for, and the words after it.

    Args:
        words: As they were given, None for those that were not. With $RL_CKPT_URL set, a first word is a url where it
            has a "/" (or is "." or ".."), and else what follows a url.

    Raises:
        InvalidInputError: No run is named.
    """
    given = [word for word in words if word is not None]
    default = os.environ.get(URL_VARIABLE)
    if default and not (given and ("/" in given[0] or given[0] in (".", "..", "~"))):
        return default, given
    if not given:
        raise InvalidInputError(f"which run? Give its url, a folder or s3://bucket/run-7, or set ${URL_VARIABLE} to it")
    return given[0], given[1:]


def only_run(url: str | None) -> str:
    """The run's url, for commands that take nothing else.

    Raises:
        InvalidInputError: No run is named.
    """
    place, rest = run_and_rest([url])
    if rest:
        raise InvalidInputError(
            f"{rest[0]!r} is no url: ${URL_VARIABLE} is set, and a folder is written with a '/' then: ./{rest[0]}"
        )
    return place


def run_and_refs(words: Sequence[str | None], names: Sequence[str], optional: int = 0) -> tuple[str, list[str | None]]:
    """The run's url and as many words after it as there are names.

    Args:
        words: As for `run_and_rest`.
        names: What the words are, for messages.
        optional: How many of the last ones may be missing; None stands for them.

    Raises:
        InvalidInputError: Too few or too many words.
    """
    url, rest = run_and_rest(words)
    if len(rest) < len(names) - optional:
        raise InvalidInputError(f"{names[len(rest)]} is missing (the run is {url})")
    if len(rest) > len(names):
        raise InvalidInputError(
            f"{rest[len(names)]!r} is too much (the run is {url}, from ${URL_VARIABLE} or the call)"
        )
    return url, [*rest, *[None] * (len(names) - len(rest))]


def ref(text: str) -> str | int:
    """A ref as the faces take it: a step as a number; an id, a tag or "latest" as text."""
    return int(text) if text.isdecimal() and text.isascii() else text


def storage_options(given: Sequence[str] | None, endpoint_url: str | None, profile: str | None) -> dict[str, Any]:
    """Options of a store, as fsspec takes them, from `name=value` words; `a.b=value` stands for {"a": {"b": value}}.

    Raises:
        InvalidInputError: A word has no "=", or contradicts another.
    """
    out: dict[str, Any] = {}
    if endpoint_url is not None:
        out["endpoint_url"] = endpoint_url
    if profile is not None:
        out["profile"] = profile
    for word in given or ():
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise InvalidInputError(f"--storage-option {word!r} must be NAME=VALUE, such as anon=true")
        *outer, last = name.split(".")
        inner = out
        for part in outer:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise InvalidInputError(f"--storage-option {word!r}: {part!r} has a value already")
        inner[last] = value if last in _TEXT else _value(value)
    return out


def is_local(url: str) -> bool:
    """Whether a url is a folder of this machine."""
    return normalise_url(url).startswith("file://")


def _value(text: str) -> Any:
    """JSON where it is (true, 5, 0.5, null, {…}), else text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
