"""Metrics: what is measured of saves, restores, the memory tier and the store, under which names, and who is told.

Owns: the table of names, which dashboards and alerts rely on (tests compare them), and the sinks of this process.
Promises: a sink that fails is taken out and never makes a save or restore fail; with no sink a measurement costs a
look at an empty tuple. Does not: keep numbers itself, or know Ray (`runtime.ray_metrics` is the sink for it).

Under plain Prometheus the names are those of the table; Ray puts `ray_` in front of them.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rl_ckpt import logs
from rl_ckpt.errors import InvalidInputError

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

    from prometheus_client import CollectorRegistry

Kind = Literal["counter", "gauge", "histogram"]

_log = logs.logger()

_STALLS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_LONG_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One thing that is measured."""

    name: str
    """As Prometheus knows it."""
    kind: Kind
    """What may be done with it: a counter only grows, a histogram counts observations by size."""
    help: str
    """What it says, with its unit."""
    labels: tuple[str, ...] = ("run",)
    """Names of its labels; `run` is the run's url, without secrets."""
    buckets: tuple[float, ...] = ()
    """Upper limits, of a histogram."""


SAVES_BEGUN = Metric("rl_ckpt_saves_begun_total", "counter", "Saves that were begun.")
SAVES_COMMITTED = Metric("rl_ckpt_saves_committed_total", "counter", "Saves that became checkpoints.")
SAVES_FAILED = Metric(
    "rl_ckpt_saves_failed_total", "counter", "Saves that failed, by the code of their error.", ("run", "reason")
)
STALL = Metric(
    "rl_ckpt_stall_seconds",
    "histogram",
    "How long a save kept its slowest worker from training, in seconds.",
    buckets=_STALLS_S,
)
DURABLE = Metric(
    "rl_ckpt_durable_seconds", "histogram", "From the begin of a save to its commit, in seconds.", buckets=_LONG_S
)
BYTES_STAGED = Metric("rl_ckpt_bytes_staged_total", "counter", "Copied out of workers' hands, in bytes.")
BYTES_WRITTEN = Metric("rl_ckpt_bytes_written_total", "counter", "Stored, metadata and repeats included, in bytes.")
BYTES_DEDUPLICATED = Metric(
    "rl_ckpt_bytes_deduplicated_total", "counter", "Staged and not written, as the store had them already, in bytes."
)
BYTES_READ = Metric(
    "rl_ckpt_bytes_read_total",
    "counter",
    "Read, in bytes, by source: store (fetched from it, by whatever), files (mapped by workers), memory (of the same "
    "node), peers_memory, peers, peers_ray.",
    ("run", "source"),
)
STORE_RETRIES = Metric("rl_ckpt_store_retries_total", "counter", "Tries beyond the first of requests to the store.")
SAVES_QUEUED = Metric("rl_ckpt_saves_queued", "gauge", "Saves under way that are not decided yet.")
TIER_BYTES = Metric(
    "rl_ckpt_memory_tier_bytes",
    "gauge",
    "Of checkpoints, in a node's shared memory, copies for other nodes included, in bytes.",
    ("run", "node"),
)
TIER_REPLICAS = Metric(
    "rl_ckpt_memory_tier_replicas", "gauge", "Copies on other nodes that parts of the newest checkpoint in memory have."
)
TIER_MISSING = Metric(
    "rl_ckpt_memory_tier_missing_replicas", "gauge", "Copies on other nodes that they should have, and don't."
)
RESTORES = Metric(
    "rl_ckpt_restores_total", "counter", 'Restores by outcome: "ok", or the code of the error.', ("run", "outcome")
)
RESTORE_SECONDS = Metric(
    "rl_ckpt_restore_seconds",
    "histogram",
    "How long restores took in each phase, in seconds: find (the checkpoint), match (what each worker needs), read "
    "(and verify), set (into workers), and total.",
    ("run", "phase"),
    _LONG_S,
)
LAST_STEP = Metric("rl_ckpt_last_committed_step", "gauge", "Step of the newest checkpoint in the store.")
LAST_TIME = Metric(
    "rl_ckpt_last_commit_timestamp_seconds", "gauge", "When the newest checkpoint was committed, in Unix seconds."
)
LAST_AGE = Metric(
    "rl_ckpt_last_commit_age_seconds", "gauge", "How long ago that was, in seconds, as its writer's clock says."
)

TABLE: tuple[Metric, ...] = (
    SAVES_BEGUN,
    SAVES_COMMITTED,
    SAVES_FAILED,
    STALL,
    DURABLE,
    BYTES_STAGED,
    BYTES_WRITTEN,
    BYTES_DEDUPLICATED,
    BYTES_READ,
    STORE_RETRIES,
    SAVES_QUEUED,
    TIER_BYTES,
    TIER_REPLICAS,
    TIER_MISSING,
    RESTORES,
    RESTORE_SECONDS,
    LAST_STEP,
    LAST_TIME,
    LAST_AGE,
)
"""Every metric there is."""


def series(prefix: str = "") -> frozenset[str]:
    """Names that a scrape shows and queries may use: of a histogram `_bucket`, `_sum` and `_count`.

    Args:
        prefix: "ray_" for what Ray exports.
    """
    ends = {"histogram": ("_bucket", "_sum", "_count")}
    return frozenset(f"{prefix}{metric.name}{end}" for metric in TABLE for end in ends.get(metric.kind, ("",)))


class Sink(Protocol):
    """Takes measurements; may be called by any thread."""

    def record(self, metric: Metric, value: float, labels: tuple[str, ...]) -> None:
        """Adds to a counter, sets a gauge, or observes.

        Args:
            metric: Of the table.
            value: Of a counter the increase, greater than 0.
            labels: Values, in the order of `metric.labels`.
        """
        ...


_sinks: list[Sink] = []
_changing = threading.Lock()


def add_sink(sink: Sink) -> None:
    """From here on a sink is told of what this process measures."""
    with _changing:
        if sink not in _sinks:
            _sinks.append(sink)


def remove_sink(sink: Sink) -> None:
    """It is told no more."""
    with _changing:
        if sink in _sinks:
            _sinks.remove(sink)


def watched() -> bool:
    """Whether anybody is told: what costs something to find out need not be found out otherwise."""
    return bool(_sinks)


def record(metric: Metric, value: float, *labels: str) -> None:
    """Tells all sinks.

    Args:
        metric: Of the table.
        value: What to add, set or observe. Adding 0 to a counter is left out.
        labels: Values, in the order of `metric.labels`.
    """
    if not _sinks or (not value and metric.kind == "counter"):
        return
    for sink in tuple(_sinks):
        try:
            sink.record(metric, value, labels)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong in a sink, no save may fail of it
            remove_sink(sink)
            _log.warning("metrics: %r failed and is told no more: %s: %s", sink, type(error).__name__, error)


class PrometheusSink:
    """Measurements as metrics of `prometheus_client`, in a registry that somebody exports."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Registers all metrics of the table.

        Raises:
            InvalidInputError: prometheus_client is not installed.
            ValueError: The registry has metrics of these names already.
        """
        client = _client()
        kinds = {"counter": client.Counter, "gauge": client.Gauge, "histogram": client.Histogram}
        self._metrics: dict[str, Any] = {
            metric.name: kinds[metric.kind](
                metric.name,
                metric.help,
                metric.labels,
                registry=registry,
                **({"buckets": metric.buckets} if metric.buckets else {}),
            )
            for metric in TABLE
        }

    def record(self, metric: Metric, value: float, labels: tuple[str, ...]) -> None:
        """See `Sink.record`."""
        child = self._metrics[metric.name].labels(*labels)
        match metric.kind:
            case "counter":
                child.inc(value)
            case "gauge":
                child.set(value)
            case "histogram":
                child.observe(value)
        if metric is LAST_TIME:  # its age is that of the moment of the scrape
            self._metrics[LAST_AGE.name].labels(*labels).set_function(lambda: max(0.0, time.time() - value))


class Exporter:
    """An HTTP endpoint with the metrics of this process; made by `serve`. A context manager."""

    def __init__(self, sink: PrometheusSink, server: WSGIServer, thread: threading.Thread) -> None:
        """Of a server that runs."""
        self._sink, self._server, self._thread = sink, server, thread
        host = str(server.server_address[0])
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}/metrics"
        """What Prometheus is to scrape."""

    def close(self) -> None:
        """Ends it; measurements are told to others alone."""
        remove_sink(self._sink)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Exporter:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()


def serve(port: int, host: str = "127.0.0.1") -> Exporter:
    """Exports what this process measures to Prometheus, without Ray.

    Args:
        port: Where to listen; 0: any that is free, see `Exporter.url`.
        host: Address to listen on. Anybody who reaches it can read the metrics, with the urls of runs.

    Raises:
        InvalidInputError: prometheus_client is not installed (`pip install rl-ckpt[metrics]`), or no such port.
        OSError: The port is taken.
    """
    client = _client()
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 1 << 16:
        raise InvalidInputError(f"port={port!r} must be an integer from 0 to 65535")
    registry = client.CollectorRegistry()
    sink = PrometheusSink(registry)
    server, thread = client.start_http_server(port, host, registry)
    add_sink(sink)
    return Exporter(sink, server, thread)


def _client() -> Any:
    try:
        import prometheus_client
    except ImportError as error:
        raise InvalidInputError(
            "prometheus_client is not installed; `pip install rl-ckpt[metrics]` brings it"
        ) from error
    return prometheus_client
