"""What KubeRay makes of a RayService, and Ray of KubeRay's pods, that no schema tells."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _get_ray_resources_from_group_spec

from k8s.manifests import Manifests

_KUBERAYS_LABELS = {"app.kubernetes.io/name", "app.kubernetes.io/created-by"}
_KUBERAYS_OPEN_FILES = 65_536  # `ulimit -n` before its `ray start`
_FILES_PER_CONNECTION = 2.5  # both ends, and a share of the pipes that HAProxy splices with
_SPARE_FILES = 100


def read_resources(group: dict[str, Any]) -> dict[str, float]:
    """Ray's custom resources of a group, as its shell passes them on."""
    found: dict[str, float] = json.loads("".join(shlex.split(group["rayStartParams"].get("resources", "{}"))))
    return found


def check_kuberay(made: Manifests) -> Iterator[str]:
    """Rules of KubeRay's that its schema does not hold."""
    cluster, service = made.cluster, made.service
    if len(service["metadata"]["name"]) > 47:
        yield "the RayService's name is longer than 47 characters"
    if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        yield "the head takes replicas"
    if not cluster.get("enableInTreeAutoscaling") or cluster["autoscalerOptions"].get("version") != "v2":
        yield "autoscaler v2 is not on"
    redis = cluster["gcsFaultToleranceOptions"]
    if not redis.get("redisAddress") or "valueFrom" not in redis["redisPassword"]:
        yield "the head's state is not in Redis, or its password is not in a secret"
    for name, group in made.groups.items():
        if not all(key in group for key in ("replicas", "minReplicas", "maxReplicas")):
            yield f"{name}: replicas are not said"
        elif not 0 < group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"{name}: minReplicas <= replicas <= maxReplicas does not hold"
        if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield f"{name}: autoscaler v2 wants restartPolicy Never"
    if service["spec"]["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade" and not service["spec"][
        "upgradeStrategy"
    ]["clusterUpgradeOptions"].get("gatewayClassName"):
        yield "an incremental upgrade needs a Gateway class"
    templates = {"head": cluster["headGroupSpec"], **made.groups}
    for name, group in templates.items():
        if own := _KUBERAYS_LABELS & set(group["template"]["metadata"]["labels"]):
            yield f"{name}: {sorted(own)} are KubeRay's, whose serving-head-svc selects pods by their own values"
        if (text := group["rayStartParams"].get("resources")) is not None:
            yield from _check_resources(name, text, group)
    for budget in made.of("PodDisruptionBudget"):
        if not isinstance(budget["spec"].get("minAvailable"), int):
            yield f"{budget['metadata']['name']}: a RayCluster's pods only take minAvailable as a number"


def _check_resources(name: str, text: str, group: dict[str, Any]) -> Iterator[str]:
    """Three read them, each in its own way: the shell, KubeRay (for accelerators) and Ray's autoscaler."""
    wanted = read_resources(group)
    try:
        kuberays = json.loads(text.strip("'\"` "))
    except ValueError:
        kuberays = None
    autoscalers = _get_ray_resources_from_group_spec(group, is_head=False)
    if kuberays != wanted or not wanted.items() <= autoscalers.items():
        yield f"{name}: resources {text} are not the same to the shell, to KubeRay and to Ray's autoscaler"


def check_open_files(made: Manifests) -> Iterator[str]:
    """HAProxy does not start where it cannot open enough files for its connections."""
    for pod in list(made.pods())[: 1 + len(made.groups)]:
        environment = {entry["name"]: entry.get("value", "") for entry in pod.spec["containers"][0]["env"]}
        files = _FILES_PER_CONNECTION * int(environment["RAY_SERVE_HAPROXY_MAXCONN"]) + _SPARE_FILES
        if files > _KUBERAYS_OPEN_FILES:
            yield f"{pod.owner}: HAProxy needs {files:.0f} open files, KubeRay asks for {_KUBERAYS_OPEN_FILES}"


def check_probes(made: Manifests) -> Iterator[str]:
    """A probe gives its answer before the kubelet loses patience: wget asks twenty times unless it is told."""
    for pod in made.pods():
        for container in pod.containers:
            for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                probe = container.get(kind, {})
                for words in probe.get("exec", {}).get("command", ()):
                    asked = re.findall(r"wget [^&]*", words)
                    seconds = [int(found) for found in re.findall(r" -T (\d+)", words)]
                    if len(seconds) != len(asked) or any(" -t 1 " not in question for question in asked):
                        yield f"{pod.owner}: {kind} may ask for longer than it says"
                    if sum(seconds) >= probe["timeoutSeconds"]:
                        yield f"{pod.owner}: {kind} may take {sum(seconds)} s, and has {probe['timeoutSeconds']} s"


def check_weights(made: Manifests) -> Iterator[str]:
    """Engines wait for what the Job leaves when all weights are there."""
    (job,) = (pod for pod in made.pods() if pod.component == "warm-models")
    left = re.findall(r"touch (\S+)", " ".join(job.spec["containers"][0]["args"]))
    for pod in made.pods():
        if pod.component == "engine":
            waits = [" ".join(container["command"]) for container in pod.spec.get("initContainers", ())]
            if not left or not any(f"[ -e {left[-1]} ]" in words for words in waits):
                yield f"{pod.owner}: does not wait for {left}, which {job.owner} leaves"
    for name, model in yaml.safe_load(made.settings_text)["models"].items():
        commit = model.get("engine_args", {}).get("revision")
        if commit and f"--revision {commit}" not in " ".join(job.spec["containers"][0]["args"]):
            yield f"{job.owner}: puts another revision there than {name} is served from"
