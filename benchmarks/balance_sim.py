"""`python -m benchmarks.balance_sim`: how long pages wait under our choice of replicas, and under three others.

A discrete-event simulation with a seed, no clock and no network. Documents of several pages arrive at random; every
page is in one of the resolution modes and has an answer whose length only its engine will find out. Engines work as
continuous batching does: all running sequences advance by one token per step, a step takes longer the more there are,
a prompt counts as some steps of its sequence, and a sequence that has no place or no room in the KV cache waits.

Ours is the router's own code: `choose` over the work under way as it is estimated, and who has no room waits in the
router, for any replica. The others give a page to a replica when it comes, where it waits for that one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from random import Random
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.fastpath.rows import Row
from serving.cluster.directory import ReplicaRecord, ReplicaState
from serving.router.scheduling.balance import Need, ReplicaLoad, choose
from serving.router.scheduling.queue import AdmissionQueue, Waiter
from serving.settings.tenants import Priority

SIZES = (2, 8, 64)
PAGES_PER_REPLICA = {2: 20_000, 8: 6000, 64: 1500}
OFFERED_LOAD = 0.85
"""Work that comes, relative to what all replicas can do at their best."""
MEAN_PAGES_PER_DOCUMENT = 4
MAX_SEQS = 32
KV_TOKENS = 80_000
STEP_S, STEP_PER_SEQ_S = 0.008, 0.0005
PROMPT_TOKENS_PER_STEP = 64

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Kind:
    """Pages of one mode: how many there are, what they cost, how long their answers are."""

    weight: float
    prompt_tokens: int
    median_output: float
    spread: float
    """Standard deviation of the logarithm of the answer's length."""

    @property
    def mean_output(self) -> float:
        return self.median_output * math.exp(self.spread**2 / 2)


MIX = (
    Kind(0.15, 73, 120, 0.6),  # tiny: labels, receipts
    Kind(0.20, 111, 250, 0.6),  # small: slides
    Kind(0.30, 273, 600, 0.6),  # base: letters
    Kind(0.10, 421, 900, 0.6),  # large: reports
    Kind(0.25, 903, 1500, 0.7),  # gundam: papers, newspapers
)


@dataclass(slots=True)
class Page:
    kind: Kind
    arrived_s: float
    num_output: int
    started_s: float = 0.0

    @property
    def expected_work(self) -> int:
        """What a router can know: the mean of its kind."""
        return self.kind.prompt_tokens + round(self.kind.mean_output)

    @property
    def num_tokens(self) -> int:
        return self.kind.prompt_tokens + self.num_output

    @property
    def num_steps(self) -> float:
        return self.num_output + self.kind.prompt_tokens / PROMPT_TOKENS_PER_STEP


@dataclass(slots=True)
class Engine:
    """One replica: what runs, what waits in it. Time is counted in steps, whose length changes with the batch."""

    waiting: deque[Page] = field(default_factory=deque)
    running: list[tuple[float, int, Page]] = field(default_factory=list)
    kv_tokens: int = 0
    steps: float = 0.0
    as_of_s: float = 0.0
    version: int = 0

    def advance(self, now_s: float) -> None:
        self.steps += (now_s - self.as_of_s) / self._step_s()
        self.as_of_s = now_s

    def start(self, numbers: count[int]) -> None:
        """Begin with what has a place and room, in the order in which it came."""
        while self.waiting and len(self.running) < MAX_SEQS:
            page = self.waiting[0]
            if self.running and self.kv_tokens + page.num_tokens > KV_TOKENS:
                break
            self.waiting.popleft()
            page.started_s = self.as_of_s
            self.kv_tokens += page.num_tokens
            heappush(self.running, (self.steps + page.num_steps, next(numbers), page))

    def finish(self) -> Page:
        _, _, page = heappop(self.running)
        self.kv_tokens -= page.num_tokens
        return page

    def next_end_s(self) -> float:
        return self.as_of_s + max(0.0, self.running[0][0] - self.steps) * self._step_s()

    def _step_s(self) -> float:
        return STEP_S + STEP_PER_SEQ_S * len(self.running)


class Policy(ABC):
    """Who gets a page. Answers with the pages that are to be given out now, and to whom."""

    name: str

    def __init__(self, num_replicas: int, rng: Random) -> None:
        self.num_replicas = num_replicas
        self.rng = rng
        self.num_open = [0] * num_replicas

    def arrive(self, page: Page) -> list[tuple[int, Page]]:
        index = self.pick()
        self.num_open[index] += 1
        return [(index, page)]

    def end(self, index: int, page: Page) -> list[tuple[int, Page]]:
        self.num_open[index] -= 1
        return []

    @abstractmethod
    def pick(self) -> int: ...


class RoundRobin(Policy):
    name = "round robin"
    _turn = 0

    def pick(self) -> int:
        self._turn += 1
        return self._turn % self.num_replicas


class AtRandom(Policy):
    name = "random"

    def pick(self) -> int:
        return self.rng.randrange(self.num_replicas)


class LeastConnections(Policy):
    name = "least connections"

    def pick(self) -> int:
        least = min(self.num_open)
        return self.rng.choice([i for i, num in enumerate(self.num_open) if num == least])


@dataclass(slots=True, eq=False)
class _WaitingPage(Waiter):
    page: Page


class Ours(Policy):
    name = "ours"

    def __init__(self, num_replicas: int, rng: Random) -> None:
        super().__init__(num_replicas, rng)
        self.queue: AdmissionQueue[_WaitingPage] = AdmissionQueue(1 << 30)
        self.loads = [ReplicaLoad(_record(i)) for i in range(num_replicas)]
        for load in self.loads:
            load.resize(load.record, None, high_reserve=0.0)

    def pick(self) -> int:
        raise NotImplementedError

    def arrive(self, page: Page) -> list[tuple[int, Page]]:
        work = page.expected_work
        self.queue.push(_WaitingPage("all", Priority.NORMAL, work, page.arrived_s, math.inf, page))
        return self._give_out()

    def end(self, index: int, page: Page) -> list[tuple[int, Page]]:
        self.loads[index].add(-page.expected_work, -1)
        return self._give_out()

    def _give_out(self) -> list[tuple[int, Page]]:
        given = []
        while (head := self.queue.head()) is not None:
            load = choose(self.loads, Need(head.work), (), self.rng)
            if load is None:
                break
            self.queue.pop(head)
            load.add(head.work, 1)
            given.append((int(load.replica_id), head.page))
        return given


def _record(index: int) -> ReplicaRecord:
    return ReplicaRecord(str(index), "m", "http://x", ReplicaState.READY, MAX_SEQS, KV_TOKENS)


PEERS = (RoundRobin, AtRandom, LeastConnections)


@dataclass(frozen=True, slots=True)
class Figures:
    p50_s: float
    p99_s: float
    utilisation: float
    """Steps of sequences done while pages still came, relative to what full batches would have done."""


def build_pages(num_replicas: int, rng: Random) -> list[Page]:
    """Documents come at random times (Poisson), each with a geometric number of pages of one kind."""
    mean_steps = sum(k.weight * (k.mean_output + k.prompt_tokens / PROMPT_TOKENS_PER_STEP) for k in MIX)
    rate = OFFERED_LOAD * num_replicas * _peak_rate() / mean_steps / MEAN_PAGES_PER_DOCUMENT
    weights = [kind.weight for kind in MIX]
    pages: list[Page] = []
    now_s = 0.0
    while len(pages) < num_replicas * PAGES_PER_REPLICA[num_replicas]:
        now_s += rng.expovariate(rate)
        kind = rng.choices(MIX, weights)[0]
        for _ in range(1 + int(math.log(1 - rng.random()) / math.log(1 - 1 / MEAN_PAGES_PER_DOCUMENT))):
            pages.append(
                Page(kind, now_s, max(1, round(rng.lognormvariate(math.log(kind.median_output), kind.spread))))
            )
    return pages


def _peak_rate() -> float:
    return MAX_SEQS / (STEP_S + STEP_PER_SEQ_S * MAX_SEQS)


def simulate(policy: Policy, pages: list[Page]) -> Figures:
    """Run all pages to their end under one policy."""
    engines = [Engine() for _ in range(policy.num_replicas)]
    numbers = count()
    ends: list[tuple[float, int, int, int]] = []  # when, a number against ties, which engine, its version
    coming = iter(pages)
    page = next(coming, None)
    done_steps = 0.0
    last_s = pages[-1].arrived_s
    while page is not None or ends:
        if page is not None and (not ends or page.arrived_s <= ends[0][0]):
            now_s, given, touched = page.arrived_s, policy.arrive(page), set[int]()
            page = next(coming, None)
        else:
            now_s, _, index, version = heappop(ends)
            if version != engines[index].version:
                continue
            engines[index].advance(now_s)
            ended = engines[index].finish()
            done_steps += ended.num_steps if now_s <= last_s else 0.0
            given, touched = policy.end(index, ended), {index}
        for index, one in given:
            engines[index].waiting.append(one)
            touched.add(index)
        for index in touched:
            engine = engines[index]
            engine.advance(now_s)
            engine.start(numbers)
            engine.version += 1
            if engine.running:
                heappush(ends, (engine.next_end_s(), next(numbers), index, engine.version))
    waits = sorted(one.started_s - one.arrived_s for one in pages)
    return Figures(
        waits[len(waits) // 2],
        waits[len(waits) * 99 // 100],
        done_steps / (last_s * policy.num_replicas * _peak_rate()),
    )


def run(seed: int) -> dict[int, dict[str, Figures]]:
    """Every policy over the same pages, at every size."""
    results: dict[int, dict[str, Figures]] = {}
    for size in SIZES:
        results[size] = {}
        for policy in (Ours, *PEERS):
            pages = build_pages(size, Random(seed))
            results[size][policy.name] = simulate(policy(size, Random(seed)), pages)
    return results


def build_rows(results: dict[int, dict[str, Figures]]) -> list[Row]:
    """One row per size, peer and figure. Waits are compared with a millisecond added, since they may be zero."""
    rows = []
    for size, figures in results.items():
        ours = figures["ours"]
        for peer in PEERS:
            theirs = figures[peer.name]
            for name in ("p50", "p99"):
                mine, other = (getattr(one, f"{name}_s") for one in (ours, theirs))
                ratio = (other + 0.001) / (mine + 0.001)
                rows.append(Row(f"{name} wait, {size} replicas", mine, other, peer.name, 0.0, "s", ratio))
            used, other = ours.utilisation, theirs.utilisation
            rows.append(Row(f"utilisation, {size} replicas", used, other, peer.name, None, "of peak", used / other))
    return rows


def build_table(results: dict[int, dict[str, Figures]]) -> Table:
    table = Table(title=f"Choice of replicas, load {OFFERED_LOAD:.0%}")
    for column in ("replicas", "choice", "p50 wait, s", "p99 wait, s", "utilisation"):
        table.add_column(column, justify="left" if column == "choice" else "right")
    for size, figures in results.items():
        for name, one in figures.items():
            table.add_row(str(size), name, f"{one.p50_s:.3f}", f"{one.p99_s:.2f}", f"{one.utilisation:.1%}")
        table.add_section()
    return table


@app.command()
def main(
    seed: Annotated[int, typer.Option(help="Of the pages and of every choice by chance.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the rows.")] = None,
) -> None:
    """Simulate our choice of replicas beside round robin, random and least connections."""
    results = run(seed)
    Console().print(build_table(results))
    if json_file is not None:
        json_file.write_text(json.dumps([dataclasses.asdict(row) for row in build_rows(results)], indent=2) + "\n")


if __name__ == "__main__":
    app()
