"""`python -m benchmarks.faults`: kills under load, a table of what was lost, and the same as JSON."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.fastpath.rows import Row
from benchmarks.faults.client import Load, Seen
from benchmarks.faults.stack import RunningStack, run_stack

app = typer.Typer(add_completion=False)

VICTIMS = ("replica", "engine", "router", "directory")
_STEADY_S = 1.5
_HEALED_WITHIN_S = 60.0
_VLLM_HEALED_WITHIN_S = 300.0
"""A replica with vLLM imports it and loads weights before it is ready: half a minute on two cores of its own."""
_MIB = 2**20
_SCRIPT = {"tokens_per_s": 60, "output_tokens": 60, "max_num_seqs": 128, "kv_tokens": 200_000}
_VLLM_CONFIG = Path(__file__).parents[2] / "configs" / "local.yaml"


@dataclass
class Round:
    """One kill, and what came of it."""

    victim: str
    healed_s: float = 0.0
    """From the kill until every replica and router was there again; the longest wait when they were not in time."""
    is_healed: bool = False
    streams: dict[str, int] = field(default_factory=dict)
    whole: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    """Whole requests that failed for good, the client's own retries included."""
    work_left: int = 0
    """Tokens of work that the routers still counted when all requests had ended: a leak unless 0."""
    router_files: int = 0
    """Open descriptors of all routers after the round."""
    router_mib: float = 0.0

    @property
    def is_clean(self) -> bool:
        """Nothing lost, nothing leaked, everything there again.

        Streams of a replica that died may be broken if they say so. Who was connected to a router that died sees a lost
        connection and asks again. Nobody else may notice anything.
        """
        excused = {"router": {Seen.RESET}, "replica": {Seen.TOLD}, "engine": {Seen.TOLD}}.get(self.victim, set())
        streams_good = set(self.streams) <= {Seen.COMPLETE, *excused}
        whole_good = set(self.whole) <= {Seen.COMPLETE, *(excused - {Seen.TOLD})}
        return streams_good and whole_good and not self.lost and not self.work_left and self.is_healed


def build_settings(num_replicas: int, num_routers: int, *, has_vllm: bool = False) -> dict[str, Any]:
    """Scripted engines, unless vLLM is asked for: what is under test is everything around them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model: dict[str, Any]
    if has_vllm:
        model = yaml.safe_load(_VLLM_CONFIG.read_text())["models"]["nano"]
        model |= {"num_replicas": num_replicas, "cpus_per_replica": 0.1}
    else:
        model = {"checkpoint": "scripted", "num_replicas": num_replicas, "cpus_per_replica": 0.1, "script": _SCRIPT}
    return {
        "models": {"nano": model},
        "router": {"host": "127.0.0.1", "port": port, "num_replicas": num_routers, "cpus_per_replica": 0.1},
        "engine": {"drain_s": 10, "heartbeat_s": 0.5, "lease_s": 3},
        "ray": {"num_cpus": 2},
    }


async def kill_under_load(
    stack: RunningStack,
    victim: str,
    num_replicas: int,
    num_routers: int,
    healed_within_s: float = _HEALED_WITHIN_S,
) -> Round:
    """One round: load, SIGKILL to the oldest process of a part, heal, let all requests end, look for leaks."""
    load = Load(stack.url, "nano")
    result = Round(victim)
    running = asyncio.create_task(load.run())
    await asyncio.sleep(_STEADY_S)
    killed_pid, killed_s = await kill(stack, victim), time.monotonic()
    wanted = {"replica": num_replicas, "router": num_routers, "directory": 1}
    result.healed_s = await wait_until_whole(stack, killed_pid, wanted, killed_s, healed_within_s)
    result.is_healed = result.healed_s < healed_within_s
    await asyncio.sleep(_STEADY_S)
    load.stop()
    await running
    result.streams = {str(seen): count for seen, count in load.streams.items()}
    result.whole = {str(seen): count for seen, count in load.whole.items()}
    result.lost = load.lost
    result.work_left = await asyncio.to_thread(work_left, stack)
    routers = await asyncio.to_thread(stack.find, "router")
    result.router_files = sum(process.num_fds() for process in routers)
    result.router_mib = sum(process.memory_info().rss for process in routers) / _MIB
    return result


async def kill(stack: RunningStack, victim: str) -> int:
    """SIGKILL to the oldest process of a part, or the end of an engine inside one; gives the pid to be replaced."""
    if victim == "engine":
        return await asyncio.to_thread(stack.end_an_engine)
    pid = (await asyncio.to_thread(stack.find, victim))[0].pid
    os.kill(pid, signal.SIGKILL)
    return pid


async def wait_until_whole(
    stack: RunningStack,
    killed_pid: int,
    wanted: dict[str, int],
    since_s: float,
    within_s: float = _HEALED_WITHIN_S,
) -> float:
    """Seconds since the kill until everything is there again; the longest wait when it is not in time."""
    while time.monotonic() - since_s < within_s:
        await asyncio.sleep(0.2)
        alive = {part: await asyncio.to_thread(stack.find, part) for part in wanted}
        is_whole = all(len(alive[part]) >= number for part, number in wanted.items())
        is_gone = all(process.pid != killed_pid for found in alive.values() for process in found)
        if is_whole and is_gone and await asyncio.to_thread(stack.num_ready) >= wanted["replica"]:
            return time.monotonic() - since_s
    return within_s


def work_left(stack: RunningStack) -> int:
    """Tokens of work that the routers still count. Asked several times, since each answer comes from one of them."""
    return max(sum(replica["work_tokens"] for replica in stack.get("/admin/state")["replicas"]) for _ in range(8))


def summarize(rounds: list[Round]) -> dict[str, dict[str, Any]]:
    """By victim: how often it was killed, and the sums and the worst over these rounds."""
    victims: dict[str, dict[str, Any]] = {}
    for victim in dict.fromkeys(entry.victim for entry in rounds):
        own = [entry for entry in rounds if entry.victim == victim]
        streams = sum((Counter(entry.streams) for entry in own), Counter[str]())
        victims[victim] = {
            "times": len(own),
            "healed_s": max(entry.healed_s for entry in own),
            "whole_complete": sum(entry.whole.get(Seen.COMPLETE, 0) for entry in own),
            "lost": sum(entry.lost for entry in own),
            "complete": streams[Seen.COMPLETE],
            "told": streams[Seen.TOLD],
            "silent": streams[Seen.SILENT],
            "reset": streams[Seen.RESET],
            "work_left": max(entry.work_left for entry in own),
            "files": [own[0].router_files, own[-1].router_files],
            "mib": [own[0].router_mib, own[-1].router_mib],
        }
    return victims


def build_rows(victims: dict[str, dict[str, Any]]) -> list[Row]:
    """Whole requests that were answered in the end, beside those that clients asked."""
    return [
        Row.of_rates(
            f"whole requests answered, {victim} killed",
            seen["whole_complete"],
            seen["whole_complete"] + seen["lost"],
            "requests asked",
            None,
            "requests",
        )
        for victim, seen in victims.items()
    ]


def build_table(rounds: list[Round]) -> Table:
    """A line per victim: how often it was killed, and the sums over these rounds."""
    table = Table(title="Kills under 32 streams and 32 whole requests")
    for column in ("killed", "times", "healed s (worst)", "whole: complete", "whole: lost", "streams: complete"):
        table.add_column(column, justify="left" if column == "killed" else "right")
    for column in ("told", "silent", "reset (router's own)", "work left", "descriptors first/last", "MiB first/last"):
        table.add_column(column, justify="right")
    for victim, seen in summarize(rounds).items():
        counts = [seen[key] for key in ("whole_complete", "lost", "complete", "told", "silent", "reset", "work_left")]
        files, mib = ("/".join(f"{value:.0f}" for value in seen[key]) for key in ("files", "mib"))
        table.add_row(victim, str(seen["times"]), f"{seen['healed_s']:.1f}", *map(str, counts), files, mib)
    return table


@app.command()
def main(
    rounds: Annotated[int, typer.Option(min=1, help="Kills of each part.")] = 10,
    victims: Annotated[str, typer.Option(help="Parts to kill, by comma.")] = ",".join(VICTIMS),
    replicas: Annotated[int, typer.Option(min=2)] = 2,
    routers: Annotated[int, typer.Option(min=2)] = 2,
    vllm: Annotated[bool, typer.Option("--vllm", help="Real vLLM engines with nano instead of scripted ones.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write every round.")] = None,
) -> None:
    """Kill replicas, routers and the directory of a real stack under load; exit 1 when anything was lost or leaked."""
    chosen = victims.split(",")
    if unknown := set(chosen) - set(VICTIMS):
        raise typer.BadParameter(f"no part {', '.join(sorted(unknown))}; there are {', '.join(VICTIMS)}")
    results: list[Round] = []
    settings = build_settings(replicas, routers, has_vllm=vllm)
    within_s = _VLLM_HEALED_WITHIN_S if vllm else _HEALED_WITHIN_S
    with tempfile.TemporaryDirectory() as folder, run_stack(settings, Path(folder)) as stack:
        plan = [victim for victim in chosen for _ in range(rounds)]
        for victim in track(plan, description="killing"):
            results.append(asyncio.run(kill_under_load(stack, victim, replicas, routers, within_s)))
    Console(width=180).print(build_table(results))
    if json_file is not None:
        summary = summarize(results)
        rows = [asdict(row) for row in build_rows(summary)]
        result = {"rows": rows, "summary": summary, "rounds": [asdict(entry) for entry in results]}
        json_file.write_text(json.dumps(result, indent=2))
    raise typer.Exit(0 if all(entry.is_clean for entry in results) else 1)


if __name__ == "__main__":
    app()
