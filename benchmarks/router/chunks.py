"""CPU per streamed chunk: what the router adds to an engine, beside the other ways to put something in front of it.

"Unpaced" engines send as fast as they can, so that whatever is in front gets several chunks at a time; at 10 ms every
chunk comes alone and costs a wake-up, a read and a write in every process that it passes.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.effort import rounds as rounds_of
from benchmarks.fastpath.rows import Row
from benchmarks.router.ways import (
    BARE,
    HANDLE,
    HAPROXY,
    OURS,
    PLAIN_AIOHTTP,
    PLAIN_HTTPX,
    Cost,
    Way,
    cheapest,
    measure,
    run_ways,
    set_paces,
)

CONCURRENCY, MAX_TOKENS, ROUNDS = 16, 256, 4
PACES = {"unpaced": None, "one chunk per 10 ms": 100.0}
NUM_REQUESTS = {"unpaced": 96, "one chunk per 10 ms": 32}
_DEAR = {HANDLE: 4, PLAIN_HTTPX: 2}
"""These cost so much more that a part of the load tells enough."""
PEERS = (PLAIN_AIOHTTP, PLAIN_HTTPX, HAPROXY, HANDLE)


def run() -> Iterator[Row]:
    """Every way under the same load, in turns."""
    with run_ways(OURS, *PEERS) as ways:
        for name, pace in PACES.items():
            set_paces(ways, pace)
            costs = take_turns(ways, NUM_REQUESTS[name])
            yield from compare(name, costs)


def take_turns(ways: dict[str, Way], num_requests: int) -> dict[str, Cost]:
    """The cheapest of the rounds of every way."""
    rounds: dict[str, list[Cost]] = {name: [] for name in ways}
    for _ in range(rounds_of(ROUNDS)):
        for name, way in ways.items():
            number = max(CONCURRENCY, num_requests // _DEAR.get(name, 1))
            rounds[name].append(measure(way, num_requests=number, concurrency=CONCURRENCY, max_tokens=MAX_TOKENS))
    return {name: cheapest(costs) for name, costs in rounds.items()}


def compare(pace: str, costs: dict[str, Cost]) -> Iterator[Row]:
    """What each way adds, and what each costs as a whole."""
    bare = costs[BARE].cpu_us_per_chunk
    added = f"CPU that the router adds per chunk, c={CONCURRENCY}, {pace}"
    whole = f"CPU of the whole server per chunk, c={CONCURRENCY}, {pace}"
    ours = costs[OURS]
    for name in PEERS:
        theirs = max(0.0, costs[name].cpu_us_per_chunk - bare)
        yield Row.of_costs(added, ours.router_cpu_us_per_chunk, theirs, name, None, "us")
    for name in (BARE, *PEERS):
        yield Row.of_costs(whole, ours.cpu_us_per_chunk, costs[name].cpu_us_per_chunk, name, bare, "us")
