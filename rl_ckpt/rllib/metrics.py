"""RLlib's metrics loggers as state trees.

Not by their own `get_state`, which joins names with "--", so that a policy called "a--b" comes back as two levels, and
whose windows come back as lists where they were deques.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger
from ray.rllib.utils.metrics.stats.base import StatsBase

from rl_ckpt.errors import InvalidInputError


def metrics_tree(logger: MetricsLogger) -> list[dict[str, Any]]:
    """A logger's statistics: for each its path (a list of keys) and its state, as plain data and arrays."""
    out: list[dict[str, Any]] = []
    with logger._threading_lock:
        _collect(logger.stats, (), out)
    return out


def metrics_problems(logger: MetricsLogger, saved: Sequence[Mapping[str, Any]]) -> list[str]:
    """What `set_metrics` could not make: statistics of classes that the logger does not know; changes nothing."""
    unknown = sorted({item["state"]["stats_cls_identifier"] for item in saved} - set(logger.stats_cls_lookup or {}))
    text = "give them by `config.reporting(custom_stats_cls_lookup=...)`"
    return [f"metrics use statistics {unknown}, which are not known here; {text}"] if unknown else []


def set_metrics(logger: MetricsLogger, saved: Sequence[Mapping[str, Any]]) -> None:
    """Puts saved statistics in place of a logger's own.

    Args:
        logger: Of an Algorithm, learner or env runner.
        saved: What `metrics_tree` gave.

    Raises:
        InvalidInputError: As `metrics_problems` tells; nothing was changed.
    """
    problems = metrics_problems(logger, saved)
    if problems:
        raise InvalidInputError("; ".join(problems))
    made: dict[Any, Any] = {}
    for item in saved:
        *above, last = item["path"]
        inner = made
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = _stats(logger, item["state"])
    with logger._threading_lock:
        logger.stats = made


def _collect(stats: Mapping[Any, Any], path: tuple[Any, ...], out: list[dict[str, Any]]) -> None:
    for key, value in stats.items():
        if isinstance(value, StatsBase):
            out.append({"path": [*path, key], "state": _plain(value.get_state())})
        else:
            _collect(value, (*path, key), out)


def _plain(value: Any) -> Any:
    """Deques as lists; tensors of their own memory, and on the CPU."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, deque | list):
        return [_plain(inner) for inner in value]
    if isinstance(value, tuple):
        return tuple(_plain(inner) for inner in value)
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def _stats(logger: MetricsLogger, state: Mapping[str, Any]) -> Any:
    known: Any = logger.stats_cls_lookup
    stats = known[state["stats_cls_identifier"]].from_state(dict(state))
    if hasattr(stats, "_set_items"):  # its own set_state leaves a list where it takes from the left of a deque
        stats._set_items(stats.items)
    return stats
