"""The ways from a client to the same scripted engine, started side by side so that they can take turns under load."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.router.load import LoadResult, run_load
from benchmarks.router.servers import Server, free_port, run_engine, run_gateway, run_plain_proxy, run_server
from serving.settings.stack import ScriptSettings

CHAT = "/v1/chat/completions"
BARE, OURS, HAPROXY, HANDLE = "bare uvicorn", "router", "Serve's HAProxy", "DeploymentHandle chain"
PLAIN_AIOHTTP, PLAIN_HTTPX = "plain aiohttp proxy", "plain starlette and httpx proxy"
_PLAIN = {PLAIN_AIOHTTP: "aiohttp", PLAIN_HTTPX: "httpx"}
SCRIPT = ScriptSettings(max_num_seqs=4096, output_tokens=256)
# Of a Ray cluster's processes those that a chunk passes through.
SERVE_PROCESSES = ("bin/haproxy", "ray::ServeReplica", "ray::ProxyActor")


@dataclass(frozen=True, slots=True)
class Way:
    """One way, and the processes that a chunk passes through on it."""

    name: str
    url: str
    parts: tuple[tuple[Server, tuple[str, ...]], ...]

    def cpu_s(self) -> float:
        """CPU seconds of all its processes so far, the engine's included."""
        return sum(server.cpu_s(*names) for server, names in self.parts)

    def set_pace(self, tokens_per_s: float | None) -> None:
        """Tell the engine at the end of the way how fast a sequence goes."""
        body = json.dumps({"tokens_per_s": tokens_per_s}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/script", body), timeout=10):
            pass


@dataclass(frozen=True, slots=True)
class Cost:
    """What one load has cost on one way."""

    load: LoadResult
    cpu_us_per_chunk: float
    router_cpu_us_per_chunk: float = 0.0


@contextlib.contextmanager
def run_ways(*names: str) -> Iterator[dict[str, Way]]:
    """Start the ways by these names; `bare`, `router` and the plain proxies share their engine."""
    with contextlib.ExitStack() as stack:
        ways: dict[str, Way] = {}
        engine = stack.enter_context(run_engine("--max-num-seqs", str(SCRIPT.max_num_seqs), "--output-tokens", "256"))
        ways[BARE] = Way(BARE, engine.url, ((engine, ()),))
        if OURS in names:
            router = stack.enter_context(run_gateway(engine))
            ways[OURS] = Way(OURS, router.url, ((router, ()), (engine, ())))
        for name, library in _PLAIN.items():
            if name in names:
                proxy = stack.enter_context(run_plain_proxy(library, engine))
                ways[name] = Way(name, proxy.url, ((proxy, ()), (engine, ())))
        for name, flag in ((HAPROXY, "haproxy"), (HANDLE, "handle")):
            if name in names:
                server = stack.enter_context(run_serve(flag))
                ways[name] = Way(name, server.url, ((server, SERVE_PROCESSES),))
        yield ways


def run_serve(way: str) -> contextlib.AbstractContextManager[Server]:
    """Ray Serve around the scripted engine, in a cluster of its own."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.router.serve_app", "--way", way, "--port", str(port)]
    return run_server([*command, "--script", SCRIPT.model_dump_json()], port, environment=haproxy_ports())


def haproxy_ports() -> dict[str, str]:
    """Ports of its own for each HAProxy of Serve's: by default all want the same two."""
    return {f"RAY_SERVE_HAPROXY_{name}_PORT": str(free_port()) for name in ("METRICS", "STATS")}


def set_paces(ways: dict[str, Way], tokens_per_s: float | None) -> None:
    """The same pace for all of them. What shares the bare one's engine shares its pace."""
    for name, way in ways.items():
        if name not in (OURS, *_PLAIN):
            way.set_pace(tokens_per_s)


def measure(way: Way, *, num_requests: int, concurrency: int, max_tokens: int) -> Cost:
    """One load on one way."""
    before_s, router_before_s = way.cpu_s(), _router_cpu_s(way)
    load = run_load(way.url + CHAT, num_requests=num_requests, concurrency=concurrency, max_tokens=max_tokens)
    scale = 1e6 / load.num_chunks
    return Cost(load, (way.cpu_s() - before_s) * scale, (_router_cpu_s(way) - router_before_s) * scale)


def _router_cpu_s(way: Way) -> float:
    return way.parts[0][0].cpu_s() if way.name == OURS else 0.0


def cheapest(costs: Sequence[Cost]) -> Cost:
    """Each figure at its best over the rounds: what else runs on the machine only ever adds."""
    best = min(costs, key=lambda cost: cost.cpu_us_per_chunk)
    return dataclasses.replace(best, router_cpu_us_per_chunk=min(cost.router_cpu_us_per_chunk for cost in costs))
