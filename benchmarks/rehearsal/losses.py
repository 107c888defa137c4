"""Nodes that end under load: what each end does to the cluster, and what clients see of it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.faults.client import Told
from benchmarks.rehearsal.cluster import HEAD, Rehearsal
from benchmarks.rehearsal.nodes import Node

STEADY_S = 10.0
_CLIENT = "client"
_ROUTERS = "cpu-"
"""How the names of nodes with routers begin."""


class End(StrEnum):
    """How a node ends."""

    KILLED = "killed"
    DRAINED = "drained"
    """By the overlay's preStop hook."""


@dataclass
class Clients:
    """The process with the clients, and what it tells."""

    node: Node
    counts: Path
    told: Path

    def read(self) -> dict[str, Any]:
        lines = self.counts.read_text().splitlines() if self.counts.exists() else []
        return json.loads(lines[-1]) if lines else {"streams": {}, "whole": {}, "lost": 0, "ready": 0}

    def read_told(self) -> list[Told]:
        """What answers told of themselves; once the clients have ended."""
        return [Told(**each) for each in json.loads(self.told.read_text())]

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
class Loss:
    """One node's end, and what followed."""

    victim: str
    end: End
    healed_s: float
    """From the end to a whole cluster; of a drained node from the start of its draining."""
    longest_pause_s: float
    seen: dict[str, Any]

    @property
    def is_clean(self) -> bool:
        """Nothing lost, and nobody left in silence.

        Streams that an engine of a killed node answered may be broken if they are told so. Connections to its HAProxy
        are lost with it (all workers have one), and a request that another node's HAProxy had given to a router there
        fails with Serve's status for that, 500; their clients ask again. The head has none of these, and a node that is
        drained has none any more when it ends.
        """
        is_excused = self.end is End.KILLED and self.victim != HEAD
        excused = {"complete", "refused"} | ({"reset"} if is_excused else set())
        excused |= {"failed"} if is_excused and self.victim.startswith(_ROUTERS) else set()
        streams = set(_nonzero(self.seen["streams"])) - {"told"}
        told_is_fine = is_excused or not self.seen["streams"].get("told")
        whole = set(_nonzero(self.seen["whole"]))
        return not self.seen["lost"] and streams <= excused and whole <= excused and told_is_fine


def _nonzero(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: number for name, number in counts.items() if number}


def kill_and_heal(rehearsal: Rehearsal, clients: Clients, victim: str, away_s: float, within_s: float) -> Loss:
    """SIGKILL to a node, a new one in its place as Kubernetes would, and the load all the while."""
    before, since_s = clients.read(), time.time()
    rehearsal.say(f"SIGKILL to every process of {victim}")
    rehearsal.network.nodes[victim].kill()
    time.sleep(away_s)
    complete = clients.num_complete() - before["streams"].get("complete", 0) - before["whole"].get("complete", 0)
    rehearsal.say(f"{complete} requests were completed in the {away_s:.0f} s after the kill")
    if victim == HEAD:
        rehearsal.say("the head starts again on its address")
        rehearsal.start_head()
    else:
        rehearsal.say(f"{rehearsal.add_worker(rehearsal.groups[victim])} starts in its place")
    healed_s = away_s + rehearsal.wait(rehearsal.is_whole, within_s, f"whole again after {victim}")
    rehearsal.say(f"whole again {healed_s:.0f} s after the kill")
    time.sleep(STEADY_S)
    return Loss(victim, End.KILLED, healed_s, clients.longest_pause_s(since_s), subtract(clients.read(), before))


def drain_and_end(rehearsal: Rehearsal, clients: Clients, victim: str, within_s: float) -> Loss:
    """The overlay's preStop hook on a node, beside a new node that takes what runs there; then its end."""
    rehearsal.say(f"{rehearsal.add_worker(rehearsal.groups[victim])} starts beside {victim}, which is to be drained")
    time.sleep(STEADY_S)
    before, since_s = clients.read(), time.time()
    hook = rehearsal.groups[victim].drain_hook
    rehearsal.say(f"{victim}: {' '.join(hook)}")
    node = rehearsal.network.nodes[victim]
    done = node.run_inside([sys.executable, *hook[1:]], 3 * within_s)  # a replica starts first, and requests end
    took_s = time.time() - since_s
    rehearsal.say(f"{victim}: {(done.stdout + done.stderr).strip()[-200:]} after {took_s:.0f} s; it ends")
    if done.returncode:
        raise RuntimeError(f"{victim} was not drained: {done.stderr[-2000:]}")
    node.kill()
    rehearsal.tell_endpoints()
    healed_s = took_s + rehearsal.wait(rehearsal.is_whole, within_s, f"whole again after {victim}")
    time.sleep(STEADY_S)
    return Loss(victim, End.DRAINED, healed_s, clients.longest_pause_s(since_s), subtract(clients.read(), before))


@contextmanager
def run_clients(rehearsal: Rehearsal, key: Path, streams: int, whole: int, tokens: int) -> Iterator[Clients]:
    node = rehearsal.network.add(_CLIENT, {})
    endpoints = node.folder / "endpoints.txt"
    rehearsal.endpoints = endpoints
    rehearsal.tell_endpoints()
    clients = Clients(node, node.folder / "counts.jsonl", node.folder / "told.json")
    command = [sys.executable, "-m", "benchmarks.rehearsal.client", "--endpoints", str(endpoints)]
    command += ["--counts", str(clients.counts), "--told", str(clients.told), "--key-file", str(key)]
    command += ["--streams", str(streams), "--whole", str(whole), "--tokens", str(tokens)]
    with node.log.open("ab") as out:
        process = subprocess.Popen(["ip", "netns", "exec", node.namespace, *command], stdout=out, stderr=out)
    try:
        yield clients
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    finally:
        process.kill()
        process.wait()


def build_table(losses: list[Loss]) -> Table:
    table = Table(title="What clients saw")
    for column in ("node", "end", "whole again, s", "longest pause, s", "whole: complete", "asked again", "lost"):
        table.add_column(column, justify="left" if column in ("node", "end") else "right")
    for column in ("streams: complete", "told", "reset", "failed", "refused", "silent"):
        table.add_column(column, justify="right")
    for loss in losses:
        whole, streams = loss.seen["whole"], loss.seen["streams"]
        again = sum(number for name, number in whole.items() if name != "complete")
        figures = [f"{loss.healed_s:.0f}", f"{loss.longest_pause_s:.1f}", whole.get("complete", 0), again]
        figures += [loss.seen["lost"]]
        figures += [streams.get(name, 0) for name in ("complete", "told", "reset", "failed", "refused", "silent")]
        table.add_row(loss.victim, loss.end, *map(str, figures))
    return table
