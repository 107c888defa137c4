"""Before a pod ends: have Ray move what runs on its node to others, and wait until the last request here is answered.

    python -m serving.cli.drain_node --within 900

For a container's `preStop` hook. Ray Serve starts every replica of a draining node elsewhere before it stops the one
here, and a replica that stops finishes its requests first. The node's HAProxy, which passes requests on to routers of
other nodes too, is ended by Serve when the last of them is answered, half a minute after it was taken out of use at the
earliest. Exit status 0 when none of these is left, 1 when one still is.
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
    """A node of Ray's, as the command line of its raylet tells of it."""

    pid: int
    node_id: str
    gcs_address: str


def parse_raylet(pid: int, command: Iterable[str]) -> Node:
    """Read a raylet's command line.

    Raises:
        ValueError: it does not say who it is.
    """
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in command if flag.startswith("--") and "=" in flag)
    try:
        return Node(pid, flags["node_id"], flags["gcs-address"])
    except KeyError as error:
        raise ValueError(f"the raylet {pid} was started without --{error.args[0]}") from None


def find_node(pid: int | None = None) -> Node:
    """The node that runs here; with a `pid`, the one of that raylet.

    Raises:
        ValueError: there is none, or more than one.
    """
    raylets = [process for process in psutil.process_iter(["name"]) if process.info["name"] == "raylet"]
    found = [process for process in raylets if pid in (None, process.pid)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} raylets run here; there has to be one (--raylet says which)")
    return parse_raylet(found[0].pid, found[0].cmdline())


def count_serving(node: Node) -> int:
    """Processes on the node that requests pass through: replicas of Ray Serve, and its HAProxies, the older ones too
    that only finish what they have."""
    number = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            command = process.cmdline()[:1]
            if command and (command[0].startswith(_REPLICA) or PurePath(command[0]).name == _HAPROXY):
                number += process.environ().get("RAY_RAYLET_PID") == str(node.pid)
    return number


def drain(node: Node, within_s: float) -> bool:
    """Drain it; True when no request can be on it any more.

    Raises:
        ValueError: Ray refuses.
    """
    deadline_s = time.monotonic() + within_s
    # Serve counts the time that a replica has for its last requests back from the deadline it is told.
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
    """Move what runs on this node of Ray's elsewhere, and wait until it has."""
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
