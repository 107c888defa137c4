"""Drains a Ray node before its pod ends: replicas move to other nodes, and the last requests here are answered.

    python -m serving.cli.drain_node --within 900

For a container's `preStop` hook. Ray Serve starts a replacement for every replica on a draining node before it stops
the replica, which finishes its requests first. Serve ends the node's HAProxy, which also forwards requests to routers
on other nodes, when the last of them is answered, but not earlier than 30 seconds after it was taken out of service.
The exit status is 0 if all of these have ended, and 1 otherwise.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated

import psutil
import typer

_POLL_S = 1.0
_RAY = "import sys; from ray.scripts.scripts import main; sys.exit(main())"
_REPLICA = "ray::ServeReplica:"
_HAPROXY = "haproxy"


@dataclass(frozen=True, slots=True)
class Node:
    """A Ray node, as described by the command line of its raylet."""

    pid: int
    node_id: str
    gcs_address: str


def parse_raylet(pid: int, command: Iterable[str]) -> Node:
    """Parse a raylet's command line.

    Raises:
        ValueError: the command line does not identify the node.
    """
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in command if flag.startswith("--") and "=" in flag)
    try:
        return Node(pid, flags["node_id"], flags["gcs-address"])
    except KeyError as error:
        raise ValueError(f"the raylet {pid} was started without --{error.args[0]}") from None


def find_node(pid: int | None = None) -> Node:
    """Find the node on this machine, or the one of the raylet with this `pid`.

    Raises:
        ValueError: there is no node, or more than one.
    """
    raylets = [process for process in psutil.process_iter(["name"]) if process.info["name"] == "raylet"]
    found = [process for process in raylets if pid in (None, process.pid)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} raylets run here; there has to be one (--raylet says which)")
    return parse_raylet(found[0].pid, found[0].cmdline())


def count_serving(node: Node) -> int:
    """Return the node's processes that handle requests: Ray Serve's replicas and HAProxies, including older HAProxies
    that only finish their connections."""
    number = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            command = process.cmdline()[:1]
            if command and (command[0].startswith(_REPLICA) or PurePath(command[0]).name == _HAPROXY):
                number += process.environ().get("RAY_RAYLET_PID") == str(node.pid)
    return number


def drain(node: Node, within_s: float) -> bool:
    """Drain the node and return whether no request can be left on it.

    Raises:
        ValueError: Ray refuses to drain the node.
    """
    deadline_s = time.monotonic() + within_s
    # Serve computes the time that a replica has for its last requests back from this deadline.
    asked = subprocess.run(
        [
            *(sys.executable, "-c", _RAY, "drain-node", "--address", node.gcs_address, "--node-id", node.node_id),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the pod ends"),
            *("--deadline-remaining-seconds", str(round(within_s))),
        ],
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
    )
    if asked.returncode:
        raise ValueError(f"Ray does not drain this node: {(asked.stderr or asked.stdout).strip()[-500:]}")
    while (number := count_serving(node)) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
    return number == 0


def main(
    within: Annotated[float, typer.Option(min=1, help="Seconds to wait at most: more than the longest request.")],
    raylet: Annotated[int | None, typer.Option(help="Its pid, where several run.")] = None,
) -> None:
    """Move the replicas on this Ray node to other nodes, and wait until they have moved."""
    try:
        is_empty = drain(find_node(raylet), within)
    except (ValueError, subprocess.TimeoutExpired) as error:
        typer.echo(f"not drained: {error}", err=True)
        raise typer.Exit(1) from None
    if not is_empty:
        typer.echo("not drained: replicas or HAProxy are still here", err=True)
        raise typer.Exit(1)
    typer.echo("drained")


if __name__ == "__main__":
    typer.run(main)
