"""The KubeRay manifests, as far as they can be checked where no Kubernetes is: they were never applied here."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray

from rl_ckpt.demo.__main__ import _parser
from tests.cluster.files import CLUSTER, documents, ray_start_options, run_with_stand_ins
from tests.cluster.kuberay import SCHEMAS

KUBERNETES = "1.32"
FILES = sorted((CLUSTER / "kuberay").glob("*.yaml"))
ALL = {(made["kind"], made["metadata"]["name"]): made for path in FILES for made in documents(path)}
CLUSTER_SPEC = ALL["RayCluster", "rl-ckpt"]["spec"]
WORKER = CLUSTER_SPEC["workerGroupSpecs"][0]


def validate(manifest: dict[str, Any]) -> None:
    schema = SCHEMAS.get(manifest["kind"])
    if schema is None:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    else:
        jsonschema.validate(manifest, schema)
        for template in templates(manifest):
            metadata = {"name": "pod", **template.get("metadata", {})}
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def templates(node: Any) -> Iterator[dict[str, Any]]:
    """Every pod template in a manifest."""
    if isinstance(node, dict):
        for key, part in node.items():
            if key in {"template", "submitterPodTemplate"}:
                yield part
            else:
                yield from templates(part)
    elif isinstance(node, list):
        for part in node:
            yield from templates(part)


@pytest.mark.parametrize("name", ALL, ids="/".join)
def test_a_manifest_is_valid(name: tuple[str, str]) -> None:
    validate(ALL[name])


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        (("RayCluster", "rl-ckpt"), ["spec", "headGroupSpec", "rayStartParam"], {}),
        (("RayCluster", "rl-ckpt"), ["spec", "headGroupSpec", "template", "spec", "containers", 0, "imagePull"], "x"),
        (("RayCluster", "rl-ckpt"), ["spec", "workerGroupSpecs", 0, "rayStartParams", "num-cpus"], 4),
        (("RayJob", "rl-ckpt-demo"), ["spec", "submissionMode"], "Job"),
        (("PodMonitor", "rl-ckpt"), ["spec", "podMetricsEndpoints", 0, "metric_relabel_configs"], []),
        (("StatefulSet", "rl-ckpt-valkey"), ["spec", "replica"], 1),
        (("PodDisruptionBudget", "rl-ckpt-worker"), ["spec", "minAvailable"], []),
    ],
)
def test_a_mistake_is_found(name: tuple[str, str], path: list[Any], value: Any) -> None:
    broken = copy.deepcopy(ALL[name])
    node = broken
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(broken)


@pytest.mark.parametrize("name", [name for name in ALL if any(templates(ALL[name]))], ids="/".join)
def test_no_container_is_root_or_unbounded(name: tuple[str, str]) -> None:
    for template in templates(ALL[name]):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} == set(container["resources"]["limits"]) == set(container["resources"]["requests"])


def test_nodes_have_shared_memory_of_their_own_and_leave_room_beside_it() -> None:
    for group in (CLUSTER_SPEC["headGroupSpec"], WORKER):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        (shm,) = [volume for volume in pod["volumes"] if volume["name"] == "shm"]
        assert shm["emptyDir"]["medium"] == "Memory"
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        size, limit = gib(shm["emptyDir"]["sizeLimit"]), gib(container["resources"]["limits"]["memory"])
        store = int(group["rayStartParams"]["object-store-memory"]) / (1 << 30)
        assert store < size <= limit / 2  # staging memory and memory tier beside it; actors beside both


def gib(text: str) -> float:
    return float(text.removesuffix("Gi"))


def test_a_pod_that_is_deleted_has_time_for_a_save() -> None:
    for group in (CLUSTER_SPEC["headGroupSpec"], WORKER):
        template = group["template"]
        (container,) = template["spec"]["containers"]
        assert template["spec"]["terminationGracePeriodSeconds"] > 30  # for how long Ray drains after SIGTERM
        assert template["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"
        # Ray itself must be the process that gets the signal, not a shell that does not hand it on.
        assert container["args"][0].endswith('eval exec "$KUBERAY_GEN_RAY_START_CMD"')
        assert "lifecycle" not in container


def test_the_command_of_a_pod_is_what_kuberay_makes_of_the_parameters(tmp_path: Path) -> None:
    (container,) = WORKER["template"]["spec"]["containers"]
    made = """ray start --address=head:6379 --resources='{"gold": 1}' --block"""
    command = [*container["command"], *(part.replace("ulimit -n 65536; ", "") for part in container["args"])]
    assert run_with_stand_ins(command, tmp_path, ["ray"], {"KUBERAY_GEN_RAY_START_CMD": made}) == [
        ["ray", "start", "--address=head:6379", '--resources={"gold": 1}', "--block"]
    ]


def test_what_manifests_name_of_one_another_is_there() -> None:
    service = ALL["Service", "rl-ckpt-valkey"]
    options = CLUSTER_SPEC["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    valkey = ALL["StatefulSet", "rl-ckpt-valkey"]["spec"]
    assert service["spec"]["selector"] == valkey["template"]["metadata"]["labels"] == valkey["selector"]["matchLabels"]
    (variable,) = valkey["template"]["spec"]["containers"][0]["env"]
    assert variable["valueFrom"] == options["redisPassword"]["valueFrom"]

    labels = {"ray.io/cluster": "rl-ckpt", "ray.io/node-type": "worker"}  # what KubeRay puts on pods
    budget = ALL["PodDisruptionBudget", "rl-ckpt-worker"]["spec"]
    assert budget["selector"]["matchLabels"] == labels
    assert 0 < budget["minAvailable"] < WORKER["replicas"]
    assert ALL["RayJob", "rl-ckpt-demo"]["spec"]["clusterSelector"] == {"ray.io/cluster": "rl-ckpt"}
    monitor = ALL["PodMonitor", "rl-ckpt"]["spec"]
    for group in (CLUSTER_SPEC["headGroupSpec"], WORKER):
        pod = group["template"]["spec"]
        assert ("ServiceAccount", pod["serviceAccountName"]) in ALL
        ports = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
        assert ports[monitor["podMetricsEndpoints"][0]["port"]] == 8080  # KubeRay's default --metrics-export-port


def test_ray_is_the_one_that_is_tested_here_and_knows_its_options() -> None:
    assert CLUSTER_SPEC["rayVersion"] == ray.__version__
    for group in (CLUSTER_SPEC["headGroupSpec"], WORKER):
        assert {f"--{name}" for name in group["rayStartParams"]} <= ray_start_options()


def test_the_job_is_the_demo_as_it_is() -> None:
    entrypoint = ALL["RayJob", "rl-ckpt-demo"]["spec"]["entrypoint"].split()
    assert entrypoint[:3] == ["python", "-m", "rl_ckpt.demo"]
    assert _parser().parse_args(entrypoint[3:]).address == "auto"
