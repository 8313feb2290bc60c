"""Metrics: the table, what a save and a load tell, and a Prometheus endpoint that is really scraped."""

import itertools
import json
import logging
import re
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from rl_ckpt import Checkpointer, logs, metrics
from rl_ckpt.errors import CheckpointNotFoundError, InvalidInputError, StorageError
from rl_ckpt.runtime.ray_metrics import RaySink
from rl_ckpt.store.local import LocalStore

ROOT = Path(__file__).parents[2]
prometheus_client = pytest.importorskip("prometheus_client")
text_string_to_metric_families = pytest.importorskip("prometheus_client.parser").text_string_to_metric_families


class Notes:
    """A sink that remembers."""

    def __init__(self):
        self.counts, self.gauges, self.observed = {}, {}, {}

    def record(self, metric, value, labels):
        assert len(labels) == len(metric.labels), metric.name
        key = (metric.name.removeprefix("rl_ckpt_"), *labels[1:])
        if metric.kind == "counter":
            assert value > 0
            self.counts[key] = self.counts.get(key, 0) + value
        elif metric.kind == "gauge":
            self.gauges[key] = value
        else:
            self.observed.setdefault(key, []).append(value)


@pytest.fixture
def notes():
    sink = Notes()
    metrics.add_sink(sink)
    yield sink
    metrics.remove_sink(sink)


def scrape(url):
    """Samples by name and labels other than the run, and how each family is typed."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    families = list(text_string_to_metric_families(text))
    samples = {
        (s.name, *(v for k, v in sorted(s.labels.items()) if k != "run")): s.value for f in families for s in f.samples
    }
    runs = {s.labels["run"] for f in families for s in f.samples}
    return samples, runs, {f.name: f.type for f in families}


# --- the table ---


def test_the_names_are_prometheus_names():
    names = [metric.name for metric in metrics.TABLE]
    assert len(set(names)) == len(names)
    for metric in metrics.TABLE:
        assert re.fullmatch(r"rl_ckpt_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.labels[0] == "run"
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert all(a < b for a, b in itertools.pairwise(metric.buckets))
    constants = [value for value in vars(metrics).values() if isinstance(value, metrics.Metric)]
    assert constants == list(metrics.TABLE)


def test_the_documentation_has_the_table():
    page = (ROOT / "docs" / "operate.md").read_text()
    for metric in metrics.TABLE:
        assert f"| `{metric.name}` | {metric.kind} | {', '.join(metric.labels)} | {metric.help} |" in page


def test_series_are_what_a_scrape_shows():
    with metrics.serve(0) as exporter:
        for metric in metrics.TABLE:
            metrics.record(metric, 1, *("x" for _ in metric.labels))
        samples, _, types = scrape(exporter.url)
    shown = {name for name, *_ in samples if not name.endswith("_created")}
    assert shown == metrics.series()
    assert {metric.name.removesuffix("_total"): metric.kind for metric in metrics.TABLE} == {
        name: kind for name, kind in types.items() if not name.endswith("_created")
    }


# --- what is told ---


def test_a_save_and_a_load_without_ray(tmp_path, notes):
    frozen, moving = np.arange(50_000), np.zeros(1000)
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        info = ckpt.save_state(3, {"frozen": frozen, "moving": moving}).result()
        moving += 1
        ckpt.save_state(4, {"frozen": frozen, "moving": moving}).result()
        with pytest.raises(InvalidInputError):
            ckpt.save_state(4, {"frozen": frozen, "moving": moving})
        ckpt.load_state(3)
        with pytest.raises(CheckpointNotFoundError):
            ckpt.load_state(5)
    assert notes.counts["saves_begun_total",] == 3
    assert notes.counts["saves_committed_total",] == 2
    assert notes.counts["saves_failed_total", "invalid_input"] == 1
    assert notes.counts["bytes_staged_total",] == 2 * (frozen.nbytes + moving.nbytes)
    assert notes.counts["bytes_deduplicated_total",] == frozen.nbytes
    assert info.bytes_written < notes.counts["bytes_written_total",] < info.bytes_written + 4 * moving.nbytes
    assert notes.counts["bytes_read_total", "files"] >= frozen.nbytes
    assert notes.counts["restores_total", "ok"] == 1
    assert notes.counts["restores_total", "not_found"] == 1
    assert notes.gauges["last_committed_step",] == 4
    assert notes.gauges["saves_queued",] == 0
    assert notes.observed["stall_seconds",][0] == info.stall_s
    assert notes.observed["durable_seconds",][0] == info.durable_s
    assert len(notes.observed["restore_seconds", "total"]) == 1


def refuse(*_):
    raise StorageError("403")


def test_a_save_that_fails_in_the_background_is_counted_by_its_reason(tmp_path, notes, monkeypatch):
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        ckpt.save_state(1, {"x": np.zeros(9)}).result()
        monkeypatch.setattr("rl_ckpt.store.plain_save.write_files", refuse)
        with pytest.raises(StorageError, match="403"):
            ckpt.save_state(2, {"x": np.ones(9)}).result()
    assert notes.counts["saves_failed_total", "storage"] == 1
    assert notes.gauges["saves_queued",] == 0
    assert notes.gauges["last_committed_step",] == 1


def test_a_job_that_goes_on_tells_of_the_checkpoint_there_is_before_its_first_is_saved(tmp_path, notes, monkeypatch):
    """Else the alert that everybody needs would not see a job whose saves fail from the start."""
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        info = ckpt.save_state(7, {"a": np.arange(3)}).result(60)
    notes.gauges.clear()
    monkeypatch.setattr("rl_ckpt.store.plain_save.write_files", refuse)
    with Checkpointer(str(tmp_path / "run")) as ckpt, pytest.raises(StorageError, match="403"):
        ckpt.save_state(8, {"a": np.arange(4)}).result(60)
    assert notes.gauges["last_committed_step",] == 7
    assert notes.gauges["last_commit_timestamp_seconds",] == info.time


def test_a_save_that_can_not_even_open_the_run_is_one_that_failed(tmp_path, notes, monkeypatch):
    for method in ("put", "create"):
        monkeypatch.setattr(LocalStore, method, refuse)
    ckpt = Checkpointer(str(tmp_path / "run"))
    for _ in range(2):
        with pytest.raises(StorageError):
            ckpt.save_state(8, {"a": np.arange(4)})
    assert (notes.counts["saves_begun_total",], notes.counts["saves_failed_total", "storage"]) == (2, 2)
    assert notes.gauges["saves_queued",] == 0


@pytest.mark.parametrize("port", [-1, 70_000, "metrics"])
def test_a_port_that_is_none_is_told(port):
    with pytest.raises(InvalidInputError, match="port"):
        metrics.serve(port)


def test_retries_of_the_store_are_counted(tmp_path, notes):
    LocalStore(f"file://{tmp_path}").stats.count_retry()
    assert notes.counts == {("store_retries_total",): 1}


def test_a_sink_that_fails_fails_no_save_and_is_told_no_more(tmp_path, notes, caplog):
    class Broken:
        calls = 0

        def record(self, metric, value, labels):
            self.calls += 1
            raise RuntimeError("no room")

    broken = Broken()
    metrics.add_sink(broken)
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        ckpt.save_state(1, {"x": np.zeros(9)}).result()
    assert broken.calls == 1
    assert notes.counts["saves_committed_total",] == 1, "others are"
    assert "failed and is told no more: RuntimeError: no room" in caplog.text


def test_nothing_is_told_where_nobody_listens(monkeypatch):
    monkeypatch.setattr(metrics, "_sinks", [])  # a test before this one may have told Ray, as its actors do
    assert not metrics.watched()
    with metrics.serve(0):
        assert metrics.watched()
    assert not metrics.watched()
    metrics.record(metrics.STALL, 1.0, "run")


# --- Prometheus ---


def test_prometheus_scrapes_a_training_process(tmp_path, monkeypatch):
    with metrics.serve(0) as exporter, Checkpointer(str(tmp_path / "run")) as ckpt:
        info = ckpt.save_state(3, {"x": np.zeros(1000)}).result()
        now = [info.time + 60]
        monkeypatch.setattr("rl_ckpt.metrics.time.time", lambda: now[0])
        first, runs, types = scrape(exporter.url)
        now[0] += 40
        later, _, _ = scrape(exporter.url)
    assert runs == {ckpt.url}
    assert first["rl_ckpt_saves_committed_total",] == 1
    assert first["rl_ckpt_stall_seconds_count",] == 1
    assert first["rl_ckpt_last_committed_step",] == 3
    assert first["rl_ckpt_last_commit_timestamp_seconds",] == info.time
    assert first["rl_ckpt_last_commit_age_seconds",] == pytest.approx(60)
    assert later["rl_ckpt_last_commit_age_seconds",] == pytest.approx(100), "as of the scrape, with no save since"
    assert types["rl_ckpt_stall_seconds"] == "histogram"
    with pytest.raises(OSError, match="refused"):
        scrape(exporter.url)


def test_a_registry_of_the_users_own(tmp_path):
    registry = prometheus_client.CollectorRegistry()
    sink = metrics.PrometheusSink(registry)
    metrics.add_sink(sink)
    try:
        with Checkpointer(str(tmp_path / "run")) as ckpt:
            ckpt.save_state(1, {"x": np.zeros(9)}).result()
    finally:
        metrics.remove_sink(sink)
    assert registry.get_sample_value("rl_ckpt_saves_committed_total", {"run": ckpt.url}) == 1
    with pytest.raises(ValueError, match="Duplicated"):
        metrics.PrometheusSink(registry)


def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    with pytest.raises(InvalidInputError, match=r"rl-ckpt\[metrics\]"):
        metrics.serve(0)
    monkeypatch.setitem(__import__("sys").modules, "pythonjsonlogger.json", None)
    with pytest.raises(InvalidInputError, match=r"rl-ckpt\[metrics\]"):
        logs.to_json()


def test_ray_gets_every_metric_with_its_labels(monkeypatch):
    sent = []
    monkeypatch.setattr("ray.util.metrics.Metric._record", lambda self, value, tags: sent.append((self, value, tags)))
    sink = RaySink()
    for metric in metrics.TABLE:
        sink.record(metric, 2.5, tuple(f"a {label}" for label in metric.labels))
    assert [(made.info["name"], value) for made, value, _ in sent] == [(m.name, 2.5) for m in metrics.TABLE]
    kinds = {"Counter": "counter", "Gauge": "gauge", "Histogram": "histogram"}
    for metric, (made, _, tags) in zip(metrics.TABLE, sent, strict=True):
        assert kinds[type(made).__name__] == metric.kind
        assert tags == {label: f"a {label}" for label in metric.labels}
        assert made.info["tag_keys"] == metric.labels
        assert tuple(made.info.get("boundaries", ())) == metric.buckets


# --- logs ---


def test_records_have_fields_and_json_lines_show_them(tmp_path, capsys):
    pytest.importorskip("pythonjsonlogger")
    log = logging.getLogger("rl_ckpt")
    level, propagate = log.level, log.propagate
    handler = logs.to_json("INFO")
    try:
        with Checkpointer(str(tmp_path / "run")) as ckpt:
            info = ckpt.save_state(3, {"x": np.zeros(9)}).result()
            with pytest.raises(InvalidInputError):
                ckpt.save_state(3, {"x": np.zeros(9)})
            ckpt.load_state()
        logs.logger("rl_ckpt.some.room").warning("told by %s", "a room")
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert all({"time", "level", "name", "message", *logs.FIELDS} <= line.keys() for line in lines)
    saved, refused, restored, other = lines
    assert (saved["run"], saved["step"], f"{saved['step']}-{saved['attempt']}") == (ckpt.url, 3, info.id)
    assert saved["message"].startswith(f"checkpoint {info.id} is in the store after")
    assert refused["level"] == "INFO", "the caller was told"
    assert restored["run"] == ckpt.url
    assert (other["name"], other["message"], other["node"]) == ("rl_ckpt.some.room", "told by a room", "")


def test_an_unknown_level_is_told():
    pytest.importorskip("pythonjsonlogger")
    with pytest.raises(InvalidInputError, match="LOUD"):
        logs.to_json("LOUD")
