"""Words and numbers for people, and values for JSON. Pure: no terminal, no clock of its own.

Promises: what `clean` gives is one line of printable text, whatever was stored; what `as_json` gives is strict JSON.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

_SIZES = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")
_LONG = 80


def clean(text: object) -> str:
    """One line that a terminal takes for text: names, tags and notes may hold escape sequences of others."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def short(text: object, longest: int = _LONG) -> str:
    """As `clean`, cut off where it is too long."""
    line = clean(text)
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def size(count: float) -> str:
    """Bytes, with three digits that matter."""
    power = 0
    while abs(count) >= 1000 and power < len(_SIZES) - 1:
        count, power = count / 1024, power + 1
    if not power:
        return f"{count:.0f} bytes" if count != 1 else "1 byte"
    return f"{count:.{0 if count >= 100 else 1 if count >= 10 else 2}f} {_SIZES[power]}"


def duration(seconds: float) -> str:
    """A length of time, in one or two units."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    for unit, sub, per in (("d", "h", 86400), ("h", "min", 3600), ("min", "s", 60)):
        if whole >= per:
            rest = whole % per // {"d": 3600, "h": 60, "min": 1}[unit]
            return f"{whole // per} {unit} {rest} {sub}" if rest else f"{whole // per} {unit}"
    raise AssertionError(seconds)


def when(seconds: float) -> str:
    """A point in time: ISO 8601 in UTC, to the second."""
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return f"{seconds} s"


def ago(seconds: float, now: float) -> str:
    """A point in time, told from now."""
    return f"{duration(now - seconds)} ago" if seconds <= now else f"in {duration(seconds - now)}: a clock is wrong"


def number(value: object) -> str:
    """A metric."""
    return f"{value:.6g}" if isinstance(value, float) else short(value, 24)


def count(n: int, one: str, many: str = "") -> str:
    """How many there are of something."""
    return (
        f"{n:,} {one if n == 1 else many or one + 's'}".replace(",", " ")
        if n >= 10_000
        else (f"{n} {one if n == 1 else many or one + 's'}")
    )


_SPOKEN = (
    (re.compile(r"`verify\((\d+), repair=True\)`"), r"`rl-ckpt verify URL \1 --repair`"),
    (re.compile(r"`verify\(repair=True\)`"), "`rl-ckpt verify --repair`"),
    (re.compile(r"storage_options=\{'key': …, 'secret': …\} \(\{'anon': True\}"), "-o key=… -o secret=… (-o anon=true"),
    (re.compile(r"storage_options=\{'client_kwargs': \{'region_name': …\}\}"), "-o client_kwargs.region_name=…"),
    (re.compile(r"storage_options\['endpoint_url'\]"), "--endpoint-url"),
    (re.compile(r"storage_options\['(\w+)'\]"), r"-o \1=…"),
    (re.compile(r"Pass allow_pickle=True"), "Give --allow-pickle"),
    (re.compile(r"trust='full'"), "--trust full"),
    (re.compile(r"LatestN\((?:n=)?(\d+)\)"), r"--latest \1"),
    (re.compile(r"EveryNSteps\((?:n=)?(\d+)\)"), r"--every \1"),
    (re.compile(r"take the tags off, or force it"), "take the tags off (`rl-ckpt untag`), or give --force"),
    (re.compile(r"give them in storage_options or the environment"), "give them in the environment, or with -o"),
)


def spoken(message: str) -> str:
    """A message of the library, with what to do as it is done on the command line."""
    for pattern, words in _SPOKEN:
        message = pattern.sub(words, message)
    return message


def as_json(value: object) -> object:
    """Plain data for strict JSON.

    Args:
        value: Dataclasses, mappings, sequences and plain values; numpy scalars as Python's. Numbers that JSON does not
            have become "NaN", "Infinity" and "-Infinity", other objects their text.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(one) for key, one in value.items()}
    if isinstance(value, float):
        return _float(value)
    if value is None or isinstance(value, str | int):  # bool is an int
        return value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, AbstractSet):
        return [as_json(one) for one in sorted(value, key=str)]
    if isinstance(value, Sequence):
        return [as_json(one) for one in value]
    item = getattr(value, "item", None)  # numpy's scalars
    return as_json(item()) if callable(item) and not getattr(value, "ndim", 1) else str(value)


def _float(value: float) -> float | str:
    if math.isfinite(value):
        return float(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
