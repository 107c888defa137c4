"""Runs the rehearsal: brings the overlay up, applies a load, ends nodes, and says what clients have seen of it."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.rehearsal.cluster import HEAD, Engines, Rehearsal, build_environment
from benchmarks.rehearsal.connections import Spoken, Watch, judge, to_json
from benchmarks.rehearsal.losses import STEADY_S, Loss, build_table, drain_and_end, kill_and_heal, run_clients
from benchmarks.rehearsal.nodes import open_network
from benchmarks.rehearsal.overlay import OVERLAY, read_overlay
from benchmarks.soak.__main__ import read_rows
from benchmarks.soak.verdict import Check, judge_books

_TOOLS = ("ip", "ss", "unshare", "nsenter", "redis-server")
_BOOKS_WITHIN_S = 60.0

app = typer.Typer(add_completion=False)


def bring_up(rehearsal: Rehearsal, engines: Engines, within_s: float) -> None:
    """Redis, head and workers, and the overlay's applications on them."""
    rehearsal.start_redis()
    rehearsal.say("Redis runs; starting the head")
    rehearsal.start_head()
    rehearsal.wait(lambda: bool(rehearsal.serve_status()), within_s, "the head's dashboard answers")
    rehearsal.start_workers(within_s)
    rehearsal.say(f"{', '.join(rehearsal.groups)} have joined; deploying serveConfigV2 of {OVERLAY}")
    rehearsal.deploy(rehearsal.network.folder)
    rehearsal.wait(rehearsal.is_whole, 2 * within_s, "two engines and two routers run")
    rehearsal.say(f"two engines ({engines}) and two routers run")


def settle_books(told: Any, folder: Path) -> list[Check]:
    """The ledger beside what answers told, as soon as they agree: a dead router's journal waits for another router."""
    deadline_s = time.monotonic() + _BOOKS_WITHIN_S
    while True:
        rows = read_rows(folder)
        # By the id that the answer showed: HAProxy gives every request one, and the router makes it unique.
        visible = {request_id.rpartition(".")[0] or request_id: row for request_id, row in rows.items()}
        num_doubled = len(rows) - len(visible)
        checks = judge_books(told, visible)
        checks.append(Check("no two rows of the ledger are of one request", f"{num_doubled} doubled", not num_doubled))
        if all(check.is_kept for check in checks) or time.monotonic() > deadline_s:
            return checks
        time.sleep(2.0)


def find_connections(rehearsal: Rehearsal, watch: Watch) -> list[Spoken]:
    """Who spoke to whom, judged by the overlay's NetworkPolicies."""
    kinds = {
        node.ip: rehearsal.groups[name].name if name in rehearsal.groups else name
        for name, node in rehearsal.network.nodes.items()
    }
    peers = {ip: (kind, rehearsal.overlay.peers[kind]) for ip, kind in kinds.items()}
    return judge(watch.connections(), peers, rehearsal.overlay.policies)


def show_connections(spoken: list[Spoken]) -> Table:
    table = Table("from", "to", "ports", "seen", "policies", title="Connections between nodes")
    for one in spoken:
        verdict = "allowed" if one.is_allowed else "DENIED"
        table.add_row(one.source, one.target, one.ports, str(one.number), verdict)
    return table


@app.command()
def main(
    engines: Annotated[
        Engines, typer.Option(help="The overlay's own, or scripted ones in their place.")
    ] = Engines.NANO,
    streams: Annotated[int, typer.Option(help="Clients that stream.")] = 4,
    whole: Annotated[int, typer.Option(help="Clients that wait for whole answers, and ask again when they must.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 60,
    within: Annotated[float, typer.Option(help="Seconds that a start or a repair may take.")] = 300.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the log and the counts.")] = None,
) -> None:
    """Run the overlay cpu-dev on nodes in network namespaces; under load kill an engine's node, a router's node and the
    head, and drain a node of either kind. Exit 1 when a request or a row of the ledger was lost, or when nodes spoke to
    each other against the overlay's NetworkPolicies. Needs root, iproute2 and redis-server."""
    if missing := [name for name in _TOOLS if shutil.which(name) is None]:
        raise typer.BadParameter(f"install {', '.join(missing)} first (iproute2, util-linux, redis-server)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the network is taken down
    console, overlay = Console(width=160), read_overlay()
    with open_network() as network:
        environment, key = build_environment(overlay, network.folder, engines)
        rehearsal = Rehearsal(network, overlay, environment, console)
        with Watch(network.nodes.values) as watch:
            bring_up(rehearsal, engines, within)
            with run_clients(rehearsal, key, streams, whole, tokens) as clients:
                rehearsal.wait(lambda: clients.num_complete() >= streams + whole, within, "the first answers are there")
                time.sleep(STEADY_S)
                kills = (("engines-0", 3.0), ("cpu-0", 3.0), (HEAD, 15.0))
                losses = [kill_and_heal(rehearsal, clients, victim, away_s, within) for victim, away_s in kills]
                losses += [drain_and_end(rehearsal, clients, victim, within) for victim in ("engines-1", "cpu-1")]
            total = clients.read()
            rehearsal.say(f"all clients have ended: {json.dumps(total['streams'])} {json.dumps(total['whole'])}")
            books = settle_books(clients.read_told(), network.folder / "journals")
        spoken = find_connections(rehearsal, watch)
    is_clean = finish(console, losses, books, spoken, total)
    if json_file is not None:
        result: dict[str, Any] = {"engines": engines, "serve_config": overlay.serve_config, "log": rehearsal.events}
        result |= {"losses": [asdict(loss) for loss in losses], "total": total}
        result |= {"books": [asdict(check) for check in books], "connections": to_json(spoken), "is_clean": is_clean}
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    raise typer.Exit(0 if is_clean else 1)


def finish(
    console: Console, losses: list[Loss], books: list[Check], spoken: list[Spoken], total: dict[str, Any]
) -> bool:
    """Print what was found; True when all of it is as it should be."""
    console.print(build_table(losses))
    console.print(show_connections(spoken))
    for check in books:
        console.print(f"{'kept' if check.is_kept else 'BROKEN'}: {check.asked}: {check.found}", markup=False)
    is_clean = all(loss.is_clean for loss in losses) and not total["lost"]
    is_clean = is_clean and all(check.is_kept for check in books) and all(one.is_allowed for one in spoken)
    console.print(f"{'nothing was lost' if is_clean else 'NOT CLEAN'}: lost {total['lost']}")
    return is_clean


if __name__ == "__main__":
    app()
