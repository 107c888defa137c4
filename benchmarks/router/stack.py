"""The whole stack against a bare vLLM server with the plugin: the nano checkpoint, streams of text, 16 at once.

Both run what configs/local.yaml says: the same engine arguments, the same environment. They take turns under the same
load, and the figure is the median of the rounds' ratios. On a shared machine the tokens per CPU second of the processes
that a token passes through say more than those by the wall.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fastpath.rows import Row
from benchmarks.router.load import run_load
from benchmarks.router.servers import Server, free_port, run_server
from benchmarks.router.ways import CHAT
from serving.demo.build import build_checkpoint
from serving.engine.arguments import build_arguments
from serving.settings import Settings, load_settings

CONCURRENCY, MAX_TOKENS, NUM_REQUESTS, ROUNDS = 16, 128, 64, 8
_CONFIG = Path("configs/local.yaml")
_SERVER = "vllm.entrypoints.launchers.api_server.entry"
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_MEDIA_CONNECTOR": "serving", "VLLM_LOGGING_LEVEL": "ERROR"}
_STACK_PROCESSES = ("ray::ServeReplica",)


@dataclass(frozen=True, slots=True)
class Speed:
    tokens_per_s: float
    tokens_per_cpu_s: float


def run() -> Iterator[Row]:
    """Both under the same load, in turns."""
    settings = load_settings(_CONFIG, {})
    name = next(iter(settings.models))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        checkpoint = Path(folder) / "nano"
        build_checkpoint(checkpoint)
        bare = servers.enter_context(run_bare(settings, name, checkpoint))
        stack = servers.enter_context(run_stack())
        sides = ((stack, _STACK_PROCESSES), (bare, ()))
        for server, names in sides:  # first requests pay for what is only done once
            measure(server, name, names)
        rounds = [[measure(server, name, names) for server, names in sides] for _ in range(ROUNDS)]
    yield build_row("per second", [(ours.tokens_per_s, theirs.tokens_per_s) for ours, theirs in rounds])
    yield build_row("per CPU second", [(ours.tokens_per_cpu_s, theirs.tokens_per_cpu_s) for ours, theirs in rounds])


def build_row(unit: str, pairs: list[tuple[float, float]]) -> Row:
    """Medians of both sides, and the median of the ratios of turns that stood beside each other."""
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(mine / other for mine, other in pairs)
    name = f"output tokens of the whole stack, nano checkpoint, c={CONCURRENCY}"
    return Row(name, ours, theirs, "bare vLLM server with the plugin", None, unit, ratio)


def measure(server: Server, model: str, names: tuple[str, ...]) -> Speed:
    """One round."""
    before_s = server.cpu_s(*names)
    load = run_load(
        server.url + CHAT,
        num_requests=NUM_REQUESTS,
        concurrency=CONCURRENCY,
        max_tokens=MAX_TOKENS,
        ignores_end=True,
        model=model,
    )
    num_tokens = NUM_REQUESTS * MAX_TOKENS
    return Speed(num_tokens / load.took_s, num_tokens / (server.cpu_s(*names) - before_s))


def run_bare(settings: Settings, name: str, checkpoint: Path) -> contextlib.AbstractContextManager[Server]:
    """vLLM's own server with the arguments that a replica would give it."""
    port = free_port()
    model = settings.models[name]
    arguments = build_arguments(name, model, settings.engine, str(checkpoint))
    command = [sys.executable, "-W", "ignore", "-m", _SERVER, *arguments, "--host", "127.0.0.1", "--port", str(port)]
    environment = {**_ENVIRONMENT, **model.images.environment(), **model.env}
    return run_server(command, port, environment=environment)


def run_stack() -> contextlib.AbstractContextManager[Server]:
    """`serving up`: Ray, the engine replica, the router."""
    port = free_port()
    command = [sys.executable, "-m", "serving.cli", "up", "--config", str(_CONFIG)]
    return run_server(command, port, environment={"SERVING__ROUTER__PORT": str(port)}, ready_path="/ready")
