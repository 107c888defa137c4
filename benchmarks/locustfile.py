"""Realistic users for Locust, in an open loop: `locust -f benchmarks/locustfile.py --host http://127.0.0.1:8000`.

    --arrivals constant|poisson|burst|daily  --rate 1  --seconds 60     when users come, how many a second, how long
    --headless --html report.html --summary summary.json                files of a run without the web page
    --processes 4, or --master / --worker                               several processes, or machines

A user of Locust's is a source here: one for each process, which lets visitors in by the schedule and never waits for
them. Each visitor reads a page or more and thinks in between (`load/people.py`). What they saw is counted here, and put
together by the master: time to first token, between tokens, tokens, pages, cost, refusals apart from errors.
"""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from random import Random
from typing import Any

import gevent
from gevent.pool import Pool
from locust import LoadTestShape, User, events, task
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Locust runs this file from anywhere

from benchmarks.load.arrivals import Shape, schedule, share
from benchmarks.load.bodies import NUM_PAGES, build_body, build_page
from benchmarks.load.people import Habits, plan_visit
from benchmarks.load.tally import Answer, Outcome, Tally
from benchmarks.load.visit import PagesClient

_GRACE_S = 60.0
"""How long visits that run at the end may go on."""


class Crowd:
    """What this process lets in and counts; in a master, what all of them did."""

    def __init__(self) -> None:
        self.num_workers = 1
        self.reset()

    def reset(self) -> None:
        """For another run: a web page may start one after the other. How many workers there are was told before."""
        self.tally = Tally()
        self.visits = Pool()
        self.running: dict[str, int] = {}
        """Visits under way, as each worker told last; -1 before its schedule was over."""
        self.began_s = 0.0
        self.is_over = False
        """Whether the schedule of this process has ended."""

    def count(self) -> int:
        return len(self.visits) if self.is_over else -1


crowd = Crowd()
if "--master" not in sys.argv:
    # Rendered before this process is heard of, and before it is forked: a worker that renders sends no heartbeats.
    for page in range(NUM_PAGES):
        build_page(page)


@events.init_command_line_parser.add_listener
def add_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("open loop")
    group.add_argument("--arrivals", choices=list(Shape), default=Shape.POISSON, help="When visitors come.")
    group.add_argument("--rate", type=float, default=1.0, help="Visitors per second, mean, of all processes together.")
    group.add_argument("--seconds", type=float, default=60.0, help="How long visitors come.")
    group.add_argument("--seed", type=int, default=1, help="Of the schedule and of what visitors do.")
    group.add_argument("--model", default="nano", help="What requests ask for.")
    group.add_argument("--pages-per-visit", type=float, default=2.0, help="Mean; at least 1.")
    group.add_argument("--think-time", type=float, default=1.0, help="Mean seconds between a visitor's pages.")
    group.add_argument("--summary", default="", help="File for the summary, as JSON.")


@events.init.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    """Workers are told how many they are before they are told to start."""
    if isinstance(environment.runner, WorkerRunner):
        environment.runner.register_message("crowd", _join_crowd)


def _join_crowd(environment: Environment, msg: Any, **_: Any) -> None:
    crowd.num_workers = int(msg.data["workers"])


@events.test_start.add_listener
def begin(environment: Environment, **_: Any) -> None:
    crowd.reset()
    crowd.began_s = time.perf_counter()
    if isinstance(environment.runner, MasterRunner):
        crowd.num_workers = environment.runner.worker_count
        environment.runner.send_message("crowd", {"workers": crowd.num_workers})


@events.report_to_master.add_listener
def report(client_id: str, data: dict[str, Any]) -> None:
    data["crowd"] = {"tally": crowd.tally.dump(), "running": crowd.count()}
    crowd.tally = Tally()


@events.worker_report.add_listener
def gather(client_id: str, data: dict[str, Any]) -> None:
    if "crowd" in data:
        crowd.tally.merge(data["crowd"]["tally"])
        crowd.running[client_id] = data["crowd"]["running"]


class Source(User):
    """Lets visitors in by the schedule; one for each process."""

    def on_start(self) -> None:
        self.options = self.environment.parsed_options
        self.client = PagesClient(self.environment.host or self.host or "", os.environ.get("SERVING_API_KEY", ""))

    @task
    def let_in(self) -> None:
        options, runner = self.options, self.environment.runner
        index = getattr(runner, "worker_index", 0) if isinstance(runner, WorkerRunner) else 0
        began_s = time.perf_counter()
        times = schedule(Shape(options.arrivals), options.rate, options.seconds, options.seed)
        for number, at_s in enumerate(share(times, index, crowd.num_workers)):
            gevent.sleep(max(0.0, began_s + at_s - time.perf_counter()))
            crowd.tally.arrive(max(0.0, time.perf_counter() - began_s - at_s))
            crowd.visits.spawn(self.visit, Random(f"{options.seed} {index} {number}"))
        crowd.is_over = True
        gevent.sleep(_GRACE_S + options.seconds)  # until the shape ends the run

    def visit(self, random: Random) -> None:
        """One visitor, until done or refused."""
        options = self.options
        for step in plan_visit(Habits(options.pages_per_visit, options.think_time), random):
            gevent.sleep(step.think_s)
            answer = self.client.ask(build_body(options.model, step), step)
            crowd.tally.add(answer)
            self.tell_locust(answer)
            if answer.outcome is not Outcome.COMPLETE:
                return

    def tell_locust(self, answer: Answer) -> None:
        """For its own statistics, page and HTML: refusals are lines of their own and no failures."""
        fire = self.environment.events.request.fire
        is_refused, is_error = answer.outcome is Outcome.REFUSED, answer.outcome is Outcome.ERROR
        kind, name = ("REFUSED", answer.reason) if is_refused else ("POST", f"{answer.manner}, to the end")
        if answer.outcome is Outcome.LEFT:
            name = f"{answer.manner}, left in the middle"
        error = RuntimeError(answer.reason) if is_error else None
        common = {"response_length": answer.num_tokens, "context": {}}
        fire(request_type=kind, name=name, response_time=1e3 * answer.whole_s, exception=error, **common)
        if answer.first_s is not None:
            fire(request_type="SSE", name="first token", response_time=1e3 * answer.first_s, exception=None, **common)
        if answer.gaps_s:
            mean_ms = 1e3 * sum(answer.gaps_s) / len(answer.gaps_s)
            fire(request_type="SSE", name="between tokens, mean", response_time=mean_ms, exception=None, **common)


class OpenLoop(LoadTestShape):
    """A source in every process until the schedule and the visits that it began are over."""

    use_common_options = False

    def tick(self) -> tuple[int, float] | None:
        options = self.runner.environment.parsed_options
        at_s = self.get_run_time()
        if at_s > options.seconds + _GRACE_S:
            return None
        if at_s > options.seconds:
            running = crowd.running.values() if isinstance(self.runner, MasterRunner) else [crowd.count()]
            if all(number == 0 for number in running):
                return None
        sources = max(1, self.runner.worker_count) if isinstance(self.runner, MasterRunner) else 1
        return sources, sources


@events.quitting.add_listener
def write_summary(environment: Environment, **_: Any) -> None:
    """What `make load` prints."""
    if isinstance(environment.runner, WorkerRunner) or not crowd.began_s:
        return
    options = environment.parsed_options
    took_s = max(1e-9, time.perf_counter() - crowd.began_s)
    run = {
        "arrivals": str(options.arrivals),
        "rate": options.rate,
        "seconds": options.seconds,
        "host": environment.host,
    }
    summary = {**run, "processes": crowd.num_workers, "cores": os.cpu_count(), **crowd.tally.summarize(took_s)}
    if options.summary:
        Path(options.summary).write_text(json.dumps(summary, indent=1) + "\n")
    if crowd.tally.errors:
        environment.process_exit_code = 1
