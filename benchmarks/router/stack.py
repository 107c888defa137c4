"""The whole stack against a bare vLLM server with the plugin: the nano checkpoint, streams of text, 16 at once.

Both run what configs/local.yaml says: the same engine arguments, the same environment. Beside them stands a plain proxy
in front of the bare server, which says how much of a difference is the price of any hop on the engine's own cores. They
take turns under the same load, and the figure is the median of the rounds' ratios. On a shared machine the tokens per
CPU second of the processes that a token passes through say more than those by the wall.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.effort import rounds as rounds_of
from benchmarks.fastpath.rows import Row
from benchmarks.router.load import run_load
from benchmarks.router.servers import Server, free_port, run_plain_proxy, run_server
from benchmarks.router.ways import CHAT, PLAIN_AIOHTTP, Way
from serving.engine.arguments import build_arguments
from serving.nano.build import build_checkpoint
from serving.settings.stack import Settings, load_settings

CONCURRENCY, MAX_TOKENS, NUM_REQUESTS, ROUNDS = 16, 128, 64, 8
CONFIG = Path("configs/local.yaml")
BARE = "bare vLLM server with the plugin"
STACK = "whole stack"
_SERVER = "vllm.entrypoints.launchers.api_server.entry"
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
_PLUGIN = {"VLLM_MEDIA_CONNECTOR": "serving"}
STACK_PROCESSES = ("ray::ServeReplica",)


@dataclass(frozen=True, slots=True)
class Speed:
    tokens_per_s: float
    tokens_per_cpu_s: float


def run() -> Iterator[Row]:
    """All under the same load, in turns."""
    settings = load_settings(CONFIG, {})
    model = next(iter(settings.models))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        checkpoint = build_checkpoint(Path(folder) / "nano")
        bare = servers.enter_context(run_bare(settings, model, checkpoint))
        proxy = servers.enter_context(run_plain_proxy("aiohttp", bare))
        stack = servers.enter_context(run_stack())
        ways = (
            Way(STACK, stack.url, ((stack, STACK_PROCESSES),)),
            Way(BARE, bare.url, ((bare, ()),)),
            Way(PLAIN_AIOHTTP, proxy.url, ((proxy, ()), (bare, ()))),
        )
        for way in ways:  # first requests pay for what is only done once
            measure(way, model)
        rounds = [{way.name: measure(way, model) for way in ways} for _ in range(rounds_of(ROUNDS))]
    for unit, field in (("per second", "tokens_per_s"), ("per CPU second", "tokens_per_cpu_s")):
        for peer, name in ((BARE, BARE), (PLAIN_AIOHTTP, f"{PLAIN_AIOHTTP} in front of a {BARE}")):
            pairs = [(getattr(each[STACK], field), getattr(each[peer], field)) for each in rounds]
            yield build_row(unit, name, pairs)


def build_row(unit: str, peer: str, pairs: list[tuple[float, float]]) -> Row:
    """Medians of both sides, and the median of the ratios of turns that stood beside each other."""
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(mine / other for mine, other in pairs)
    name = f"output tokens of the whole stack, nano checkpoint, c={CONCURRENCY}"
    return Row(name, ours, theirs, peer, None, unit, ratio)


def measure(way: Way, model: str) -> Speed:
    """One round."""
    before_s = way.cpu_s()
    load = run_load(
        way.url + CHAT,
        num_requests=NUM_REQUESTS,
        concurrency=CONCURRENCY,
        max_tokens=MAX_TOKENS,
        ignores_end=True,
        model=model,
    )
    num_tokens = NUM_REQUESTS * MAX_TOKENS
    return Speed(num_tokens / load.took_s, num_tokens / (way.cpu_s() - before_s))


def run_bare(
    settings: Settings, name: str, checkpoint: Path, *flags: str, module: str = _SERVER
) -> contextlib.AbstractContextManager[Server]:
    """vLLM's own server with the arguments that a replica would give it; another module is one without the plugin."""
    port = free_port()
    model = settings.models[name]
    arguments = [*build_arguments(name, model, settings.engine, str(checkpoint)), *flags]
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments, "--host", "127.0.0.1", "--port", str(port)]
    plugin = {**_PLUGIN, **model.images.environment()} if module == _SERVER else {}
    return run_server(command, port, environment={**_ENVIRONMENT, **plugin, **model.env})


def run_stack(config: Path = CONFIG) -> contextlib.AbstractContextManager[Server]:
    """`serving up`: Ray, the engine replica, the router."""
    port = free_port()
    command = [sys.executable, "-m", "serving.cli.main", "up", "--config", str(config)]
    return run_server(command, port, environment={"SERVING__ROUTER__PORT": str(port)}, ready_path="/ready")
