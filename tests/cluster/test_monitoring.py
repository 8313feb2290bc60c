"""Scrape configuration, alerts and dashboard: they parse, do what they say, and ask only for metrics that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from rl_ckpt import metrics
from tests.cluster.files import CLUSTER, documents

PROMETHEUS = CLUSTER / "prometheus"
DASHBOARD = CLUSTER / "grafana" / "dashboards" / "rl_ckpt.json"
LABELS = {metric.name: set(metric.labels) for metric in metrics.TABLE}
RULES = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"][0]["rules"]
# What Grafana puts in place of its variables before Prometheus sees a query.
VARIABLES = {"$__rate_interval": "1m", "$__range": "1h", "$run": ".*"}


def dashboard() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return made


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> list[tuple[str, str]]:
    """Where each query is from, and the query as Prometheus gets it."""
    found = [(f"alert {rule['alert']}", rule["expr"]) for rule in RULES]
    for panel in panels():
        for target in panel["targets"]:
            query = target["expr"]
            for variable, value in VARIABLES.items():
                query = query.replace(variable, value)
            found.append((f"panel {panel['title']}", query))
    return found


def selectors(query: str) -> list[promql_parser.VectorSelector]:
    found: list[promql_parser.VectorSelector] = []

    def visit(node: promql_parser.Expr) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        if isinstance(node, promql_parser.MatrixSelector):
            found.append(node.vector_selector)
        return True

    promql_parser.walk(promql_parser.parse(query), pre_visit=visit)
    return found


@pytest.mark.parametrize(("where", "query"), queries())
def test_a_query_asks_only_for_metrics_and_labels_that_there_are(where: str, query: str) -> None:
    found = selectors(query)
    assert found, f"{where} asks for nothing"
    for selector in found:
        name = selector.name or ""
        assert name in metrics.series(), f"{where} asks for {name}"
        metric = re.sub(r"_(bucket|sum|count)$", "", name) if name not in LABELS else name
        asked = {matcher.name for matcher in selector.matchers.matchers}
        assert asked <= LABELS[metric] | {"le"}, f"{where} asks for labels {asked} of {metric}"


@pytest.mark.parametrize(("where", "query"), queries())
def test_a_query_sums_over_the_labels_that_ray_adds(where: str, query: str) -> None:
    """A query without an aggregation would give a line for every process, and another one after each restart."""
    grouped = re.findall(r"by \(([^)]*)\)", query)
    assert grouped, where
    known = {label for labels in LABELS.values() for label in labels} | {"le"}
    assert {label.strip() for group in grouped for label in group.split(",")} <= known
    histogram = "_bucket" in query
    assert histogram == ("histogram_quantile" in query), where
    assert not re.search(r"_sum\b", query.replace("sum by", "")), f"{where}: Ray's sums of histograms are approximate"


def test_every_metric_can_be_seen_on_the_dashboard() -> None:
    asked = {re.sub(r"_bucket$", "", selector.name or "") for _, query in queries() for selector in selectors(query)}
    # The age is computed from the time of the commit, so that it grows even where its writer is silent.
    assert {metric.name for metric in metrics.TABLE} - asked == {"rl_ckpt_last_commit_age_seconds"}


def test_the_dashboard_is_whole() -> None:
    made = dashboard()
    ids = [panel["id"] for panel in made["panels"]]
    assert len(set(ids)) == len(ids)
    taken: dict[tuple[int, int], str] = {}
    for panel in made["panels"]:
        box = panel["gridPos"]
        assert box["x"] + box["w"] <= 24
        for cell in [
            (x, y) for x in range(box["x"], box["x"] + box["w"]) for y in range(box["y"], box["y"] + box["h"])
        ]:
            assert taken.setdefault(cell, panel["title"]) == panel["title"], "two panels in one place"
    for panel in panels():
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEFG"[: len(panel["targets"])])
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
        named = set(re.findall(r"Alert: (\w+)", panel["description"]))
        assert named <= {rule["alert"] for rule in RULES}, "a description names an alert that there is not"


def test_a_run_that_was_only_restored_can_be_chosen_too() -> None:
    (run,) = [variable for variable in dashboard()["templating"]["list"] if variable["name"] == "run"]
    query = run["query"]["query"]
    names = re.search(r'__name__=~"([^"]+)"', query)
    assert names is not None
    chosen = {metric for metric in metrics.TABLE if re.fullmatch(names[1], metric.name)}
    assert chosen == {metrics.SAVES_BEGUN, metrics.RESTORES}
    assert run["definition"] == query


def test_grafana_finds_dashboard_and_data_source() -> None:
    compose = yaml.safe_load((CLUSTER.parent / "docker-compose.yml").read_text())["services"]["grafana"]
    mounts = {volume.split(":")[1]: CLUSTER.parent / volume.split(":")[0] for volume in compose["volumes"]}
    (provider,) = documents(CLUSTER / "grafana/provisioning/dashboards/rl_ckpt.yaml")[0]["providers"]
    assert (mounts[provider["options"]["path"]] / DASHBOARD.name).samefile(DASHBOARD)
    (source,) = documents(CLUSTER / "grafana/provisioning/datasources/prometheus.yaml")[0]["datasources"]
    variables = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}
    assert variables["datasource"]["current"]["value"] == source["uid"]


def test_every_alert_says_what_happened_and_is_tried_out() -> None:
    tried = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tried for case in test.get("alert_rule_test", []) if "exp_alerts" in case}
    for test in tried:
        for expression in test.get("promql_expr_test", []):
            fired |= set(re.findall(r'alertname="(\w+)"', json.dumps(expression).replace('\\"', '"')))
    assert fired == {rule["alert"] for rule in RULES}
    for rule in RULES:
        assert {"summary", "description", "runbook"} <= set(rule["annotations"])
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert (CLUSTER.parent / rule["annotations"]["runbook"]).is_file()


def test_ray_metrics_get_the_names_of_the_table_wherever_they_are_scraped() -> None:
    (job,) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    (rule,) = job["metric_relabel_configs"]
    (monitor,) = documents(CLUSTER / "kuberay" / "monitoring.yaml")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (operator_rule,) = endpoint["metricRelabelings"]
    assert list(rule.values()) == list(operator_rule.values())
    renamed = {re.sub(f"^{rule['regex']}$", r"\1", name) for name in metrics.series("ray_")}
    assert renamed == metrics.series()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
@pytest.mark.parametrize(
    "arguments",
    [["check", "config", "prometheus.yml"], ["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]],
)
def test_promtool_agrees(arguments: list[str], tmp_path: Path) -> None:
    for path in PROMETHEUS.glob("*.yml"):
        # The token's file exists in the container only, and promtool looks for it.
        text = path.read_text().replace("/run/ray_token", str(tmp_path / "ray_token"))
        (tmp_path / path.name).write_text(text)
    (tmp_path / "ray_token").touch()
    done = subprocess.run(["promtool", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
