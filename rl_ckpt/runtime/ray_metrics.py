"""Measurements as Ray's metrics: exported at the metrics port of each node, with `ray_` in front of their names.

Promises: nothing is sent by the one who measures; a measurement goes into this process's memory (2 µs), which Ray
reads. Where Ray has no metrics port (`ray[default]` is not installed) it goes nowhere. Does not: run without Ray.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ray.util import metrics as ray_metrics

from rl_ckpt import metrics
from rl_ckpt.metrics import Metric


class RaySink:
    """See `metrics.Sink`."""

    def __init__(self) -> None:
        """Makes Ray's metrics; they are sent once they have a value."""
        self._metrics: dict[str, Any] = {metric.name: _made(metric) for metric in metrics.TABLE}

    def record(self, metric: Metric, value: float, labels: tuple[str, ...]) -> None:
        """See `metrics.Sink.record`."""
        tags, made = dict(zip(metric.labels, labels, strict=True)), self._metrics[metric.name]
        match metric.kind:
            case "counter":
                made.inc(value, tags)
            case "gauge":
                made.set(value, tags)
            case "histogram":
                made.observe(value, tags)


def _made(metric: Metric) -> Any:
    match metric.kind:
        case "counter":
            return ray_metrics.Counter(metric.name, metric.help, metric.labels)
        case "gauge":
            return ray_metrics.Gauge(metric.name, metric.help, metric.labels)
        case "histogram":
            return ray_metrics.Histogram(metric.name, metric.help, list(metric.buckets), metric.labels)


@lru_cache(maxsize=1)
def tell_ray() -> None:
    """From here on Ray's metrics have what this process measures; calling it again changes nothing."""
    metrics.add_sink(RaySink())
