"""Runs the rehearsal: brings the overlay up, applies a load, kills nodes, and says what clients have seen of it."""

from __future__ import annotations

import json
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.rehearsal.nodes import Network, Node, open_network
from benchmarks.rehearsal.overlay import OVERLAY, Group, Overlay, read_overlay

_BIN = Path(sys.executable).parent
_HEAD, _REDIS, _CLIENT = "head", "redis", "client"
_OBJECT_STORE = "--object-store-memory=80000000"
_STEADY_S = 10.0
_JOINED = "This command will now block"
_PASSWORD = secrets.token_hex(16)

app = typer.Typer(add_completion=False)


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
        node = self.network.add(_REDIS, {})
        flags = ["--bind", node.ip, "--requirepass", _PASSWORD, "--appendonly", "yes", "--dir", "/tmp", "--save", ""]
        node.start(["redis-server", *flags])
        self.environment |= {"RAY_REDIS_ADDRESS": f"{node.ip}:6379", "RAY_external_storage_namespace": "rehearsal"}

    def start_head(self) -> None:
        """The first time or again, on the same address, as the head's Service gives it."""
        node = self.network.nodes.get(_HEAD) or self.network.add(_HEAD, self.environment)
        flags = [f"--node-ip-address={node.ip}", "--port=6379", f"--redis-password={_PASSWORD}", _OBJECT_STORE]
        node.start([str(_BIN / "ray"), "start", "--head", "--block", *flags, *self.overlay.head_flags])

    def start_worker(self, name: str, group: Group) -> None:
        node = self.network.nodes.get(name) or self.network.add(name, self.environment)
        self.groups[name] = group
        flags = [f"--address={self.network.nodes[_HEAD].ip}:6379", f"--node-ip-address={node.ip}", _OBJECT_STORE]
        node.start([str(_BIN / "ray"), "start", "--block", *flags, *group.ray_flags])
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

    def restart_ended(self) -> None:
        """What ends by itself is started again, as Kubernetes does with a container."""
        for name, node in list(self.network.nodes.items()):
            if node.process is None or node.process.poll() is None:
                continue
            self.say(f"{name} ended by itself and is started again: {node.tail(200).splitlines()[-1:]}")
            if name == _HEAD:
                self.start_head()
            elif name in self.groups:
                self.start_worker(name, self.groups[name])

    def deploy(self, folder: Path) -> None:
        """The Serve config, as KubeRay does it: to the head's dashboard."""
        file = folder / "serve.yaml"
        file.write_text(self.overlay.serve_config)
        command = [str(_BIN / "serve"), "deploy", "-a", "http://127.0.0.1:8265", str(file)]
        done = self.network.nodes[_HEAD].run(command, 120)
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
            done = self.network.nodes[_HEAD].run([sys.executable, "-c", code], 20)
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
            time.sleep(1.0)
        return time.monotonic() - begin_s


@dataclass
class Clients:
    """The process with the clients, and what it tells."""

    node: Node
    counts: Path

    def read(self) -> dict[str, Any]:
        lines = self.counts.read_text().splitlines() if self.counts.exists() else []
        return json.loads(lines[-1]) if lines else {"streams": {}, "whole": {}, "lost": 0, "ready": 0}

    def num_complete(self) -> int:
        told = self.read()
        return int(told["streams"].get("complete", 0) + told["whole"].get("complete", 0))

    def longest_pause_s(self, since_s: float) -> float:
        """The longest time in which no request was completed."""
        worst, last_s, last = 0.0, since_s, -1
        for line in self.counts.read_text().splitlines():
            told = json.loads(line)
            number = told["streams"].get("complete", 0) + told["whole"].get("complete", 0)
            if told["at_s"] < since_s or number != last:
                last_s, last = max(told["at_s"], since_s), number
            worst = max(worst, told["at_s"] - last_s)
        return worst


def subtract(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What came between two readings."""
    kinds = ("streams", "whole")
    parts = {kind: {name: number - before[kind].get(name, 0) for name, number in after[kind].items()} for kind in kinds}
    return {**parts, "lost": after["lost"] - before["lost"]}


@dataclass
class Kill:
    """One node's end, and what followed."""

    victim: str
    healed_s: float
    longest_pause_s: float
    seen: dict[str, Any]

    @property
    def is_clean(self) -> bool:
        """Nothing lost, and nobody left in silence.

        Streams that an engine of a dead node answered may be broken if they are told so. Connections to its HAProxy are
        lost with it (all workers have one), and their clients ask again. The head has neither.
        """
        excused = {"complete", "refused"} | ({"reset"} if self.victim != _HEAD else set())
        streams = set(_nonzero(self.seen["streams"])) - {"told"}
        whole = set(_nonzero(self.seen["whole"]))
        told_is_fine = self.victim != _HEAD or not self.seen["streams"].get("told")
        return not self.seen["lost"] and streams <= excused and whole <= excused and told_is_fine


def _nonzero(counts: dict[str, int]) -> dict[str, int]:
    return {name: number for name, number in counts.items() if number}


def kill_and_heal(rehearsal: Rehearsal, clients: Clients, victim: str, away_s: float, within_s: float) -> Kill:
    """SIGKILL to a node, a new one in its place as Kubernetes would, and the load all the while."""
    before, since_s = clients.read(), time.time()
    rehearsal.say(f"SIGKILL to every process of {victim}")
    rehearsal.network.nodes[victim].kill()
    time.sleep(away_s)
    complete = clients.num_complete() - before["streams"].get("complete", 0) - before["whole"].get("complete", 0)
    rehearsal.say(f"{complete} requests were completed in the {away_s:.0f} s after the kill")
    if victim == _HEAD:
        rehearsal.say("the head starts again on its address")
        rehearsal.start_head()
    else:
        rehearsal.say(f"{rehearsal.add_worker(rehearsal.groups[victim])} starts in its place")
    healed_s = away_s + rehearsal.wait(rehearsal.is_whole, within_s, f"whole again after {victim}")
    rehearsal.say(f"whole again {healed_s:.0f} s after the kill")
    time.sleep(_STEADY_S)
    seen = subtract(clients.read(), before)
    return Kill(victim, healed_s, clients.longest_pause_s(since_s), seen)


@contextmanager
def run_clients(rehearsal: Rehearsal, key: Path, streams: int, whole: int, tokens: int) -> Iterator[Clients]:
    node = rehearsal.network.add(_CLIENT, {})
    endpoints = node.folder / "endpoints.txt"
    rehearsal.endpoints = endpoints
    rehearsal.tell_endpoints()
    clients = Clients(node, node.folder / "counts.jsonl")
    command = [sys.executable, "-m", "benchmarks.rehearsal.client", "--endpoints", str(endpoints)]
    command += ["--counts", str(clients.counts), "--key-file", str(key), "--tokens", str(tokens)]
    command += ["--streams", str(streams), "--whole", str(whole)]
    with node.log.open("ab") as out:
        process = subprocess.Popen(["ip", "netns", "exec", node.namespace, *command], stdout=out, stderr=out)
    try:
        yield clients
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    finally:
        process.kill()
        process.wait()


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
        # 20,000 connections need 50,036 files, which a pod may open and a shell here may not.
        "RAY_SERVE_HAPROXY_MAXCONN": "2000",
        "PATH": f"{_BIN}:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": str(Path.cwd()),
    }
    if engines is Engines.SCRIPTED:
        environment |= {"SERVING__MODELS__NANO__SCRIPT__TOKENS_PER_S": "30"}
        environment |= {"SERVING__MODELS__NANO__SCRIPT__OUTPUT_TOKENS": "60"}
    return environment, key


def build_table(kills: list[Kill]) -> Table:
    table = Table(title="What clients saw")
    for column in ("killed", "whole again, s", "longest pause, s", "whole: complete", "asked again", "lost"):
        table.add_column(column, justify="left" if column == "killed" else "right")
    for column in ("streams: complete", "told", "reset", "refused", "silent"):
        table.add_column(column, justify="right")
    for kill in kills:
        whole, streams = kill.seen["whole"], kill.seen["streams"]
        again = sum(number for name, number in whole.items() if name != "complete")
        figures = [
            f"{kill.healed_s:.0f}",
            f"{kill.longest_pause_s:.1f}",
            whole.get("complete", 0),
            again,
            kill.seen["lost"],
        ]
        figures += [streams.get(name, 0) for name in ("complete", "told", "reset", "refused", "silent")]
        table.add_row(kill.victim, *map(str, figures))
    return table


@app.command()
def main(
    engines: Annotated[
        Engines, typer.Option(help="The overlay's own, or scripted ones in their place.")
    ] = Engines.NANO,
    streams: Annotated[int, typer.Option(help="Clients that stream.")] = 4,
    whole: Annotated[int, typer.Option(help="Clients that wait for whole answers, and ask again when they must.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 60,
    within: Annotated[float, typer.Option(help="Seconds that a start or a repair may take.")] = 240.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the log and the counts.")] = None,
) -> None:
    """Run the overlay cpu-dev on nodes in network namespaces, kill an engine's node, a router's node and the head under
    load, and exit 1 when a request was lost. Needs root, iproute2 and redis-server."""
    if missing := [name for name in ("ip", "unshare", "redis-server") if shutil.which(name) is None]:
        raise typer.BadParameter(f"install {', '.join(missing)} first (iproute2, util-linux, redis-server)")
    console, overlay = Console(width=160), read_overlay()
    with open_network() as network:
        environment, key = build_environment(overlay, network.folder, engines)
        rehearsal = Rehearsal(network, overlay, environment, console)
        rehearsal.start_redis()
        rehearsal.say("Redis runs; starting the head")
        rehearsal.start_head()
        rehearsal.wait(lambda: bool(rehearsal.serve_status()), within, "the head's dashboard answers")
        rehearsal.start_workers(within)
        rehearsal.say(f"{', '.join(rehearsal.groups)} have joined; deploying serveConfigV2 of {OVERLAY}")
        rehearsal.deploy(network.folder)
        rehearsal.wait(rehearsal.is_whole, 2 * within, "two engines and two routers run")
        rehearsal.say(f"two engines ({engines}) and two routers run")
        with run_clients(rehearsal, key, streams, whole, tokens) as clients:
            rehearsal.wait(
                lambda: clients.num_complete() >= streams + whole, within, "the first requests are completed"
            )
            time.sleep(_STEADY_S)
            plan = (("engines-0", 3.0), ("cpu-0", 3.0), (_HEAD, 15.0))
            kills = [kill_and_heal(rehearsal, clients, victim, away_s, within) for victim, away_s in plan]
        total = clients.read()
        rehearsal.say(f"all clients have ended: {json.dumps(total['streams'])} {json.dumps(total['whole'])}")
    console.print(build_table(kills))
    is_clean = all(kill.is_clean for kill in kills) and not total["lost"]
    console.print(f"{'nothing was lost' if is_clean else 'NOT CLEAN'}: lost {total['lost']}")
    if json_file is not None:
        result = {"engines": engines, "serve_config": overlay.serve_config, "log": rehearsal.events}
        result |= {"kills": [asdict(kill) for kill in kills], "total": total, "is_clean": is_clean}
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    raise typer.Exit(0 if is_clean else 1)


if __name__ == "__main__":
    app()
