"""What the overlay says: the Serve config, the settings, and how each kind of node starts Ray."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.rehearsal.policies import Peer, Policies

OVERLAY = Path("k8s/overlays/cpu-dev")


@dataclass(frozen=True)
class Group:
    """Nodes of one kind."""

    name: str
    replicas: int
    ray_flags: tuple[str, ...]
    drain_hook: tuple[str, ...]
    """What a pod's container runs before it is ended."""


@dataclass(frozen=True)
class Overlay:
    serve_config: str
    """To the letter."""
    settings: str
    environment: Mapping[str, str]
    """Of every node, without what comes from secrets."""
    head_flags: tuple[str, ...]
    groups: tuple[Group, ...]
    policies: Policies
    peers: Mapping[str, Peer]
    """By kind of node: `head`, `redis`, `client`, and the groups' names."""


def read_overlay(folder: Path = OVERLAY) -> Overlay:
    """Render it with kustomize and read it.

    Raises:
        RuntimeError: kustomize refuses it.
    """
    kubectl = Path(sys.executable).with_name("kubectl")
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise RuntimeError(f"kubectl kustomize {folder}: {done.stderr.strip()}")
    objects = [entry for entry in yaml.safe_load_all(done.stdout) if entry]
    service = next(entry for entry in objects if entry["kind"] == "RayService")["spec"]
    cluster = service["rayClusterConfig"]
    settings = next(
        entry["data"]["settings.yaml"]
        for entry in objects
        if entry["kind"] == "ConfigMap" and "settings.yaml" in entry.get("data", {})
    )
    container = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    groups = tuple(
        Group(
            group["groupName"],
            group["replicas"],
            _flags(group["rayStartParams"]),
            tuple(group["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]),
        )
        for group in cluster["workerGroupSpecs"]
    )
    environment = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    policies = [entry["spec"] for entry in objects if entry["kind"] == "NetworkPolicy"]
    namespace = next(entry["metadata"]["name"] for entry in objects if entry["kind"] == "Namespace")
    return Overlay(
        service["serveConfigV2"],
        settings,
        environment,
        _flags(cluster["headGroupSpec"]["rayStartParams"]),
        groups,
        Policies(namespace, policies),
        _read_peers(namespace, cluster, objects),
    )


def _read_peers(namespace: str, cluster: Mapping[str, Any], objects: list[dict[str, Any]]) -> dict[str, Peer]:
    """Clients come through the ingress controller, as they do in a cluster."""
    (redis,) = (entry for entry in objects if entry["kind"] == "StatefulSet" and "redis" in entry["metadata"]["name"])
    templates = {"head": cluster["headGroupSpec"]["template"], "redis": redis["spec"]["template"]}
    templates |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    peers = {name: Peer(namespace, template["metadata"]["labels"]) for name, template in templates.items()}
    return {**peers, "client": Peer("ingress-nginx", {})}


def _flags(parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """As KubeRay makes them: a flag each, passed through a shell."""
    return tuple(flag for name, value in parameters.items() for flag in shlex.split(f"--{name}={value}"))
