"""Every benchmark of the repository: what `python -m benchmarks` runs, in this order.

A new one is a module with a command line that takes `--json FILE` and writes there either a list of rows (see
`fastpath/rows.py`) or an object with `rows`, and a line in `BENCHMARKS`. Its place in the report is a template of
`benchmarks/report/`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.effort import Effort


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One command, and one file of results."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    """More arguments in a quick run."""
    minutes: float = 1.0
    """Of a quick run on two cores, about: for the progress bar."""
    is_quick: bool = True
    """Whether it is part of a quick run at all."""
    about: str = ""
    find_obstacle: Callable[[], str] = lambda: ""
    """Why it cannot run on this machine, with what to do about it; empty when it can."""

    def arguments_for(self, effort: Effort) -> list[str]:
        return [*self.arguments, *(self.quick if effort is Effort.QUICK else ())]


def _measure(package: str, name: str, minutes: float, about: str, **more: Any) -> Benchmark:
    return Benchmark(
        f"{package}.{name}", f"benchmarks.{package}", ("--only", name), minutes=minutes, about=about, **more
    )


def _find_ray_llm() -> str:
    from benchmarks.router.ray_llm import FOLDER

    if (FOLDER / "bin" / "python").exists():
        return ""
    return "its environment (about 3 GB) is not there: make it once with `python -m benchmarks.router.ray_llm`"


def _find_namespaces() -> str:
    if os.getuid() != 0:
        return "it makes network namespaces, for which it must run as root"
    missing = [tool for tool in ("ip", "nsenter", "redis-server") if shutil.which(tool) is None]
    return f"install {', '.join(missing)} first (iproute2, util-linux, redis-server)" if missing else ""


BENCHMARKS: Sequence[Benchmark] = (
    _measure("fastpath", "ngram", 0.3, "the n-gram guard per token, against stock vLLM's"),
    _measure("fastpath", "images", 0.7, "a page from JPEG bytes to model-ready pixels, against stock vLLM's code"),
    _measure("fastpath", "encoder", 1.6, "the vision encoder over eight pages, together and one at a time"),
    _measure("fastpath", "servers", 6.1, "whole requests through two vLLM servers: with the plugin, and stock"),
    _measure("fastpath", "reading", 3.4, "what the nano checkpoint reads, with the plugin and with stock code"),
    _measure("router", "chunks", 2.3, "CPU per streamed chunk: router, plain proxies, HAProxy, handle chain"),
    _measure("router", "first_token", 0.8, "time to the first token that each of these adds"),
    _measure("router", "throughput", 0.6, "chunks per second through one router process"),
    _measure("router", "memory", 0.1, "memory of 2,000 open streams that are silent"),
    _measure("router", "writes", 0.8, "CPU that coalescing the writes of one event-loop iteration saves"),
    _measure("router", "stack", 3.4, "the whole stack against bare vLLM, and a plain proxy in front of the same"),
    _measure("router", "ray_llm", 3.7, "ray.serve.llm in its three modes", find_obstacle=_find_ray_llm),
    Benchmark(
        "concurrency",
        "benchmarks.concurrency",
        quick=("--levels", "1,4,16", "--pages-per-level", "32"),
        minutes=4.3,
        about="pages per second and latencies against concurrency: the stack, bare vLLM with the plugin, stock vLLM",
    ),
    Benchmark(
        "scaling", "benchmarks.scaling", ("run",), minutes=0.7, about="throughput against replicas, scripted engines"
    ),
    Benchmark(
        "load_client", "benchmarks.load.clients", ("run",), minutes=1.2, about="what the load generator itself costs"
    ),
    Benchmark("balance_sim", "benchmarks.balance_sim", minutes=0.9, about="choice of replicas, simulated"),
    Benchmark("ledger", "benchmarks.ledger", minutes=0.7, about="CPU per request of the books"),
    Benchmark(
        "faults",
        "benchmarks.faults",
        ("--rounds", "10"),
        quick=("--rounds", "1"),
        minutes=2.4,
        about="parts of a running stack are killed under load",
    ),
    Benchmark(
        "overload",
        "benchmarks.overload",
        quick=("--seconds", "24"),
        minutes=0.9,
        about="four times more than the replicas can take",
    ),
    Benchmark(
        "ocr_accuracy",
        "benchmarks.ocr_accuracy",
        ("--pages", "24"),
        minutes=7.0,
        is_quick=False,
        about="what the nano checkpoint reads through the OCR service, in every mode, with cost and compression",
    ),
    Benchmark(
        "planning_check",
        "benchmarks.planning",
        ("check",),
        minutes=7.0,
        is_quick=False,
        about="loads of the nano stack beside what the simulation of `serving plan` predicts",
    ),
    Benchmark(
        "rehearsal",
        "benchmarks.rehearsal",
        minutes=12.0,
        is_quick=False,
        about="the Kubernetes overlay cpu-dev on nodes in network namespaces, which are killed and drained",
        find_obstacle=_find_namespaces,
    ),
)


def choose(only: Sequence[str], effort: Effort) -> list[Benchmark]:
    """Those that are named, by their whole name or by the part before the point; without names those of the effort.

    Raises:
        ValueError: a name that nobody has.
    """
    if not only:
        return [each for each in BENCHMARKS if each.is_quick or effort is Effort.FULL]
    unknown = [name for name in only if not any(is_named(each, name) for each in BENCHMARKS)]
    if unknown:
        known = ", ".join(each.name for each in BENCHMARKS)
        raise ValueError(f"no benchmark {', '.join(unknown)}; there are {known}")
    return [each for each in BENCHMARKS if any(is_named(each, name) for name in only)]


def is_named(benchmark: Benchmark, name: str) -> bool:
    return name in (benchmark.name, benchmark.name.partition(".")[0])
