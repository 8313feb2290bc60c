"""RLlib's metrics loggers as state trees.

Not by their own `get_state`, which joins names with "--", so that a policy called "a--b" comes back as two levels, and
whose windows come back as lists where they were deques. Numbers stand in one text: a hundred policies have thousands of
statistics, and a leaf for each would make every save slow and every manifest large.
"""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger
from ray.rllib.utils.metrics.stats.base import StatsBase

from rl_ckpt.errors import InvalidInputError

_TAG = "$"
_JSON = (type(None), bool, int, float, str)


def metrics_tree(logger: MetricsLogger) -> dict[str, Any]:
    """A logger's statistics.

    Returns:
        "text": JSON, deflated (zlib): for each statistic its path and its state; "arrays": what of it are arrays and
        tensors.

    Raises:
        InvalidInputError: Something was logged that is neither a number, text, array nor a container of these.
    """
    arrays: list[Any] = []
    with logger._threading_lock:
        found = [
            [_encode(path, arrays, path), _encode(stats.get_state(), arrays, path)]
            for path, stats in _all(logger.stats)
        ]
    return {"text": zlib.compress(json.dumps(found, separators=(",", ":")).encode()), "arrays": arrays}


def metrics_problems(logger: MetricsLogger, tree: Mapping[str, Any]) -> list[str]:
    """What `set_metrics` could not make: statistics of classes that the logger does not know; changes nothing."""
    unknown = sorted({state["stats_cls_identifier"] for _, state in _saved(tree)} - set(logger.stats_cls_lookup or {}))
    text = "give them by `config.reporting(custom_stats_cls_lookup=...)`"
    return [f"metrics use statistics {unknown}, which are not known here; {text}"] if unknown else []


def set_metrics(logger: MetricsLogger, tree: Mapping[str, Any]) -> None:
    """Puts saved statistics in place of a logger's own.

    Args:
        logger: Of an Algorithm, learner or env runner.
        tree: What `metrics_tree` gave.

    Raises:
        InvalidInputError: As `metrics_problems` tells; nothing was changed.
    """
    problems = metrics_problems(logger, tree)
    if problems:
        raise InvalidInputError("; ".join(problems))
    made: dict[Any, Any] = {}
    for path, state in _saved(tree):
        *above, last = path
        inner = made
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = _stats(logger, state)
    with logger._threading_lock:
        logger.stats = made


def _all(stats: Mapping[Any, Any], above: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], StatsBase]]:
    for key, value in stats.items():
        if isinstance(value, StatsBase):
            yield (*above, key), value
        else:
            yield from _all(value, (*above, key))


def _saved(tree: Mapping[str, Any]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    return [
        (_decode(path, tree["arrays"]), _decode(state, tree["arrays"]))
        for path, state in json.loads(zlib.decompress(tree["text"]))
    ]


def _encode(value: Any, arrays: list[Any], where: Sequence[Any]) -> Any:
    """As JSON that tells every type; deques become lists, which the statistics make deques of again."""
    if type(value) in _JSON:
        return value
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return _number(value) or _array(value, arrays)
    if isinstance(value, deque | list):
        return [_encode(item, arrays, where) for item in value]
    if isinstance(value, tuple):
        return {_TAG: "tuple", "v": [_encode(item, arrays, where) for item in value]}
    if isinstance(value, Mapping):
        if all(type(key) is str for key in value) and _TAG not in value:
            return {key: _encode(item, arrays, where) for key, item in value.items()}
        return {_TAG: "dict", "v": [[_encode(part, arrays, where) for part in item] for item in value.items()]}
    name = "/".join(map(str, where))
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise InvalidInputError(f"the metric {name!r} holds a {kind}; log numbers, strings, arrays and containers of them")


def _number(value: Any) -> dict[str, Any] | None:
    """A scalar whose value Python's own number holds exactly."""
    name = str(value.dtype)
    if value.ndim or not name.removeprefix("torch.").startswith(
        ("bool", "int", "uint", "float16", "float32", "float64", "bfloat16")
    ):
        return None
    kind = "torch" if isinstance(value, torch.Tensor) else "numpy" if isinstance(value, np.generic) else "array"
    return {_TAG: kind, "dtype": name.removeprefix("torch."), "v": value.item()}


def _array(value: Any, arrays: list[Any]) -> dict[str, Any]:
    own = value if isinstance(value, np.generic) else value.clone() if isinstance(value, torch.Tensor) else value.copy()
    arrays.append(own)
    return {_TAG: "at", "v": len(arrays) - 1}


def _decode(value: Any, arrays: Sequence[Any]) -> Any:
    if isinstance(value, list):
        return [_decode(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    inner: Any = value.get("v")
    match value.get(_TAG):
        case None:
            return {key: _decode(item, arrays) for key, item in value.items()}
        case "tuple":
            return tuple(_decode(item, arrays) for item in inner)
        case "dict":
            return {_decode(key, arrays): _decode(item, arrays) for key, item in inner}
        case "at":
            return arrays[inner]
        case "torch":
            return torch.tensor(inner, dtype=getattr(torch, value["dtype"]))
    scalar = np.asarray(inner).astype(_dtype(value["dtype"]))
    return scalar if value[_TAG] == "array" else scalar[()]


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name)) if name == "bfloat16" else np.dtype(name)


def _stats(logger: MetricsLogger, state: Mapping[str, Any]) -> Any:
    known: Any = logger.stats_cls_lookup
    stats = known[state["stats_cls_identifier"]].from_state(dict(state))
    if hasattr(stats, "_set_items"):  # its own set_state leaves a list where it takes from the left of a deque
        stats._set_items(stats.items)
    return stats
