"""The fields of KubeRay's RayCluster and RayJob and of the Prometheus operator's PodMonitor that the manifests use.

Written after the API references of KubeRay 1.6 and of the operator; the resource definitions themselves cannot be had
offline. Stricter than those in one way: a field that is not listed here is an error, so that a misspelt one is found.
Pod templates are checked apart, against Kubernetes's own schema.
"""

from __future__ import annotations

from typing import Any

STRING = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}


def _record(required: list[str], **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}


POD_TEMPLATE = _record(["spec"], metadata={"type": "object"}, spec={"type": "object"})
SECRET_OR_VALUE = _record(
    [],
    value=STRING,
    valueFrom=_record(["secretKeyRef"], secretKeyRef=_record(["name", "key"], name=STRING, key=STRING)),
)
HEAD = _record(
    ["template"],
    serviceType=STRING,
    rayStartParams=STRINGS,
    resources=STRINGS,
    labels=STRINGS,
    template=POD_TEMPLATE,
)
WORKERS = _record(
    ["groupName", "template", "minReplicas", "maxReplicas"],
    groupName=STRING,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    suspend={"type": "boolean"},
    rayStartParams=STRINGS,
    resources=STRINGS,
    labels=STRINGS,
    template=POD_TEMPLATE,
)
CLUSTER_SPEC = _record(
    ["headGroupSpec"],
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=_record([], mode={"enum": ["token", "disabled"]}, secretName=STRING),
    gcsFaultToleranceOptions=_record(
        ["redisAddress"],
        redisAddress=STRING,
        redisUsername=SECRET_OR_VALUE,
        redisPassword=SECRET_OR_VALUE,
        externalStorageNamespace=STRING,
    ),
    enableInTreeAutoscaling={"type": "boolean"},
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS, "minItems": 1},
)
JOB_SPEC = _record(
    ["entrypoint"],
    entrypoint=STRING,
    clusterSelector=STRINGS,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    ttlSecondsAfterFinished=COUNT,
    runtimeEnvYAML=STRING,
    metadata=STRINGS,
    submitterConfig=_record([], backoffLimit=COUNT),
    submitterPodTemplate=POD_TEMPLATE,
)
RELABELING = _record(
    [],
    sourceLabels={"type": "array", "items": STRING},
    regex=STRING,
    targetLabel=STRING,
    replacement=STRING,
    action=STRING,
)
MONITOR_SPEC = _record(
    ["selector", "podMetricsEndpoints"],
    jobLabel=STRING,
    selector=_record(["matchLabels"], matchLabels=STRINGS),
    podMetricsEndpoints={
        "type": "array",
        "items": _record(
            ["port"],
            port=STRING,
            path=STRING,
            interval={"type": "string", "pattern": r"^\d+s$"},
            metricRelabelings={"type": "array", "items": RELABELING},
        ),
    },
)
METADATA = _record(["name"], name=STRING, labels=STRINGS, annotations=STRINGS)


def _resource(version: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return _record(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=METADATA,
        spec=spec,
    )


SCHEMAS = {
    "RayCluster": _resource("ray.io/v1", "RayCluster", CLUSTER_SPEC),
    "RayJob": _resource("ray.io/v1", "RayJob", JOB_SPEC),
    "PodMonitor": _resource("monitoring.coreos.com/v1", "PodMonitor", MONITOR_SPEC),
}
