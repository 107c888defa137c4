"""The cluster under rehearsal: the overlay's Redis, head and workers, brought up as KubeRay would."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.rehearsal.nodes import Network
from benchmarks.rehearsal.overlay import Group, Overlay

HEAD, REDIS = "head", "redis"
_BIN = Path(sys.executable).parent
_OBJECT_STORE = "--object-store-memory=80000000"
_POLL_S = 3.0  # each look at Serve's status is a process
_JOINED = "This command will now block"
_PASSWORD = secrets.token_hex(16)
_AHEAD = -10
"""Niceness of the head and of nodes that start. Each has a machine of its own where this is real; here it must not wait
for engines at work: Ray gives a node's agent 15 s and the node itself 30 s to come up."""


class Engines(StrEnum):
    NANO = "nano"
    SCRIPTED = "scripted"


@dataclass
class Rehearsal:
    """The cluster and its clients."""

    network: Network
    overlay: Overlay
    environment: dict[str, str]
    console: Console
    started_s: float = field(default_factory=time.monotonic)
    events: list[dict[str, Any]] = field(default_factory=list)
    groups: dict[str, Group] = field(default_factory=dict)
    starting: set[str] = field(default_factory=set)
    """Workers that have not joined yet."""
    endpoints: Path | None = None

    def tell_endpoints(self) -> None:
        """The addresses of all workers, as the Service's selector finds them."""
        if self.endpoints is not None:
            nodes = (self.network.nodes[name] for name in self.groups)
            self.endpoints.write_text("\n".join(node.ip for node in nodes if node.process is not None))

    def say(self, text: str) -> None:
        at_s = time.monotonic() - self.started_s
        self.events.append({"at_s": round(at_s, 1), "what": text})
        self.console.print(f"[{at_s:6.1f} s] {text}", markup=False)

    def start_redis(self) -> None:
        node = self.network.add(REDIS, {})
        flags = ["--bind", node.ip, "--requirepass", _PASSWORD, "--appendonly", "yes", "--dir", "/tmp", "--save", ""]
        node.start(["redis-server", *flags])
        self.environment |= {"RAY_REDIS_ADDRESS": f"{node.ip}:6379", "RAY_external_storage_namespace": "rehearsal"}

    def start_head(self) -> None:
        """The first time or again, on the same address, as the head's Service gives it."""
        node = self.network.nodes.get(HEAD) or self.network.add(HEAD, self.environment)
        flags = [f"--node-ip-address={node.ip}", "--port=6379", f"--redis-password={_PASSWORD}", _OBJECT_STORE]
        node.start([str(_BIN / "ray"), "start", "--head", "--block", *flags, *self.overlay.head_flags])
        node.weigh(_AHEAD)

    def start_worker(self, name: str, group: Group) -> None:
        node = self.network.nodes.get(name) or self.network.add(name, self.environment)
        self.groups[name] = group
        flags = [f"--address={self.network.nodes[HEAD].ip}:6379", f"--node-ip-address={node.ip}", _OBJECT_STORE]
        node.start([str(_BIN / "ray"), "start", "--block", *flags, *group.ray_flags])
        node.weigh(_AHEAD)
        self.starting.add(name)
        self.tell_endpoints()

    def start_workers(self, within_s: float) -> None:
        """One after the other: `ray start` gives up after 30 s, too little for some at once on a busy machine."""
        for group in self.overlay.groups:
            for _ in range(group.replicas):
                node = self.network.nodes[self.add_worker(group)]
                self.wait(lambda node=node: _JOINED in node.tail(), within_s, f"{node.name} has joined")  # type: ignore[misc]

    def add_worker(self, group: Group) -> str:
        """A node with a name and an address of its own, as a new pod has them; a node that died never comes back."""
        name = f"{group.name}-{sum(one == group for one in self.groups.values())}"
        self.start_worker(name, group)
        return name

    def settle_joined(self) -> None:
        """Nodes that have joined share the cores as equals."""
        for name in [name for name in self.starting if _JOINED in self.network.nodes[name].tail()]:
            self.network.nodes[name].weigh(0)
            self.starting.discard(name)

    def restart_ended(self) -> None:
        """What ends by itself is started again, as Kubernetes does with a container."""
        for name, node in list(self.network.nodes.items()):
            if node.process is None or node.process.poll() is None:
                continue
            self.say(f"{name} ended by itself and is started again: {node.tail(200).splitlines()[-1:]}")
            if name == HEAD:
                self.start_head()
            elif name in self.groups:
                self.start_worker(name, self.groups[name])

    def deploy(self, folder: Path) -> None:
        """The Serve config, as KubeRay does it: to the head's dashboard."""
        file = folder / "serve.yaml"
        file.write_text(self.overlay.serve_config)
        command = [str(_BIN / "serve"), "deploy", "-a", "http://127.0.0.1:8265", str(file)]
        done = self.network.nodes[HEAD].run(command, 120)
        if done.returncode:
            raise RuntimeError(f"serve deploy: {done.stdout[-2000:]}{done.stderr[-3000:]}")

    def serve_status(self) -> dict[str, Any]:
        """States of applications and numbers of running replicas; empty while the head does not answer."""
        code = (
            "import json, os, urllib.request as r; "
            "q = r.Request('http://127.0.0.1:8265/api/serve/applications/', "
            "headers={'Authorization': 'Bearer ' + os.environ['RAY_AUTH_TOKEN']}); "
            "print(r.urlopen(q, timeout=8).read().decode())"
        )
        try:
            done = self.network.nodes[HEAD].run([sys.executable, "-c", code], 20)
        except subprocess.TimeoutExpired:
            return {}
        return json.loads(done.stdout) if done.returncode == 0 else {}

    def is_whole(self) -> bool:
        """Whether every application runs with all of its replicas."""
        applications = self.serve_status().get("applications", {})
        for name, one in applications.items():
            if one["status"] == "DEPLOY_FAILED":
                raise RuntimeError(f"{name} was not deployed: {one['message'][-3000:]}")
        running = {
            name: sum(
                replica["state"] == "RUNNING" for entry in one["deployments"].values() for replica in entry["replicas"]
            )
            for name, one in applications.items()
            if one["status"] == "RUNNING"
        }
        return running == {"engine-nano": 2, "router": 2}

    def wait(self, is_so: Callable[[], bool], within_s: float, what: str) -> float:
        """Seconds until it was so.

        Raises:
            RuntimeError: it was not in time.
        """
        begin_s = time.monotonic()
        while not is_so():
            if time.monotonic() - begin_s > within_s:
                status = json.dumps(self.serve_status(), indent=1)[:6000]
                tails = "\n".join(f"== {node.name}\n{node.tail()}" for node in self.network.nodes.values())
                raise RuntimeError(f"not within {within_s:.0f} s: {what}\n{status}\n{tails}")
            self.restart_ended()
            self.settle_joined()
            time.sleep(_POLL_S)
        return time.monotonic() - begin_s


def build_environment(overlay: Overlay, folder: Path, engines: Engines) -> tuple[dict[str, str], Path]:
    """What the overlay's pods have, with this machine's paths in the place of their volumes and of its secrets."""
    settings, keys = folder / "settings.yaml", folder / "keys.yaml"
    settings.write_text(overlay.settings)
    made = subprocess.run(
        [_BIN / "serving", "keys", "create", "--file", keys, "--tenant", "rehearsal"],
        capture_output=True,
        text=True,
        check=True,
    )
    key = folder / "key.txt"
    key.write_text(next(word for word in made.stdout.split() if word.startswith("sk-")))
    key.chmod(0o600)
    environment = {
        **overlay.environment,
        "HOME": str(folder),
        "SERVING_SETTINGS_FILE": str(settings),
        "SERVING_CHECKPOINTS_DIR": str(folder / "models"),
        "SERVING__ROUTER__KEYS_FILE": str(keys),
        "SERVING__BILLING__DIRECTORY": str(folder / "journals"),
        "SERVING__ENGINE__API_KEY": secrets.token_hex(16),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PATH": f"{_BIN}:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": str(Path.cwd()),
    }
    if engines is Engines.SCRIPTED:
        environment |= {"SERVING__MODELS__NANO__SCRIPT__TOKENS_PER_S": "30"}
        environment |= {"SERVING__MODELS__NANO__SCRIPT__OUTPUT_TOKENS": "60"}
    return environment, key
