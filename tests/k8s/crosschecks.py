"""What one object says of another, and a schema does not see. Each check gives what is wrong, in words."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import yaml

from k8s.kuberay import check_kuberay, check_open_files, check_probes, check_weights, read_resources
from k8s.manifests import K8S, Manifests, PodTemplate, flags, named_secrets
from serving.settings.router import LimitSettings

_CLUSTERS_OWN = {"kube-root-ca.crt"}  # Kubernetes puts it into every namespace
_KUBERAYS_OWN = {"serving-serve-svc": {"serve"}, "serving-head-svc": {"dashboard", "serve"}}
_GATEWAYS = "gateway.networking.k8s.io/gateway-name"  # pods that a Gateway class makes
_IMAGE = re.compile(r"[a-z0-9.-]+(:\d+)?(/[a-z0-9._-]+)+:(?!latest$)[A-Za-z0-9._-]+(@sha256:[0-9a-f]{64})?")


def check_images(made: Manifests) -> Iterator[str]:
    """Every image with a registry and a tag that is not latest; Ray's version the image's."""
    for pod in made.pods():
        for container in pod.containers:
            if not _IMAGE.fullmatch(container["image"]):
                yield f"{pod.owner}: image {container['image']} is not pinned"
    for lock in ("cpu", "gpu"):
        text = (K8S.parent / f"requirements/{lock}.txt").read_text()
        found = re.search(r"^ray(?:\[[a-z,]*\])?==([\w.]+)", text, re.MULTILINE)
        if found is None or found[1] != made.cluster["rayVersion"]:
            yield f"rayVersion {made.cluster['rayVersion']} is not that of requirements/{lock}.txt"


def check_sources(made: Manifests) -> Iterator[str]:
    """Every ConfigMap, Secret, claim, service account and priority class that is named is there."""
    secrets, config_maps = named_secrets(), made.names("ConfigMap") | _CLUSTERS_OWN
    for pod in made.pods():
        for name, key in _secret_keys(pod.spec):
            if key not in secrets.get(name, set()):
                yield f"{pod.owner}: secret {name} with key {key} is not in secrets.example.yaml"
        for name in _values(pod.spec, "configMap"):
            if name["name"] not in config_maps:
                yield f"{pod.owner}: there is no ConfigMap {name['name']}"
        for claim in _values(pod.spec, "persistentVolumeClaim"):
            if claim["claimName"] not in made.names("PersistentVolumeClaim"):
                yield f"{pod.owner}: there is no claim {claim['claimName']}"
        for secret in _values(pod.spec, "secret"):
            if secret["secretName"] not in secrets:
                yield f"{pod.owner}: secret {secret['secretName']} is not in secrets.example.yaml"
        if pod.spec["serviceAccountName"] not in made.names("ServiceAccount"):
            yield f"{pod.owner}: there is no service account {pod.spec['serviceAccountName']}"
        if pod.spec.get("priorityClassName", "serving-critical") not in made.names("PriorityClass"):
            yield f"{pod.owner}: there is no priority class {pod.spec['priorityClassName']}"
        volumes = {volume["name"] for volume in pod.spec.get("volumes", ())}
        volumes |= {claim["metadata"]["name"] for claim in _claims(made, pod.owner)}
        for container in pod.containers:
            for mount in container.get("volumeMounts", ()):
                if mount["name"] not in volumes:
                    yield f"{pod.owner}: {container['name']} mounts {mount['name']}, which is no volume"
    for name, key in _secret_keys([made.cluster.get("gcsFaultToleranceOptions"), made.of("ScrapeConfig")]):
        if key not in secrets.get(name, set()):
            yield f"secret {name} with key {key} is not in secrets.example.yaml"


def check_selectors(made: Manifests) -> Iterator[str]:
    """Every selector selects a pod of ours."""
    pods = list(made.pods())
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy", "PodMonitor", "StatefulSet"):
        for item in made.of(kind):
            where = f"{kind} {item['metadata']['name']}"
            if kind == "Service":
                selectors = [{"matchLabels": item["spec"]["selector"]}] if "selector" in item["spec"] else []
            else:
                selectors = [*_values(item["spec"], "selector")]
            for selector in (*selectors, *_own_pods(item["spec"])):
                others = any(rule["key"] == _GATEWAYS for rule in selector.get("matchExpressions", ()))
                if selector and not others and not any(_is_selected(pod, selector) for pod in pods):
                    yield f"{where}: selects no pod: {selector}"
    for pod in pods:
        for spread in pod.spec.get("topologySpreadConstraints", ()):
            if not _is_selected(pod, spread["labelSelector"]):
                yield f"{pod.owner}: is spread over other pods than its own"


def check_ports(made: Manifests) -> Iterator[str]:
    """Services, monitors, Ingress, rayStartParams, applications and network policies mean the same ports."""
    pods = list(made.pods())
    services = dict(_KUBERAYS_OWN)
    for service in made.of("Service"):
        where = f"Service {service['metadata']['name']}"
        services[service["metadata"]["name"]] = {port["name"] for port in service["spec"].get("ports", ())}
        for pod in pods:
            if "selector" in service["spec"] and _is_selected(pod, {"matchLabels": service["spec"]["selector"]}):
                for port in service["spec"]["ports"]:
                    if port["targetPort"] not in _port_names(pod):
                        yield f"{where}: {pod.owner} has no port {port['targetPort']}"
    for ingress in made.of("Ingress"):
        for backend in _values(ingress["spec"], "service"):
            if backend["port"]["name"] not in services.get(backend["name"], set()):
                yield f"Ingress: no service {backend['name']} has a port {backend['port']['name']}"
    for monitor in made.of("PodMonitor"):
        known = set().union(*(_port_names(pod) for pod in pods if _is_selected(pod, monitor["spec"]["selector"])))
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            if endpoint["port"] not in known:
                yield f"PodMonitor: no pod has a port {endpoint['port']}"
    yield from _check_prometheus(made)
    yield from _check_ray_ports(made)


def _check_prometheus(made: Manifests) -> Iterator[str]:
    """What is to be scraped may be, and is asked for in the namespace where it is."""
    (policy,) = (item for item in made.of("NetworkPolicy") if item["metadata"]["name"] == "prometheus")
    let_in = _port_ranges(policy["spec"]["ingress"][0]["ports"])
    for pod in made.pods():
        for container in pod.containers:
            for port in container.get("ports", ()):
                if "metrics" in port["name"] and not _is_within(port["containerPort"], let_in):
                    yield f"{pod.owner}: the network policy prometheus does not let {port['name']} through"
    for config in made.of("ScrapeConfig"):
        for targets in config["spec"]["httpSDConfigs"]:
            name, namespace, *_ = targets["url"].removeprefix("http://").split(".")
            if name not in _KUBERAYS_OWN or namespace != config["metadata"]["namespace"]:
                yield f"ScrapeConfig: {targets['url']} is no service of this namespace"


def _check_ray_ports(made: Manifests) -> Iterator[str]:
    policy = next((item for item in made.of("NetworkPolicy") if item["metadata"]["name"] == "ray"), None)
    if policy is None:
        yield "there is no network policy ray"
        return
    for direction in ("ingress", "egress"):
        rules = policy["spec"][direction][0]["ports"]
        open_ports = _port_ranges(rules)
        groups = {"head": made.cluster["headGroupSpec"], **made.groups}
        for name, group in groups.items():
            wanted = {key: int(value) for key, value in group["rayStartParams"].items() if key.endswith("port")}
            wanted |= {"gcs": 6379, "dashboard": 8265, "fallback-proxy": 8500}
            wanted |= {"direct-ingress-first": 30000, "direct-ingress-last": 31000}
            wanted.pop("metrics-export-port")
            for what, port in wanted.items():
                if not _is_within(port, open_ports):
                    yield f"{name}: the network policy's {direction} does not let {what} {port} through"
    for pod in made.pods():
        for container in pod.containers:
            for port in container.get("ports", ()):
                if port["name"] == "metrics" and pod.owner in groups:
                    exported = groups[pod.owner]["rayStartParams"]["metrics-export-port"]
                    if str(port["containerPort"]) != exported:
                        yield f"{pod.owner}: Ray exports metrics on {exported}, the port is {port['containerPort']}"


def check_settings(made: Manifests) -> Iterator[str]:
    """The mounted settings, the applications and the worker groups fit each other."""
    settings, config = yaml.safe_load(made.settings_text), made.applications
    router = settings["router"]
    if (config["http_options"]["host"], config["http_options"]["port"]) != (router["host"], router["port"]):
        yield "serveConfigV2: http_options are not the router's host and port"
    built = {app["args"]["model"] for app in config["applications"] if app["import_path"].endswith(":engine")}
    has_documents = any(app["import_path"].endswith(":documents") for app in config["applications"])
    if has_documents != settings.get("ocr", {}).get("enabled", False):
        yield "serveConfigV2: the OCR service is in the settings or in the applications only"
    if built != set(settings["models"]):
        yield f"serveConfigV2: engines of {sorted(built)}, settings of {sorted(settings['models'])}"
    for pod in list(made.pods())[: 1 + len(made.groups)]:
        container = pod.spec["containers"][0]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        environment = {entry["name"]: entry.get("value") for entry in container["env"]}
        if environment.get("SERVING_SETTINGS_FILE") != f"{mounts.get('settings')}/settings.yaml":
            yield f"{pod.owner}: the settings are not mounted where SERVING_SETTINGS_FILE says"
        if router["keys_file"] != f"{mounts.get('keys')}/keys.yaml":
            yield f"{pod.owner}: the keys are not mounted where router.keys_file says"
        if settings["billing"]["directory"] != mounts.get("journals"):
            yield f"{pod.owner}: the journals' volume is not mounted at billing.directory"
        if container["ports"][-1] != {"name": "serve", "containerPort": router["port"]}:
            yield f"{pod.owner}: port serve is not router.port"
    yield from _check_room(made, settings)
    yield from _check_times(made, settings)
    yield from _check_ingress(made, settings)


def _check_room(made: Manifests, settings: dict[str, Any]) -> Iterator[str]:
    """Replicas find nodes: Ray's custom resources, CPUs and GPUs of the groups."""
    wants = [(name, model, _bounds(model)) for name, model in settings["models"].items()]
    wants += [
        (name, settings[name], (settings[name]["num_replicas"],) * 2)
        for name in ("router", "ocr")
        if settings.get(name, {}).get("enabled", name == "router")
    ]
    taken: Counter[str] = Counter()
    for name, wanted, (fewest, most) in wants:
        resources = wanted["resources_per_replica"]
        fit = [group for group in made.groups.values() if set(resources) <= set(read_resources(group))]
        if len(fit) != 1:
            yield f"{name}: {len(fit)} worker groups have {sorted(resources)}, not one"
            continue
        (group,) = fit
        params = group["rayStartParams"]
        per_node = int(params["num-cpus"]) / wanted["cpus_per_replica"]
        if gpus := wanted.get("gpus_per_replica", 0):
            per_node = min(per_node, int(params.get("num-gpus", "0")) / gpus)
        if fewest > math.floor(per_node) * group["minReplicas"] or most > math.floor(per_node) * group["maxReplicas"]:
            yield f"{name}: {fewest} to {most} replicas do not fit {group['groupName']}, {per_node:g} on a node"
        taken[group["groupName"]] += most * wanted["cpus_per_replica"]
        if taken[group["groupName"]] > int(params["num-cpus"]) * group["maxReplicas"]:
            yield f"{name}: leaves no CPU of {group['groupName']} to others, or they none to it"
        container = group["template"]["spec"]["containers"][0]
        limits = container["resources"]["limits"]
        if int(params["num-cpus"]) > float(limits["cpu"]) or params.get("num-gpus", "0") != limits.get(
            "nvidia.com/gpu", "0"
        ):
            yield f"{group['groupName']}: Ray is told of other CPUs or GPUs than the pod has"


def _check_times(made: Manifests, settings: dict[str, Any]) -> Iterator[str]:
    """What waits for requests waits longer than a request may take."""
    longest = settings["router"]["admission"]["request_timeout_s"]
    if settings["engine"]["drain_s"] < longest:
        yield "engine.drain_s is shorter than the longest request"
    if made.service["spec"]["rayClusterDeletionDelaySeconds"] <= longest:
        yield "rayClusterDeletionDelaySeconds is shorter than the longest request"
    for pod in list(made.pods())[1 : 1 + len(made.groups)]:
        container = pod.spec["containers"][0]
        drained = float(flags(container["lifecycle"]["preStop"]["exec"]["command"])["--within"])
        if not longest < drained < pod.seconds("terminationGracePeriodSeconds"):
            yield f"{pod.owner}: request {longest} s < drain {drained} s < grace period does not hold"
        environment = {entry["name"]: entry.get("value", "") for entry in container["env"]}
        for name in ("HARD_STOP_AFTER_S", "TIMEOUT_CLIENT_S", "TIMEOUT_SERVER_S"):
            if float(environment[f"RAY_SERVE_HAPROXY_{name}"]) <= longest:
                yield f"{pod.owner}: RAY_SERVE_HAPROXY_{name} is shorter than the longest request"


def _check_ingress(made: Manifests, settings: dict[str, Any]) -> Iterator[str]:
    """The Ingress takes what the router takes, for as long."""
    limits = LimitSettings.model_validate(settings["router"].get("limits", {}))
    for ingress in made.of("Ingress"):
        notes = {name.rpartition("/")[2]: text for name, text in ingress["metadata"]["annotations"].items()}
        if notes["proxy-body-size"] != f"{limits.max_body_bytes // 2**20}m":
            yield f"Ingress: bodies of {notes['proxy-body-size']}, the router takes {limits.max_body_bytes} bytes"
        for direction in ("read", "send"):
            if float(notes[f"proxy-{direction}-timeout"]) <= settings["router"]["admission"]["request_timeout_s"]:
                yield f"Ingress: proxy-{direction}-timeout is shorter than the longest request"
        if {notes["proxy-buffering"], notes["proxy-request-buffering"]} != {"off"}:
            yield "Ingress: keeps events back, or bodies"


def check_security(made: Manifests) -> Iterator[str]:
    """The restricted pod security standard, and more."""
    for pod in made.pods():
        context = pod.spec["securityContext"]
        if not context.get("runAsNonRoot") or not context.get("runAsUser"):
            yield f"{pod.owner}: may run as root"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{pod.owner}: has no seccomp profile"
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.owner}: has Kubernetes' token"
        containers = pod.containers
        if pod.owner == "head":
            containers = [*containers, {"name": "autoscaler", **made.cluster["autoscalerOptions"]}]
        for container in containers:
            where, own = f"{pod.owner}: {container['name']}", container.get("securityContext", {})
            if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities") != {"drop": ["ALL"]}:
                yield f"{where} has privileges"
            if not own.get("readOnlyRootFilesystem"):
                yield f"{where} can write to its root file system"
            resources = container.get("resources", {})
            if not {"cpu", "memory"} <= set(resources.get("requests", {})) & set(resources.get("limits", {})):
                yield f"{where} has no requests and limits"
    denied = [item["spec"] for item in made.of("NetworkPolicy") if item["metadata"]["name"] == "default-deny"]
    if denied != [{"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}]:
        yield "nothing is denied by default"


CHECKS = (
    check_images,
    check_sources,
    check_selectors,
    check_ports,
    check_settings,
    check_kuberay,
    check_open_files,
    check_probes,
    check_weights,
    check_security,
)


def _values(node: Any, key: str) -> Iterator[Any]:
    """Every mapping under `key`, however deep."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key and isinstance(value, dict):
                yield value
            yield from _values(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from _values(value, key)


def _own_pods(spec: Any) -> Iterator[dict[str, Any]]:
    """Pod selectors of this namespace: those beside a namespace selector mean others."""
    if isinstance(spec, dict):
        if "podSelector" in spec and "namespaceSelector" not in spec:
            yield spec["podSelector"]
        for value in spec.values():
            yield from _own_pods(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from _own_pods(value)


def _secret_keys(node: Any) -> Iterator[tuple[str, str]]:
    for kind in ("secretKeyRef", "credentials"):
        for found in _values(node, kind):
            yield found["name"], found["key"]


def _is_selected(pod: PodTemplate, selector: dict[str, Any]) -> bool:
    """As Kubernetes matches labels; operator `In` is the only one in use."""
    exact = selector.get("matchLabels", {}).items() <= pod.labels.items()
    return exact and all(
        rule["operator"] == "In" and pod.labels.get(rule["key"]) in rule["values"]
        for rule in selector.get("matchExpressions", ())
    )


def _port_ranges(rules: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(rule["port"], rule.get("endPort", rule["port"])) for rule in rules]


def _is_within(port: int, ranges: list[tuple[int, int]]) -> bool:
    return any(first <= port <= last for first, last in ranges)


def _port_names(pod: PodTemplate) -> set[str]:
    return {port["name"] for container in pod.containers for port in container.get("ports", ())}


def _claims(made: Manifests, owner: str) -> list[dict[str, Any]]:
    sets = (item for item in made.of("StatefulSet") if item["metadata"]["name"] == owner)
    return [claim for item in sets for claim in item["spec"].get("volumeClaimTemplates", ())]


def _bounds(model: dict[str, Any]) -> tuple[int, int]:
    if scaling := model.get("autoscaling"):
        return scaling["min_replicas"], scaling["max_replicas"]
    return model["num_replicas"], model["num_replicas"]
