"""What the overlay says: the Serve config, the settings, and how each kind of node starts Ray."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

OVERLAY = Path("k8s/overlays/cpu-dev")


@dataclass(frozen=True)
class Group:
    """Nodes of one kind."""

    name: str
    replicas: int
    ray_flags: tuple[str, ...]


@dataclass(frozen=True)
class Overlay:
    serve_config: str
    """To the letter."""
    settings: str
    environment: Mapping[str, str]
    """Of every node, without what comes from secrets."""
    head_flags: tuple[str, ...]
    groups: tuple[Group, ...]


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
        Group(group["groupName"], group["replicas"], _flags(group["rayStartParams"]))
        for group in cluster["workerGroupSpecs"]
    )
    environment = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    return Overlay(
        service["serveConfigV2"], settings, environment, _flags(cluster["headGroupSpec"]["rayStartParams"]), groups
    )


def _flags(parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """As KubeRay makes them: a flag each. It passes them through a shell, which takes the outer quotes off."""
    flags = []
    for name, value in parameters.items():
        text = str(value)
        if name == "resources":  # JSON in quotes for the shell
            text = text.strip("'\"").replace("\\", "")
        flags.append(f"--{name}={text}")
    return tuple(flags)
