"""Results of `algo.train()`: numbers by path, and those that a checkpoint is found by later."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

_RECORDED = (
    "training_iteration",
    "num_env_steps_sampled_lifetime",
    "env_runners/episode_return_mean",
    "evaluation/env_runners/episode_return_mean",
)
_PLAIN = str | bool | int | float | np.integer | np.floating


def at(result: Mapping[str, Any], path: str) -> float | None:
    """The number at a path of a nested result, such as "env_runners/episode_return_mean".

    Keys may hold a "/" themselves (names of policies). None where there is no number there, or NaN.
    """
    found: Any = result.get(path)
    if found is None:
        for cut in (i for i, char in enumerate(path) if char == "/"):
            inner = result.get(path[:cut])
            if isinstance(inner, Mapping):
                value = at(inner, path[cut + 1 :])
                if value is not None:
                    return value
        return None
    return _number(found)


def _number(value: Any) -> float | None:
    if isinstance(value, np.integer | np.floating):
        value = value.item()
    return value if type(value) in (int, float) and not math.isnan(value) else None


def recorded(result: Mapping[str, Any], best: tuple[str, str] | None = None) -> dict[str, float]:
    """Metrics for a checkpoint: by path, those of a usual kind that a result has, and the one that is watched."""
    paths = dict.fromkeys((*_RECORDED, *([] if best is None else [best[0]])))
    found = {path: at(result, path) for path in paths}
    return {path: value for path, value in found.items() if value is not None}


def recorded_as_given(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values among somebody's metrics: numbers and strings."""
    return {name: value for name, value in metrics.items() if isinstance(value, _PLAIN)}
