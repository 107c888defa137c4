"""A discrete-event simulation of a router and its engines. No clock, no network, a seed.

The router makes its real decisions: `choose` over every `ReplicaLoad`, each filled as far as its record allows;
requests that fit nowhere wait in the router. An engine follows its `ServiceCurve` step by step; consecutive steps in
which no sequence starts or ends are combined.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from random import Random
from typing import Any

import simpy

from serving.cluster.directory import ReplicaRecord, ReplicaState
from serving.planning.curve import ServiceCurve
from serving.router.scheduling.balance import Need, ReplicaLoad, choose

_WARM_UP, _COOL_DOWN = 0.1, 0.9
"""Pages that arrive before and after these fractions of a run are not counted: the load is not steady then."""

Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True, slots=True)
class Pages:
    """The pages of a load: prompts of equal length, answers of random lengths."""

    prompt_tokens: int
    mean_output: float
    spread: float = 0.0
    """Standard deviation of the logarithm of an answer's length; 0 makes all equal."""
    max_output: int = 1 << 30

    def draw(self, rng: Random) -> int:
        """Draw the tokens of an answer, at least one. Their mean is `mean_output` if few reach the maximum."""
        middle = math.log(self.mean_output) - self.spread**2 / 2
        return min(self.max_output, max(1, round(math.exp(rng.gauss(middle, self.spread)))))

    @property
    def expected_work(self) -> int:
        """Return the work that a router estimates before the answer is known."""
        return self.prompt_tokens + round(self.mean_output)


@dataclass(slots=True, eq=False)
class SimulatedPage:
    """One page in the simulation. Times are simulated seconds."""

    prompt_tokens: int
    num_output: int
    work: int
    arrived_s: float
    ended: Callable[[SimulatedPage], None]
    first_s: float = 0.0
    ended_s: float = 0.0
    replica: int = -1


@dataclass(slots=True)
class _Engine:
    """One replica's loop."""

    env: simpy.Environment
    curve: ServiceCurve
    waiting: deque[SimulatedPage] = field(default_factory=deque)
    running: list[tuple[int, int, SimulatedPage]] = field(default_factory=list)
    """The step in which a page ends, a number that breaks ties, and the page."""
    num_tokens: int = 0
    """Tokens in the KV cache that running sequences occupy or will occupy."""
    steps: int = 0
    busy_s: float = 0.0
    _numbers: count[int] = field(default_factory=count)
    _bell: simpy.Event | None = None

    def submit(self, job: SimulatedPage) -> None:
        self.waiting.append(job)
        if self._bell is not None:
            self._bell.succeed()
            self._bell = None

    def run(self) -> Process:
        while True:
            admitted = self._admit()
            if admitted:
                yield from self._pass(1, self.curve.step_s(len(self.running), len(admitted)))
                for job in admitted:
                    job.first_s = self.env.now
            elif self.running:
                yield from self._run_until_news()
            else:
                self._bell = self.env.event()
                yield self._bell
                continue
            self._end_what_is_done()

    def _admit(self) -> list[SimulatedPage]:
        admitted: list[SimulatedPage] = []
        while self.waiting and len(self.running) < self.curve.max_seqs and len(admitted) < self.curve.prompts_per_step:
            job = self.waiting[0]
            size = job.prompt_tokens + job.num_output
            if self.running and self.num_tokens + size > self.curve.kv_tokens:
                break
            self.waiting.popleft()
            self.num_tokens += size
            heappush(self.running, (self.steps + job.num_output, next(self._numbers), job))
            admitted.append(job)
        return admitted

    def _run_until_news(self) -> Process:
        """Simulate steps until a running sequence ends, or until a page arrives that can start."""
        step_s = self.curve.step_s(len(self.running))
        num_left = self.running[0][0] - self.steps
        if self.waiting:  # queued requests cannot start before a running one ends
            yield from self._pass(num_left, num_left * step_s)
            return
        begun_s, self._bell = self.env.now, self.env.event()
        yield self.env.timeout(num_left * step_s) | self._bell
        self._bell = None
        num_done = min(num_left, math.ceil((self.env.now - begun_s) / step_s - 1e-9))
        rest_s = begun_s + num_done * step_s - self.env.now
        yield from self._pass(num_done, max(0.0, rest_s))
        self.busy_s += max(0.0, num_done * step_s - max(0.0, rest_s))

    def _pass(self, num_steps: int, seconds: float) -> Process:
        yield self.env.timeout(seconds)
        self.steps += num_steps
        self.busy_s += seconds

    def _end_what_is_done(self) -> None:
        while self.running and self.running[0][0] <= self.steps:
            _, _, job = heappop(self.running)
            self.num_tokens -= job.prompt_tokens + job.num_output
            job.ended_s = self.env.now
            job.ended(job)


class _Fleet:
    """The router in front of its replicas."""

    def __init__(self, env: simpy.Environment, curve: ServiceCurve, num_replicas: int, rng: Random) -> None:
        self.engines = [_Engine(env, curve) for _ in range(num_replicas)]
        for engine in self.engines:
            env.process(engine.run())
        self._loads = [ReplicaLoad(_record(index, curve)) for index in range(num_replicas)]
        for load in self._loads:
            load.resize(load.record, None, high_reserve=0.0)
        self._queue: deque[SimulatedPage] = deque()
        self._rng = rng

    def arrive(self, job: SimulatedPage) -> None:
        self._queue.append(job)
        self._give_out()

    def leave(self, job: SimulatedPage) -> None:
        self._loads[job.replica].add(-job.work, -1)
        self._give_out()

    def busy(self, now_s: float) -> float:
        """Return the fraction of the time so far in which engines were busy."""
        return sum(engine.busy_s for engine in self.engines) / now_s / len(self.engines) if now_s else 0.0

    def _give_out(self) -> None:
        while self._queue:
            load = choose(self._loads, Need(self._queue[0].work), (), self._rng)
            if load is None:
                return
            job = self._queue.popleft()
            job.replica = int(load.replica_id)
            load.add(job.work, 1)
            self.engines[job.replica].submit(job)


def _record(index: int, curve: ServiceCurve) -> ReplicaRecord:
    return ReplicaRecord(str(index), "m", "http://x", ReplicaState.READY, curve.max_seqs, curve.kv_tokens)


@dataclass(frozen=True, slots=True)
class SimulatedOutcome:
    """What clients observed. Times in seconds from the request to the last byte; rates while the load was steady."""

    p50_s: float
    p95_s: float
    p99_s: float
    mean_s: float
    first_p95_s: float
    """Time to the first token."""
    pages_per_s: float
    tokens_per_s: float
    busy: float
    """Part of the time in which an engine had something to do."""


@dataclass(frozen=True, slots=True)
class SimulatedRun:
    """A load from its first request to its last answer."""

    jobs: Sequence[SimulatedPage]
    """The pages in the order of arrival."""
    overhead_s: float
    """Overhead per page, which is not included in their times."""
    took_s: float
    busy: float
    """Part of the time in which an engine had something to do."""

    @property
    def times_s(self) -> list[float]:
        """Return the time of each page as its client observed it."""
        return [job.ended_s - job.arrived_s + self.overhead_s for job in self.jobs]


def simulate_open(
    curve: ServiceCurve, pages: Pages, *, num_replicas: int, pages_per_s: float, num_pages: int, seed: int = 1
) -> SimulatedOutcome:
    """Simulate an open loop: pages arrive at random (Poisson), regardless of the stack's state.

    The same seed gives the same pages with the same gaps, scaled, at every rate, so that rates can be compared.
    """
    rng = Random(seed)
    trace = [(rng.expovariate(1.0) / pages_per_s, pages.draw(rng)) for _ in range(num_pages)]
    return _measure(run_trace(curve, pages, trace, num_replicas=num_replicas, seed=seed))


def run_trace(
    curve: ServiceCurve, pages: Pages, trace: Iterable[tuple[float, int]], *, num_replicas: int, seed: int = 1
) -> SimulatedRun:
    """Simulate pages with these gaps, in seconds since the previous page, and these answer lengths."""
    env = simpy.Environment()
    fleet, jobs = _Fleet(env, curve, num_replicas, Random(seed)), list[SimulatedPage]()

    def come() -> Process:
        for gap_s, num_output in trace:
            yield env.timeout(gap_s)
            job = SimulatedPage(pages.prompt_tokens, num_output, pages.expected_work, env.now, fleet.leave)
            jobs.append(job)
            fleet.arrive(job)

    env.process(come())
    env.run()
    return SimulatedRun(jobs, curve.overhead_s, env.now + curve.overhead_s, fleet.busy(env.now))


def simulate_closed(
    curve: ServiceCurve, pages: Pages, *, num_replicas: int, num_clients: int, num_pages: int, seed: int = 1
) -> SimulatedOutcome:
    """Simulate a closed loop: each client sends its next request after its answer."""
    rng = Random(seed)
    lengths = [pages.draw(rng) for _ in range(num_pages)]
    return _measure(run_closed(curve, pages, lengths, num_replicas=num_replicas, num_clients=num_clients, seed=seed))


def run_closed(
    curve: ServiceCurve, pages: Pages, lengths: Iterable[int], *, num_replicas: int, num_clients: int, seed: int = 1
) -> SimulatedRun:
    """Simulate a closed loop with these answer lengths."""
    env = simpy.Environment()
    fleet, jobs = _Fleet(env, curve, num_replicas, Random(seed)), list[SimulatedPage]()
    left = iter(lengths)

    def ask_on() -> Process:
        for num_output in left:
            answered = env.event()

            def end(job: SimulatedPage, answered: simpy.Event = answered) -> None:
                fleet.leave(job)
                answered.succeed()

            job = SimulatedPage(pages.prompt_tokens, num_output, pages.expected_work, env.now, end)
            jobs.append(job)
            yield env.timeout(curve.overhead_s)
            fleet.arrive(job)
            yield answered

    for _ in range(num_clients):
        env.process(ask_on())
    env.run()
    return SimulatedRun(jobs, 0.0, env.now, fleet.busy(env.now))


def _measure(run: SimulatedRun) -> SimulatedOutcome:
    """Summarise the pages in the middle of a run."""
    num_jobs = len(run.jobs)
    begin, end = int(num_jobs * _WARM_UP), max(int(num_jobs * _WARM_UP) + 1, int(num_jobs * _COOL_DOWN))
    times = sorted(run.times_s[begin:end])
    firsts = sorted(job.first_s - job.arrived_s + run.overhead_s for job in run.jobs[begin:end])
    by_end = sorted(run.jobs, key=lambda job: job.ended_s)[begin:end]
    took_s = by_end[-1].ended_s - by_end[0].ended_s
    return SimulatedOutcome(
        p50_s=percentile(times, 0.50),
        p95_s=percentile(times, 0.95),
        p99_s=percentile(times, 0.99),
        mean_s=sum(times) / len(times),
        first_p95_s=percentile(firsts, 0.95),
        pages_per_s=(len(by_end) - 1) / took_s if took_s else 0.0,
        tokens_per_s=sum(job.num_output for job in by_end[1:]) / took_s if took_s else 0.0,
        busy=run.busy,
    )


def percentile(ordered: Sequence[float], part: float) -> float:
    """Return a quantile of sorted values, interpolated between two of them."""
    place = part * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def iterate_rates(low: float, high: float, is_good: Callable[[float], bool], rounds: int) -> Iterator[float]:
    """Bisect, and yield after each round the highest rate known to be good, or 0.0. `low` itself is not tried."""
    best = 0.0
    for _ in range(rounds):
        middle = (low + high) / 2
        if is_good(middle):
            best = low = middle
        else:
            high = middle
        yield best
