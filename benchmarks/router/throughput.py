"""Chunks per second through one router process at concurrency 64: by the wall, and per CPU second of that process.

The wall's figure is bounded by what load generator and engine leave of the machine; a CPU second of the process is
what one core of its own would give it. Beside it the bare engine's, which is uvicorn alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.effort import rounds as rounds_of
from benchmarks.fastpath.rows import Row
from benchmarks.router.ways import BARE, OURS, Cost, measure, run_ways, set_paces

CONCURRENCY, MAX_TOKENS, ROUNDS = 64, 256, 4
PACES = {"unpaced": (None, 384), "12,800 chunks/s offered": (200.0, 128)}


def run() -> Iterator[Row]:
    """Both ways in turns."""
    with run_ways(OURS) as ways:
        for name, (pace, num_requests) in PACES.items():
            set_paces(ways, pace)
            rounds: dict[str, list[Cost]] = {OURS: [], BARE: []}
            for _ in range(rounds_of(ROUNDS)):
                for key, costs in rounds.items():
                    load = {"num_requests": num_requests, "concurrency": CONCURRENCY, "max_tokens": MAX_TOKENS}
                    costs.append(measure(ways[key], **load))
            walls = {
                key: max(cost.load.num_chunks / cost.load.took_s for cost in costs) for key, costs in rounds.items()
            }
            per_cpu_s = {
                OURS: 1e6 / min(cost.router_cpu_us_per_chunk for cost in rounds[OURS]),
                BARE: 1e6 / min(cost.cpu_us_per_chunk for cost in rounds[BARE]),
            }
            measure_name = f"chunks through one router process, c={CONCURRENCY}, {name}"
            yield Row.of_rates(measure_name, per_cpu_s[OURS], per_cpu_s[BARE], BARE, None, "per CPU second of it")
            yield Row.of_rates(measure_name, walls[OURS], walls[BARE], BARE, None, "per second")
