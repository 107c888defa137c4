"""Time to the first token at concurrency 1: what the router adds to the bare engine's, and what its peers add."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from benchmarks.effort import rounds as rounds_of
from benchmarks.fastpath.rows import Row
from benchmarks.router.ways import BARE, HAPROXY, OURS, PLAIN_AIOHTTP, PLAIN_HTTPX, measure, run_ways

ROUNDS, NUM_REQUESTS = 7, 100
PEERS = (PLAIN_AIOHTTP, PLAIN_HTTPX, HAPROXY)


def run() -> Iterator[Row]:
    """Medians of the rounds' medians, the ways in turns."""
    with run_ways(OURS, *PEERS) as ways:
        rounds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds_of(ROUNDS)):
            for name, way in ways.items():
                cost = measure(way, num_requests=NUM_REQUESTS, concurrency=1, max_tokens=1)
                rounds[name].append(cost.load.first_p50_s * 1e3)
    middle = {name: statistics.median(times) for name, times in rounds.items()}
    ours = max(0.0, middle[OURS] - middle[BARE])
    for name in PEERS:
        theirs = max(0.0, middle[name] - middle[BARE])
        yield Row.of_costs("added time to first token, c=1, p50", ours, theirs, name, None, "ms")
    yield Row.of_costs("time to first token, c=1, p50", middle[OURS], middle[BARE], BARE, middle[BARE], "ms")
