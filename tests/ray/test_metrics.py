"""Metrics of a real cluster, as Prometheus gets them: from the metrics port that Ray opens on every node."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from rl_ckpt import Checkpointer, metrics
from tests.ray.holders import give, on_nodes, until
from tests.ray.holders import several_nodes as nodes

pytest.importorskip("opentelemetry.exporter.prometheus", reason="the metrics port comes with ray[default]")
parser = pytest.importorskip("prometheus_client.parser")

REPORT = {"metrics_report_interval_ms": 1000}


@pytest.fixture(scope="module")
def cluster(_no_aws_settings_from_outside: None) -> Iterator[Any]:
    with nodes(2, REPORT) as made:
        yield made


def scrape() -> dict[tuple[str, ...], float]:
    """Of all nodes: samples of ours by name and the labels that are ours but the run; one per process is added up."""
    found: dict[tuple[str, ...], float] = {}
    for node in ray.nodes():
        if node["Alive"]:
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with urllib.request.urlopen(url, timeout=30) as answer:
                text = answer.read().decode()
            for family in parser.text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.name.startswith("ray_rl_ckpt_"):
                        assert sample.labels["run"].startswith("file://")
                        ours = [sample.labels[x] for x in ("node", "phase", "source", "reason") if x in sample.labels]
                        key = (sample.name.removeprefix("ray_rl_ckpt_"), *ours)
                        found[key] = found.get(key, 0.0) + sample.value
    return found


def test_what_ray_exports(cluster: Any, tmp_path: Path) -> None:
    workers = on_nodes(2)
    give(workers, [{"w": np.arange(100_000), "own": np.full(5000, rank)} for rank in range(2)])
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        ckpt.save(1, workers).result()
        info = ckpt.save(2, workers).result()
        ckpt.restore(workers)
        found: dict[tuple[str, ...], float] = {}

        def exported() -> bool:
            try:
                found.update(scrape())
            except urllib.error.URLError:  # the port is not open yet
                return False
            tier = [value for key, value in found.items() if key[0] == "memory_tier_bytes"]
            whole = len(tier) == 2 and min(tier) > 0 and found.get(("memory_tier_replicas",), 0) >= 2
            return whole and ("restore_seconds_count", "total") in found

        until(exported, "both nodes export")
    assert found["saves_begun_total",] == found["saves_committed_total",] == 2
    assert found["stall_seconds_count",] == found["durable_seconds_count",] == 2
    assert found["last_committed_step",] == 2
    assert found["last_commit_timestamp_seconds",] == pytest.approx(info.time)
    assert 0 <= found["last_commit_age_seconds",] < 300
    assert found["bytes_staged_total",] >= 2 * 880_000
    assert found["bytes_deduplicated_total",] >= 880_000, "the second save wrote nothing anew"
    assert found["bytes_written_total",] >= 880_000
    assert found["bytes_read_total", "memory"] >= 880_000
    assert found["memory_tier_missing_replicas",] == 0
    assert {key[1] for key in found if key[0] == "restore_seconds_count"} == {"find", "match", "read", "set", "total"}
    assert {name for name, *_ in found} <= {name.removeprefix("rl_ckpt_") for name in metrics.series()}
