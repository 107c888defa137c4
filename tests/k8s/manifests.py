"""What the overlays make, as Kubernetes would get it."""

from __future__ import annotations

import functools
import itertools
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from support.paths import ROOT

K8S = ROOT / "k8s"
OVERLAYS = ("cpu-dev", "gpu-prod")
BIN = ROOT / ".venv/bin"


def render(folder: Path) -> str:
    """What `kubectl kustomize` makes of a folder."""
    made = subprocess.run(
        [BIN / "kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60, check=False
    )
    assert made.returncode == 0, made.stderr
    assert not made.stderr, made.stderr  # deprecations
    return made.stdout


@dataclass(frozen=True)
class PodTemplate:
    """A pod template, and the object that it stands in."""

    owner: str
    labels: dict[str, str]
    spec: dict[str, Any]

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec["containers"], *self.spec.get("initContainers", ())]

    @property
    def component(self) -> str:
        return self.labels.get("app.kubernetes.io/component", "")

    def seconds(self, key: str) -> float:
        """`terminationGracePeriodSeconds` and the like."""
        return float(self.spec[key])


@dataclass(frozen=True)
class Manifests:
    """An overlay's objects."""

    name: str
    objects: tuple[dict[str, Any], ...]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [item for item in self.objects if item["kind"] == kind]

    def names(self, kind: str) -> set[str]:
        return {item["metadata"]["name"] for item in self.of(kind)}

    @cached_property
    def service(self) -> dict[str, Any]:
        (found,) = self.of("RayService")
        return found

    @property
    def cluster(self) -> dict[str, Any]:
        found: dict[str, Any] = self.service["spec"]["rayClusterConfig"]
        return found

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        return {group["groupName"]: group for group in self.cluster["workerGroupSpecs"]}

    @property
    def applications(self) -> dict[str, Any]:
        """`serveConfigV2`, read."""
        found: dict[str, Any] = yaml.safe_load(self.service["spec"]["serveConfigV2"])
        return found

    @property
    def settings_text(self) -> str:
        (found,) = (item for item in self.of("ConfigMap") if item["metadata"]["name"].startswith("serving-settings-"))
        return str(found["data"]["settings.yaml"])

    def pods(self) -> Iterator[PodTemplate]:
        """Every pod template, the Ray cluster's too."""
        head = self.cluster["headGroupSpec"]["template"]
        yield PodTemplate("head", head["metadata"]["labels"], head["spec"])
        for name, group in self.groups.items():
            yield PodTemplate(name, group["template"]["metadata"]["labels"], group["template"]["spec"])
        for kind in ("Job", "StatefulSet", "Deployment"):
            for item in self.of(kind):
                template = item["spec"]["template"]
                yield PodTemplate(item["metadata"]["name"], template["metadata"]["labels"], template["spec"])


def read_manifests(name: str, text: str) -> Manifests:
    return Manifests(name, tuple(item for item in yaml.load_all(text, yaml.CSafeLoader) if item))


@functools.cache
def named_secrets() -> dict[str, set[str]]:
    """The secrets that somebody has to bring, and their keys."""
    objects = yaml.load_all((K8S / "secrets.example.yaml").read_text(), yaml.CSafeLoader)
    return {item["metadata"]["name"]: set(item["stringData"]) for item in objects}


def flags(words: list[str]) -> dict[str, str]:
    """`--a b` pairs of a command."""
    return {word: value for word, value in itertools.pairwise(words) if word.startswith("--")}
